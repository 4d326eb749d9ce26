"""With a mask, the server's image is that of diffusers' inpainting pipelines for the same seed, to 1/255.

The oracle is AutoPipelineForInpainting on the same model, in the same test. Each case goes the whole way: client, gRPC, engine,
ONNX Runtime, PNG. Each of several images is the one that diffusers makes alone: with several, diffusers samples the source's
latents for all of them by the first seed, which would break the contract of seeds.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import covering, nightly_but
from diffusers import AutoPipelineForInpainting, ChromaInpaintPipeline, FluxFillPipeline, StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers_oracle import drawn as drawn_together
from fakes import make_request
from img2img_client import Client, InvalidRequest
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Mask, run_alone
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.diffusion.inpainting import FluxFill
from img2img_server.runtime.diffusion.masking import default_mask
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.schedulers import registry
from PIL import Image, ImageDraw, ImageOps
from running import running

INPAINTING = ("sd-inpaint", "sdxl-inpaint")
"""Their UNets see the mask and the masked source."""
FAMILIES = ("sd1", "sd2", "sdxl", "refiner", "sd3", "flux-dev", "chroma", "zimage", "qwenimage", *INPAINTING)
SIZE = (64, 96)
SOURCE_SIZE = (80, 112)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, bundle: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for name in (*FAMILIES, "lcm", "sd-tiny-vae", "flux-fill"):
        (folder / name).symlink_to(bundle(name))
    return folder


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    def load() -> ModelRegistry:
        return ModelRegistry.load(models, lambda path, manifest: load_pipeline(path, manifest, Execution("cpu")))

    with running(load) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """diffusers' own inpainting pipeline on PyTorch, by a family's name."""
    pipes: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in pipes:
            if name == "flux-fill":
                pipe = FluxFillPipeline.from_pretrained(tiny_model(name))
            elif name == "chroma":  # which AutoPipelineForInpainting does not know
                pipe = ChromaInpaintPipeline.from_pretrained(tiny_model(name))
                pipe.transformer.register_to_config(guidance_embeds=False)  # it looks for this key of Flux
            elif name == "lcm":  # no inpainting class is its own; Stable Diffusion's knows its guidance
                pipe = StableDiffusionInpaintPipeline.from_pretrained(tiny_model(name), safety_checker=None)
            else:
                folder = Path(__file__).parents[2] / "demo" / "model" if name == "demo" else tiny_model(name)
                pipe = AutoPipelineForInpainting.from_pretrained(folder, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            pipes[name] = pipe
        return pipes[name]

    return get


def source() -> Image.Image:
    """A smooth image with edges."""
    width, height = SOURCE_SIZE
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=-1) * 200 + (y > 0.6)[..., None] * np.array([0, 55, 20])
    return Image.fromarray(pixels.astype(np.uint8))


def ellipse(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((size[0] // 5, size[1] // 3, size[0] - 8, size[1] - 20), fill=255)
    return mask


MASKS: dict[str, Image.Image] = {
    "of the source's size": ellipse(SOURCE_SIZE),
    "of another size": ellipse((200, 150)),
    "soft": VaeImageProcessor.blur(ellipse(SOURCE_SIZE), 7),
    "black": Image.new("L", SOURCE_SIZE, 0),
    "white": Image.new("L", SOURCE_SIZE, 255),
    "of color": ImageOps.colorize(VaeImageProcessor.blur(ellipse(SOURCE_SIZE), 5), "black", "white"),
}

Settings = dict[str, Any]
GUIDED: Settings = {"strength": 0.7, "num_inference_steps": 6, "guidance_scale": 6.0}
LOW: Settings = {"strength": 0.25, "num_inference_steps": 8, "guidance_scale": 1.0}
FULL: Settings = {"strength": 1.0, "num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": "fog"}


def expected(pipe: Any, mask: Image.Image, settings: Settings, seed: int, pasted: bool, count: int = 1) -> list[Image.Image]:
    """diffusers' images, each made alone."""
    images, image = [], source()
    if type(pipe).__name__ == "ZImageInpaintPipeline":  # resizes nothing
        image = image.resize(SIZE, Image.Resampling.LANCZOS)
    for index in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        masked = {"mask_image": mask, "width": SIZE[0], "height": SIZE[1]}
        if type(pipe).__name__ == "ChromaInpaintPipeline":
            masked["max_sequence_length"] = 512  # as Chroma's other classes have it; padding counts
        made = pipe("a lake", image=image, generator=generator, **masked, **settings).images[0]
        if pasted:
            own = mask.convert("L").resize(SIZE, Image.Resampling.LANCZOS)
            made = pipe.image_processor.apply_overlay(own, source().resize(SIZE, Image.Resampling.LANCZOS), made)
        images.append(made)
    return images


