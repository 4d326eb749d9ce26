"""What a bundle's parts take, by provider, size and rows: measured in turns, so that a noisy machine disturbs all alike.

A part is called through the pipeline that the server would run: one request is drawn, what each graph is given is kept, and
those calls are repeated. A step is the pipeline's own denoise and advance, and needs no graphs.
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
from img2img_server.runtime.providers.openvino import has_amx

STEP = "step"
"""The name by which a whole step is told, beside those of the components."""
PEAK = "peak"
"""The name of the machine's own measure, a large matrix product."""

FAILURES = (
    BundleError,
    ServerError,
    ValueError,
    RuntimeError,  # torch's, its out-of-memory too
    *ERRORS,
)
"""What may be wrong with one variant, while others can be measured."""

_MANY_STEPS = (50, 20, 8, 4, 2, 1)
_FEW_STEPS = (2, 1, 4, 8)
"""How many steps to ask for: the first that the model allows. Many where steps are timed, few to call each graph once."""
_CPU_SIDE, _GPU_SIDE = 2048, 8192
"""Sides of the matrices whose product is the machine's peak."""


class Work(Protocol):
    """Something that can be timed again and again."""

    def ready(self) -> None:
        """What has to be done before, and is not timed."""
        ...

    def run(self) -> None:
        """What is timed."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


@dataclass(slots=True, eq=False)
class TimedCase:
    """One cell of the table. `seconds` are those of each round; `operations` of one run, None where they can't be counted.

    `size` is of images in pixels, width and height. `arithmetic` is what the peak is measured in that it is compared with.
    """

    component: str
    provider: str
    size: tuple[int, int]
    rows: int
    work: Work
    arithmetic: str = "fp32"
    operations: int | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class CapturedCall:
    """One graph, called with what its pipeline gave it."""

    runner: Runner
    feed: Mapping[str, torch.Tensor]

    def ready(self) -> None:
        """Nothing: a graph keeps nothing from call to call."""

    def run(self) -> None:
        """One call."""
        with torch.inference_mode():
            self.runner.run(self.feed)

    def close(self) -> None:
        """Nothing is held but tensors."""


class StepWork:
    """The pipeline's denoise and advance of `requests`, which share every call; they begin anew when they are done."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[Request]) -> None:
        self.shared = pipeline.max_rows != 1
        """Whether the rows are those of one call."""
        self._pipeline = pipeline
        self._requests = requests
        self._states: Sequence[Any] = ()

    def ready(self) -> None:
        """Prepares new requests where a next step would be the last, in which a whole pipeline decodes, too."""
        if self._states and all(state.step_count - state.step > 1 for state in self._states):
            return
        self.close()
        self._states = self._pipeline.prepare(self._requests)
        if min(state.step_count for state in self._states) > 2:
            # In its first step a whole pipeline also encodes.
            self.run()

    def run(self) -> None:
        """One step of all."""
        self._pipeline.advance(self._states, self._pipeline.denoise(self._states))

    def close(self) -> None:
        """Gives back what the requests hold."""
        for each in self._states:
            self._pipeline.release(each)
        self._states = ()


class Product:
    """A product of two square matrices: what the machine can do at best, on the same threads."""

    def __init__(self, device: str, arithmetic: str, threads: int) -> None:
        side = _GPU_SIDE if device == "cuda" else _CPU_SIDE
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arithmetic]
        self.size = (side, side)
        self.operations = 2 * side**3
        self._threads = threads
        self._left, self._right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))

    def ready(self) -> None:
        """Takes the threads; pipelines take theirs at each call."""
        torch.set_num_threads(self._threads)

    def run(self) -> None:
        """One product; on a GPU fp32 is what ONNX Runtime makes of it, TF32."""
        torch.backends.cuda.matmul.allow_tf32 = True
        with torch.inference_mode():
            torch.mm(self._left, self._right)

    def close(self) -> None:
        """Nothing is held but tensors."""


def requests_of(pipeline: Pipeline, size: tuple[int, int], rows: int, guidance: float, few_steps: bool = False) -> list[Request]:
    """Requests that bring `rows` rows together, each a prompt and an image of its own. Raises InvalidField.

    With `guidance` above 1 one may bring two rows; what is then left over is brought by one without guidance.
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
    """Draws `requests`, which calls every graph. The first call of each, by the component's name."""
    recorders = {name: _Recorder(graph) for name, graph in graphs_of(pipeline).items()}
    states: Sequence[Any] = ()
    try:
        states = pipeline.prepare(requests)
        # A whole pipeline decodes in its last step, and may have more of them than it first said.
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
    """The graphs of a pipeline by their component's name; none where all is torch."""
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


def take_turns(cases: Sequence[TimedCase], synchronize: Callable[[], None], clock: Callable[[], float]) -> Iterator[None]:
    """Times every case once, each time it is asked to go on: forwards, then backwards, so that nobody always follows the same."""
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
    """Waits for the GPU, where one of `providers` has it. Not yet run on a GPU."""
    uses_gpu = bool({"cuda", "tensorrt"} & set(providers)) and torch.cuda.is_available()
    return torch.cuda.synchronize if uses_gpu else lambda: None


def arithmetic_of(provider: str, precision: str, exact: bool = False) -> str:
    """What a provider is expected to compute a component of `precision` in, where it has the choice (`exact`: it has not)."""
    if provider in ("cuda", "tensorrt"):
        return precision if precision in ("fp16", "bf16") else "fp32"
    return "bf16" if provider == "openvino" and not exact and has_amx() else "fp32"


class _Recorder:
    """A runner in a graph's place that keeps the first feed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.runner: Runner = graph._runner
        self.inputs, self.outputs = self.runner.inputs, self.runner.outputs
        self.feed: dict[str, torch.Tensor] = {}
        graph._runner = self

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        # Cloned: a pipeline may write over what it gave.
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
    raise InvalidField("num_inference_steps", f"the model takes none of {counts}")
