"""Measures a bundle's graphs and a whole step, by provider, size and rows, in rounds, so that other load affects all alike.

The server's own pipeline runs one request while the inputs of each graph are captured; these calls are then repeated. A step is
the pipeline's denoise and advance, and needs no graphs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image

from img2img_server.engine.request import Pipeline, Request
from img2img_server.errors import BundleError, InvalidField, ServerError
from img2img_server.runtime.onnx.modules import Graph, OnnxDenoiser, OnnxTextEncoder, OnnxVae
from img2img_server.runtime.onnx.providers import ERRORS
from img2img_server.runtime.onnx.runners import Runner
from img2img_server.support.device_lock import measuring

STEP = "step"
"""The name of a whole step in results, beside those of the components."""
_ANY_SIZE = (0, 0)
"""The size of cases that do not depend on it."""
_GUIDANCE = 7.5

FAILURES = (
    BundleError,
    ServerError,
    ValueError,
    RuntimeError,  # torch's, its out-of-memory too
    *ERRORS,
)
"""Exceptions that skip one variant but not the others."""

_MANY_STEPS = (50, 20, 8, 4, 2, 1)
_FEW_STEPS = (2, 1, 4, 8)
"""Numbers of steps to try, of which the first that the model supports is used: many to time steps, few to capture calls."""


class Work(Protocol):
    """Work that can be timed repeatedly."""

    def ready(self) -> None:
        """Prepares the next run. Not timed."""
        ...

    def run(self) -> None:
        """Does the work. Timed."""
        ...

    def close(self) -> None:
        """Releases resources."""
        ...


@dataclass(slots=True, eq=False)
class TimedCase:
    """One variant and its `seconds` in each round. `size` is the images' width and height in pixels."""

    component: str
    provider: str
    size: tuple[int, int]
    rows: int
    work: Work
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class CapturedCall:
    """A call of one graph, with inputs captured from its pipeline."""

    runner: Runner
    feed: Mapping[str, torch.Tensor]

    def ready(self) -> None:
        """Does nothing: graphs are stateless."""

    def run(self) -> None:
        """Calls the graph."""
        with torch.inference_mode():
            self.runner.run(self.feed)

    def close(self) -> None:
        """Does nothing."""


class StepWork:
    """The pipeline's denoise and advance of `requests`, which share every call and are restarted when they are done."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[Request]) -> None:
        self._pipeline = pipeline
        self._requests = requests
        self._states: Sequence[Any] = ()

    def ready(self) -> None:
        """Restarts the requests before their last step, in which an opaque pipeline also decodes."""
        if self._states and all(state.step_count - state.step > 1 for state in self._states):
            return
        self.close()
        self._states = self._pipeline.prepare(self._requests)
        if min(state.step_count for state in self._states) > 2:
            # Skips the first step, in which an opaque pipeline also encodes.
            self.run()

    def run(self) -> None:
        """Runs one step of all requests."""
        self._pipeline.advance(self._states, self._pipeline.denoise(self._states))

    def close(self) -> None:
        """Releases the requests' states."""
        for each in self._states:
            self._pipeline.release(each)
        self._states = ()


def requests_of(pipeline: Pipeline, size: tuple[int, int], rows: int, guidance: float, few_steps: bool = False) -> list[Request]:
    """Requests with `rows` rows in total, each with its own prompt and image. Raises InvalidField.

    With `guidance` above 1 a request may have two rows; an odd row is filled by a request without guidance.
    """
    steps = _FEW_STEPS if few_steps else _MANY_STEPS
    requests: list[Request] = []
    while (left := rows - sum(pipeline.plan(request).rows for request in requests)) > 0:
        text = f"{len(requests) + 1} of {rows} rows at {size[0]} x {size[1]}"
        request = _request(pipeline, size, text, guidance, steps)
        if pipeline.plan(request).rows > left:
            request = _request(pipeline, size, text, 1.0, steps)
        requests.append(request)
    return requests


def capture(pipeline: Pipeline, requests: Sequence[Request]) -> dict[str, CapturedCall]:
    """Runs `requests` and captures the first call of each graph, by the component's name."""
    recorders = {name: _Recorder(graph) for name, graph in graphs_of(pipeline).items()}
    states: Sequence[Any] = ()
    try:
        states = pipeline.prepare(requests)
        # An opaque pipeline decodes in its last step, and may increase its step count.
        while any(each.step < each.step_count for each in states):
            pipeline.advance(states, pipeline.denoise(states))
        pipeline.finish(states)
    finally:
        for each in states:
            pipeline.release(each)
        for recorder in recorders.values():
            recorder.stop()
    return {name: CapturedCall(recorder.runner, recorder.feed) for name, recorder in recorders.items() if recorder.feed}


