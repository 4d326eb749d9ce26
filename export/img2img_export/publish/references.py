"""Keeps the reference images in the bundle, for servers to judge other ways of computing by (img2img_server's gate)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.manifest import Reference
from PIL import Image

if TYPE_CHECKING:
    from img2img_export.verify.images import ImageCase

_FOLDER = "verification/references"


def save(cases: "Sequence[ImageCase]", pictures: Sequence[Image.Image], bundle: Path) -> tuple[Reference, ...]:
    """Writes each case's source and image into `bundle` as PNG, and gives what the manifest says of them."""
    (bundle / _FOLDER).mkdir(parents=True, exist_ok=True)
    references = []
    for number, (case, picture) in enumerate(zip(cases, pictures, strict=True), start=1):
        request = case.request
        # Cases of one size have the same source.
        source = f"{_FOLDER}/source-{request.image.width}x{request.image.height}.png"
        drawn = f"{_FOLDER}/{number}.png"
        request.image.save(bundle / source, optimize=True)
        picture.save(bundle / drawn, optimize=True)
        references.append(
            Reference(
                case=case.name,
                source=source,
                picture=drawn,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt or "",
                strength=request.strength,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                seed=request.seeds[0],
            )
        )
    return tuple(references)
