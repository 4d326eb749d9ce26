"""What `scripts/gpu_check` times: a graph in a session of given options, a PyTorch module, a whole picture.

What is of CUDA is not yet run on a GPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from img2img_server.engine.request import Pipeline, Request
from img2img_server.pipelines.measuring import Case, Work, take_turns
from img2img_server.pipelines.runners import dtype_of
from img2img_server.pipelines.sessions import SessionOptions, open_session
from PIL import Image

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.int32: np.int32}


class Bound:
    """A session of `graph` whose inputs and outputs are bound to tensors that stay where they are.

    `options` are the provider's, by ONNX Runtime's names; `feed` are the inputs by name, which are moved and converted;
    `shapes` are those of the outputs by name.
    """

    def __init__(
        self,
        graph: Path,
        provider: str,
        options: Mapping[str, str],
        feed: Mapping[str, torch.Tensor],
        shapes: Mapping[str, Sequence[int]],
        threads: int,
    ) -> None:
        device = "cuda" if provider in ("cuda", "tensorrt") else "cpu"
        self._session = open_session(graph, SessionOptions(provider, threads, provider_options=tuple(options.items())))
        self._binding = self._session.io_binding()
        inputs = {item.name: feed[item.name].to(device, dtype_of(item)).contiguous() for item in self._session.get_inputs()}
        self.outputs = {
            item.name: torch.empty(tuple(shapes[item.name]), device=device, dtype=dtype_of(item))
            for item in self._session.get_outputs()
        }
        # Kept: a binding holds addresses only.
        self._inputs = inputs
        for name, tensor in inputs.items():
            self._binding.bind_input(name, device, 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in self.outputs.items():
            self._binding.bind_output(name, device, 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())

    def ready(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        """One run; ONNX Runtime waits for its end."""
        self._session.run_with_iobinding(self._binding)

    def close(self) -> None:
        """Nothing to do."""


@dataclass(slots=True, eq=False)
class Function:
    """Anything that torch computes."""

    call: Callable[[], Any]

    def ready(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        """One call."""
        with torch.inference_mode():
            self.call()

    def close(self) -> None:
        """Nothing to do."""


@dataclass(slots=True, eq=False)
class Picture:
    """A whole request through the engine's four calls, encoding included: `pipeline` must have no cache."""

    pipeline: Pipeline
    request: Request
    images: list[Image.Image] = field(default_factory=list)

    def ready(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        """One picture, kept in `images`."""
        states = self.pipeline.prepare([self.request])
        try:
            while states[0].step < states[0].step_count:
                self.pipeline.advance(states, self.pipeline.denoise(states))
            self.images = list(self.pipeline.finish(states)[0])
        finally:
            self.pipeline.release(states[0])

    def close(self) -> None:
        """Nothing to do."""


def in_turns(works: Mapping[str, Work], seconds: float, synchronize: Callable[[], None]) -> dict[str, Case]:
    """Runs all thrice to warm up, as recording and autotuning take, then in turns for so many seconds, 3 rounds at least."""
    for work in works.values():
        for _ in range(3):
            work.ready()
            work.run()
    cases = {name: Case(name, name, (0, 0), 1, work) for name, work in works.items()}
    begun = time.monotonic()
    for number, _ in enumerate(take_turns(list(cases.values()), synchronize, time.perf_counter), start=1):
        if number >= 3 and time.monotonic() - begun >= seconds:
            break
    return cases


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels between two pictures of one size; 999 where they are equal."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    square = float(np.mean(difference**2))
    return 999.0 if square == 0 else float(10 * np.log10(255**2 / square))
