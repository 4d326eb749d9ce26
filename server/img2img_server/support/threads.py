"""Work on a thread of its own, which nothing waits for at the end of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

_R = TypeVar("_R")


async def in_thread(work: Callable[[], _R]) -> _R:
    """What `work` returns or raises, on a daemon thread: loading a model cannot be stopped, and may never end."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_R] = loop.create_future()

    def settle(value: _R | None, error: BaseException | None) -> None:
        if outcome.done():  # nobody waits any more
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(cast(_R, value))

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as caught:  # noqa: BLE001 - it is raised where the work is waited for
            error = caught
        except BaseException as caught:  # noqa: BLE001 - such as a panic of a library in Rust, which is no Exception
            error = Panic(f"{type(caught).__name__}: {caught}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="img2img-loading", daemon=True).start()
    return await outcome


class Panic(RuntimeError):
    """Stands for a BaseException of a library: raised on the event loop, that would end the process."""