def drawn(client: Client, model: str, seed: int, settings: Settings, **options: Any) -> list[Image.Image]:
    width, height = SIZE
    result = client.transform(
        source(), model=model, prompt="a lake", seed=seed, width=width, height=height, **settings, **options
    )
    return [image.image for image in result.images]


def assert_same(images: list[Image.Image], others: list[Image.Image]) -> None:
    assert len(images) == len(others)
    for ours, theirs in zip(images, others, strict=True):
        assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


CASES = {"guided": GUIDED, "low": LOW, "full": FULL}


def settings_of(model: str, settings: Settings) -> Settings:
    """The settings as the model takes them."""
    settings = dict(settings)
    if model == "flux-dev":
        settings.pop("negative_prompt", None)  # Flux reads none
    if model == "qwenimage":
        settings["true_cfg_scale"] = settings.pop("guidance_scale")
        if settings["true_cfg_scale"] > 1:
            settings.setdefault("negative_prompt", "fog")
    return settings


@covering(case=CASES, model=FAMILIES)
def test_masked_image_matches_diffusers(client: Client, oracle: Callable[[str], Any], model: str, case: str) -> None:
    mask, settings = MASKS["soft"], settings_of(model, CASES[case])
    for pasted in (False, True):
        images = drawn(client, model, 3, settings, mask=mask, mask_paste=pasted)
        assert_same(images, expected(oracle(model), mask, settings, 3, pasted))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", ["sd1", "sd3"])
def test_masks_of_every_kind_are_read_as_diffusers_reads_them(
    client: Client, oracle: Callable[[str], Any], model: str, mask: str
) -> None:
    images = drawn(client, model, 4, GUIDED, mask=MASKS[mask], image_count=2)
    assert_same(images, expected(oracle(model), MASKS[mask], GUIDED, 4, pasted=True, count=2))
    if mask == "black":
        assert_same(images[:1], [source().resize(SIZE, Image.Resampling.LANCZOS)])


@pytest.mark.parametrize("model", nightly_but(["sd1", "zimage", "qwenimage"], "sd1", "zimage"))
def test_batching_requests_with_and_without_masks_does_not_change_outputs(
    client: Client, oracle: Callable[[str], Any], model: str
) -> None:
    asked: list[tuple[int, str, Settings, int]] = [
        (10, "soft", GUIDED, 1),
        (20, "", GUIDED, 1),
        (30, "of another size", LOW, 2),
        (40, "white", FULL, 1),
        (50, "", LOW, 1),
        (60, "black", {**FULL, "num_inference_steps": 9}, 1),
    ]
    with ThreadPoolExecutor(len(asked)) as threads:
        calls = [
            threads.submit(drawn, client, model, seed, settings_of(model, settings), mask=MASKS.get(mask), image_count=count)
            for seed, mask, settings, count in asked
        ]
        for call, (seed, mask, given, count) in zip(calls, asked, strict=True):
            settings = settings_of(model, given)
            if not mask:
                assert_same(call.result(), drawn(client, model, seed, settings))
            else:
                assert_same(call.result(), expected(oracle(model), MASKS[mask], settings, seed, pasted=True, count=count))


def test_masked_lcm_at_full_strength_matches_the_inpaint_pipeline(client: Client, oracle: Callable[[str], Any]) -> None:
    settings: Settings = {"strength": 1.0, "num_inference_steps": 4, "guidance_scale": 8.0}
    images = drawn(client, "lcm", 5, settings, mask=MASKS["soft"])
    assert_same(images, expected(oracle("lcm"), MASKS["soft"], settings, 5, pasted=True))


def test_deterministic_autoencoder_draws_no_extra_noise(client: Client, oracle: Callable[[str], Any]) -> None:
    name = "EulerAncestralDiscreteScheduler"
    with drawing_with(oracle("sd-tiny-vae"), name) as pipe:
        images = drawn(client, "sd-tiny-vae", 6, GUIDED, mask=MASKS["soft"], scheduler=name)
        assert_same(images, expected(pipe, MASKS["soft"], GUIDED, 6, pasted=True))


@pytest.mark.parametrize("model", INPAINTING)
def test_inpainting_models_draw_noise_in_the_order_of_diffusers(client: Client, oracle: Callable[[str], Any], model: str) -> None:
    """At strength 1 their source is not encoded, so no noise is drawn for it."""
    name = "EulerAncestralDiscreteScheduler"
    with drawing_with(oracle(model), name) as pipe:
        for settings in (GUIDED, FULL):
            images = drawn(client, model, 8, settings, mask=MASKS["soft"], scheduler=name, mask_paste=False, image_count=2)
            assert_same(images, expected(pipe, MASKS["soft"], settings, 8, pasted=False, count=2))


