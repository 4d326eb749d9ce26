"""Runs a session on torch tensors on its own device: without copies through the host, and without waiting for the device.

On CUDA, torch and ONNX Runtime use one stream, so their work is done in the order of submission. tests/cuda runs this with the
CUDA provider on fake libraries, tests/server with a CPU session.
"""

import logging
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import onnxruntime
import torch
from torch.utils.dlpack import from_dlpack

from img2img_server.bundle.adapters import ADAPTERS
from img2img_server.runtime.common.out_of_memory import KEEPERS, RUNTIME_ERRORS
from img2img_server.runtime.onnx.runners import dtype_of
from img2img_server.runtime.providers.cuda_graphs import (
    NO_GRAPH,
    ROW_BUCKETS,
    SHRINK,
    Binding,
    Key,
    Recording,
    Replays,
    bucket_of,
)

_log = logging.getLogger(__name__)

_MOST_SHAPES = 1024
"""Maximum number of input shapes whose output shapes are remembered."""

Feed = Mapping[str, torch.Tensor]


class DeviceRunner:
    """A session whose inputs and outputs are torch tensors on `device`. Only one thread at a time may run it.

    `enter` is called before each call, to make the session's stream torch's current one. `replays` keeps recordings of calls,
    None for no recordings. If all inputs and outputs of the graph have an axis of rows, calls are recorded for ROW_BUCKETS. The
    matrices of LoRAs (bundle/adapters.py) are read in place: a recording sees what was written into them since.
    `owner` identifies the model (out_of_memory.py). `weights` are the tensors of SessionOptions.weights; the runner holds
    them as long as its session.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        enter: Callable[[], None] = lambda: None,
        replays: Replays | None = None,
        owner: Hashable = None,
        weights: Feed | None = None,
    ) -> None:
        self.owner = owner
        self.weights = weights
        self.inputs: Sequence[Any] = session.get_inputs()
        self.outputs: Sequence[Any] = session.get_outputs()
        self._held = [item.name for item in self.inputs if item.shape and item.shape[0] == ADAPTERS]
        own = [item for item in self.inputs if item.name not in set(self._held)]
        self._own = own
        self._names = [item.name for item in own]
        self._last_held: Feed = {}
        self._session = session
        self._device = torch.device(device)
        self._enter = enter
        self._replays = replays
        self._types = [dtype_of(item) for item in self.outputs]
        self._binding = Binding(session, self._device, NO_GRAPH)
        self._shapes: dict[Key, list[torch.Size]] = {}
        # Flux's positions have the axis of tokens first, which is a later one of other inputs.
        inner = {axis for item in own for axis in item.shape[1:] if isinstance(axis, str)}
        self._with_rows = frozenset(item.name for item in own if item.shape and item.shape[0] not in inner)
        self._has_rows = all(_varies(item) for item in (*own, *self.outputs))
        self.row_buckets = ROW_BUCKETS if replays is not None and self._has_rows else ()
        self._smallest: Key | None = None
        self._busy = threading.Lock()
        KEEPERS.add(self)

    def run(self, feed: Feed) -> list[torch.Tensor]:
        """Runs the graph on tensors of `device`."""
        with self._busy:
            self._enter()
            if self._replays is None:
                return self._call(feed)
            results = []
            for rows, part in self._parts(feed):
                recording, is_new = self._recorded(self._replays, part, rows)
                if recording is None:
                    results.append(self._call(part))
                    continue
                if not is_new:
                    recording.run()
                results.append([(buffer if rows is None else buffer[:rows]).clone() for buffer in recording.outputs])
            return results[0] if len(results) == 1 else [torch.cat(outputs) for outputs in zip(*results, strict=True)]

    def give_back(self) -> None:
        """Frees the recordings, whose memory is in ONNX Runtime's arena, and then the arena's unused memory. Does nothing during
        a call."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            if self._replays is not None:
                self._replays.drop()
            if self._smallest is None:
                return
            # The arena shrinks only after a run.
            binding = Binding(self._session, self._device, NO_GRAPH, SHRINK)
            named = zip(self._own, self._smallest, strict=False)
            binding.bind({item.name: self._zeros(item, shape) for item, shape in named} | dict(self._last_held), None)
            binding.run()
        except RUNTIME_ERRORS as error:
            _log.warning("ONNX Runtime's arena could not be shrunk: %s", str(error).partition("\n")[0])
        finally:
            self._busy.release()

    def _zeros(self, item: Any, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype_of(item), device=self._device)

    def _elements(self, key: Key) -> int:
        return sum(math.prod(shape) for shape in key[: len(self._names)])

    def _parts(self, feed: Feed) -> list[tuple[int | None, Feed]]:
        """Divides `feed` into calls of at most ROW_BUCKETS[-1] rows, each with its number of rows; None for graphs without
        rows."""
        counts = {feed[name].shape[0] for name in self._with_rows} if self._has_rows else set()
        if len(counts) != 1:
            return [(None, feed)]
        (rows,), most = counts, ROW_BUCKETS[-1]
        if rows <= most:
            return [(rows, feed)]
        return [
            (
                min(most, rows - start),
                {name: tensor[start : start + most] if name in self._with_rows else tensor for name, tensor in feed.items()},
            )
            for start in range(0, rows, most)
        ]

    def _key(self, feed: Feed, rows: int | None) -> Key:
        shapes = ((name, feed[name].shape) for name in self._names)
        key: Key = tuple(
            shape if rows is None or name not in self._with_rows else torch.Size((rows, *shape[1:])) for name, shape in shapes
        )
        # Held inputs are allocated together, so the first stands for all.
        return key if not self._held else (*key, (feed[self._held[0]].data_ptr(), *feed[self._held[0]].shape))

    def _recorded(self, replays: Replays, feed: Feed, rows: int | None) -> tuple[Recording | None, bool]:
        """The recording for a call of `rows` rows (None for graphs without rows) with its inputs filled in, None if there is
        none, and whether it was made just now, so that its outputs are computed already."""
        key = self._key(feed, None if rows is None else bucket_of(rows))
        recording = replays.find(key)
        if recording is None:
            return (self._record(replays, key, feed) if replays.is_due(key) else None), True
        for name, buffer in recording.inputs.items():
            (buffer if rows is None else buffer[: len(feed[name])]).copy_(feed[name])
        return recording, False

    def _record(self, replays: Replays, key: Key, feed: Feed) -> Recording | None:
        """Records a call of `feed`, padded to the shapes of `key`."""
        padded = {name: _padded(feed[name].contiguous(), shape) for name, shape in zip(self._names, key, strict=False)}
        held = {name: feed[name] for name in self._held}
        return replays.record(key, padded, self._empty(key) or self._call(padded | held), held)

    def _empty(self, key: Key) -> list[torch.Tensor]:
        """New output tensors for a call of these shapes; empty if their shapes are not known yet."""
        shapes = self._shapes.get(key, [])
        return [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in zip(shapes, self._types, strict=False)]

    def _call(self, feed: Feed) -> list[torch.Tensor]:
        """Runs the graph without a recording."""
        held = {name: feed[name] for name in self._held}
        self._last_held = held
        feed = {name: feed[name] for name in self._names} | held
        key = self._key(feed, None)
        outputs = self._empty(key)
        if not outputs:
            return self._learn(key, feed)
        self._binding.bind(feed, outputs)
        self._binding.run()
        return outputs

    def _learn(self, key: Key, feed: Feed) -> list[torch.Tensor]:
        """Makes the first call of these shapes: ONNX Runtime allocates the outputs, whose shapes are not known yet.

        They are copied out of its arena, in which a later recording may use the same memory.
        """
        self._binding.bind(feed, None)
        self._binding.run()
        values = self._binding.take()
        # DLPack has no bool.
        outputs = [from_dlpack(value).view(dtype).clone() for value, dtype in zip(values, self._types, strict=True)]
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        self._shapes[key] = [output.shape for output in outputs]
        self._smallest = min((key, self._smallest or key), key=self._elements)
        return outputs


def _varies(item: Any) -> bool:
    """Whether the first axis of a graph's input or output is dynamic."""
    return bool(item.shape) and not isinstance(item.shape[0], int)


def _padded(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`tensor` with its last row repeated up to `shape`."""
    missing = shape[0] - tensor.shape[0] if shape else 0
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
