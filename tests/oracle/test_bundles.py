"""optimum's own pipeline loads the bundles, and draws what diffusers draws of the model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoPipelineForImage2Image
from img2img_export.verify import images
from optimum.onnxruntime import ORTPipelineForImage2Image

Get = Callable[[str], Path]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner", "lcm"])
def test_optimum_draws_the_same_images_from_the_bundle(name: str, bundle: Get, tiny_model: Get) -> None:
    source = AutoPipelineForImage2Image.from_pretrained(tiny_model(name), use_safetensors=True, local_files_only=True)
    loaded = ORTPipelineForImage2Image.from_pretrained(bundle(name), export=False, local_files_only=True)
    for pipeline in (source, loaded):
        pipeline.set_progress_bar_config(disable=True)
    for case in images.image_cases(source, "stable-diffusion"):
        (reference,) = images.make_references(source, [case])
        (image,) = images.make_references(loaded, [case])
        assert images.measure(case.name, image, reference).passed, case.name


def test_optimum_loads_a_bundle_whose_vae_is_partly_in_fp16(bundle: Get) -> None:
    loaded = ORTPipelineForImage2Image.from_pretrained(bundle("sdxl-overflow"), export=False, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    (image,) = images.make_references(loaded, images.image_cases(loaded, "stable-diffusion-xl")[:1])
    assert np.asarray(image).std() > 10