def test_requests_to_an_inpainting_model_share_a_batch(client: Client, oracle: Callable[[str], Any]) -> None:
    asked: list[tuple[int, str, Settings, int]] = [
        (10, "soft", GUIDED, 1),
        (20, "of another size", LOW, 2),
        (30, "white", FULL, 1),
        (40, "black", GUIDED, 1),
    ]
    with ThreadPoolExecutor(len(asked)) as threads:
        calls = [
            threads.submit(drawn, client, "sd-inpaint", seed, settings, mask=MASKS[mask], image_count=count)
            for seed, mask, settings, count in asked
        ]
        for call, (seed, mask, settings, count) in zip(calls, asked, strict=True):
            assert_same(call.result(), expected(oracle("sd-inpaint"), MASKS[mask], settings, seed, pasted=True, count=count))


@pytest.mark.parametrize("mask", ["soft", "of another size"])
def test_flux_fill_image_matches_diffusers(client: Client, oracle: Callable[[str], Any], mask: str) -> None:
    for settings in ({"strength": 1.0, "num_inference_steps": 4, "guidance_scale": 30.0}, GUIDED):
        for pasted in (False, True):
            images = drawn(client, "flux-fill", 9, settings, mask=MASKS[mask], mask_paste=pasted, image_count=2)
            assert_same(images, expected(oracle("flux-fill"), MASKS[mask], settings, 9, pasted, count=2))


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_requests_to_flux_fill_share_calls(backend: str, bundle: Callable[[str], Path], oracle: Callable[[str], Any]) -> None:
    """They may differ in mask, prompt, steps, strength, guidance and, as graphs, in aspect. Images have the bits that they have
    alone."""
    if backend == "onnx":
        pipeline: Any = load_pipeline(bundle("flux-fill"), read_manifest(bundle("flux-fill")), Execution("cpu"))
    else:
        pipeline = FluxFill(oracle("flux-fill"), "torch:cpu", 1, Cache(0))
    assert type(pipeline) is FluxFill
    sizes = ((64, 96), (96, 64) if backend == "onnx" else (64, 96))
    first, second = (source().resize(size, Image.Resampling.BICUBIC) for size in sizes)
    requests = [
        make_request(image=first, mask=Mask(ellipse(sizes[0])), prompt="a lake", seeds=(1, 2), **GUIDED),
        make_request(image=second, mask=default_mask(sizes[1]), prompt="winter", seeds=(3,), strength=1.0, num_inference_steps=2),
    ]
    assert len({pipeline.plan(request).shape for request in requests}) == 1
    with torch.inference_mode():
        together = drawn_together(pipeline, requests)
        for request, images in zip(requests, together, strict=True):
            for ours, alone in zip(images, run_alone(pipeline, request), strict=True):
                assert np.abs(np.asarray(ours, int) - np.asarray(alone, int)).max() <= (0 if backend == "onnx" else 1)
            assert request.mask is not None
            (width, height), names = request.result_size, ("prompt", "strength", "num_inference_steps", "guidance_scale")
            settings = {name: getattr(request, name) for name in names}
            for seed, ours in zip(request.seeds, images, strict=True):
                theirs = oracle("flux-fill")(
                    image=request.image, mask_image=request.mask.image, width=width, height=height,
                    generator=torch.Generator().manual_seed(seed), **settings,
                ).images[0]  # fmt: skip
                assert_same([ours], [theirs])


@pytest.mark.parametrize("model", ["sd-inpaint", "flux-fill"])
def test_an_inpainting_model_needs_a_mask(client: Client, model: str) -> None:
    with pytest.raises(InvalidRequest, match=f"mask: model '{model}' is an inpainting model, which needs a mask"):
        client.transform(source(), model=model, width=64, height=96)
    (mask,) = (field for field in client.model(model).fields if field.name == "mask")
    assert mask.required


@contextmanager
def drawing_with(pipe: Any, scheduler: str) -> Iterator[Any]:
    kept, pipe.scheduler = pipe.scheduler, registry.make(scheduler, pipe.scheduler)
    try:
        yield pipe
    finally:
        pipe.scheduler = kept


SCHEDULERS = [name for name in registry.NAMES if name.endswith("Scheduler")]


@pytest.mark.parametrize("name", nightly_but([*SCHEDULERS, "DPM++ 2M SDE Karras", "DPM2 a Karras"], *SCHEDULERS[:6]))
def test_masked_image_matches_diffusers_with_every_scheduler(client: Client, oracle: Callable[[str], Any], name: str) -> None:
    with drawing_with(oracle("sd1"), name) as pipe:
        for settings in (GUIDED, FULL):
            images = drawn(client, "sd1", 7, settings, mask=MASKS["soft"], scheduler=name, mask_paste=False)
            assert_same(images, expected(pipe, MASKS["soft"], settings, 7, pasted=False))
