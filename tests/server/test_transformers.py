"""Stable Diffusion 3, Flux and Chroma, stepped: mixed requests share calls, and each image is diffusers' own, to 1/255."""

import copy
import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import covering
from fakes import Caller, Clock, make_request, run_out
from img2img_export.convert.graphs import describe_graph
from img2img_export.convert.parts import denoiser_part
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_server.bundle.manifest import Manifest, read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Request, run_alone
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import InvalidField
from img2img_server.runtime.diffusion import preview
from img2img_server.runtime.diffusion.chroma import Chroma
from img2img_server.runtime.diffusion.flux import Flux
from img2img_server.runtime.diffusion.masking import default_mask
from img2img_server.runtime.diffusion.stable_diffusion_3 import StableDiffusion3, StableDiffusion3Tokens
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.runtime.schedulers.registry import FLOW_NAMES
from PIL import Image

MODELS = {"sd3-no-t5": StableDiffusion3, "sd3": StableDiffusion3, "flux-dev": Flux, "flux": Flux, "chroma": Chroma}
"""Tiny models, and their family. Flux dev shifts its timesteps by the image's size, and takes guidance as an input."""
CLASSES = {
    StableDiffusion3: diffusers.StableDiffusion3Img2ImgPipeline,
    Flux: diffusers.FluxImg2ImgPipeline,
    Chroma: diffusers.ChromaImg2ImgPipeline,
}
GUIDED = ("sd3-no-t5", "sd3", "chroma")
"""Models that guide with a second row."""
KINDS = ("sd3-no-t5", "flux-dev")
"""The models that the engine also steps in PyTorch."""
SIZES = ((64, 64), (96, 64), (80, 112))

Load = Callable[..., SteppedPipeline]


@pytest.fixture(scope="module")
def load(bundle: Callable[[str], Path]) -> Load:
    def get(name: str, **changes: Any) -> SteppedPipeline:
        manifest = replace(read_manifest(bundle(name)), **changes)
        pipeline = load_pipeline(bundle(name), manifest, Execution("cpu"), cache=Cache(2**20))
        assert isinstance(pipeline, StableDiffusion3Tokens if name.startswith("sd3") else MODELS[name])
        return pipeline

    return get


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Diffusers' own pipeline on PyTorch."""
    pipes: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in pipes:
            kind = CLASSES[MODELS[name]]
            left_out: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-no-t5" else {}
            pipes[name] = kind.from_pretrained(tiny_model(name), torch_dtype=torch.float32, local_files_only=True, **left_out)
            pipes[name].set_progress_bar_config(disable=True)
        return pipes[name]

    return get


def source(size: tuple[int, int], number: int = 0) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def mixed(size: tuple[int, int]) -> list[Request]:
    """Requests with nothing in common but their size. The second draws two images; of 4, 2, 5 and 1 steps."""
    settings: list[dict[str, Any]] = [
        {"strength": 0.6, "num_inference_steps": 6, "guidance_scale": 4.0, "seeds": (1,), "prompt": "a lake at sunset"},
        {"strength": 1.0, "num_inference_steps": 2, "guidance_scale": 1.0, "seeds": (2, 3), "prompt": "winter mountains"},
        {"strength": 0.5, "num_inference_steps": 9, "guidance_scale": 7.5, "seeds": (4,), "prompt": "a forest"},
        {"strength": 0.1, "num_inference_steps": 4, "guidance_scale": 0.0, "seeds": (5,), "prompt": ""},
    ]
    settings[2]["negative_prompt"] = "fog"
    return [make_request(image=source(size, number), **each) for number, each in enumerate(settings)]


def expected(pipe: Any, request: Request, seed: int) -> Image.Image:
    """diffusers' image for the request with a generator of that seed."""
    width, height = request.image.size
    names = ("prompt", "negative_prompt", "image", "strength", "num_inference_steps", "guidance_scale")
    given = {name: getattr(request, name) for name in names}
    image: Image.Image = pipe(**given, width=width, height=height, generator=torch.Generator().manual_seed(seed)).images[0]
    assert np.asarray(image).std() > 10, "a flat image would prove nothing"
    return image


def difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def images_of(caller: Caller) -> tuple[Image.Image, ...]:
    (ending,) = caller.endings
    assert isinstance(ending, Completed)
    return ending.images


def count_calls(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Clock]:
    """The rows of each call of the transformer from now on, and a clock by which each takes a second."""
    name = "forward" if getattr(pipeline._denoiser, "tokens", None) is None else "predict"
    rows, clock, call = list[int](), Clock(), getattr(pipeline._denoiser, name)

    def counted(**inputs: Any) -> Any:
        rows.append(len(inputs["hidden_states"]))
        clock.now += 1
        return call(**inputs)

    monkeypatch.setitem(pipeline._denoiser.__dict__, name, counted)
    return rows, clock


def run_together(pipeline: Any, requests: Sequence[Request], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Caller], list[int]]:
    """Runs requests in one engine. Returns each caller's events, and the rows of each call of the transformer. A call takes a
    second for any number of rows, so all compatible requests share calls.
    """
    rows, clock = count_calls(pipeline, monkeypatch)
    engine = Engine({"m": pipeline}, QueueLimits(max_batch_size=16), clock)
    callers = [Caller(engine) for _ in requests]
    for request, caller in zip(requests, callers, strict=True):
        engine.submit(request, caller.events.append)
    run_out(engine)
    return callers, rows


