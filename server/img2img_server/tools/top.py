"""`img2img top`: shows in a terminal what a server is doing, from two readings of its metrics. top_view.py draws it."""

import argparse
import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

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


_TIMEOUT = 5.0
_MOST_BYTES = 16 * 2**20
"""Maximum bytes of a response. A server with a hundred models sends about 1 MB."""
_STAGES = ("queue", "encode", "denoise", "decode", "total")
"""Stages of a transform, in order."""

Labels = frozenset[tuple[str, str]]
Samples = dict[str, dict[Labels, float]]
"""Values by name and labels."""


class MetricsError(Exception):
    """The metrics cannot be read. The message is for the user."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model: its state, its engine, its memory in bytes, and its activity in the window.

    `step_seconds` is the mean duration of a denoising call, `rows` and `requests` are the means of its batch, and `stages` the
    mean seconds of finished transforms; None without data.
    """

    id: str
    state: str
    engine: str
    memory: float
    pictures_per_second: float
    step_seconds: float | None
    rows: float | None
    requests: float | None
    stages: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A server's state: rates and means over `seconds`, other values at their end.

    `requests_per_second` is by gRPC status. `work_seconds` is the estimated remaining work, `cache_hits` the hit rate, `cpus` the
    number of busy CPUs. Sizes are in bytes. None means unknown.
    """

    url: str
    version: str
    uptime: float | None
    seconds: float
    requests_per_second: dict[str, float]
    active: float
    waiting: float
    work_seconds: float | None
    call_seconds: float
    cache_hits: float | None
    cache_bytes: float | None
    cache_budget: float | None
    assets_bytes: float
    assets_quota: float
    memory: float
    cpus: float
    device_free: float | None
    device_total: float | None
    models: tuple[ModelView, ...]


class History:
    """The readings of the last `window` seconds from the metrics at `url`."""

    def __init__(self, url: str, window: float) -> None:
        self.url = _complete(url)
        self._window = window
        self._readings: deque[tuple[float, Samples]] = deque()

    def read(self) -> None:
        """Adds a reading. Raises MetricsError."""
        samples = parse(_fetch(self.url), self.url)
        start = "process_start_time_seconds"
        if self._readings and _one(samples, start) != _one(self._readings[-1][1], start):
            self._readings.clear()  # the server was restarted, and its counters with it
        now = time.monotonic()
        self._readings.append((now, samples))
        while len(self._readings) > 2 and self._readings[1][0] < now - self._window:
            self._readings.popleft()

    def snapshot(self) -> Snapshot:
        """The state by the readings, of which there must be at least one."""
        (begun, before), (ended, now) = self._readings[0], self._readings[-1]
        return compare(self.url, before, now, ended - begun)


def parse(text: str, url: str) -> Samples:
    """Parses the metrics served at `url`. Raises MetricsError if they are not those of img2img."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: Samples = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    except ValueError:
        samples = {}
    if "img2img_build_info" not in samples:
        raise MetricsError(f"{url} does not serve metrics of img2img")
    return samples


def compare(url: str, before: Samples, now: Samples, seconds: float) -> Snapshot:
    """The state between two readings that are `seconds` apart."""
    change = _Change(before, now, seconds)
    hits, misses = change.of("img2img_cache_hits_total"), change.of("img2img_cache_misses_total")
    start = _one(now, "process_start_time_seconds")
    return Snapshot(
        url=url,
        version=next((value for value in _values(now, "img2img_build_info", "version")), ""),
        uptime=None if start is None else max(0.0, time.time() - start),
        seconds=seconds,
        requests_per_second={
            status: change.rate("img2img_requests_total", status=status)
            for status in _values(now, "img2img_requests_total", "status")
        },
        active=_one(now, "img2img_engine_active_requests") or 0.0,
        waiting=_one(now, "img2img_engine_waiting_requests") or 0.0,
        work_seconds=_one(now, "img2img_engine_work_seconds"),
        call_seconds=_one(now, "img2img_engine_call_seconds") or 0.0,
        cache_hits=hits / (hits + misses) if hits + misses else None,
        cache_bytes=_one(now, "img2img_cache_bytes"),
        cache_budget=_one(now, "img2img_cache_budget_bytes"),
        assets_bytes=_one(now, "img2img_assets_bytes") or 0.0,
        assets_quota=_one(now, "img2img_assets_quota_bytes") or 0.0,
        memory=_one(now, "process_resident_memory_bytes") or 0.0,
        cpus=change.rate("process_cpu_seconds_total"),
        device_free=_one(now, "img2img_device_memory_free_bytes"),
        device_total=_one(now, "img2img_device_memory_total_bytes"),
        models=tuple(_model(now, change, model) for model in _values(now, "img2img_model_state", "model")),
    )


class _Change:
    """The increase of counters and histograms between two readings."""

    def __init__(self, before: Samples, now: Samples, seconds: float) -> None:
        self._before = before
        self._now = now
        self._seconds = seconds

    def of(self, name: str, **labels: str) -> float:
        return (_one(self._now, name, **labels) or 0.0) - (_one(self._before, name, **labels) or 0.0)

    def rate(self, name: str, **labels: str) -> float:
        return self.of(name, **labels) / self._seconds if self._seconds > 0 else 0.0

    def mean(self, name: str, **labels: str) -> float | None:
        count = self.of(f"{name}_count", **labels)
        return self.of(f"{name}_sum", **labels) / count if count else None


def _model(now: Samples, change: _Change, model: str) -> ModelView:
    states = now.get("img2img_model_state", {})
    state = next((dict(labels).get("state", "") for labels, on in states.items() if on and ("model", model) in labels), "")
    infos = [dict(labels) for labels in now.get("img2img_model_info", {}) if ("model", model) in labels]
    return ModelView(
        id=model,
        state=state,
        engine=infos[0].get("engine", "") if infos else "",
        memory=_one(now, "img2img_model_memory_bytes", model=model) or 0.0,
        pictures_per_second=change.rate("img2img_pictures_total", model=model),
        step_seconds=change.mean("img2img_device_call_duration_seconds", model=model, stage="denoise"),
        rows=change.mean("img2img_batch_rows", model=model),
        requests=change.mean("img2img_batch_requests", model=model),
        stages={stage: change.mean("img2img_transform_stage_duration_seconds", model=model, stage=stage) for stage in _STAGES},
    )


def _one(samples: Samples, name: str, **labels: str) -> float | None:
    """The sum of all samples with these labels, None if there are none or it is NaN."""
    values = [value for has, value in samples.get(name, {}).items() if labels.items() <= has]
    total = sum(values)
    return None if not values or math.isnan(total) else total


def _values(samples: Samples, name: str, label: str) -> list[str]:
    """The values of a label in the samples of `name`, sorted."""
    return sorted({value for labels in samples.get(name, {}) for has, value in labels if has == label})


def _complete(url: str) -> str:
    """The full URL of an address such as "localhost:9464"."""
    url = url if "://" in url else f"http://{url}"
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/metrics"


def _fetch(url: str) -> str:
    import http.client
    import urllib.error
    import urllib.request

    if urlsplit(url).scheme not in ("http", "https"):
        raise MetricsError(f"'{url}' is not an http address")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT) as response:
            text: str = response.read(_MOST_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise MetricsError(f"{url} responds with status {error.code}: no metrics there") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise MetricsError(
            f"no metrics at {url} ({why}): is the server running with --metrics-port? See `img2img top --help`"
        ) from None
    return text


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
