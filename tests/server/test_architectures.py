"""Architectures other than Stable Diffusion 1, 2 and XL, stepped and opaque, exported from tiny models: images match diffusers
within 1/255."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers_oracle import drawn, oracle, source
from fakes import make_request
from img2img_server import images
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule
from img2img_server.runtime.common.sources import source_rule
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

ARCHITECTURES = {
    "sd-tiny-vae": "onnx",
    "sd-masked": "onnx",
    "pix2pix": "onnx",
    "sd3": "onnx",
    "sd3-no-t5": "onnx",
    "flux": "onnx",
    "flux-dev": "onnx",
    "kontext": "onnx",
    "chroma": "onnx",
    "kandinsky21": "hybrid",
    "kandinsky22": "hybrid",
    "kandinsky3": "hybrid",
    "kolors": "hybrid",
    "if": "hybrid",
    "sd-pag": "torch",
    "sdxl-pag": "torch",
    "sd3-pag": "torch",
    "zimage": "onnx",
    "qwenimage": "onnx",
    "klein": "onnx",
    "flux2": "onnx",
    "qwenimage-edit": "onnx",
    "qwenimage-edit-plus": "onnx",
    "qwenimage2": "torch",
    "longcat-edit": "hybrid",
    "sana-sprint": "torch",
}
"""Tiny models, and what their bundles run on."""

_LARGE = {"kontext", "qwenimage-edit", "qwenimage-edit-plus", "qwenimage2", "longcat-edit"}
"""Models that look at a million pixels of any source, and take seconds for each image."""

_PHOTO = (104, 72)
"""Not a multiple of any model's, and wider than tall."""


def expected(pipe: Any, image: Image.Image, seed: int, size: tuple[int, int], **settings: Any) -> Image.Image:
    """diffusers' result for the unchanged image, of `size` if the class takes a size."""
    width, height = size
    known = inspect.signature(pipe.__call__).parameters
    ignored = type(pipe).__name__ in ("KolorsImg2ImgPipeline", "ZImageImg2ImgPipeline")  # a width: they keep the source's size
    if ("width" not in known and not source_rule(pipe).sets_size) or ignored:
        image = pipe.image_processor.resize(image, height, width)  # as its user would have to
    if "KandinskyV22" in type(pipe).__name__:  # which passes them to its image processor in the wrong order
        width, height = height, width
    offered = {"width": width, "height": height, "max_area": width * height, "intermediate_timesteps": None, **settings}
    chosen = {name: value for name, value in offered.items() if name in known}
    result: Image.Image = pipe(image=image, generator=torch.Generator().manual_seed(seed), **chosen).images[0]
    return result.convert("RGB")


def asked(pipeline: Pipeline, image: Image.Image, size: SizeRule, **settings: Any) -> Request:
    """The request that the server makes of an image and a wanted size."""
    limits = ImageLimits()
    result = images.result_size(image.size, size, pipeline.source_rule, pipeline.size_multiple, limits)
    return make_request(image=images.prepare(image, result, pipeline.source_rule, limits), size=result, **settings)


@pytest.mark.parametrize("name", nightly_but(ARCHITECTURES, "sd3-no-t5", "flux-dev", "if", "klein"))
def test_images_match_diffusers(name: str, bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> None:
    """Small ones, two of a request beside another request, and sources that the pipeline has to resize."""
    manifest = read_manifest(bundle(name))
    assert manifest.backend == ARCHITECTURES[name]
    assert bool(manifest.backend_reason) == (manifest.backend != "onnx")
    pipeline = load_pipeline(bundle(name), manifest, Execution("cpu"))
    assert pipeline.engine == f"{manifest.backend}:cpu"
    pipe = oracle(tiny_model(name), manifest.pipeline_class)
    multiple = pipeline.size_multiple
    rule, any_size = pipeline.source_rule, SizeRule()
    own = any_size if rule.sets_size else SizeRule(64, 96 if multiple > 8 else 104)
    if rule.square:
        own = any_size = SizeRule(64, 64)
    calls = [
        (source(64, 64), SizeRule(), (1, 2), {"prompt": "a lake", "guidance_scale": 4.0}),
        (source(64, 64), SizeRule(), (3,), {"prompt": "a lake", "guidance_scale": 4.0}),
        (source(*_PHOTO), any_size, (3,), {"prompt": "winter mountains", "guidance_scale": 1.0}),
        (source(*_PHOTO), own, (4,), {"prompt": "winter mountains", "guidance_scale": 4.0}),
    ]
    shared: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 4}
    if name in _LARGE:
        calls, shared = calls[2:], {"num_inference_steps": 2}
    requests = [asked(pipeline, image, size, seeds=seeds, **settings, **shared) for image, size, seeds, settings in calls]
    for request, outputs, (image, _, seeds, settings) in zip(requests, drawn(pipeline, requests), calls, strict=True):
        for seed, ours in zip(seeds, outputs, strict=True):
            theirs = expected(pipe, image, seed, request.result_size, **settings, **shared)
            assert ours.size == theirs.size == request.result_size
            assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("rule", [SizeRule(width=64), SizeRule(height=128), SizeRule(longest_side=128)])
