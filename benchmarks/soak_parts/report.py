"""The report of a soak: JSON, and a table for docs/reliability.md."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from soak_parts.judging import STOP_SLACK, Growth, Times, percentile
from soak_parts.ledger import Ledger
from soak_parts.traffic import KINDS
from soak_parts.watching import Watch

_MEBI = 2**20


@dataclass(frozen=True, slots=True)
class Run:
    """The settings and the outcome of a run. `seconds` is the duration of the load; `capacity` and `rate` are per second."""

    seed: int
    model: str
    seconds: float
    capacity: float
    rate: float
    exit_status: int
    options: str


@dataclass(frozen=True, slots=True)
class Report:
    """All results of a run: `attacks` by kind and status, and one line for each violated guarantee in `broken`."""

    run: Run
    ledger: Ledger
    watch: Watch
    growth: Growth
    times: Times
    attacks: Mapping[str, Mapping[str, int]]
    broken: Sequence[str]

    def write(self, folder: Path) -> str:
        """Writes soak.json and soak.md into `folder`, and returns the table."""
        table = self._table()
        (folder / "soak.json").write_text(json.dumps(self._figures(), indent=1) + "\n", encoding="utf-8")
        (folder / "soak.md").write_text(table, encoding="utf-8")
        return table

    def _figures(self) -> dict[str, object]:
        ledger, watch, growth, times = self.ledger, self.watch, self.growth, self.times
        return {
            "run": asdict(self.run),
            "machine": platform.processor() or platform.machine(),
            "issued": dict(ledger.issued),
            "endings": [{"kind": kind, "ending": ending, "count": n} for (kind, ending), n in sorted(ledger.endings.items())],
            "lost": ledger.lost,
            "doubled": ledger.doubled,
            "wrong": ledger.count("wrong"),
            "health": {"count": len(watch.health_seconds), **_quantiles(watch.health_seconds)},
            "small_tenant": {"alone": _quantiles(times.alone), "under_load": _quantiles(times.under_load), "ratio": times.ratio},
            "stop": {"seconds": times.stop, "grace": times.grace},
            "attacks": self.attacks,
            "memory": {**asdict(growth), "share": growth.share, "share_per_hour": growth.share_per_hour},
            "checkpoints": [{"at": point.at, **asdict(point.vitals)} for point in watch.checkpoints],
            "broken": list(self.broken),
        }

    def _table(self) -> str:
        run, ledger, watch, growth, times = self.run, self.ledger, self.watch, self.growth, self.times
        health = _quantiles(watch.health_seconds)
        first, last = watch.checkpoints[0].vitals, watch.checkpoints[-1].vitals
        faults = sum(count for kind, count in ledger.issued.items() if KINDS[kind].fault)
        verdict = f"{growth.share:+.2%}" + ("" if growth.judged else " (run too short to judge)")
        rows = [
            ("model, seed, options", f"{run.model}, {run.seed}, {run.options}"),
            ("minutes under load", f"{run.seconds / 60:.1f}"),
            ("capacity; operations sent", f"{run.capacity:.2f} images per second; {run.rate:.2f} per second"),
            ("operations", f"{sum(ledger.issued.values())}, {faults} of them with an injected fault"),
            ("completed with correct images", f"{ledger.count('image')}"),
            ("refused, queue full", f"{ledger.count('refused')}"),
            ("cancelled; deadline passed", f"{ledger.count('cancelled')}; {ledger.count('deadline')}"),
            ("disconnected; clients killed", f"{ledger.count('disconnected')}; {ledger.count('killed')}"),
            ("refused as invalid", f"{ledger.count('invalid')}"),
            ("models unloaded", f"{ledger.count('done')}"),
            ("**lost**", f"**{ledger.lost}**"),
            ("**doubled**", f"**{ledger.doubled}**"),
            ("**wrong**", f"**{ledger.count('wrong')}**"),
            ("attempts of hostile clients, by kind", _attempts(self.attacks)),
            (
                "health checks; median, p99, maximum",
                f"{len(watch.health_seconds)}; "
                + ", ".join(f"{health[name] * 1e3:.0f}" for name in ("median", "p99", "most"))
                + " ms",
            ),
            (
                "resident memory when idle, after warm-up and at the end",
                f"{growth.first / _MEBI:.1f}, {growth.last / _MEBI:.1f} MiB",
            ),
            ("**memory growth**", f"**{verdict}**"),
            (
                "slope when idle; under load",
                f"{growth.share_per_hour:+.1%}, {growth.per_hour / _MEBI:+.1f} MiB per hour; "
                f"{growth.load_per_hour / _MEBI:+.1f} MiB per hour",
            ),
            ("file descriptors, first and last", f"{first.descriptors}, {last.descriptors}"),
            ("threads, first and last", f"{first.threads}, {last.threads}"),
            (
                "requests of a small tenant; p95 alone, under load",
                f"{len(times.under_load)}; {_p95(times.alone)}, {_p95(times.under_load)} ms ({times.ratio:.1f} times)",
            ),
            (
                "SIGTERM with requests in progress and hostile clients connected",
                f"exit status {run.exit_status} after {times.stop:.1f} s (at most {times.grace + STOP_SLACK:g} s)",
            ),
            ("guarantees violated", f"{len(self.broken)}"),
        ]
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join(lines) + "\n"


def _attempts(attacks: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(f"{kind}: {sum(statuses.values())}" for kind, statuses in sorted(attacks.items())) or "none"


def _p95(seconds: Sequence[float]) -> str:
    return f"{percentile(seconds, 95) * 1e3:.0f}"


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    values = seconds or [0.0]
    return {
        "median": float(np.median(values)),
        "p95": percentile(values, 95),
        "p99": percentile(values, 99),
        "most": max(values),
    }
