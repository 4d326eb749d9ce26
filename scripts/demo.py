"""The Python part of scripts/demo: export, serve, transform one image, compare. Run it with `scripts/demo`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from img2img_client import Client, Completed, Img2ImgError, TransformResult
from img2img_client.progress import show_progress
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("demo/images/noon-lake.png")
BUNDLE = Path(".demo/models/demo")
PORT_FILE = Path(".demo/port")
LOG = Path(".demo/server.log")
AFTER = Path(".demo/after.png")
SHEET = Path(".demo/before-after.png")

SEED = 7
START_SECONDS = 180.0
STOP_SECONDS = 15.0
TRANSFORM_SECONDS = 180.0

_CONSOLE = Console(stderr=True, highlight=False)
_IMG2IMG = (sys.executable, "-m", "img2img_cli")


def main(started: float) -> int:
    """Runs the stages and prints their durations. `started` is the start of the setup, in seconds since the epoch."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    os.chdir(ROOT)
    seconds = {"setup": time.time() - started}
    AFTER.parent.mkdir(exist_ok=True)
    with _stage("export", seconds):
        export()
    with running_server(seconds) as target, _stage("transform", seconds):
        result = transform(target)
    result.save(AFTER)
    compare(result).save(SHEET)
    report(result, seconds | {"all": time.time() - started})
    return 0


def export() -> None:
    """Exports demo/model to a bundle, replacing one that is out of date."""
    command = [*_IMG2IMG, "export", "demo/model", "--output", str(BUNDLE), "--force"]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("demo: the export failed")


@contextmanager
def running_server(seconds: dict[str, float]) -> Iterator[str]:
    """Starts a server and yields its address; always stops the server at the end."""
    PORT_FILE.unlink(missing_ok=True)
    command = [*_IMG2IMG, "serve", "--models", str(BUNDLE.parent), "--port", "0", "--port-file", str(PORT_FILE)]
    with LOG.open("wb") as log:  # In its own session, so that Ctrl-C reaches only this script, which stops the server.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        with _stage("server start", seconds):
            port = _wait_for_port(server)
            _CONSOLE.print(f"serving on port {port}, process {server.pid}, log in {LOG}")
        yield f"127.0.0.1:{port}"
    finally:
        with _stage("server stop", seconds):
            _stop(server)


def _wait_for_port(server: "subprocess.Popen[bytes]") -> int:
    """Waits until the server is ready and returns its port. On failure, exits with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    with _waiting("loading the model") as show_seconds:
        while time.monotonic() < deadline:
            if PORT_FILE.exists():
                return int(PORT_FILE.read_text())
            if server.poll() is not None:
                sys.exit(f"demo: the server ended with status {server.returncode}:\n{_tail(LOG)}")
            show_seconds()
            time.sleep(0.05)
    sys.exit(f"demo: the server was not ready within {START_SECONDS:.0f} s:\n{_tail(LOG)}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Stops the server with SIGTERM, then SIGKILL. Ignores further Ctrl-C meanwhile."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _CONSOLE.print(f"the server did not stop within {STOP_SECONDS:.0f} s: killing it")
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def transform(target: str) -> TransformResult:
    """Transforms the image with default settings and a fixed seed, so that each run gives the same result."""
    with (
        Client(target, timeout=TRANSFORM_SECONDS) as client,
        client.transform_stream(SOURCE, seed=SEED) as events,
        show_progress(_CONSOLE) as show,
    ):
        for event in events:
            show(event)
            if isinstance(event, Completed):
                return event.result
    raise AssertionError("a stream ends with a Completed event or an error")


def compare(result: TransformResult) -> Image.Image:
    """A sheet with the image before and after, side by side, 384 pixels high, each with a label above it."""
    size, band, margin = 384, 36, 12
    with Image.open(SOURCE) as before, result.image as after:
        shown = [
            (image.convert("RGB").resize((image.width * size // image.height, size), Image.Resampling.LANCZOS), label)
            for image, label in ((before, f"before: {SOURCE.name}"), (after, "after: the server's default prompt"))
        ]
    sheet = Image.new("RGB", (margin + sum(image.width + margin for image, _ in shown), band + size + margin), "white")
    draw, left = ImageDraw.Draw(sheet), margin
    for image, label in shown:
        draw.text((left, band // 2), label, fill="black", font=ImageFont.load_default(18), anchor="lm")
        sheet.paste(image, (left, band))
        left += image.width + margin
    return sheet


def report(result: TransformResult, seconds: dict[str, float]) -> None:
    """Prints the result, the engine and the durations."""
    print(f"\n{AFTER}  {result.images[0].width} x {result.images[0].height}, seed {result.images[0].seed}\n{SHEET}\n")
    print(f"engine        {result.engine}")
    for name, value in seconds.items():
        print(f"{name:13} {value:6.2f} s")
        if name == "transform":
            for part, milliseconds in asdict(result.timings).items():
                print(f"  {part.removesuffix('_ms'):11} {milliseconds / 1000:6.2f} s")


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints a stage's name and records its duration."""
    _CONSOLE.print(f"[bold]{name}[/bold]")
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


@contextmanager
def _waiting(what: str) -> Iterator[Callable[[], None]]:
    """Yields a function that shows the elapsed time: on a terminal at each call, otherwise a line every 5 seconds."""
    started = time.monotonic()
    if _CONSOLE.is_terminal and not _CONSOLE.is_dumb_terminal:
        with _CONSOLE.status(what) as status:
            yield lambda: status.update(f"{what}, {time.monotonic() - started:.0f} s")
        return
    shown = 0.0

    def show_line() -> None:
        nonlocal shown
        if time.monotonic() - started >= shown + 5.0:
            shown += 5.0
            _CONSOLE.print(f"{what}, {shown:.0f} s")

    yield show_line


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    try:
        sys.exit(main(float(sys.argv[1])))
    except Img2ImgError as error:
        sys.exit(f"demo: {error}\n{_tail(LOG)}")
    except KeyboardInterrupt:
        sys.exit(130)
