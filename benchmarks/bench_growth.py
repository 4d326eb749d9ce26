"""CPU time of the engine by the number of waiting requests: a step, a new request, a cancelled one, updates of positions.

Nothing is computed: the pipeline only counts, calls take 5 ms of a manual clock, and the figures are CPU seconds of the engine's
thread. 32 requests are active, 16 of them share each call. The step is measured twice: without position updates, and with one due
for every waiting request.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Event, Plan, Request, Ticket
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from manual_device import IMAGE, ManualDevice, ManualState
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / ".bench" / "growth.json"

_CALL = 0.005
"""Seconds of a call on the manual clock."""
_MODELS = 8


class _Counter(ManualDevice):
    """Counts steps. A request's shape is its prompt."""

    engine = "simulated:counter"

    def plan(self, request: Request) -> Plan:
        return Plan(request.prompt, 512 * 512, 1, request.num_inference_steps)

    def denoise(self, states: Sequence[ManualState]) -> Sequence[None]:
        self.now += _CALL
        return [None] * len(states)


@dataclass(frozen=True, slots=True)
class Load:
    """How the waiting requests differ: how many clients, shapes and models there are, 0 for one each. `deadline` is in how many
    seconds each has to be finished, None for any."""

    clients: int = 1
    shapes: int = 1
    models: int = 1
    deadline: float | None = None

    def request(self, number: int, now: float) -> Request:
        """One of the requests."""
        client = number % self.clients if self.clients else number
        shape = number % self.shapes if self.shapes else number
        steps = (20, 25, 30, 50)[number * 7 % 4]
        deadline = None if self.deadline is None else now + self.deadline
        return Request(
            f"m{number % self.models}", IMAGE, f"{shape}", "", 1.0, steps, 7.5, (0,), deadline, client=f"client {client}"
        )


LOADS = {
    "100 clients": Load(clients=100),
    "one client": Load(),
    "a client each": Load(clients=0),
    "100 clients, a shape each": Load(clients=100, shapes=0),
    "100 clients, 8 models": Load(clients=100, models=_MODELS),
    "100 clients, deadlines": Load(clients=100, deadline=1e6),
}


class _Filled:
    """An engine in which so many requests wait."""

    def __init__(self, load: Load, waiting: int) -> None:
        self._load, self._waiting, self._number, self._device = load, waiting, 0, _Counter()
        limits = QueueLimits(max_waiting=10 * waiting + 1000, max_client_waiting=10 * waiting + 1000)
        self.engine = Engine({f"m{number}": self._device for number in range(_MODELS)}, limits, self._device.clock)
        for number in range(_MODELS):
            name = f"m{number}"
            self.engine.costs.adopt(name, WarmUp(16, 1.0, self._device.clock).measure(name, self._device))
        for _ in range(limits.max_active):
            self.submit()
            self.engine.step()
        begun = time.thread_time()
        self.tickets = [self.submit() for _ in range(waiting)]
        self.fill_seconds = time.thread_time() - begun
        for _ in range(20):
            self.engine.step()
        self.top_up()

    def top_up(self) -> None:
        """Has as many requests wait as at the beginning."""
        while self.engine.stats.waiting < self._waiting:
            self.tickets.append(self.submit())

    def submit(self) -> Ticket:
        """Submits one more request."""
        self._number += 1
        request = self._load.request(self._number, self._device.now)
        return self.engine.submit(request, _ignore).ticket

    def cancel_last(self) -> None:
        """Cancels the newest request, which waits, and has it leave at the next step."""
        self.tickets.pop().cancel()
        self.engine.step()

    def make_updates_due(self) -> None:
        """Advances the clock until updates are due for all waiting requests, and takes the longer step that follows."""
        self.top_up()
        self._device.now += 2.0
        self.engine.step()


def _ignore(event: Event) -> None:
    pass


def measure(load: Load, waiting: int, times: int) -> dict[str, float]:
    """CPU microseconds of each kind of work, the tenth percentile, which other load disturbs least; and the mean of the submits
    that filled the queue."""
    filled = _Filled(load, waiting)
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "step": (filled.top_up, filled.engine.step),
        "step after a cancellation": (filled.top_up, filled.cancel_last),
        "submit": (filled.top_up, filled.submit),
        "step with updates": (filled.make_updates_due, filled.engine.step),
    }
    figures = {name: statistics.quantiles([_timed(*work) for _ in range(times)], n=10)[0] * 1e6 for name, work in works.items()}
    figures["submit while filling"] = filled.fill_seconds / waiting * 1e6
    filled.engine.close()
    return figures


def _timed(prepare: Callable[[], object], work: Callable[[], object]) -> float:
    prepare()
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument(
        "--waiting", type=int, nargs="+", default=[100, 1000, 5000], metavar="N", help="waiting requests (default: %(default)s)"
    )
    parser.add_argument("--times", type=int, default=100, metavar="N", help="of each kind of work (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measures every load, prints a table, and writes a JSON file and a figure."""
    figures = {
        name: {waiting: measure(load, waiting, arguments.times) for waiting in arguments.waiting} for name, load in LOADS.items()
    }
    kinds = list(next(iter(next(iter(figures.values())).values())))
    table = Table("load", "waiting", *(f"{kind} µs" for kind in kinds))
    for name, by_waiting in figures.items():
        for waiting, row in by_waiting.items():
            table.add_row(name, str(waiting), *(f"{row[kind]:.0f}" for kind in kinds))
    Console(width=140).print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    _plot(figures, kinds[:-1])
    return 0


def _plot(figures: dict[str, dict[int, dict[str, float]]], kinds: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(kinds), 3.2), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for name, by_waiting in figures.items():
            axis.plot(list(by_waiting), [row[kind] for row in by_waiting.values()], marker="o", label=name)
        axis.set(title=kind, xlabel="waiting requests", xscale="log")
    axes[0].set_ylabel("CPU µs")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.savefig(RESULT.with_suffix(".png"), dpi=110)
