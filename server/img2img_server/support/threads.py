"""Work on a daemon thread, which does not delay the end of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

_R = TypeVar("_R")


async def in_thread(work: Callable[[], _R]) -> _R:
    """Runs `work` on a daemon thread and returns its result or raises its error. For work that cannot be cancelled and may hang,
    such as loading a model."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_R] = loop.create_future()

    def settle(value: _R | None, error: BaseException | None) -> None:
        if outcome.done():  # the caller was cancelled
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(cast(_R, value))

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as caught:  # noqa: BLE001 - raised in the awaiting task
            error = caught
        except BaseException as caught:  # noqa: BLE001 - such as a panic of a Rust library, which is not an Exception
            error = Panic(f"{type(caught).__name__}: {caught}")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="img2img-loading", daemon=True).start()
    return await outcome


class Panic(RuntimeError):
    """Replaces a library's BaseException, which would end the process if raised on the event loop."""
