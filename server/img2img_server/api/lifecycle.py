"""The lifecycle of the server's process: a first signal drains it; a second signal or a stuck engine ends it at once.

Exit statuses: 0 after a drain, 130 or 143 if SIGINT or SIGTERM ended it before it was drained, 70 (sysexits.h: EX_SOFTWARE) if
the engine was stuck.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from img2img_server.api.server import Server

_log = logging.getLogger(__name__)

STUCK = os.EX_SOFTWARE
_ANSWERING = 2.0
"""Maximum seconds to send errors to waiting callers before an immediate exit."""
_FORCED_EXIT = 4.0
"""Seconds after which an immediate exit is forced, even if the event loop is blocked or a lock is held."""
_AFTER_GRACE = 4.5
"""Seconds after `--grace` at which a drain is ended by force: neither clients nor storage can delay the exit further."""


async def live(server: Server) -> int:
    """Starts `server`, serves, and drains it at the first SIGTERM or SIGINT. Returns 0.

    The process ends within the grace period plus 5 s, whatever its clients do. A second signal, a signal during startup or a
    stuck engine ends it at once, by os._exit, because Python would wait for threads inside a model call. Raises the exceptions
    of `server.start`.
    """
    with _signals() as signals:
        first = asyncio.ensure_future(signals.get())
        starting = asyncio.ensure_future(server.start())
        await asyncio.wait({starting, first}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            _log.warning("%s: stopping before startup finished", first.result().name)
            await _end(server, 128 + first.result())
        if starting.exception() is not None:
            await server.stop()
        starting.result()
        stuck = asyncio.ensure_future(server.failed())
        await asyncio.wait({first, stuck}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            await _end_stuck(server)
        _log.info("draining")
        forced = _ForcedExit(server.grace + _AFTER_GRACE, 128 + first.result())
        second = asyncio.ensure_future(signals.get())
        draining = asyncio.ensure_future(server.stop())
        await asyncio.wait({draining, second, stuck}, return_when=asyncio.FIRST_COMPLETED)
        if draining.done() and not server.stuck:
            draining.result()
            forced.status = 0
            return 0
        if not second.done():
            await _end_stuck(server)
        _log.warning("%s: stopping at once, without waiting for running requests", second.result().name)
        await _end(server, 128 + second.result())


class _ForcedExit:
    """Ends the process with `status` after `seconds`, even if the event loop is blocked or the interpreter waits for a thread.
    Does not log, because a lock of the log may be held."""

    def __init__(self, seconds: float, status: int) -> None:
        self.status = status
        timer = threading.Timer(seconds, lambda: os._exit(self.status))
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """A queue of the SIGTERM and SIGINT signals received within the block. Afterwards they have their default effect."""
    numbers, loop = (signal.SIGTERM, signal.SIGINT), asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in numbers:
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        yield signals
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _end_stuck(server: Server) -> NoReturn:
    """Logs the stack of every thread and ends the process."""
    _log.critical("the engine is stuck: the server exits with status %d", STUCK)
    faulthandler.dump_traceback(sys.stderr)
    await _end(server, STUCK)


async def _end(server: Server, status: int) -> NoReturn:
    """Sends ShuttingDown to waiting callers and ends the process without waiting for its threads."""
    _ForcedExit(_FORCED_EXIT, status)
    try:
        await asyncio.wait_for(server.stop_now(), _ANSWERING)
    except Exception:  # noqa: BLE001 - the process ends in any case
        _log.exception("not all clients were notified")
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
