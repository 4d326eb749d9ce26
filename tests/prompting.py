"""Models that take image prompts, for tests of the server: the model and its image encoder are fakes, and the adapters are
headers without weights."""

from dataclasses import replace
from pathlib import Path

from adapter_headers import EMBEDDING, TEXT, WIDTHS, write_header
from fakes import FakePipeline
from img2img_server.bundle.image_adapters import PromptKind
from img2img_server.bundle.image_encoders import FAMILY, EncoderWidths
from img2img_server.models.registry import Model
from img2img_server.support.model_fields import IMAGE_PROMPTS
from running import manifest

ADAPTERS = ("plain", "style")
SIDE = 16
"""The side of the squares that the image encoder reads."""

KIND = PromptKind(WIDTHS, TEXT)
"""The kind of models that ADAPTERS fit."""


def model(name: str, pipeline: FakePipeline) -> Model:
    """A model that ADAPTERS fit; sets its pipeline to take image prompts."""
    pipeline.fields = {**pipeline.fields, **IMAGE_PROMPTS}
    return Model(name, manifest(f"acme/{name}"), pipeline, prompt_kind=KIND)


def image_encoder(name: str = "vit") -> Model:
    """The image encoder of ADAPTERS."""
    pipeline = FakePipeline()
    pipeline.native_size = (SIDE, SIDE)
    kind = replace(manifest(f"acme/{name}"), family=FAMILY)
    return Model(name, kind, pipeline, encoder_widths=EncoderWidths(EMBEDDING, 1))


def write_adapters(folder: Path) -> Path:
    """Writes ADAPTERS, and one of another model, to the folder."""
    for name in ADAPTERS:
        write_header(folder / f"{name}.safetensors")
    write_header(folder / "other.safetensors", text=2 * TEXT)
    return folder
