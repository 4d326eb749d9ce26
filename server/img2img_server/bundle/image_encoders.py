"""The names in the graph of CLIP's image encoder, which reads the images of image prompts.

Standard library only: the exporter imports this module, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import DAMAGED, read_json
from img2img_server.bundle.manifest import Manifest

FAMILY = "image-encoder"
"""The family of bundles of image encoders, and the component with their graph."""
CLASS = "CLIPVisionModelWithProjection"
"""The class of image encoders that become bundles, of transformers."""

PIXELS = "pixel_values"
"""The input: normalized pixels [rows, 3, S, S] of square images."""
EMBEDS = "image_embeds"
"""The output for the projected embeddings [rows, P]."""
STATES = "hidden_states"
"""The output for the hidden states [rows, T, H] before the last layer."""


@dataclass(frozen=True, slots=True)
class EncoderWidths:
    """The outputs of an image encoder: `projection_dim` numbers for an image, and `hidden_size` for each of its tokens."""

    projection_dim: int
    hidden_size: int


def widths_of(config: Mapping[str, Any]) -> EncoderWidths:
    """The widths of an image encoder with this config.json. Raises KeyError, TypeError or ValueError if it is damaged."""
    return EncoderWidths(int(config["projection_dim"]), int(config["hidden_size"]))


def encoder_widths(bundle: Path, manifest: Manifest) -> EncoderWidths | None:
    """The widths of an image encoder's bundle. None for others, and if they cannot be read: loading the bundle says why."""
    if manifest.family != FAMILY:
        return None
    try:
        return widths_of(read_json(bundle / FAMILY / "config.json"))
    except DAMAGED:
        return None
