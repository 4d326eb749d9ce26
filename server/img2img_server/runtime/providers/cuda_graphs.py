"""CUDA graphs: a session's call is recorded once for a shape, and replayed in one launch instead of hundreds.

What ONNX Runtime does (cuda_execution_provider.cc, inference_session.cc, cuda_graph.cc): a call with a `gpu_graph_id` that is
not -1 runs the graph twice as usual and a third time to record it; every later call with that id replays it, on the addresses
that were bound then, whatever is bound now. Recordings belong to the thread that made them. While one is made, no other thread
may allocate or free on the device. `release_captured_graph` does nothing on CUDA, so what was recorded is never freed.
"""

import functools
import itertools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime
import torch

from img2img_server.runtime.common.out_of_memory import RUNTIME_ERRORS, is_out_of_memory
from img2img_server.support.device_lock import DEVICE_IN_USE, records_at_once

_log = logging.getLogger(__name__)

Key = tuple[torch.Size, ...]
"""The shapes of a graph's inputs, in their order."""

ROW_BUCKETS = (1, 2, 4, 8, 16)
"""Rows that calls are recorded with. A call of another number of rows is padded to the next; one of more is made in parts."""

NO_GRAPH = -1
"""The `gpu_graph_id` of a call that is neither recorded nor replayed."""

SHRINK = ("memory.enable_memory_arena_shrinkage", "gpu:0")
"""The option of a run after which ONNX Runtime's arena frees what is not in use."""

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


def bucket_of(rows: int) -> int:
    """The rows that a call of `rows`, of at most the largest bucket's, is padded to."""
    return next(bucket for bucket in ROW_BUCKETS if rows <= bucket)


class Binding:
    """Inputs and outputs of calls of `session`, by their addresses on `device`."""

    def __init__(
        self, session: onnxruntime.InferenceSession, device: torch.device, graph_id: int, *settings: tuple[str, str]
    ) -> None:
        self._device = device
        self._binding = session.io_binding()
        self._outputs = [item.name for item in session.get_outputs()]
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # What follows on the same stream needs no waiting for.
        for name, value in (("disable_synchronize_execution_providers", "1"), *settings):
            self._options.add_run_config_entry(name, value)
        self.run: Callable[[], None] = functools.partial(session.run_with_iobinding, self._binding, self._options)
        """Runs the session on what is bound. Raises what ONNX Runtime raises."""

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

    def take(self) -> Sequence[Any]:
        """The outputs that ONNX Runtime allocated, as OrtValues. They are the caller's from now on."""
        values: Sequence[Any] = self._binding.get_outputs()
        self._binding.clear_binding_outputs()
        return values

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        assert tensor.is_contiguous(), "an address says nothing of strides"
        return self._device.type, self._device.index or 0, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A call with memory of its own, of whose addresses a recording knows. `run` makes `outputs` of `inputs`."""

    graph_id: int
    inputs: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]
    run: Callable[[], None]
    """Replays it; the first time, records it. Raises what ONNX Runtime raises."""


class Replays:
    """The recordings of one session, whose provider has CUDA graphs enabled.

    A shape is recorded once it was called more than `patience` times, or at once in `recording_at_once`. `most` recordings are
    kept, those that were used last; `most_ever` are made, as released ones are not freed. After a call that could not be
    recorded, which is logged, no more are made.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        name: str,
        patience: int = 2,
        most: int = 64,
        most_ever: int = 256,
    ) -> None:
        self._session = session
        self._device = torch.device(device)
        self._name = name
        self._patience = patience
        self._most = most
        self._left = most_ever
        self._ids = itertools.count(1)
        self._calls: Counter[Key] = Counter()
        self._recordings: OrderedDict[Key, Recording] = OrderedDict()
        self._thread: int | None = None

    def find(self, key: Key) -> Recording | None:
        """What was recorded for these shapes on this thread."""
        if self._thread != threading.get_ident():
            # Another thread has taken over, to which the recordings of the one before mean nothing.
            self._thread = threading.get_ident()
            self.drop()
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
        return recording

    def is_due(self, key: Key) -> bool:
        """Counts a call of shapes that are not recorded. Whether they are to be, now."""
        if self._left <= 0:
            return False
        if len(self._calls) >= _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        return self._calls[key] > self._patience or records_at_once()

    def record(self, key: Key, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> Recording | None:
        """Records a call on tensors of its own, like `inputs` and `outputs` in shape and type; the inputs' values are taken over.
        None if another thread uses the device, or if it cannot be recorded."""
        if not DEVICE_IN_USE.acquire(blocking=False):
            return None
        try:
            recording = self._prepare(inputs, outputs)
            recording.run()
        except RUNTIME_ERRORS as error:
            if is_out_of_memory(error):
                raise
            _log.warning("%s records no more CUDA graphs: %s", self._name, str(error).partition("\n")[0])
            self._left = 0
            return None
        finally:
            DEVICE_IN_USE.release()
        if len(self._recordings) >= self._most:
            oldest, _ = self._recordings.popitem(last=False)
            del self._calls[oldest]
        self._recordings[key] = recording
        return recording

    def drop(self) -> None:
        """Forgets all recordings: the memory that they use may be freed after this."""
        self._recordings.clear()
        self._calls.clear()

    def _prepare(self, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> Recording:
        self._left -= 1
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        results = [torch.empty_like(tensor) for tensor in outputs]
        graph_id = next(self._ids)
        binding = Binding(self._session, self._device, graph_id)
        binding.bind(own, results)
        return Recording(graph_id, own, results, binding.run)
