"""`img2img top`: what a server is doing, now, in a terminal."""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from img2img_server.tools.top.reading import History

PROGRAM = "img2img top"

_WIDTH_OF_A_PIPE = 200

_EPILOG = """\
A server tells its metrics only where it is told to:
  img2img serve --models models --metrics-port 9464

examples:
  img2img top                                   the server on this machine, until q or Ctrl-C
  img2img top http://gpu-box:9464/metrics       another one
  img2img top --once                            one look, two readings a second apart
  img2img top --once --json | jq .work_seconds  for a script

requests/s are calls by their gRPC status. active, waiting: requests in the engine, and the estimated seconds of work that is
left of them. rows: samples in a step's batch, two for a guided picture. step: what a call of the denoiser takes. Stages are means
of the transforms that were finished. Rates and means are of the last --window seconds; "-" is where there was nothing.

Exit status: 0 done, 1 no server or no metrics there, 2 wrong arguments.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("url", nargs="?", default="http://127.0.0.1:9464/metrics", metavar="URL", help="of the metrics (default: %(default)s)")
    add("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two readings (default: %(default)g)")
    add("--window", type=_seconds, default=10.0, metavar="SECONDS", help="that rates and means are of (default: %(default)g)")
    add("--once", action="store_true", help="show it once and end")
    add("--json", action="store_true", help="an object a line, all numbers in seconds and bytes; null: there was nothing")


def run(arguments: argparse.Namespace) -> int:
    """Shows until it is told to end. Returns 0, or 1 where nothing can be read at first."""
    from img2img_server.tools.top.reading import History, MetricsError

    history = History(arguments.url, arguments.window)
    try:
        history.read()
        if arguments.once:
            time.sleep(arguments.interval)  # rates want two readings
            history.read()
            _show_once(history, arguments.json)
        else:
            _show_on(history, arguments.interval, arguments.json)
    except MetricsError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _show_once(history: "History", as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(asdict(history.snapshot())), flush=True)
    else:
        from img2img_server.tools.top.view import draw

        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
        console.print(draw(history.snapshot()))


def _show_on(history: "History", interval: float, as_json: bool) -> None:
    """Shows it anew after each reading, until it is told to end. A server that does not answer meanwhile is waited for."""
    from rich.console import Console

    from img2img_server.tools.top.reading import MetricsError
    from img2img_server.tools.top.view import draw

    console = Console(highlight=False)
    plain = as_json or not console.is_terminal or console.is_dumb_terminal
    problem = ""
    with _ending() as told_to_end, _nothing() if plain else _live(history, console) as live:
        while not told_to_end(interval):
            try:
                history.read()
                problem = ""
            except MetricsError as error:
                problem = str(error)
            if live is not None:
                live.update(draw(history.snapshot(), problem), refresh=True)
            elif problem:
                print(f"{PROGRAM}: {problem}", file=sys.stderr)
            else:
                _show_once(history, as_json)


def _live(history: "History", console: "Console") -> "Live":
    from rich.live import Live

    from img2img_server.tools.top.view import draw

    return Live(draw(history.snapshot()), console=console, screen=True, auto_refresh=False)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextlib.contextmanager
def _ending() -> Iterator[Callable[[float], bool]]:
    """Gives a function that waits so many seconds, and returns True, and early, on a q or Ctrl-C.

    Ctrl-C is taken as a signal that wakes the wait: an exception could come up anywhere, in the middle of drawing even.
    """
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    former = signal.set_wakeup_fd(wake.fileno())
    try:
        with _raw_keys() as keys:

            def told_to_end(seconds: float) -> bool:
                end = time.monotonic() + seconds
                while (left := end - time.monotonic()) > 0:
                    ready = select.select([woken.fileno(), *keys], [], [], left)[0]
                    if woken.fileno() in ready or (ready and os.read(ready[0], 1) in (b"q", b"Q", b"")):
                        return True
                return False

            yield told_to_end
    finally:
        signal.set_wakeup_fd(former)
        signal.signal(signal.SIGINT, before)
        woken.close()
        wake.close()


@contextlib.contextmanager
def _raw_keys() -> Iterator[list[int]]:
    """Where keys can be read, each as it is typed: standard input, if that is a terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield [sys.stdin.fileno()]
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not in 0.05 to 3600 seconds")
    return value