def graphs_of(pipeline: Pipeline) -> dict[str, Graph]:
    """The graphs of a pipeline by their component's name; empty for a torch pipeline."""
    found: dict[str, Graph] = {}
    pipe = getattr(pipeline, "_pipe", None)
    inner = [value for name, value in vars(pipe).items() if name.endswith("_pipe")] if pipe is not None else []
    for part in (pipe, *inner):
        for name, component in getattr(part, "components", {}).items():
            if isinstance(component, OnnxVae):
                found |= {"vae_encoder": component._encoder, "vae_decoder": component._decoder}
            elif isinstance(component, (OnnxDenoiser, OnnxTextEncoder)):
                found[name] = component._graph
    return found


def run_rounds(cases: Sequence[TimedCase], synchronize: Callable[[], None], clock: Callable[[], float]) -> Iterator[None]:
    """Times every case once in each round, in alternating order, so that no case always follows the same other one."""
    backwards = False
    while True:
        for case in reversed(cases) if backwards else cases:
            case.work.ready()
            synchronize()
            begun = clock()
            case.work.run()
            synchronize()
            case.seconds.append(clock() - begun)
        backwards = not backwards
        yield


def synchronizer(providers: Sequence[str]) -> Callable[[], None]:
    """A function that waits for the GPU if one of `providers` uses it."""
    uses_gpu = bool({"cuda", "tensorrt"} & set(providers)) and torch.cuda.is_available()
    return torch.cuda.synchronize if uses_gpu else lambda: None


class _Recorder:
    """Replaces a graph's runner and keeps its first inputs."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.runner: Runner = graph._runner
        self.inputs, self.outputs = self.runner.inputs, self.runner.outputs
        self.feed: dict[str, torch.Tensor] = {}
        graph._runner = self

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        # Cloned, since a pipeline may overwrite its inputs.
        self.feed = self.feed or {name: tensor.clone() for name, tensor in feed.items()}
        return self.runner.run(feed)

    def stop(self) -> None:
        self._graph._runner = self.runner


def _request(pipeline: Pipeline, size: tuple[int, int], prompt: str, guidance: float, counts: Sequence[int]) -> Request:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    for steps in counts:
        request = Request("", image, prompt, None, 1.0, steps, guidance, (0,))
        try:
            pipeline.plan(request)
        except InvalidField:
            continue
        return request
    raise InvalidField("num_inference_steps", f"the model supports none of {counts} steps")


def cases_of(
    provider: str, pipeline: Pipeline, sizes: Sequence[tuple[int, int]], rows: Sequence[int], note: Callable[[str], None]
) -> list[TimedCase]:
    """All cases of one provider, each run once. `note` is called with a line for each variant, and for each that is skipped."""
    cases: list[TimedCase] = []
    for size in sizes:
        for count in rows:
            where = f"{provider}, {size[0]} x {size[1]}, {count} rows"
            if pipeline.max_rows is not None and count > pipeline.max_rows:
                note(f"{where}: skipped, since this model's calls have at most {pipeline.max_rows} rows")
                continue
            note(f"warming up: {where}")
            try:
                with measuring():  # opens the graphs
                    found = [*_parts(provider, pipeline, size, count), _step(provider, pipeline, size, count)]
            except FAILURES as error:
                note(f"{where}: skipped: {type(error).__name__}: {error}")
                continue
            # Text encoders do not depend on the image's size, so they are measured once.
            known = {(case.component, case.rows) for case in cases if case.size == _ANY_SIZE}
            cases += [case for case in found if case.size != _ANY_SIZE or (case.component, case.rows) not in known]
    return cases


def _parts(provider: str, pipeline: Pipeline, size: tuple[int, int], rows: int) -> list[TimedCase]:
    """A case per graph, with as many rows as there are requests."""
    calls = capture(pipeline, requests_of(pipeline, size, rows, guidance=1.0, few_steps=True))
    return [
        TimedCase(
            name, provider, _ANY_SIZE if name.startswith("text_encoder") else size, len(next(iter(call.feed.values()))), call
        )
        for name, call in sorted(calls.items(), key=lambda item: _position(item[0]))
    ]


def _step(provider: str, pipeline: Pipeline, size: tuple[int, int], rows: int) -> TimedCase:
    """A case for a step of requests with guidance."""
    step = StepWork(pipeline, requests_of(pipeline, size, rows, _GUIDANCE))
    step.ready()
    return TimedCase(STEP, provider, size, rows, step)


def _position(component: str) -> int:
    """A component's position in the order of use."""
    order = ("text_encoder", "vae_encoder", "unet", "transformer", "vae_decoder")
    return next((index for index, name in enumerate(order) if component.startswith(name)), len(order))
