"""Architectures that run whole, each as the exporter makes it of a tiny model: the images are diffusers' own, to 1/255."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import nightly_but
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import run_alone
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

ARCHITECTURES = {
    "pix2pix": "onnx",
    "sd3": "onnx",
    "sd3-no-t5": "onnx",
    "flux": "onnx",
    "flux-dev": "onnx",
    "kandinsky22": "hybrid",
    "kandinsky3": "hybrid",
    "kolors": "hybrid",
    "zimage": "torch",
    "qwenimage": "torch",
}
"""Tiny models, and what their bundles run on."""


def source(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def oracle(directory: Path, pipeline_class: str) -> Any:
    """Diffusers' own pipeline. Parts that the model was saved without have to be left out by name."""
    index = diffusers.DiffusionPipeline.load_config(directory)
    left_out = {name: None for name, entry in index.items() if entry == [None, None]}
    pipe = getattr(diffusers, pipeline_class).from_pretrained(directory, torch_dtype=torch.float32, **left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe: Any, image: Image.Image, seed: int, **settings: Any) -> Image.Image:
    width, height = image.size
    if "KandinskyV22" in type(pipe).__name__:  # which hands them to its image processor the wrong way round
        width, height = height, width
    known = inspect.signature(pipe.__call__).parameters
    offered = {"width": width, "height": height, **settings}
    chosen = {name: value for name, value in offered.items() if name in known}
    picture: Image.Image = pipe(image=image, generator=torch.Generator().manual_seed(seed), **chosen).images[0]
    return picture


@pytest.mark.parametrize("name", nightly_but(ARCHITECTURES, *(set(ARCHITECTURES) - {"sd3-no-t5", "flux-dev"})))
def test_a_picture_is_diffusers_picture(name: str, bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> None:
    manifest = read_manifest(bundle(name))
    assert manifest.backend == ARCHITECTURES[name]
    assert bool(manifest.backend_reason) == (manifest.backend != "onnx")
    pipeline = load_pipeline(bundle(name), manifest, Execution("cpu"))
    assert pipeline.engine == f"{manifest.backend}:cpu"
    pipe = oracle(tiny_model(name), manifest.pipeline_class)
    multiple = pipeline.size_multiple
    tall = (64, 96 if multiple > 8 else 104)
    for size, seeds, prompt, guidance in (((64, 64), (1, 2), "a lake", 4.0), (tall, (3,), "winter mountains", 1.0)):
        settings = {"prompt": prompt, "strength": 0.6, "num_inference_steps": 4, "guidance_scale": guidance}
        pictures = run_alone(pipeline, make_request(image=source(*size), seeds=seeds, **settings))
        for seed, picture in zip(seeds, pictures, strict=True):
            theirs = expected(pipe, source(*size), seed, **settings)
            assert picture.size == theirs.size == size
            assert np.asarray(theirs).std() > 10, "a flat picture would prove nothing"
            assert np.abs(np.asarray(picture, int) - np.asarray(theirs, int)).max() <= 1


def test_a_prompt_and_a_negative_one_matter_where_the_model_knows_them(bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle("sd3"), read_manifest(bundle("sd3")), Execution("cpu"))
    settings: dict[str, Any] = {"image": source(64, 64), "num_inference_steps": 3, "guidance_scale": 5.0}
    drawn = [
        np.asarray(run_alone(pipeline, make_request(**settings, prompt=prompt, negative_prompt=negative))[0], int)
        for prompt, negative in (("a lake", None), ("winter", None), ("a lake", "a forest"))
    ]
    assert all(np.abs(drawn[0] - other).max() > 1 for other in drawn[1:])


def test_strength_is_nothing_to_a_model_without_it(bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle("pix2pix"), read_manifest(bundle("pix2pix")), Execution("cpu"))
    requests = [make_request(image=source(64, 64), strength=strength, num_inference_steps=3) for strength in (0.2, 1.0)]
    assert [pipeline.plan(request).step_count for request in requests] == [3, 3]
    one, other = (np.asarray(run_alone(pipeline, request)[0]) for request in requests)
    assert np.array_equal(one, other)


def test_what_can_be_split_can_run_whole_too(bundle: Callable[[str], Path]) -> None:
    """As bundles do whose graphs take one timestep for all: they cannot be batched."""
    manifest = read_manifest(bundle("sd1"))
    request = make_request(image=source(72, 64), prompt="a lake", strength=0.6, num_inference_steps=4, seeds=(1, 2))
    split, whole = (
        run_alone(load_pipeline(bundle("sd1"), replace(manifest, family=family), Execution("cpu")), request)
        for family in (manifest.family, "whole")
    )
    for one, other in zip(split, whole, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_beside_graphs_of_half_precision_all_else_stays_in_single(
    bundle: Callable[[str], Path],
) -> None:
    half = bundle("sd1:fp16")
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
