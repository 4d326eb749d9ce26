"""Reads an IP-Adapter's file, in the layout of h94/IP-Adapter's safetensors: its image projection, and the weights that make keys
and values of its tokens for each cross-attention layer of a UNet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch.nn import functional

from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.files import MOST_TENSORS
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.image_prompts.projection import Layout, Projection, Shapes, layout_of

_PROJECTION, _LAYERS = "image_proj.", "ip_adapter."
_TYPES = ("F16", "BF16", "F32")
"""Types of weights, by safetensors' names."""
_FACE_ID = ("_lora.", "image_proj.perceiver_resampler.")
"""Parts of names that only IP-Adapters for FaceID have."""
_PARTS = ("to_k_ip", "to_v_ip")
_MOST_NAME = 200
"""Maximum characters of a name in a message."""
_MOST_ROWS = 8192
"""Rows of the weights of keys and values that are converted to fp32 at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAdapter:
    """An IP-Adapter in memory, on the CPU. `weight` [W, C] makes of a token, for each layer, its key and then its value."""

    projection: Projection
    weight: torch.Tensor

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.weight.nbytes + sum(tensor.nbytes for tensor in self.projection.weights.values())

    def states(self, given: torch.Tensor) -> torch.Tensor:
        """The keys and values [N, W], in fp32, of an image's tokens. `given` is the image encoder's output for the image: hidden
        states [1, T, H] if the projection reads them, else an embedding [1, P]."""
        tokens = self.projection(given)[0]
        parts = (send(part, tokens.device, torch.float32) for part in self.weight.split(_MOST_ROWS))
        return torch.cat([functional.linear(tokens, part) for part in parts], dim=-1)


def read_adapter(path: Path, widths: Sequence[int], text_width: int) -> ImageAdapter:
    """Reads an IP-Adapter for a UNet whose cross-attention layers have these `widths`, in diffusers' order, and read tokens of
    `text_width`. Nothing is read before all names and shapes are known to be right. Raises AdapterProblem."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            layout, names = _check(_shapes(file), widths, text_width)
            # Copies: what stays in the file would change with it.
            weights = {name: file.get_tensor(_PROJECTION + name).clone() for name in layout.shapes}
            weight = torch.cat([file.get_tensor(name) for name in names])
    except OSError as error:
        raise AdapterProblem(f"cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise AdapterProblem(f"is damaged or not a safetensors file: {error}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in (weight, *weights.values())):
        raise AdapterProblem("is damaged: its weights contain NaN or infinite numbers; download or copy it again")
    return ImageAdapter(Projection(layout, weights), weight)


def _shapes(file: Any) -> Shapes:
    """The shapes of a file's tensors. Raises AdapterProblem if one is no weight of an IP-Adapter."""
    names = list(file.keys())
    if len(names) > MOST_TENSORS:
        raise AdapterProblem(f"has more than {MOST_TENSORS} tensors")
    if any(part in name for name in names for part in _FACE_ID) or _is_face_id(names):
        raise AdapterProblem(
            "is an IP-Adapter for FaceID, which does not read images as CLIP does: use one that is not for FaceID"
        )
    if odd := next((name for name in names if not name.startswith((_PROJECTION, _LAYERS))), None):
        raise AdapterProblem(f"is not an IP-Adapter for Stable Diffusion: it contains {odd[:_MOST_NAME]}")
    for name in names:
        if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
            raise AdapterProblem(f"has {name[:_MOST_NAME]} in {kind}, and not in one of {', '.join(_TYPES)}: convert it")
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _is_face_id(names: Iterable[str]) -> bool:
    """Whether the names are those of an IP-Adapter for FaceID whose LoRA was left out."""
    own = {name.removeprefix(_PROJECTION) for name in names if name.startswith(_PROJECTION)}
    return {"proj.0.weight", "proj.2.weight", "norm.weight"} <= own and "proj.weight" not in own


def _check(shapes: Shapes, widths: Sequence[int], text_width: int) -> tuple[Layout, list[str]]:
    """The layout of the file's image projection, and the names of the layers' weights, in order. Raises AdapterProblem."""
    own = {name.removeprefix(_PROJECTION): shape for name, shape in shapes.items() if name.startswith(_PROJECTION)}
    try:
        layout = layout_of(own)
    except KeyError as error:
        raise AdapterProblem(f"is not an IP-Adapter for Stable Diffusion: it contains no {_PROJECTION}{error.args[0]}") from None
    except ValueError as error:
        raise AdapterProblem(f"is damaged: {_PROJECTION}{error}") from None
    expected = {_PROJECTION + name: shape for name, shape in layout.shapes.items()}
    _compare({name: shape for name, shape in shapes.items() if name.startswith(_PROJECTION)}, expected, "is damaged")
    layers = {
        f"{_LAYERS}{2 * index + 1}.{part}.weight": (width, text_width) for index, width in enumerate(widths) for part in _PARTS
    }
    found = {name: shape for name, shape in shapes.items() if name.startswith(_LAYERS)}
    _compare(found, layers, "does not fit the model, and is for another size of Stable Diffusion")
    if layout.outs != text_width:
        raise AdapterProblem(
            f"is damaged: its image projection makes tokens of {layout.outs} numbers, its layers read {text_width}"
        )
    return layout, list(layers)


def _compare(found: Shapes, expected: Shapes, problem: str) -> None:
    """Raises AdapterProblem, which begins with the `problem`, if the shapes are not the expected ones."""
    for name in (*expected, *found):
        own, other, shown = found.get(name), expected.get(name), name[:_MOST_NAME]
        if own is None:
            raise AdapterProblem(f"{problem}: it contains no {shown}")
        if other is None:
            raise AdapterProblem(f"{problem}: it contains {shown}, which such an IP-Adapter does not have")
        if own != other:
            raise AdapterProblem(f"{problem}: {shown} has the shape {list(own)}, not {list(other)}")
