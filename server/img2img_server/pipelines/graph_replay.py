"""CUDA graphs: a session's call is recorded once for a shape, and replayed in one launch instead of hundreds.

What ONNX Runtime does (cuda_execution_provider.cc, inference_session.cc, cuda_graph.cc): a call with a `gpu_graph_id` that is
not -1 runs the graph twice as usual and a third time to record it; every later call with that id replays it, on the addresses
that were bound then, whatever is bound now. Recordings belong to the thread that made them. While one is made, no other thread
may allocate on the device. The CUDA provider is free to keep the memory of released recordings. Not yet run on a GPU.
"""

import itertools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime
import torch

from img2img_server.pipelines.memory import RUNTIME_ERRORS

_log = logging.getLogger(__name__)

Key = tuple[torch.Size, ...]
"""The shapes of a graph's inputs, in their order."""

DEVICE_IN_USE = threading.Lock()
"""Held while a call is recorded, and by whoever else allocates on the device, as a pipeline does that is loaded on another
thread: that would break the recording, and be broken by it. There is one device in a process, so there is one lock."""

NO_GRAPH = -1
"""The `gpu_graph_id` of a call that is neither recorded nor replayed."""

_MOST_COUNTED = 1024
"""Shapes whose calls are counted."""

_ELEMENTS = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}
"""ONNX's numbers of the types that runners know."""


class Binding:
    """Inputs and outputs of calls of `session`, by their addresses on `device`."""

    def __init__(self, session: onnxruntime.InferenceSession, device: torch.device, graph_id: int) -> None:
        self._session = session
        self._device = device
        self._binding = session.io_binding()
        self._outputs = [item.name for item in session.get_outputs()]
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # What follows on the same stream needs no waiting for.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor] | None) -> None:
        """Binds tensors, which must be contiguous and stay where they are until the call is over. Without `outputs` ONNX Runtime
        allocates them."""
        for name, tensor in inputs.items():
            self._binding.bind_input(name, *self._place(tensor))
        for index, name in enumerate(self._outputs):
            if outputs is None:
                self._binding.bind_output(name, self._device.type, self._device.index or 0)
            else:
                self._binding.bind_output(name, *self._place(outputs[index]))

    def run(self) -> None:
        """Runs the session on what is bound. Raises what ONNX Runtime raises."""
        self._session.run_with_iobinding(self._binding, self._options)

    def take(self) -> Sequence[Any]:
        """The outputs that ONNX Runtime allocated, as OrtValues. They are the caller's from now on."""
        values: Sequence[Any] = self._binding.get_outputs()
        self._binding.clear_binding_outputs()
        return values

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        assert tensor.is_contiguous(), "an address says nothing of strides"
        return self._device.type, self._device.index or 0, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """A call with memory of its own, of whose addresses a recording knows."""

    graph_id: int
    inputs: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]
    binding: Binding


class Replays:
    """The recordings of one session, whose provider has CUDA graphs enabled.

    A shape is recorded once it was called more than `patience` times: rare ones cost nothing. `most` recordings are kept, those
    that were used last; `most_ever` are made, as released ones may not be freed. After a call that could not be recorded, which
    is logged, no more are made.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        name: str,
        patience: int = 6,
        most: int = 12,
        most_ever: int = 64,
    ) -> None:
        self._session = session
        self._device = torch.device(device)
        self._name = name
        self._patience = patience
        self._most = most
        self._left = most_ever
        self._ids = itertools.count(1)
        self._calls: Counter[Key] = Counter()
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()
        self._thread: int | None = None

    def run(self, key: Key, feed: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> bool:
        """Fills `outputs` with what a recorded call makes of `feed`. False where the caller has to make the call itself."""
        if self._thread != threading.get_ident():
            self._begin_anew()
        recording = self._recordings.get(key)
        if recording is not None:
            self._replay(recording, feed, outputs)
            self._recordings.move_to_end(key)
            return True
        if not self._is_due(key) or not DEVICE_IN_USE.acquire(blocking=False):
            return False
        try:
            self._replay(self._prepare(key, feed, outputs), feed, outputs)
            return True
        except RUNTIME_ERRORS as error:
            _log.warning("%s records no more CUDA graphs: %s", self._name, str(error).partition("\n")[0])
            self._left = 0
            self._recordings.pop(key, None)
            return False
        finally:
            DEVICE_IN_USE.release()

    def _replay(self, recording: _Recording, feed: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        for name, buffer in recording.inputs.items():
            buffer.copy_(feed[name])
        recording.binding.run()
        for output, buffer in zip(outputs, recording.outputs, strict=True):
            output.copy_(buffer)

    def _is_due(self, key: Key) -> bool:
        if self._left <= 0:
            return False
        if len(self._calls) >= _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        return self._calls[key] > self._patience

    def _prepare(self, key: Key, feed: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> _Recording:
        """Makes room for a recording, and the memory that it is to use. Its first call records it."""
        if len(self._recordings) >= self._most:
            oldest, recording = self._recordings.popitem(last=False)
            if hasattr(self._session, "release_captured_graph"):  # since ONNX Runtime 1.27
                self._session.release_captured_graph(recording.graph_id)
            del self._calls[oldest]
        graph_id = next(self._ids)
        inputs = {name: torch.empty_like(tensor) for name, tensor in feed.items()}
        results = [torch.empty_like(tensor) for tensor in outputs]
        binding = Binding(self._session, self._device, graph_id)
        binding.bind(inputs, results)
        self._left -= 1
        self._recordings[key] = _Recording(graph_id, inputs, results, binding)
        return self._recordings[key]

    def _begin_anew(self) -> None:
        """Another thread has taken over, to which the recordings of the one before mean nothing."""
        self._thread = threading.get_ident()
        self._recordings.clear()
        self._calls.clear()
