"""`img2img top`: shows a server's activity in a terminal. top_metrics.py reads its metrics, top_view.py draws them."""

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

from img2img_server.tools.top_metrics import History, MetricsError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PROGRAM = "img2img top"

_WIDTH_OF_A_PIPE = 200

_EPILOG = """\
The server must be started with a metrics port:
  img2img serve --models models --metrics-port 9464

examples:
  img2img top                                   the server on this machine, until q or Ctrl-C
  img2img top http://gpu-box:9464/metrics       another server
  img2img top --once                            print once, from two readings a second apart
  img2img top --once --json | jq .work_seconds  for scripts

requests/s: calls by gRPC status. engine: active and waiting requests, and their estimated remaining work in seconds. rows:
samples in a step's batch, two for an image with guidance. step: duration of one denoising call. Stages: mean durations of
finished transforms. Rates and means cover the last --window seconds; "-" means no data.

Exit status: 0 success, 1 no metrics at the address, 2 wrong arguments.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("url", nargs="?", default="http://127.0.0.1:9464/metrics", metavar="URL", help="metrics address (default: %(default)s)")
    add("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="time between two readings (default: %(default)g)")
    add("--window", type=_seconds, default=10.0, metavar="SECONDS", help="period of rates and means (default: %(default)g)")
    add("--once", action="store_true", help="print once and exit")
    add(
        "--json", action="store_true", help="print one JSON object per line; numbers are in seconds and bytes, null means no data"
    )


def run(arguments: argparse.Namespace) -> int:
    """Shows the metrics until the user quits. Returns 0, or 1 if the first reading fails."""
    history = History(arguments.url, arguments.window)
    try:
        history.read()
        if arguments.once:
            time.sleep(arguments.interval)  # rates need two readings
            history.read()
            _show_once(history, arguments.json)
        else:
            _show_on(history, arguments.interval, arguments.json)
    except MetricsError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _show_once(history: History, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(asdict(history.snapshot())), flush=True)
    else:
        from img2img_server.tools.top_view import draw

        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
        console.print(draw(history.snapshot()))


def _show_on(history: History, interval: float, as_json: bool) -> None:
    """Updates the display after each reading, until the user quits. Retries while the server does not respond."""
    from rich.console import Console

    from img2img_server.tools.top_view import draw

    console = Console(highlight=False)
    plain = as_json or not console.is_terminal or console.is_dumb_terminal
    problem = ""
    with _quitting() as quit_within, _nothing() if plain else _live(history, console) as live:
        while not quit_within(interval):
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


def _live(history: History, console: "Console") -> "Live":
    from rich.live import Live

    from img2img_server.tools.top_view import draw

    return Live(draw(history.snapshot()), console=console, screen=True, auto_refresh=False)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextlib.contextmanager
def _quitting() -> Iterator[Callable[[float], bool]]:
    """Yields a function that waits for a number of seconds. It returns True at once if the user presses q or Ctrl-C, else False.

    Ctrl-C is handled as a signal that ends the wait, because an exception could interrupt drawing.
    """
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    former = signal.set_wakeup_fd(wake.fileno())
    try:
        with _raw_keys() as keys:

            def quit_within(seconds: float) -> bool:
                end = time.monotonic() + seconds
                while (left := end - time.monotonic()) > 0:
                    ready = select.select([woken.fileno(), *keys], [], [], left)[0]
                    if woken.fileno() in ready or (ready and os.read(ready[0], 1) in (b"q", b"Q", b"")):
                        return True
                return False

            yield quit_within
    finally:
        signal.set_wakeup_fd(former)
        signal.signal(signal.SIGINT, before)
        woken.close()
        wake.close()


@contextlib.contextmanager
def _raw_keys() -> Iterator[list[int]]:
    """The descriptor of standard input in unbuffered mode, if it is a terminal."""
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
