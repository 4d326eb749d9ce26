"""Reads an IP-Adapter's file, in the layout of h94/IP-Adapter's safetensors: its image projection, and the weights that make keys
and values of its tokens for each cross-attention of a UNet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch.nn import functional

from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.files import MOST_TENSORS
from img2img_server.bundle.image_adapters import (
    KEY,
    LAYERS,
    PROJECTION,
    VALUE,
    AdapterNeeds,
    PromptKind,
    Shapes,
    difference,
    needs_of,
)
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.image_prompts.projection import Projection, shapes_of

_TYPES = ("F16", "BF16", "F32")
"""Types of weights, by safetensors' names."""
_MOST_NAME = 100
"""Maximum characters of a name in a message."""
_ROWS, _ROWS_ON_CPU = 8192, 256
"""Rows of the weights of keys and values that are converted to fp32 at a time. On a CPU as many as fit its cache (2 MiB for
SDXL), so that the converted weights are not written to main memory; for so little work, threads would wait for each other."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An IP-Adapter in memory, on the CPU. `weight` [W, C] makes of a token, for each layer, its key and then its value."""

    needs: AdapterNeeds
    projection: Projection
    weight: torch.Tensor

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.weight.nbytes + sum(tensor.nbytes for tensor in self.projection.weights.values())

    def states(self, given: torch.Tensor) -> torch.Tensor:
        """The keys and values [N, W], in fp32, of an image's tokens. `given` is the image encoder's output for the image: hidden
        states [1, T, H] if the adapter reads them, else an embedding [1, P]."""
        tokens = self.projection(given)[0]
        if tokens.device.type != "cpu":
            return self._of(tokens, _ROWS)
        with _one_thread():
            return self._of(tokens, _ROWS_ON_CPU)

    def _of(self, tokens: torch.Tensor, rows: int) -> torch.Tensor:
        parts = (send(part, tokens.device, torch.float32) for part in torch.split(self.weight, rows))
        return torch.cat([functional.linear(tokens, part) for part in parts], dim=-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's calls on this thread use no others within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_adapter(path: Path, model: PromptKind) -> AdapterWeights:
    """Reads an IP-Adapter that fits a `model`. No weight is read before all names and shapes are known to be right. Raises
    AdapterProblem."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            needs, names = _check(_shapes(file), model)
            # Copies: what stays in the file would change with it.
            weights = {name: file.get_tensor(PROJECTION + name).clone() for name in names}
            layers = range(1, 2 * len(model.layer_widths), 2)
            weight = torch.cat([file.get_tensor(f"{LAYERS}{layer}.{part}") for layer in layers for part in (KEY, VALUE)])
    except OSError as error:
        raise AdapterProblem(f"cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise AdapterProblem(f"is damaged or not a safetensors file: {error}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in (weight, *weights.values())):
        raise AdapterProblem("is damaged: its weights contain NaN or infinite numbers; download or copy it again")
    return AdapterWeights(needs, Projection(needs.kind, weights), weight)


def _shapes(file: Any) -> Shapes:
    """The shapes of the IP-Adapter's tensors. Raises AdapterProblem for too many, and for other types than weights have."""
    names = [name for name in file.keys() if name.startswith((PROJECTION, LAYERS))]  # noqa: SIM118 - not a dictionary
    if len(names) > MOST_TENSORS:
        raise AdapterProblem(f"has more than {MOST_TENSORS} tensors")
    for name in names:
        if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
            raise AdapterProblem(f"has {name[:_MOST_NAME]} in {kind}, and not in one of {', '.join(_TYPES)}: convert it")
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _check(shapes: Shapes, model: PromptKind) -> tuple[AdapterNeeds, list[str]]:
    """The requirements of an IP-Adapter with these shapes, and the names of the weights of its image projection. Raises
    AdapterProblem."""
    needs = needs_of(shapes)
    if problem := difference(needs.fits, model):
        raise AdapterProblem(f"does not fit the model: {problem}")
    found = {name.removeprefix(PROJECTION): shape for name, shape in shapes.items() if name.startswith(PROJECTION)}
    try:
        expected = shapes_of(needs.kind, needs.encoder_width, needs.fits.text_width, found)
    except LookupError:
        raise AdapterProblem(
            f"is damaged: weights of its image projection ({PROJECTION}*) are missing or have no shape"
        ) from None
    for name in (*expected, *found):
        if found.get(name) != expected.get(name):
            one, other = (list(known[name]) if name in known else "none" for known in (found, expected))
            raise AdapterProblem(f"is damaged: the shape of {PROJECTION}{name[:_MOST_NAME]} is {one}, and {other} is expected")
    return needs, list(expected)
