"""Runs a session on torch tensors of the device that it computes on: nothing goes through the host, no call waits for the device.

What ONNX Runtime computes on CUDA follows what torch asked for before and precedes what it asks for next, as both use one stream.
Not yet run on a GPU; tests run it on a session of the CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnxruntime
import torch
from torch.utils.dlpack import from_dlpack

from img2img_server.pipelines.graph_replay import NO_GRAPH, Binding, Key, Replays
from img2img_server.pipelines.runners import dtype_of

_MOST_SHAPES = 1024
"""Shapes of inputs whose outputs' shapes are remembered."""


class DeviceRunner:
    """A session whose inputs and outputs are torch tensors on `device`. Only one thread at a time may run it.

    `enter` is called before anything is asked of the device: it sees to it that torch uses the session's stream. `replays` keeps
    recordings of calls, None where there are to be none.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        enter: Callable[[], None] = lambda: None,
        replays: Replays | None = None,
    ) -> None:
        self.inputs: Sequence[Any] = session.get_inputs()
        self.outputs: Sequence[Any] = session.get_outputs()
        self._device = torch.device(device)
        self._enter = enter
        self._replays = replays
        self._types = [dtype_of(item) for item in self.outputs]
        self._binding = Binding(session, self._device, NO_GRAPH)
        self._shapes: dict[Key, list[torch.Size]] = {}

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph on tensors of `device`."""
        self._enter()
        key = tuple(feed[item.name].shape for item in self.inputs)
        shapes = self._shapes.get(key)
        if shapes is None:
            return self._learn(key, feed)
        outputs = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in zip(shapes, self._types, strict=True)]
        if self._replays is not None and self._replays.run(key, feed, outputs):
            return outputs
        self._binding.bind(feed, outputs)
        self._binding.run()
        return outputs

    def _learn(self, key: Key, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The first call with such inputs: only ONNX Runtime knows yet how large its outputs are, so they are of its memory."""
        self._binding.bind(feed, None)
        self._binding.run()
        outputs = [from_dlpack(value) for value in self._binding.take()]
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        self._shapes[key] = [output.shape for output in outputs]
        # DLPack knows no truth values.
        return [output.view(dtype) for output, dtype in zip(outputs, self._types, strict=True)]
