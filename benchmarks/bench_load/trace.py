"""Reads the trace of `img2img serve --trace` (Chrome trace events): batch sizes and idle time of the device."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_CALLS = ("prepare", "denoise", "preview", "finish")
"""Calls that run a model. "advance" (the scheduler step) does not."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the engine. Times are on the trace's clock in seconds; `rows` are those of a call of the denoiser."""

    name: str
    start: float
    seconds: float
    requests: int
    rows: int

    @property
    def end(self) -> float:
        """The end time."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Trace:
    """A server's calls in order of their start, and the counters of its caches."""

    calls: tuple[Call, ...]
    caches: dict[str, Any]


def read_trace(path: Path) -> Trace:
    """The trace in a file: an array of events, or an object with the key traceEvents."""
    loaded = json.loads(path.read_text(encoding="utf-8"))
    events = loaded["traceEvents"] if isinstance(loaded, dict) else loaded
    calls = [
        Call(event["name"], event["ts"] / 1e6, event["dur"] / 1e6, _count(event, "requests"), _count(event, "rows"))
        for event in events
        if event.get("ph") == "X"
    ]
    caches: dict[str, Any] = next((event.get("args", {}) for event in events if event.get("name") == "caches"), {})
    return Trace(tuple(sorted(calls, key=lambda call: call.start)), caches)


def last_part(calls: Sequence[Call], gap: float) -> list[Call]:
    """The calls after the last pause of at least `gap` seconds."""
    first = 0
    reached = calls[0].end if calls else 0.0
    for index, call in enumerate(calls):
        if call.start - reached >= gap:
            first = index
        reached = max(reached, call.end)
    return list(calls[first:])


def histogram(calls: Iterable[Call], of: str) -> dict[int, int]:
    """Number of denoise calls by their "rows" or "requests"."""
    counted = Counter(call.rows if of == "rows" else call.requests for call in calls if call.name == "denoise")
    return dict(sorted(counted.items()))


def idle_share(calls: Sequence[Call]) -> float:
    """The share of the time from the first denoise call to the last in which no call ran a model, 0 to 1."""
    denoise = [call for call in calls if call.name == "denoise"]
    if not denoise:
        return 0.0
    start, end = min(call.start for call in denoise), max(call.end for call in denoise)
    busy = 0.0
    reached = start
    for call in sorted(calls, key=lambda call: call.start):
        if call.name in DEVICE_CALLS and call.end > reached and call.start < end:
            busy += min(call.end, end) - max(call.start, reached)
            reached = min(call.end, end)
    return 1 - busy / (end - start) if end > start else 0.0


def _count(event: dict[str, Any], name: str) -> int:
    value = event.get("args", {}).get(name, 0)
    return len(value) if isinstance(value, list) else int(value)
