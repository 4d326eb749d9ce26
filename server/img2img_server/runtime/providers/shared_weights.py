"""Weights on the GPU that the graphs of a component share: the plain graph, the LoRA graph and the control graph.

By default each session copies the weights of its graph to the GPU. With `add_initializer` it uses values that are there already.
ONNX Runtime's optimizers read the file all the same: a weight that one of them changed in place would be wrong, without an error.
`open_session` disables the one that may; tests/cuda/test_shared_weights.py compares the weights of optimized graphs with the
file.
"""

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from img2img_server.errors import BundleError
from img2img_server.runtime.common.out_of_memory import RUNTIME_ERRORS
from img2img_server.runtime.onnx.graph_weights import Place, external_weights

_LEAST = 4096
"""Bytes of the smallest shared weight: smaller ones are often numbers that are needed on the CPU."""


Weights = Mapping[str, torch.Tensor]
"""Tensors on the GPU, by the names of a graph's weights."""


class SharedWeights:
    """The weights on `device` of the graphs of one model, by their place in the weights file. Freed with the last session that
    was opened with them. Thread-safe."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Place, torch.Tensor] = weakref.WeakValueDictionary()

    def of(self, graph: Path) -> Weights:
        """The weights of a graph, by name. A weight that another graph uses is not copied to the device again. Empty if the
        directory has no other graph. Raises BundleError if the device has not enough memory."""
        if not any(other != graph for other in graph.parent.glob("*.onnx")):
            return {}
        try:
            with self._lock:
                wanted = {name: place for name, place in external_weights(graph).items() if place.bytes >= _LEAST}
                return {name: self._send(place) for name, place in wanted.items()}
        except RUNTIME_ERRORS as error:
            raise BundleError(f"{graph}: its weights cannot be sent to the GPU: {error}") from error

    def _send(self, place: Place) -> torch.Tensor:
        tensor = self._known.get(place)
        if tensor is None:
            tensor = self._known[place] = place.read().to(self._device)
        return tensor
