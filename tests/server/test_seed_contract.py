"""The same seed gives the same image: alone or in a batch, next to anything, with every scheduler, and diffusers' own."""

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import hypothesis.strategies as st
import numpy as np
import onnxruntime
import pytest
import torch
from covering import nightly_but
from diffusers import AutoPipelineForImage2Image
from fakes import Caller, make_request
from hypothesis import HealthCheck, given, settings
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Request, run_alone
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import InvalidField
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.schedulers.registry import NAMES
from PIL import Image

PROMPTS = ("a lake at sunset", "winter mountains", "a forest", "")
Load = Callable[..., SteppedPipeline]


@pytest.fixture(scope="module")
def load(bundle: Callable[[str], Path]) -> Load:
    def get(name: str, cache: Cache | None = None) -> SteppedPipeline:
        pipeline = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"), cache=cache)
        assert isinstance(pipeline, SteppedPipeline)
        return pipeline

    return get


@pytest.fixture(scope="module")
def pipeline(load: Load) -> SteppedPipeline:
    return load("sd1", Cache(2**20))


@pytest.fixture(scope="module")
def distilled(load: Load) -> SteppedPipeline:
    return load("lcm", Cache(2**20))


def source_image(size: tuple[int, int], number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@st.composite
def mixes(
    draw: st.DrawFn, schedulers: Sequence[str | None] = (None, *NAMES), other_size: tuple[int, int] = (72, 56)
) -> list[tuple[Request, int]]:
    """Some requests, and how many steps of the engine pass before each arrives."""

    def one() -> tuple[Request, int]:
        number, size = draw(st.integers(0, 3)), draw(st.sampled_from([(64, 64), (64, 64), other_size]))
        request = make_request(
            image=source_image(size, number),
            image_digest=draw(st.sampled_from([b"", repr((number, size)).encode()])),
            prompt=draw(st.sampled_from(PROMPTS)),
            negative_prompt=draw(st.sampled_from([None, "", "fog"])),
            strength=draw(st.sampled_from([0.34, 0.6, 1.0])),
            num_inference_steps=draw(st.integers(3, 7)),
            guidance_scale=draw(st.sampled_from([0.0, 1.0, 3.0, 7.5])),
            seeds=tuple(range(7))[draw(st.integers(0, 5)) :][: draw(st.integers(1, 2))],
            scheduler=draw(st.sampled_from(schedulers)),
        )
        return request, draw(st.integers(0, 3))

    return [one() for _ in range(draw(st.integers(2, 5)))]


@given(mix=mixes())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_image_is_identical_alone_and_in_any_batch(pipeline: SteppedPipeline, mix: list[tuple[Request, int]]) -> None:
    assert_same_alone_and_together(pipeline, mix)


@given(mix=mixes(schedulers=(None, "LCM")))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_image_is_identical_in_any_batch_with_embedded_guidance(
    distilled: SteppedPipeline, mix: list[tuple[Request, int]]
) -> None:
    assert_same_alone_and_together(distilled, mix)


@pytest.mark.parametrize("name", ["sd3-no-t5", "flux-dev"])
@given(mix=mixes(schedulers=(None, "Euler"), other_size=(80, 48)))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_transformer_image_is_identical_alone_and_in_any_batch(load: Load, name: str, mix: list[tuple[Request, int]]) -> None:
    assert_same_alone_and_together(load(name), mix)


def assert_same_alone_and_together(pipeline: SteppedPipeline, mix: list[tuple[Request, int]]) -> None:
    engine = Engine({"m": pipeline}, QueueLimits(max_batch_size=8, max_admitted=3))
    callers = []
    for request, pause in mix:
        caller = Caller(engine)
        engine.submit(request, caller.events.append)
        callers.append(caller)
        for _ in range(pause):
            engine.step()
    while engine.step():
        pass
    for (request, _), caller in zip(mix, callers, strict=True):
        (ending,) = caller.endings
        assert isinstance(ending, Completed)
        for together, alone in zip(ending.images, run_alone(pipeline, request), strict=True):
            assert difference(together, alone) <= 1


@pytest.fixture(scope="module")
def loaded(tiny_model: Callable[[str], Path]) -> Any:
    """Diffusers' own pipeline. Copy it to change its scheduler."""
    oracle = AutoPipelineForImage2Image.from_pretrained(
        tiny_model("sd1"), torch_dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    oracle.set_progress_bar_config(disable=True)
    return oracle


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_scheduler_matches_diffusers(pipeline: SteppedPipeline, loaded: Any, name: str) -> None:
    class_name, overrides = NAMES[name]
    oracle = copy.copy(loaded)
    # As its user would set it; latents, unlike pixels, are never clipped.
    chosen = getattr(diffusers, class_name).from_config(loaded.scheduler.config, **overrides)
    if "clip_sample" in chosen.config:
        chosen.register_to_config(clip_sample=False)
    oracle.scheduler = chosen
    source = source_image((64, 64), 5)
    for steps, strength in ((5, 0.6), (4, 1.0)):
        request = make_request(
            image=source, prompt="a lake", strength=strength, num_inference_steps=steps, guidance_scale=6.0, seeds=(3,),
            scheduler=name,
        )  # fmt: skip
        (ours,) = run_alone(pipeline, request)
        (expected,) = oracle(
            "a lake", image=source, strength=strength, num_inference_steps=steps, guidance_scale=6.0,
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip
        assert np.asarray(expected).std() > 10
        assert difference(ours, expected) <= 1


@pytest.mark.parametrize(
    "model", nightly_but(["sd1", "sdxl", "refiner", "lcm", "sd3", "flux-dev"], "sd1", "sdxl", "lcm", "flux-dev")
)
def test_cache_does_not_change_images(load: Load, model: str) -> None:
    cache = Cache(2**24)
    cached, plain = load(model, cache), load(model, Cache(0))
    for seed, negative in ((1, None), (2, "fog"), (1, None), (2, "fog")):
        request = make_request(
            image=source_image((64, 64), 1), image_digest=b"1", prompt="a lake", negative_prompt=negative, seeds=(seed,),
            num_inference_steps=3,
        )  # fmt: skip
        (one,), (other,) = run_alone(cached, request), run_alone(plain, request)
        assert difference(one, other) <= 1
    stats = cache.stats
    assert stats.misses <= 4, "one image and three texts at most"
    assert stats.hits >= 6


def test_images_with_different_content_have_separate_cache_entries(load: Load) -> None:
    pipeline = load("sd1", Cache(2**24))
    first, second = (
        run_alone(pipeline, make_request(image=source_image((64, 64), number), image_digest=bytes([number]), strength=0.5))[0]
        for number in (1, 2)
    )
    assert difference(first, second) > 1


def test_requests_without_guidance_cost_half(pipeline: SteppedPipeline, distilled: SteppedPipeline) -> None:
    scales = (0.0, 1.0, 1.01, 7.5)
    assert [pipeline.plan(make_request(guidance_scale=scale)).rows for scale in scales] == [1, 1, 2, 2]
    assert [distilled.plan(make_request(guidance_scale=scale)).rows for scale in scales] == [1, 1, 1, 1]


def test_distilled_model_runs_every_step_or_names_its_maximum(distilled: SteppedPipeline) -> None:
    plans = [distilled.plan(make_request(num_inference_steps=4, strength=strength)) for strength in (0.1, 1.0)]
    assert [plan.step_count for plan in plans] == [4, 4]
    with pytest.raises(InvalidField, match=r"at strength 0\.1 the maximum of this model is 5"):
        distilled.plan(make_request(num_inference_steps=6, strength=0.1))
    with pytest.raises(InvalidField, match="does not support 'DDIM'"):
        distilled.plan(make_request(scheduler="DDIM"))


def test_preview_resembles_the_final_image(load: Load) -> None:
    """With the demo model, whose weights are trained: halfway it is nearer to the result than to the source."""
    pipeline = load("demo")
    source = Image.open(Path(__file__).parents[2] / "demo" / "images" / "noon-lake.png").convert("RGB")
    request = make_request(
        image=source, prompt="A beautiful landscape with mountains and a lake at night", strength=0.9, num_inference_steps=10,
        preview_interval=1,
    )  # fmt: skip
    (state,) = pipeline.prepare([request])
    previews: list[Image.Image | None] = []
    while state.step < state.step_count:
        pipeline.advance([state], pipeline.denoise([state]))
        previews += pipeline.preview([state])
    ((result,),) = pipeline.finish([state])

    def distance(preview: Image.Image | None, other: Image.Image) -> float:
        assert preview is not None
        assert preview.size == (32, 32)
        return float(np.abs(np.asarray(preview, float) - np.asarray(other.resize((32, 32), Image.Resampling.BOX), float)).mean())

    assert distance(previews[-1], result) < 25
    assert distance(previews[-2], result) < distance(previews[-2], source)


@pytest.mark.parametrize("name", ["sd1", "lcm"])
def test_at_most_nine_frames_lie_between_the_engines_loop_and_session_run(
    name: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, stacks = load(name), list[list[str]]()
    run = onnxruntime.InferenceSession.run

    def recorded(*arguments: Any, **named: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        names: list[str] = []
        while frame is not None and frame.f_code is not Engine._run.__code__:
            names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        stacks.append([*names, "Engine._run"])
        return run(*arguments, **named)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", recorded)
    engine, ended = Engine({"m": pipeline}), threading.Event()
    engine.submit(make_request(num_inference_steps=3), lambda event: ended.set() if isinstance(event, Completed) else None)
    engine.start()
    assert ended.wait(120)
    engine.close()
    denoised = [stack for stack in stacks if any(name.endswith(".denoise") for name in stack)]
    assert denoised, "the engine's thread called the denoiser's session"
    assert all(len(stack) <= 9 for stack in denoised), max(denoised, key=len)
