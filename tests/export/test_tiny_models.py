"""The tiny models are fit to be compared on: the same every time, with contrast, and no part of a request without effect."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoPipelineForImage2Image
from img2img_server.bundle import digest_files, list_files

NAMES = sorted(tiny_models.BUILDERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_same_every_time(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = tiny_model(name), tiny_models.build(name, tmp_path / name)
    weights = [file for file in list_files(first) if file.endswith(".safetensors")]
    assert weights
    assert digest_files(first, weights) == digest_files(second, weights)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_a_request_shows_in_the_picture(name: str, tiny_model: Callable[[str], Path]) -> None:
    from img2img_export.graphs import quiet
    from img2img_export.pictures import sample_picture

    pipeline = AutoPipelineForImage2Image.from_pretrained(tiny_model(name), use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64} if name == "kandinsky22" else {}

    def draw(
        prompt: str = "a lake", seed: int = 0, guidance: float = 7.5, strength: float = 0.6, flip: bool = False
    ) -> np.ndarray:
        image = sample_picture(64, 64)
        with quiet():
            pictures = pipeline(
                prompt,
                image=image.rotate(180) if flip else image,
                generator=torch.Generator().manual_seed(seed),
                guidance_scale=guidance,
                strength=strength,
                num_inference_steps=5,
                **size,
            ).images
        return np.asarray(pictures[0], np.int16)

    reference = draw()
    assert reference.std() > 25, "grey pictures compare well whatever went wrong"
    others = [draw("winter forest"), draw(seed=1), draw(guidance=1.0), draw(strength=0.9), draw(flip=True)]
    assert [float(np.abs(other - reference).mean()) > 3 for other in others] == [True] * 5