def test_unsupported_size_is_refused(rule: SizeRule, bundle: Callable[[str], Path]) -> None:
    """DeepFloyd IF draws at its UNet's size; only that size may be requested."""
    pipeline = load_pipeline(bundle("if"), read_manifest(bundle("if")), Execution("cpu"))
    with pytest.raises(InvalidField, match="this model sets the size itself: of this image it makes 48 x 32 pixels"):
        asked(pipeline, source(*_PHOTO), rule)
    assert asked(pipeline, source(*_PHOTO), SizeRule(48, 32)).result_size == (48, 32)
    assert asked(pipeline, source(72, 104), SizeRule(area=1024)).result_size == (32, 48)


def test_unsupported_source_is_refused_and_names_its_field(bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle("klein"), read_manifest(bundle("klein")), Execution("cpu"))
    with pytest.raises(InvalidField, match="this model does not take the image: Image too small") as raised:
        pipeline.plan(asked(pipeline, source(48, 64), SizeRule(64, 64)))
    assert raised.value.field == "image"


def test_step_count_for_a_strength_follows_each_models_rounding_rule(bundle: Callable[[str], Path]) -> None:
    """Stable Diffusion 3 and Flux round the steps up, others down; a model without a strength runs all."""
    plans = {}
    for name in ("sd3-no-t5", "flux-dev", "klein"):
        pipeline = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"))
        plans[name] = pipeline.plan(make_request(image=source(64, 64), strength=0.3, num_inference_steps=1)).step_count
    assert plans == {"sd3-no-t5": 1, "flux-dev": 1, "klein": 1}
    pipeline = load_pipeline(bundle("if"), read_manifest(bundle("if")), Execution("cpu"))
    with pytest.raises(InvalidField, match=r"strength 0\.3 times 1 steps is less than one step: increase one of them"):
        pipeline.plan(make_request(image=source(64, 64), strength=0.3, num_inference_steps=1))


def test_prompt_and_negative_prompt_change_the_image(bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle("sd3"), read_manifest(bundle("sd3")), Execution("cpu"))
    settings: dict[str, Any] = {"image": source(64, 64), "num_inference_steps": 3, "guidance_scale": 5.0}
    drawn = [
        np.asarray(run_alone(pipeline, make_request(**settings, prompt=prompt, negative_prompt=negative))[0], int)
        for prompt, negative in (("a lake", None), ("winter", None), ("a lake", "a forest"))
    ]
    assert all(np.abs(drawn[0] - other).max() > 1 for other in drawn[1:])


def test_strength_is_ignored_by_models_without_it(bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle("pix2pix"), read_manifest(bundle("pix2pix")), Execution("cpu"))
    requests = [make_request(image=source(64, 64), strength=strength, num_inference_steps=3) for strength in (0.2, 1.0)]
    assert [pipeline.plan(request).step_count for request in requests] == [3, 3]
    one, other = (np.asarray(run_alone(pipeline, request)[0]) for request in requests)
    assert np.array_equal(one, other)


def test_opaque_pipeline_matches_the_stepped_pipeline(bundle: Callable[[str], Path]) -> None:
    """Like bundles whose graphs take one timestep for all rows, which cannot be batched."""
    manifest = read_manifest(bundle("sd1"))
    request = make_request(image=source(72, 64), prompt="a lake", strength=0.6, num_inference_steps=4, seeds=(1, 2))
    split, whole = (
        run_alone(load_pipeline(bundle("sd1"), replace(manifest, family=family), Execution("cpu")), request)
        for family in (manifest.family, "whole")
    )
    for one, other in zip(split, whole, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_latents_stay_float32_with_float16_graphs(
    bundle: Callable[[str], Path],
) -> None:
    half = bundle("sd1:fp16:speedups")
    manifest = read_manifest(half)
    (unet,) = [component for component in manifest.components if component.name == "unet"]
    assert {item.name: item.type for item in unet.inputs} == {
        "sample": "float16", "timestep": "float32", "encoder_hidden_states": "float16",
    }  # fmt: skip
    pipeline: Any = load_pipeline(half, manifest, Execution("cpu"))
    request = make_request(image=source(64, 64), prompt="a lake", num_inference_steps=4, guidance_scale=5.0)
    (state,) = pipeline.prepare([request])
    (noise,) = pipeline.denoise([state])
    assert {state.latents.dtype, *(part.dtype for part in noise)} == {torch.float32}
    single = load_pipeline(bundle("sd1"), read_manifest(bundle("sd1")), Execution("cpu"))
    one, other = (np.asarray(run_alone(drawn_by, request)[0], float) for drawn_by in (pipeline, single))
    assert 0 < np.abs(one - other).mean() < 1
