"""Runners: an ONNX graph as a function of torch tensors."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import onnxruntime
import torch
from torch.utils.dlpack import from_dlpack

from img2img_server.errors import BundleError

_T = TypeVar("_T")

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


class Runner(Protocol):
    """An ONNX graph as a function of torch tensors."""

    @property
    def inputs(self) -> Sequence[Any]:
        """The graph's inputs, as onnxruntime.NodeArg."""
        ...

    @property
    def outputs(self) -> Sequence[Any]:
        """The graph's outputs, as onnxruntime.NodeArg."""
        ...

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph. `feed` has a tensor for each input: contiguous, of the input's type and on the runner's device.

        Returns the results in the order of `outputs`. The next run does not overwrite them.
        """
        ...


Make = Callable[[str, Path], Runner]
"""Makes the runner of a component, from its name and its ONNX file. Raises BundleError."""


LORA_RUNNER, LIGHT_RUNNER, CONTROL_RUNNER = ".lora", ".light", ".control"
"""Suffixes of the names of runners of LoRA graphs, light graphs and control graphs, after the component's name."""
_FURTHER = (LORA_RUNNER, LIGHT_RUNNER, CONTROL_RUNNER)


def bundle_of(name: str, graph: Path) -> Path:
    """The bundle's folder, of which `graph` is a file in the folder of the component `name`, or of one of its further graphs'
    runners."""
    component = next((name.removesuffix(suffix) for suffix in _FURTHER if name.endswith(suffix)), name)
    return next((folder.parent for folder in graph.parents if folder.name == component), graph.parent)


class HostRunner:
    """A session with inputs and outputs on the CPU, whatever device it computes on."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.inputs: Sequence[Any] = session.get_inputs()
        self.outputs: Sequence[Any] = session.get_outputs()
        self._names = [item.name for item in self.outputs]
        types = {dtype_of(item) for item in (*self.inputs, *self.outputs)}
        # NumPy has no bfloat16.
        self.run = self._run_values if torch.bfloat16 in types else self._run_arrays

    def _run_arrays(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = self._session.run(self._names, {name: tensor.numpy() for name, tensor in feed.items()})
        return [torch.from_numpy(value) for value in values]

    def _run_values(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = {name: onnxruntime.OrtValue.from_dlpack(tensor) for name, tensor in feed.items()}
        return [from_dlpack(value) for value in self._session.run_with_ort_values(self._names, values)]


def dtype_of(item: Any) -> torch.dtype:
    """The torch dtype of a NodeArg. Raises BundleError for a type without an equivalent in torch."""
    if item.type not in _DTYPES:
        raise BundleError(f"the graph's '{item.name}' is a {item.type}, which has no equivalent in torch")
    return _DTYPES[item.type]


class SplitGraphRunner:
    """A graph split in two: `body` takes the outputs of `head`, by name. Implements Runner with the whole graph's inputs.

    `head` computes the timestep embedding in float32, `body` the rest in the provider's precision. In bfloat16 the angle of a
    timestep embedding is off by radians, which tripled the error of a UNet's call in OpenVINO compared with PyTorch.
    """

    def __init__(self, head: Runner, body: Runner) -> None:
        self._head = head
        self._body = body
        self._between = [item.name for item in head.outputs]
        whole = {item.name: item for item in (*head.inputs, *body.inputs) if item.name not in self._between}
        self.inputs: Sequence[Any] = list(whole.values())
        self.outputs: Sequence[Any] = body.outputs

    def open_for(self, width: int, height: int) -> None:
        """Opens what calls for images of this size need."""
        open_for(self._body, width, height)

    @property
    def opened_bytes(self) -> int:
        """The memory of the graphs that the body opened later, about."""
        return opened_bytes(self._body)

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the two graphs in sequence."""
        waves = self._head.run({item.name: feed[item.name] for item in self._head.inputs})
        known = {**feed, **dict(zip(self._between, waves, strict=True))}
        return self._body.run({item.name: known[item.name] for item in self._body.inputs})


class Later(Generic[_T]):
    """A resource that `open_it` opens on first use, on any thread. `opened` is None until then."""

    def __init__(self, open_it: Callable[[], _T]) -> None:
        self.opened: _T | None = None
        self._open = open_it
        self._lock = threading.Lock()

    def get(self) -> _T:
        """The opened resource. Slow the first time. Raises the errors of `open_it`."""
        with self._lock:
            if self.opened is None:
                self.opened = self._open()
            return self.opened


def open_for(runner: Runner, width: int, height: int) -> None:
    """Opens what calls for images of this size, in pixels, need of a runner that opens graphs later. Slow the first time; any
    thread may call it."""
    opens = getattr(runner, "open_for", None)
    if opens is not None:
        opens(width, height)


def opened_bytes(runner: Any) -> int:
    """The memory of the graphs that a runner opened later, about; 0 for one that opens none."""
    return int(getattr(runner, "opened_bytes", 0))
