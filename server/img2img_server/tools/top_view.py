"""The screen of `img2img top`: draws a snapshot as rich tables."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from img2img_server.telemetry.logs import escape
from img2img_server.tools.top_metrics import ModelView, Snapshot

_NOTHING = "-"
_STATES = {"ready": "green", "loading": "yellow", "failed": "red"}


def draw(snapshot: Snapshot, problem: str = "") -> RenderableType:
    """The whole screen. `problem` is the error of the last reading, if any."""
    parts: list[RenderableType] = [_head(snapshot), Text(), _summary(snapshot), Text(), _models(snapshot.models)]
    parts += [Text(), _stages(snapshot.models)]
    if problem:
        parts[1:1] = [_text(problem, "red")]
    return Group(*parts)


def _head(snapshot: Snapshot) -> Text:
    up = "" if snapshot.uptime is None else f", up {_duration(snapshot.uptime)}"
    return _text(f"img2img {snapshot.version} at {snapshot.url}{up}, last {snapshot.seconds:.0f} s", "bold")


def _summary(snapshot: Snapshot) -> Table:
    work = snapshot.work_seconds
    hits = _NOTHING if snapshot.cache_hits is None else f"{snapshot.cache_hits:.0%}"
    rates = [f"{status} {rate:.1f}" for status, rate in sorted(snapshot.requests_per_second.items(), key=_ok_first)]
    lines = {
        "requests/s": "  ".join(rates) or _NOTHING,
        "engine": f"{snapshot.active:.0f} active, {snapshot.waiting:.0f} waiting, about "
        f"{_NOTHING if work is None else f'{work:.1f}'} s of work, {snapshot.call_seconds:.1f} s in the current call",
        "cache": f"{hits} hits, {_of(snapshot.cache_bytes, snapshot.cache_budget)}",
        "assets": _of(snapshot.assets_bytes, snapshot.assets_quota),
        "memory": f"{_size(snapshot.memory)}, {snapshot.cpus:.1f} CPUs busy",
    }
    if snapshot.device_free is not None and snapshot.device_total is not None:
        lines["GPU memory"] = _of(snapshot.device_total - snapshot.device_free, snapshot.device_total)
    table = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        table.add_row(_text(name, "bold"), _text(line))
    return table


def _models(models: tuple[ModelView, ...]) -> Table:
    table = _table("model", "state", "engine", "memory", "images/s", "step ms", "rows", "requests", names=3)
    for model in models:
        table.add_row(
            _text(model.id),
            _text(model.state, _STATES.get(model.state, "")),
            _text(model.engine or _NOTHING),
            _size(model.memory) if model.memory else _NOTHING,
            f"{model.pictures_per_second:.1f}",
            _mean(model.step_seconds, 1e3, 1),
            _mean(model.rows, 1, 1),
            _mean(model.requests, 1, 1),
        )
    return table


def _stages(models: tuple[ModelView, ...]) -> Table:
    stages = list(dict.fromkeys(stage for model in models for stage in model.stages))
    table = _table("transforms", *(f"{stage} s" for stage in stages), names=1)
    for model in models:
        table.add_row(_text(model.id), *(_mean(model.stages.get(stage), 1, 2) for stage in stages))
    return table


def _table(*headings: str, names: int) -> Table:
    """A table without borders. All columns after the first `names` contain numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < names else "right", overflow="fold", no_wrap=number >= names)
    return table


def _text(text: str, style: str = "") -> Text:
    """Text with control characters escaped, since a server may send any names."""
    return Text(escape(text), style=style)


def _ok_first(item: tuple[str, float]) -> tuple[bool, str]:
    return item[0] != "OK", item[0]


def _mean(value: float | None, scale: float, digits: int) -> str:
    return _NOTHING if value is None else f"{value * scale:.{digits}f}"


def _of(held: float | None, most: float | None) -> str:
    return _NOTHING if held is None or most is None else f"{_size(held)} of {_size(most)}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"
