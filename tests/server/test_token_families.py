"""Families on graphs of tokens: requests that differ in everything but their number of tokens share each call, and each image is
the one that diffusers makes of the request alone."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import nightly_but
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime.common import rotary
from img2img_server.runtime.diffusion.preview import draw
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx.token_graphs import MARK, FluxTokens
from PIL import Image

FAMILIES = {
    "kontext": ("flux-kontext", "onnx"),
    "klein": ("flux-2-klein", "onnx"),
    "flux2": ("flux-2", "onnx"),
    "chroma": ("chroma", "onnx"),
    "qwenimage": ("qwen-image", "onnx"),
    "zimage": ("z-image", "onnx"),
}
"""Tiny models, their families, and their bundles' engines. Qwen-Image-Edit and -Plus, which read a million pixels, are in
test_architectures.py."""

_LONG = "mountains and a lake at sunset with a winter forest behind the lake, and fog over the water"


def source(width: int, height: int, seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def mixed() -> list[Request]:
    """Wide and tall images of 24 tokens and references of 20, with other prompts, steps, guidance, strength and seeds."""
    wide, tall = source(96, 64, 1), source(64, 96, 2)
    return [
        make_request(image=wide, prompt="a lake", seeds=(1, 2), num_inference_steps=3, guidance_scale=4.0, strength=0.9),
        make_request(image=tall, prompt=_LONG, seeds=(3,), num_inference_steps=5, guidance_scale=1.0, strength=0.7,
                     negative_prompt="fog and a forest", true_cfg_scale=2.5),
        make_request(image=tall, prompt="winter", seeds=(4,), num_inference_steps=2, guidance_scale=2.5, strength=1.0,
                     negative_prompt="fog", true_cfg_scale=1.0, size=(96, 64)),
    ]  # fmt: skip


def run(pipeline: Any, requests: list[Request]) -> tuple[list[Any], list[int]]:
    """The images of requests that share all calls, and the rows of each call."""
    rows: list[int] = []
    predict = pipeline._denoiser.predict

    def counting(**inputs: torch.Tensor) -> tuple[torch.Tensor]:
        rows.append(len(inputs["hidden_states"]))
        found: tuple[torch.Tensor] = predict(**inputs)
        return found

    pipeline._denoiser.predict = counting
    states = pipeline.prepare(requests)
    while active := [state for state in states if state.step < state.step_count]:
        pipeline.advance(active, pipeline.denoise(active))
    images = pipeline.finish(states)
    for state in states:
        pipeline.release(state)
    return list(images), rows


@pytest.mark.parametrize("name", nightly_but(FAMILIES, "klein", "chroma", "qwenimage", "zimage"))
def test_requests_with_different_shapes_prompts_and_steps_share_calls(
    name: str, bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    manifest = read_manifest(bundle(name))
    assert (manifest.family, manifest.backend) == FAMILIES[name]
    pipeline: Any = load_pipeline(bundle(name), manifest, Execution("cpu"))
    requests = mixed()
    if not pipeline.source_rule.keeps_size:
        requests[2] = make_request(image=source(96, 64, 2), prompt="winter", seeds=(4,), num_inference_steps=2, strength=1.0)
    plans = [pipeline.plan(request) for request in requests]
    assert len({plan.shape for plan in plans}) == 1
    images, rows = run(pipeline, requests)
    assert len(rows) == max(plan.step_count for plan in plans)
    assert rows[0] == sum(plan.rows for plan in plans)

    pipe = getattr(diffusers, manifest.pipeline_class).from_pretrained(tiny_model(name), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    for request, made in zip(requests, images, strict=True):
        width, height = request.result_size
        offered = {
            "strength": request.strength, "guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt,
            "true_cfg_scale": request.true_cfg_scale or 1.0, "width": width, "height": height, "max_area": width * height,
        }  # fmt: skip
        settings = {key: value for key, value in offered.items() if key in known}
        for seed, image in zip(request.seeds, made, strict=True):
            theirs = pipe(
                image=request.image, prompt=request.prompt, num_inference_steps=request.num_inference_steps,
                generator=torch.Generator().manual_seed(seed), **settings,
            ).images[0]  # fmt: skip
            assert image.size == theirs.size
            assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
            assert np.abs(np.asarray(image, int) - np.asarray(theirs, int)).max() <= 1
        (alone, *_) = run_alone(pipeline, request)
        assert np.abs(np.asarray(alone, int) - np.asarray(made[0], int)).max() <= 1


def test_references_of_different_sizes_and_order_share_calls(
    bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    """A wide image and a square reference have as many tokens as a square image and a tall reference, or as one large image."""
    pipeline: Any = load_pipeline(bundle("klein"), read_manifest(bundle("klein")), Execution("cpu"))
    wide, square, tall, large = source(96, 64, 1), source(64, 64, 2), source(64, 96, 3), source(128, 80, 4)
    looks = [(wide, square), (square, tall), (large,)]
    requests = [
        make_request(image=image, references=tuple(others), size=size, prompt=prompt, seeds=(seed,), num_inference_steps=2 + seed)
        for seed, ((image, *others), size, prompt) in enumerate(
            zip(looks, ((64, 64), (128, 32), (32, 128)), ("a lake", _LONG, "winter"), strict=True)
        )
    ]
    assert len({pipeline.plan(request).shape for request in requests}) == 1
    images, rows = run(pipeline, requests)
    assert rows == [3, 3, 2, 1]
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(tiny_model("klein"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for request, look, (image,) in zip(requests, looks, images, strict=True):
        width, height = request.result_size
        theirs = pipe(
            image=list(look), prompt=request.prompt, num_inference_steps=request.num_inference_steps, width=width, height=height,
            generator=torch.Generator().manual_seed(request.seeds[0]),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(image, int) - np.asarray(theirs, int)).max() <= 1


def test_latents_are_normalized_by_the_models_own_statistics(
    bundle: Callable[[str], Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Those of the tiny model are 0 and 1, which are as good as none; here a bundle and diffusers have others."""
    directory = Path(shutil.copytree(bundle("klein"), tmp_path / "klein"))
    numbers = np.random.default_rng(3)
    statistics = {"running_mean": numbers.normal(0, 1, 64).tolist(), "running_var": numbers.uniform(0.2, 3, 64).tolist()}
    for path in (directory / "vae_encoder" / "config.json", directory / "vae_decoder" / "config.json"):
        config = json.loads(path.read_text())
        assert statistics.keys() <= config.keys()
        path.write_text(json.dumps(config | statistics))
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(tiny_model("klein"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, values in statistics.items():
        getattr(pipe.vae.bn, name).copy_(torch.tensor(values))
    image, reference = source(96, 64, 1), source(64, 80, 2)
    request = make_request(image=image, references=(reference,), prompt="a lake", seeds=(4,), num_inference_steps=2)
    (ours,) = run_alone(load_pipeline(directory, read_manifest(directory), Execution("cpu")), request)
    theirs = pipe(
        image=[image, reference], prompt="a lake", num_inference_steps=2, width=96, height=64,
        generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    (plain,) = run_alone(load_pipeline(bundle("klein"), read_manifest(bundle("klein")), Execution("cpu")), request)
    assert np.abs(np.asarray(ours, int) - np.asarray(plain, int)).max() > 10, "they count"


def test_images_with_different_token_counts_do_not_share_calls(bundle: Callable[[str], Path]) -> None:
    """Wide and tall images share calls; a reference of another size counts, too."""
    pipeline = load_pipeline(bundle("klein"), read_manifest(bundle("klein")), Execution("cpu"))
    images = source(96, 64, 1), source(64, 96, 1), source(64, 80, 1)
    wide, tall, smaller = (pipeline.plan(make_request(image=image, size=(64, 96))).shape for image in images)
    assert wide == tall != smaller
    assert pipeline.plan(make_request(image=images[0], size=(64, 80))).shape not in (wide, smaller)


def test_a_bundle_in_pytorch_is_opaque(bundle: Callable[[str], Path]) -> None:
    """diffusers' own transformers take positions without rows."""
    from img2img_export.convert.models import WHOLE, plans_for
    from img2img_export.read.checkpoint import Layout

    plans = list(plans_for(Layout("Flux2KleinPipeline", {"transformer": ("diffusers", "Flux2Transformer2DModel")}, ()), "auto"))
    stepped = [("onnx", "flux-2-klein"), ("hybrid", "flux-2-klein")]
    assert [(plan.backend, plan.family) for plan in plans] == [*stepped, ("torch", WHOLE)]


@pytest.mark.parametrize("name", ["klein", "chroma", "qwenimage"])
def test_previews_of_the_last_step_show_the_result(name: str, bundle: Callable[[str], Path]) -> None:
    """For requests of both shapes: the last step's prediction is the decoded latents."""
    pipeline: Any = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"))
    vae = pipeline._pipe.vae
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    pipeline._preview_weights = np.random.default_rng(0).normal(0, 0.2, (3, 4 * channels + 1)).tolist()
    shapes = {(96, 64): 1, (64, 96): 2}
    settings = {"prompt": "a lake", "num_inference_steps": 2, "strength": 1.0, "guidance_scale": 1.0, "preview_interval": 1}
    states = pipeline.prepare(
        [make_request(image=source(*size, seed), seeds=(seed,), **settings) for size, seed in shapes.items()]
    )
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    factor = 8
    for (width, height), state, drawn in zip(shapes, states, pipeline.preview(states), strict=True):
        assert drawn.size == (width // factor, height // factor)
        (expected,) = draw(pipeline._final_latents(state), pipeline._preview_weights)
        difference = np.asarray(drawn, int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1
        assert np.asarray(drawn).std() > 1


@pytest.mark.parametrize("name", nightly_but([name for name, (_, backend) in FAMILIES.items() if backend == "onnx"], "klein"))
def test_models_of_graphs_have_no_weights_in_pytorch(name: str, bundle: Callable[[str], Path]) -> None:
    """Neither in memory, also after an image, nor in the bundle."""
    pipeline: Any = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"))
    run_alone(pipeline, make_request(image=source(64, 64, 1), prompt="a lake", num_inference_steps=1))
    modules = [part for part in pipeline._pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3
    assert not [weight.shape for part in modules for weight in (*part.parameters(), *part.buffers())]
    assert not list(bundle(name).rglob("*.safetensors"))


def test_rotary_tables_are_made_once_for_equal_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux Fill's loop in diffusers passes the same position ids at every step, as float32."""
    made, table = [], rotary.Rotary.table

    def counted(self: rotary.Rotary, positions: rotary.Positions, dims: Any) -> np.ndarray:
        made.append(len(positions))
        return table(self, positions, dims)

    monkeypatch.setattr(rotary.Rotary, "table", counted)
    tokens = FluxTokens({"axes_dims_rope": (4, 4, 8), "guidance_embeds": False})

    def inputs(text: int, sizes: list[rotary.Size], number: type = np.float32) -> Any:
        ids = [torch.from_numpy(part.astype(number)) for part in rotary.flux_positions(text, sizes)]
        return tokens.inputs(
            {"hidden_states": torch.zeros(2, len(ids[1]), 4), **dict(zip(("txt_ids", "img_ids"), ids, strict=True))}
        )

    wide = inputs(8, [(4, 6)])
    assert torch.equal(inputs(8, [(4, 6)])[MARK], wide[MARK])
    assert made == [8, 24]
    tall = inputs(8, [(6, 4)])
    assert tall[MARK].shape == wide[MARK].shape
    assert not torch.equal(tall[MARK], wide[MARK])
    assert inputs(4, [(4, 6)], np.int64)["text_rotary"].shape[1] == 4, "zeros of the same bytes as 8 positions in float32"
    assert made == [8, 24, 8, 24, 4, 24]
    for side in range(1, 40):
        inputs(8, [(side, 1)])
    assert len(tokens._tables) <= 16