@covering(name=MODELS, size=SIZES)
def test_mixed_requests_share_calls_and_match_diffusers(
    name: str, size: tuple[int, int], load: Load, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed(size)
    callers, rows = run_together(load(name), requests, monkeypatch)
    # 4, 2, 5 and 1 steps: as many calls as the longest has.
    assert rows == ([2 + 2 + 2 + 1, 2 + 2 + 2, 2 + 2, 2 + 2, 2] if name in GUIDED else [5, 4, 2, 2, 1])
    for request, caller in zip(requests, callers, strict=True):
        for seed, image in zip(request.seeds, images_of(caller), strict=True):
            assert difference(image, expected(oracle(name), request, seed)) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_mixed_requests_share_calls_without_graphs(
    name: str, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = MODELS[name](oracle(name), "torch:cpu", 1, Cache(2**20))
    with torch.inference_mode():
        callers, rows = run_together(pipeline, mixed((64, 96)), monkeypatch)
        monkeypatch.undo()
        assert len(rows) == 5
        for request, caller in zip(mixed((64, 96)), callers, strict=True):
            assert difference(images_of(caller)[0], expected(oracle(name), request, request.seeds[0])) <= 1


def turned(*sizes: tuple[int, int]) -> list[Request]:
    """Requests of 5 and 3 steps for images of two sizes, of which the second draws two."""
    first, second = sizes
    return [
        make_request(image=source(first, 1), prompt="a lake at sunset", strength=0.7, num_inference_steps=6, guidance_scale=4.0),
        make_request(
            image=source(second, 2), prompt="winter", strength=1.0, num_inference_steps=3, guidance_scale=2.0, seeds=(8, 9)
        ),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_portrait_and_landscape_images_share_calls(
    name: str, load: Load, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is diffusers' own, and the same bits as alone; one of them has a mask."""
    first, second = turned((96, 64), (64, 96))
    requests, pipeline = [first, second, replace(second, seeds=(8,), mask=default_mask((64, 96)))], load(name)
    alone = [run_alone(pipeline, request) for request in requests]
    callers, rows = run_together(pipeline, requests, monkeypatch)
    assert rows == ([8, 8, 8, 2, 2] if name in GUIDED else [4, 4, 4, 1, 1])
    for request, caller, own in zip(requests, callers, alone, strict=True):
        for seed, image, same in zip(request.seeds, images_of(caller), own, strict=True):
            assert request.mask is not None or difference(image, expected(oracle(name), request, seed)) <= 1
            assert difference(image, same) == 0
    assert difference(images_of(callers[1])[0], images_of(callers[2])[0]) > 1, "a mask that changes nothing would prove nothing"


@pytest.mark.parametrize("name", KINDS)
def test_images_with_different_token_counts_do_not_share_calls(
    name: str, load: Load, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [make_request(image=source(size), num_inference_steps=2, strength=1.0, guidance_scale=1.0) for size in SIZES]
    callers, rows = run_together(load(name), requests, monkeypatch)
    assert rows == [1] * 6
    for request, caller in zip(requests, callers, strict=True):
        assert difference(images_of(caller)[0], expected(oracle(name), request, request.seeds[0])) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_transformer_in_pytorch_shares_calls_for_images_of_one_size_only(
    name: str, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in diffusers' classes have no rows."""
    pipeline, requests = MODELS[name](oracle(name), "torch:cpu", 1, Cache(0)), turned((96, 64), (64, 96))
    with torch.inference_mode():
        callers, rows = run_together(pipeline, requests, monkeypatch)
        monkeypatch.undo()
        assert sorted(rows) == ([2] * 5 + [4] * 3 if name.startswith("sd3") else [1] * 5 + [2] * 3)
        for request, caller in zip(requests, callers, strict=True):
            assert difference(images_of(caller)[0], expected(oracle(name), request, request.seeds[0])) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_graph_of_images_of_one_size_is_stepped(
    name: str, bundle: Callable[[str], Path], oracle: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like graphs of other tools and of earlier versions."""
    old = Path(shutil.copytree(bundle(name), tmp_path / "old"))
    module = copy.deepcopy(oracle(name).transformer)
    calls = [one_call(module, *sizes) for sizes in ((4, 6, 7), (8, 4, 9))]
    part = denoiser_part("transformer", module, calls, calls[0])
    trace(module, part, calls[0]).write(old / "transformer", Progress(), "transformer")
    manifest = read_manifest(old)
    parts = tuple(
        replace(one, fused="", lora="", inputs=describe_graph(old, "transformer").inputs) if one.name == "transformer" else one
        for one in manifest.components
    )
    pipeline, requests = load_pipeline(old, replace(manifest, components=parts), Execution("cpu")), turned((96, 64), (64, 96))
    assert type(pipeline) is MODELS[name]
    callers, rows = run_together(pipeline, [*requests, requests[0]], monkeypatch)
    assert sorted(rows) == [4 if name.startswith("sd3") else 2] * 8
    for request, caller in zip(requests, callers, strict=False):
        assert difference(images_of(caller)[0], expected(oracle(name), request, request.seeds[0])) <= 1


def one_call(module: Any, height: int, width: int, text: int) -> dict[str, torch.Tensor]:
    """A call of diffusers' class with two rows for latents of a size."""
    config, tokens = module.config, height * width // 4
    call = {
        "encoder_hidden_states": torch.randn(2, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
    }
    if "img_ids" not in inspect.signature(module.forward).parameters:
        latents = torch.randn(2, config.in_channels, height, width)
        return {"hidden_states": latents, **call, "timestep": torch.tensor([400.0, 900.0])}
    call |= {"timestep": torch.tensor([0.4, 0.9]), "guidance": torch.tensor([3.0, 4.0])}
    return {
        "hidden_states": torch.randn(2, tokens, 64),
        **call,
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.zeros(tokens, 3),
    }


def test_cancelled_request_is_removed_at_the_next_step(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load("flux")
    rows, clock = count_calls(pipeline, monkeypatch)
    engine = Engine({"m": pipeline}, clock=clock)
    leaving, _ = (Caller(engine).submit(image=source((64, 64)), num_inference_steps=4, strength=1.0) for _ in range(2))
    engine.step()
    assert leaving.ticket is not None
    leaving.ticket.cancel()
    run_out(engine)
    assert rows == [2, 1, 1, 1]


@pytest.mark.parametrize("scheduler", FLOW_NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_named_scheduler_matches_diffusers(
    name: str, scheduler: str, load: Load, oracle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, pipe = load(name), oracle(name)
    request = make_request(image=source((64, 64)), strength=0.6, num_inference_steps=5, guidance_scale=4.0, scheduler=scheduler)
    if name == "flux-dev" and "Heun" in scheduler:
        assert scheduler not in pipeline.schedulers
        with pytest.raises(InvalidField, match="scheduler"):
            pipeline.plan(request)
        return
    class_name, overrides = FLOW_NAMES[scheduler]
    own = {
        key: value
        for key, value in pipe.scheduler.config.items()
        if key in inspect.signature(getattr(diffusers, class_name)).parameters
    }
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, class_name).from_config(own, **overrides))
    (image,) = run_alone(pipeline, request)
    assert difference(image, expected(pipe, request, request.seeds[0])) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_step_count_for_a_strength_matches_diffusers(name: str, load: Load, oracle: Callable[[str], Any]) -> None:
    """Any strength above 0 leaves a step, by the rule of these classes; Stable Diffusion's leaves none below 1 / steps."""
    pipeline, pipe = load(name), oracle(name)
    shift = {"mu": 0.5} if name == "flux-dev" else {}
    for strength in (0.01, 0.1, 0.249, 0.25, 0.251, 1 / 3, 0.5, 0.7, 0.99, 1.0):
        for steps in (1, 3, 4, 10, 28):
            pipe.scheduler.set_timesteps(steps, **shift)
            timesteps, _ = pipe.get_timesteps(steps, strength, "cpu")
            plan = pipeline.plan(make_request(image=source((64, 64)), num_inference_steps=steps, strength=strength))
            assert plan.step_count == len(timesteps) >= 1


@pytest.mark.parametrize("name", KINDS)
def test_strength_without_a_step_is_an_invalid_strength(name: str, load: Load, oracle: Callable[[str], Any]) -> None:
    request = make_request(image=source((64, 64)), num_inference_steps=4, strength=1e-20)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        expected(oracle(name), request, 1)
    with pytest.raises(InvalidField) as caught:
        load(name).plan(request)
    assert caught.value.field == "strength"


def test_image_beyond_the_position_table_names_width_or_height(load: Load) -> None:
    """The tiny model has 16 x 16 of them, of 16 pixels each."""
    pipeline = load("sd3-no-t5")
    assert pipeline.plan(make_request(image=source((256, 256)))).rows == 2
    for size, field in (((272, 64), "width"), ((64, 272), "height")):
        with pytest.raises(InvalidField, match="more than the 256") as caught:
            pipeline.plan(make_request(image=source(size)))
        assert caught.value.field == field


@pytest.mark.parametrize("name", KINDS)
def test_previews_show_the_latents_predicted_by_a_step(name: str, load: Load, bundle: Callable[[str], Path]) -> None:
    assert [len(row) for row in read_manifest(bundle("flux-dev")).latent_preview] == [4 * 16 + 1] * 3, "fitted by the export"
    weights = tuple(tuple(row) for row in np.random.default_rng(0).normal(0.05, 0.1, (3, 4 * 16 + 1)).tolist())
    pipeline = load(name, latent_preview=weights)
    request = make_request(image=source((96, 64)), num_inference_steps=4, strength=0.8, preview_interval=2, guidance_scale=3.0)
    (state,) = pipeline.prepare([request])
    seen: list[Any] = []
    while state.step < state.step_count:
        pipeline.advance([state], pipeline.denoise([state]))
        seen += pipeline.preview([state])
    assert [image is not None for image in seen] == [False, True, False, True]
    assert seen[1].size == seen[3].size == (12, 8)
    # An Euler step to a noise level of zero ends at the prediction itself.
    assert difference(seen[3], preview.draw(pipeline._final_latents(state), weights)[0]) <= 1
    assert difference(seen[1], seen[3]) > 1


@pytest.mark.parametrize("name", KINDS)
def test_bundle_exported_as_opaque_is_stepped(name: str, load: Load, bundle: Callable[[str], Path]) -> None:
    request = make_request(image=source((64, 64)), num_inference_steps=3, preview_interval=1)
    old = load(name, family="whole", latent_preview=())
    assert difference(run_alone(old, request)[0], run_alone(load(name), request)[0]) == 0
    (state,) = old.prepare([request])
    old.advance([state], old.denoise([state]))
    assert old.preview([state]) == [None]

    def one_timestep(manifest: Manifest) -> Manifest:
        parts = [
            replace(part, inputs=tuple(replace(item, shape=()) if item.name == "timestep" else item for item in part.inputs))
            for part in manifest.components
        ]
        return replace(manifest, family="whole", components=tuple(parts))

    manifest = one_timestep(read_manifest(bundle(name)))
    assert isinstance(load_pipeline(bundle(name), manifest, Execution("cpu")), OpaquePipeline)
