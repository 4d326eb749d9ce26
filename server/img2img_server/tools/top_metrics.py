"""The data of `img2img top`: reads a server's metrics over HTTP, and computes rates and means of a time window."""

import math
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

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
