"""How a source is resized for a model, and the sizes that models choose: diffusers' own functions are the oracle."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deepfloyd_if.pipeline_if_img2img import resize as resize_for_if
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions as qwen_dimensions
from img2img_server import images
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule
from img2img_server.runtime.common.sources import source_rule, steps_of
from img2img_server.support.source_rule import EDITED, STRETCHED, SourceRule
from PIL import Image

BICUBIC = SourceRule("BICUBIC", 1)
LIMITS = ImageLimits(max_pixels=64 * 64)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fake(name: str, unet_size: int = 64, **processor: Any) -> Any:
    """A pipeline of diffusers' class `name` with nothing but an image processor and a UNet's configuration."""
    pipe = object.__new__(getattr(diffusers, name))
    parts = {"unet": SimpleNamespace(config=SimpleNamespace(sample_size=unet_size))}
    if processor:
        parts["image_processor"] = VaeImageProcessor(**processor)
    pipe.__dict__.update(parts)
    return pipe


@pytest.mark.parametrize(("rule", "settings"), [(STRETCHED, {}), (BICUBIC, {"resample": "bicubic", "reducing_gap": 1})])
@pytest.mark.parametrize("size", [(64, 64), (40, 56), (16, 24)])
def test_source_is_resized_as_by_the_pipelines_image_processor(
    rule: SourceRule, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    source = noise(104, 72)
    ours = images.prepare(source, size, rule, LIMITS)
    theirs = VaeImageProcessor(**settings).resize(source, size[1], size[0])
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert not np.array_equal(np.asarray(ours), np.asarray(images.prepare(source, size, SourceRule("NEAREST"), LIMITS)))


def test_source_rule_is_derived_from_the_pipelines_image_processor() -> None:
    assert source_rule(fake("StableDiffusionImg2ImgPipeline", vae_scale_factor=8)) == STRETCHED
    assert source_rule(fake("Kandinsky3Img2ImgPipeline", resample="bicubic", reducing_gap=1)) == BICUBIC
    assert source_rule(fake("StableDiffusionInstructPix2PixPipeline", resample="linear")) == SourceRule("BILINEAR")
    for name in ("FluxKontextPipeline", "Flux2KleinPipeline", "QwenImageEditPlusPipeline", "SanaSprintImg2ImgPipeline"):
        assert replace(source_rule(fake(name, vae_scale_factor=16)), edit_size=None) == EDITED
    assert source_rule(fake("IFImg2ImgPipeline")) == SourceRule(keeps_size=True, shorter_side=64)


def test_editing_model_gets_the_source_unresized_up_to_the_limit() -> None:
    source = noise(64, 40)
    assert images.prepare(source, (16, 16), EDITED, LIMITS) is source
    assert images.prepare(noise(200, 50), (16, 16), EDITED, LIMITS).size == (128, 32)


def test_model_chosen_sizes_match_diffusers() -> None:
    sides = (17, 64, 100, 333, 640, 1001)
    for source in itertools.product(sides, sides):
        own = SourceRule(shorter_side=64).own_size(source)
        assert own == resize_for_if(Image.new("RGB", source), 64).size
        width, height = SourceRule(area=1024 * 1024).own_size(source) or (0, 0)
        assert (width, height) == calculate_dimensions(1024 * 1024, source[0] / source[1])


def test_only_the_model_chosen_size_can_be_requested() -> None:
    rule, limits = SourceRule(keeps_size=True, shorter_side=64), ImageLimits()
    for asked in (SizeRule(), SizeRule(96, 64), SizeRule(height=64), SizeRule(area=4096), SizeRule(longest_side=96)):
        assert images.result_size((104, 72), asked, rule, 8, limits) == (96, 64)
    for asked, field in (
        (SizeRule(64, 64), "width"),
        (SizeRule(height=72), "height"),
        (SizeRule(longest_side=64), "fit.longest_side"),
    ):
        with pytest.raises(InvalidField, match="this model sets the size itself: of this image it makes 96 x 64") as raised:
            images.result_size((104, 72), asked, rule, 8, limits)
        assert raised.value.field == field
    with pytest.raises(InvalidField, match="6144 x 64 pixels"):
        images.result_size((9600, 100), SizeRule(), rule, 8, ImageLimits(max_pixels=256 * 256))


def test_a_model_of_square_images_refuses_others() -> None:
    """Kandinsky 2.1, whose pipeline fails on them."""
    rule = SourceRule(square=True)
    assert images.result_size((104, 72), SizeRule(64, 64), rule, 8, ImageLimits()) == (64, 64)
    for asked, field in ((SizeRule(), "image"), (SizeRule(64), "width"), (SizeRule(height=64), "height")):
        with pytest.raises(InvalidField, match="this model makes square images: set width and height") as raised:
            images.result_size((104, 72), asked, rule, 8, ImageLimits())
        assert raised.value.field == field


def test_step_count_follows_the_pipelines_rounding_rule() -> None:
    """Some round down, others up; those without a rule run all."""
    down, up = fake("StableDiffusionImg2ImgPipeline"), fake("FluxImg2ImgPipeline")
    assert [steps_of(down, count, strength) for count, strength in ((10, 0.55), (1, 0.8), (4, 1.0))] == [5, 0, 4]
    assert [steps_of(up, count, strength) for count, strength in ((10, 0.55), (1, 0.8), (4, 1.0))] == [6, 1, 4]
    assert steps_of(fake("FluxKontextPipeline"), 7, 0.1) == 7


SIZES = [(104, 72), (72, 104), (64, 64), (1000, 667), (667, 1000), (1024, 1024), (1333, 750), (512, 2048), (1920, 1080)]
"""Sizes of sources, below and above a million pixels."""


def edited(name: str, source: tuple[int, int], asked: SizeRule, multiple: int, by: tuple[int, int] | None = None) -> Any:
    return images.result_size(source, asked, source_rule(fake(name, vae_scale_factor=16)), multiple, ImageLimits(), by)


@pytest.mark.parametrize("source", SIZES)
def test_editing_models_choose_the_size_as_in_diffusers(source: tuple[int, int]) -> None:
    width, height = source
    for name in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        expected = qwen_dimensions(1024 * 1024, width / height)
        assert edited(name, source, SizeRule(), 16) == expected
        assert edited(name, source, SizeRule(height=64), 16) == (expected[0], 64), "each side on its own"
    image = Flux2ImageProcessor._resize_if_exceeds_area(Image.new("RGB", source))
    assert edited("Flux2KleinPipeline", source, SizeRule(), 16) == tuple(side // 16 * 16 for side in image.size)
    _, *preferred = min((abs(width / height - one / other), one, other) for one, other in PREFERRED_KONTEXT_RESOLUTIONS)
    assert edited("FluxKontextPipeline", source, SizeRule(), 16) == tuple(preferred)
    assert edited("FluxKontextPipeline", source, SizeRule(128, 64), 16) == (128, 64)


def test_fit_overrides_the_models_size_rule() -> None:
    for name in ("QwenImageEditPlusPipeline", "Flux2Pipeline", "FluxKontextPipeline"):
        assert edited(name, (104, 72), SizeRule(longest_side=104), 8) == (104, 72)


def test_last_reference_sets_the_size_as_in_diffusers() -> None:
    by = qwen_dimensions(1024 * 1024, 72 / 104)
    assert edited("QwenImageEditPlusPipeline", (104, 72), SizeRule(), 16, (72, 104)) == by
    assert source_rule(fake("QwenImage21Pipeline")).edit_size == source_rule(fake("QwenImageEditPlusPipeline")).edit_size
    sizes = {
        name: source_rule(fake(name)).edit_size for name in ("Flux2Pipeline", "QwenImageEditPipeline", "FluxKontextPipeline")
    }
    assert not any(size is None or size.by_last for size in sizes.values())


def test_size_above_the_limit_is_refused_with_advice() -> None:
    rule, limits = source_rule(fake("QwenImageEditPipeline")), ImageLimits(max_pixels=512 * 512)
    with pytest.raises(InvalidField, match="1024 x 1024 pixels, the maximum is 262144: set fit") as raised:
        images.result_size((64, 64), SizeRule(), rule, 16, limits)
    assert raised.value.field == "image"
    assert images.result_size((64, 64), SizeRule(512, 512), rule, 16, limits) == (512, 512)
