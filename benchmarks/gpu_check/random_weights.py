"""Weights of a model by their names and shapes: random, of the size that PyTorch begins a training with.

The same name and shape always give the same values. So a graph that travels without weights has, on another machine, those of
the PyTorch module, and the fused graph has those of the plain one.
"""

import functools
import math
import zlib
from dataclasses import dataclass

import torch
from img2img_export.convert.external_weights import Weight

_POOL = 8_388_617
"""Numbers that are drawn; a weight is a stretch of them, repeated as often as needed. A prime, so that no two rows are equal."""
_EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")


def random_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of a parameter in float32: weights of norms are near 1, biases near 0, others let activations stay finite."""
    count = math.prod(shape)
    start = zlib.crc32(name.encode()) % _POOL
    parts = [_numbers()[start : start + count]]
    while missing := count - sum(map(len, parts)):
        parts.append(_numbers()[:missing])
    numbers = torch.cat(parts).reshape(shape)
    if len(shape) < 2:
        return 1 + 0.1 * numbers if name.endswith("weight") else 0.02 * numbers
    if name.endswith(_EMBEDDINGS):
        return 0.02 * numbers
    # The variance that PyTorch's layers begin with.
    return numbers / math.sqrt(3 * math.prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class RandomWeight(Weight):
    """A weight of a graph whose values are made when it is written: `source` only has the shape of the parameter `name`."""

    name: str = ""

    def read(self) -> torch.Tensor:
        """The values as the graph wants them."""
        values = random_values(self.name, tuple(self.source.shape))
        return Weight(values, self.dtype, self.shape, self.permutation).read()


@functools.cache
def _numbers() -> torch.Tensor:
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
