"""Units of work to time: a graph in a session as the server opens it, a PyTorch function, a whole request."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from img2img_server.engine.request import Pipeline, Request
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.runners import HostRunner, Runner, dtype_of
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.support.device_lock import recording_at_once
from img2img_server.tools.bench_measuring import TimedCase, Work, run_rounds
from PIL import Image

from gpu_check.settings import Settings


@dataclass(slots=True, eq=False)
class Opened:
    """An open graph. `recorded`: its calls are replayed as CUDA graphs."""

    runner: Runner
    recorded: bool = False
    device: str = "cpu"

    def work(self, feed: Mapping[str, torch.Tensor]) -> "GraphCall":
        """A call on tensors by name, which are moved and converted. Runs it once, which records it if possible."""
        types = {item.name: dtype_of(item) for item in self.runner.inputs}
        call = GraphCall(self.runner, {name: feed[name].to(self.device, dtype).contiguous() for name, dtype in types.items()})
        with recording_at_once():
            call.run()
        return call


def open_graph(graph: Path, settings: Settings, record: bool = True, options: Mapping[str, str] | None = None) -> Opened:
    """Opens a graph as the server does, with further `options` of the provider. A graph that cannot be recorded, or
    with `record` False, runs without CUDA graphs. Raises BundleError."""
    if settings.device == "cpu":
        return Opened(HostRunner(open_session(graph, SessionOptions("cpu", settings.threads))))
    from img2img_server.runtime.providers import cuda

    recorded = False

    def opening(path: Path, given: SessionOptions) -> Any:
        nonlocal recorded
        own = {**dict(given.provider_options), **(options or {})}
        session = open_session(path, replace(given, provider_options=tuple(own.items())))
        recorded = given.recordable
        return session

    make = cuda.runners(Execution("cuda", settings.threads, cuda_graphs=record), settings.threads, opening)
    return Opened(make(graph.parent.name, graph), recorded, "cuda")


@dataclass(slots=True, eq=False)
class GraphCall:
    """A call of a graph; `outputs` has the outputs of the last run."""

    runner: Runner
    feed: Mapping[str, torch.Tensor]
    outputs: list[torch.Tensor] = field(default_factory=list)

    def ready(self) -> None:
        """Does nothing."""

    def run(self) -> None:
        """Makes one call."""
        with torch.inference_mode():
            self.outputs = self.runner.run(self.feed)

    def close(self) -> None:
        """Does nothing."""


@dataclass(slots=True, eq=False)
class Function:
    """A PyTorch function; `result` has the result of the last run."""

    call: Callable[[], Any]
    result: Any = None

    def ready(self) -> None:
        """Does nothing."""

    def run(self) -> None:
        """Makes one call."""
        with torch.inference_mode():
            self.result = self.call()

    def close(self) -> None:
        """Does nothing."""


@dataclass(slots=True, eq=False)
class WholeRequest:
    """A whole request through the pipeline's calls, including encoding: `pipeline` must have no cache."""

    pipeline: Pipeline
    request: Request
    images: list[Image.Image] = field(default_factory=list)

    def ready(self) -> None:
        """Does nothing."""

    def run(self) -> None:
        """Makes the images of the request."""
        states = self.pipeline.prepare([self.request])
        try:
            while states[0].step < states[0].step_count:
                self.pipeline.advance(states, self.pipeline.denoise(states))
            self.images = list(self.pipeline.finish(states)[0])
        finally:
            self.pipeline.release(states[0])

    def close(self) -> None:
        """Does nothing."""


def in_turns(works: Mapping[str, Work], seconds: float, synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Runs each three times to warm up, then all in turns for `seconds`, at least 3 rounds. Returns the seconds of each round."""
    for work in works.values():
        for _ in range(3):
            work.ready()
            work.run()
    cases = {name: TimedCase(name, name, (0, 0), 1, work) for name, work in works.items()}
    begun = time.monotonic()
    for number, _ in enumerate(run_rounds(list(cases.values()), synchronize, time.perf_counter), start=1):
        if number >= 3 and time.monotonic() - begun >= seconds:
            break
    return {name: case.seconds for name, case in cases.items()}


def one_after_another(works: Sequence[Work], rounds: int, synchronize: Callable[[], None]) -> list[list[float]]:
    """Runs the works in their order `rounds` times. Returns the seconds of each, without a first round."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, taken in zip(works, seconds, strict=True):
            synchronize()
            begun = time.perf_counter()
            work.run()
            synchronize()
            taken.append(time.perf_counter() - begun)
    return [taken[1:] for taken in seconds]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference of two tensors: the L2 norm of the difference divided by that of the other."""
    reference = other.float()
    return float(torch.linalg.vector_norm(one.float() - reference) / torch.linalg.vector_norm(reference))
