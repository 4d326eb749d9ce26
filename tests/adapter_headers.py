"""Files with the header of an image adapter (IP-Adapter) and no weights: enough for a server to find the models that fit."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTHS, TEXT = (32, 32, 64, 64, 64), 48
"""Widths of the adapters' model."""
EMBEDDING, STATE = 24, 40
"""Widths of the image encoder."""

PROJECTIONS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "plain": {"proj.weight": (4 * TEXT, EMBEDDING), "proj.bias": (4 * TEXT,), "norm.weight": (TEXT,), "norm.bias": (TEXT,)},
    "full": {"proj.0.weight": (STATE, STATE), "proj.2.weight": (TEXT, STATE), "proj.3.weight": (TEXT,)},
    "plus": {"latents": (1, 16, 32), "proj_in.weight": (32, STATE), "proj_out.weight": (TEXT, 32)},
    "faceid": {"proj.0.weight": (1024, 512), "proj.2.weight": (4 * TEXT, 1024), "norm.weight": (TEXT,)},
    "faceid plus": {"proj.0.weight": (1024, 512), "perceiver_resampler.proj_in.weight": (TEXT, STATE)},
}
"""Shapes of the image projection of each kind of adapter."""


def shapes_of(kind: str, widths: Sequence[int] = WIDTHS, text: int = TEXT) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors."""
    made = {f"image_proj.{name}": shape for name, shape in PROJECTIONS[kind].items()}
    for index, width in enumerate(widths):
        for part in ("to_k_ip", "to_v_ip"):
            made[f"ip_adapter.{2 * index + 1}.{part}.weight"] = (width, text)
    return made


def header_of(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """A safetensors header of tensors with these shapes, all without bytes."""
    items = {name: {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **items}).encode()
    return struct.pack("<Q", len(text)) + text


def write_header(file: Path, kind: str = "plain", **changes: object) -> Path:
    """Writes a file with the header of an adapter. `changes` are arguments of `shapes_of`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header_of(shapes_of(kind, **changes)))  # type: ignore[arg-type]
    return file
