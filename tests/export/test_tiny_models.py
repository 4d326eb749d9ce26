"""The tiny models are fit to be compared on: the same every time, with contrast, and no part of a request without effect."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from covering import nightly_but
from img2img_server.bundle.manifest import digest_files, list_files
from img2img_server.runtime.control.own import edges
from PIL import Image

NAMES = sorted(tiny_models.BUILDERS)


@pytest.mark.parametrize("name", nightly_but(NAMES, "sd1", "sdxl", "sd3"))
def test_a_model_is_the_same_every_time(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = tiny_model(name), tiny_models.build(name, tmp_path / name)
    weights = [file for file in list_files(first) if file.endswith(".safetensors")]
    assert weights
    assert digest_files(first, weights) == digest_files(second, weights)


_NO_GUIDANCE = {"flux", "flux-control", "flux-dev", "qwenimage", "zimage", "lcm"}
"""Models whose guidance is none (schnell), goes by another argument, or has hardly any effect on random weights."""


_FAINT = {
    "flux2", "klein", "kontext", "longcat-edit", "qwenimage-edit", "qwenimage-edit-plus", "qwenimage-layered", "qwenimage2",
    "sana-sprint", "sd-tiny-vae",
}  # fmt: skip
"""Models with random weights whose images depend less on the source or the prompt than the others' do."""


@pytest.mark.parametrize("name", nightly_but(sorted(set(NAMES) - _FAINT), "sd1", "sdxl", "sd3"))
def test_every_request_field_affects_the_image(name: str, tiny_model: Callable[[str], Path]) -> None:
    from img2img_export.convert.graphs import quiet
    from img2img_export.convert.models import Loader
    from img2img_export.read.checkpoint import INDEX_NAME, read_index, read_layout
    from img2img_export.verify.images import sample_image

    directory = tiny_model(name)
    pipeline = Loader(directory, read_layout(read_index(directory / INDEX_NAME))).pipeline()
    known = inspect.signature(pipeline.__call__).parameters

    def draw(**changes: Any) -> np.ndarray:
        seed, flip = changes.pop("seed", 0), changes.pop("flip", False)
        image = sample_image(64, 64)
        settings = {"prompt": "a lake", "guidance_scale": 7.5, "strength": 0.6, "height": 64, "width": 64, **changes}
        settings["mask_image"] = Image.new("L", (64, 64), 255)
        settings["control_image"] = edges(sample_image(64, 64), (64, 64))
        with quiet(), torch.no_grad():
            images = pipeline(
                image=image.rotate(180) if flip else image,
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=5,
                **{name: value for name, value in settings.items() if name in known},
            ).images
        return np.asarray(images[0], np.int16)

    reference = draw()
    assert reference.std() > 25, "grey images compare well whatever went wrong"
    changes: list[dict[str, Any]] = [{"prompt": "winter forest"}, {"seed": 1}, {"flip": True}]
    changes += [{"guidance_scale": 1.0}] if name not in _NO_GUIDANCE else []
    changes += [{"strength": 0.9}] if "strength" in known else []
    differences = {str(change): float(np.abs(draw(**change) - reference).mean()) for change in changes}
    assert all(difference > 3 for difference in differences.values()), differences
