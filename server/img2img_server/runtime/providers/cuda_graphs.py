"""CUDA graphs: a session's call is recorded once per shape, and replayed in one launch instead of hundreds.

ONNX Runtime's behavior (cuda_execution_provider.cc, inference_session.cc, cuda_graph.cc): the first call with a `gpu_graph_id`
other than -1 runs the graph twice as usual and a third time to record it; each later call with that id replays it on the
addresses that were bound during recording. A recording belongs to the thread that made it. During recording, no other thread may
allocate or free device memory. `release_captured_graph` does nothing on CUDA, so recordings are never freed.
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

Key = tuple[tuple[int, ...], ...]
"""The shapes of a graph's inputs, in their order, and the identity of those that calls read in place."""

ROW_BUCKETS = (1, 2, 4, 8, 16)
"""Numbers of rows of recorded calls. Other calls are padded to the next number; larger ones are divided."""

NO_GRAPH = -1
"""The `gpu_graph_id` of a call that is neither recorded nor replayed."""

SHRINK = ("memory.enable_memory_arena_shrinkage", "gpu:0")
"""Run option that makes ONNX Runtime's arena free unused memory after the run."""

_MOST_COUNTED = 1024
"""Maximum number of shapes whose calls are counted."""

_ELEMENTS = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}
"""ONNX's type numbers of the dtypes that runners support."""


def bucket_of(rows: int) -> int:
    """The number of rows that a call of `rows` is padded to. `rows` is at most ROW_BUCKETS[-1]."""
    return next(bucket for bucket in ROW_BUCKETS if rows <= bucket)


class Binding:
    """Binds inputs and outputs of a session's calls by their addresses on `device`."""

    def __init__(
        self, session: onnxruntime.InferenceSession, device: torch.device, graph_id: int, *settings: tuple[str, str]
    ) -> None:
        self._device = device
        self._binding = session.io_binding()
        self._outputs = [item.name for item in session.get_outputs()]
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))
        # Later work is on the same stream, so the host need not wait.
        for name, value in (("disable_synchronize_execution_providers", "1"), *settings):
            self._options.add_run_config_entry(name, value)
        self.run: Callable[[], None] = functools.partial(session.run_with_iobinding, self._binding, self._options)
        """Runs the session on the bound tensors. Raises ONNX Runtime's errors."""

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor] | None) -> None:
        """Binds tensors, which must be contiguous and must not be moved or freed before the call is over. With `outputs` None,
        ONNX Runtime allocates them."""
        for name, tensor in inputs.items():
            self._binding.bind_input(name, *self._place(tensor))
        for index, name in enumerate(self._outputs):
            if outputs is None:
                self._binding.bind_output(name, self._device.type, self._device.index or 0)
            else:
                self._binding.bind_output(name, *self._place(outputs[index]))

    def take(self) -> Sequence[Any]:
        """Returns the outputs that ONNX Runtime allocated, as OrtValues, and unbinds them."""
        values: Sequence[Any] = self._binding.get_outputs()
        self._binding.clear_binding_outputs()
        return values

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        assert tensor.is_contiguous(), "only contiguous tensors can be bound by address"
        return self._device.type, self._device.index or 0, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A recorded call with its own input and output memory. `run` computes `outputs` from `inputs`, and from `held`, which is
    read in place."""

    graph_id: int
    inputs: dict[str, torch.Tensor]
    held: Mapping[str, torch.Tensor]
    outputs: list[torch.Tensor]
    run: Callable[[], None]
    """Replays the call; the first time, records it. Raises ONNX Runtime's errors."""


class Replays:
    """The recordings of one session with CUDA graphs enabled.

    A shape is recorded after more than `patience` calls, or at once in `recording_at_once`. At most `most` recordings are kept
    (LRU) and `most_ever` made, because ONNX Runtime does not free them. If a call cannot be recorded, this is logged, and no more
    recordings are made.
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
        """The recording of these shapes that this thread made, or None."""
        if self._thread != threading.get_ident():
            # Another thread runs the session now; recordings cannot be replayed on it.
            self._thread = threading.get_ident()
            self.drop()
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
        return recording

    def is_due(self, key: Key) -> bool:
        """Counts a call of shapes without a recording. Returns whether to record them now."""
        if self._left <= 0:
            return False
        if len(self._calls) >= _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        return self._calls[key] > self._patience or records_at_once()

    def record(
        self,
        key: Key,
        inputs: Mapping[str, torch.Tensor],
        outputs: Sequence[torch.Tensor],
        held: Mapping[str, torch.Tensor] | None = None,
    ) -> Recording | None:
        """Records a call on copies of `inputs`, on `held` itself, and on new outputs of the shapes and types of `outputs`.

        Returns None if another thread uses the device, or if the call cannot be recorded.
        """
        if not DEVICE_IN_USE.acquire(blocking=False):
            return None
        try:
            recording = self._prepare(inputs, outputs, held or {})
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
        """Drops all recordings. The memory that they use may be freed after this."""
        self._recordings.clear()
        self._calls.clear()

    def _prepare(
        self, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor], held: Mapping[str, torch.Tensor]
    ) -> Recording:
        self._left -= 1
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        results = [torch.empty_like(tensor) for tensor in outputs]
        graph_id = next(self._ids)
        binding = Binding(self._session, self._device, graph_id)
        binding.bind({**own, **held}, results)
        return Recording(graph_id, own, held, results, binding.run)
