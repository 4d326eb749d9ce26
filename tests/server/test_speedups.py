"""Requests that need not be exact: images as a loop over diffusers' modules draws them that skips the same work, to 1/255."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from fakes import Caller, make_request
from img2img_export.verify.images import sample_image
from img2img_server.bundle.manifest import read_manifest
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Completed, Request, run_alone
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.runtime.diffusion.speedups import EXACT_CODE
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx.runners import Runner
from img2img_server.support.fidelity import EXACT, Fidelity

Get = Callable[[str], Path]

LIGHT_COST = 0.25
SETTINGS = {
    "guidance": Speedup("guidance", 0.4, 2, keeps_guidance=True, keeps_features=False, psnr_db=40.0, ssim=0.99),
    "features": Speedup("features", 0.2, 3, keeps_guidance=False, keeps_features=True, psnr_db=40.0, ssim=0.99),
    "both": Speedup("both", 0.2, 2, keeps_guidance=True, keeps_features=True, psnr_db=40.0, ssim=0.99),
    "fewer": Speedup(
        "fewer", 1.0, 1, keeps_guidance=False, keeps_features=False, called_share=0.2, skip_period=2, psnr_db=31.0, ssim=0.99
    ),
    "all": Speedup(
        "all", 0.2, 2, keeps_guidance=True, keeps_features=True, called_share=0.4, skip_period=3, psnr_db=40.0, ssim=0.99
    ),
}
FAST = Fidelity("fast")
HIGH = Fidelity("high")
"""A bound that "fewer" does not keep."""


class Counting:
    """A runner that notes the rows of its calls."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.rows: list[int] = []

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        self.rows.append(len(feed["sample"]))
        return self._runner.run(feed)


class Model:
    """A model with a light graph, and diffusers' own modules of it."""

    def __init__(self, bundle: Path, checkpoint: Path) -> None:
        self.manifest = read_manifest(bundle)
        pipeline = load_pipeline(bundle, self.manifest, Execution("cpu"), cache=Cache(2**22))
        assert isinstance(pipeline, SteppedPipeline)
        self.pipeline = pipeline
        self.offer()
        self.oracle = AutoPipelineForImage2Image.from_pretrained(checkpoint, local_files_only=True, safety_checker=None)
        self.oracle.set_progress_bar_config(disable=True)

    def offer(self, *names: str, least_steps: int = 4, most_guidance: float = 7.5) -> None:
        """Gives the model these speedups."""
        table = tuple(SETTINGS[name] for name in names)
        self.pipeline.speedups.speedups = Speedups(table, 1, least_steps, most_guidance, LIGHT_COST)

    def counted(self) -> tuple[list[int], list[int]]:
        """The rows of the calls of the whole and of the light graph from now on."""
        runners = []
        for graph in (self.pipeline._denoiser._graph, self.pipeline._denoiser._light):
            inner = graph._runner
            graph._runner = Counting(inner._runner if isinstance(inner, Counting) else inner)
            runners.append(graph._runner.rows)
        return runners[0], runners[1]

    @torch.no_grad()
    def expected(self, request: Request, speedup: Speedup | None) -> np.ndarray:
        """The image by diffusers' UNet, called block by block, and diffusers' other methods."""
        pipe, unet, guided = self.oracle, self.oracle.unet, request.guidance_scale > 1
        texts, more = _conditions(pipe, request, guided)
        pipe.scheduler.set_timesteps(request.num_inference_steps)
        times = pipe.get_timesteps(request.num_inference_steps, request.strength, "cpu")[0]
        generator = torch.Generator().manual_seed(request.seeds[0])
        pixels = pipe.image_processor.preprocess(request.image)
        latents = pipe.prepare_latents(pixels, times[:1], 1, 1, torch.float32, "cpu", generator)
        called = range(len(times)) if speedup is None else _called(len(times), speedup)
        light = iter([False] * len(times) if speedup is None else speedup.light_steps(len(called)))
        features = difference = torch.empty(0)
        original = torch.empty(0)
        for step, time in enumerate(times):
            if step not in called:
                signal, noise = _levels(pipe.scheduler, time)
                output = (latents - signal * original) / noise
                latents = pipe.scheduler.step(output, time, latents, return_dict=False)[0]
                continue
            is_light = next(light)
            one = speedup is not None and speedup.keeps_guidance and is_light
            rows = slice(1, 2) if guided and one else slice(0, 2)
            count = 2 if guided and not one else 1
            sample = pipe.scheduler.scale_model_input(torch.cat([latents] * count), time)
            given = {name: value[rows] for name, value in more.items()}
            if speedup is not None and speedup.keeps_features and is_light:
                output = _light(unet, sample, time.expand(count), texts[rows], given, features[-count:])
            else:
                output, features = _full(unet, sample, time.expand(count), texts[rows], given)
            if guided and count == 2:
                negative, positive = output.chunk(2)
                difference = positive - negative
                output = negative + request.guidance_scale * difference
            elif guided:
                output = output + (request.guidance_scale - 1) * difference
            signal, noise = _levels(pipe.scheduler, time)
            original = (latents - noise * output) / signal
            latents = pipe.scheduler.step(output, time, latents, return_dict=False)[0]
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return np.asarray(pipe.image_processor.postprocess(decoded)[0], int)


def _called(count: int, speedup: Speedup) -> list[int]:
    """The steps in which the model is called."""
    steps, since = [], 0
    for step in range(count):
        since += step >= speedup.called_share * count
        if since and since == speedup.skip_period:
            since = 0
        else:
            steps.append(step)
    return steps


def _levels(scheduler: Any, time: torch.Tensor) -> tuple[float, float]:
    """The shares of image and noise in latents at a timestep."""
    one, zero, times = torch.ones(1), torch.zeros(1), time.reshape(1)
    return float(scheduler.add_noise(one, zero, times)), float(scheduler.add_noise(zero, one, times))


def _conditions(pipe: Any, request: Request, guided: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The embeddings of both prompts, and the UNet's further inputs."""
    found = pipe.encode_prompt(request.prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided)
    if len(found) == 2:
        texts = torch.cat([found[1], found[0]]) if guided else found[0]
        return texts, {}
    positive, negative, pooled, other = found
    width, height = request.image.size
    size = (height, width)
    own, away = pipe._get_add_time_ids(
        size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, dtype=torch.float32,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    more = {"text_embeds": pooled, "time_ids": own}
    if guided:
        more = {"text_embeds": torch.cat([other, pooled]), "time_ids": torch.cat([away, own])}
    return torch.cat([negative, positive]) if guided else positive, more


def _full(unet: Any, sample: Any, times: Any, texts: Any, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The UNet's output, and what its last layer is given by the one before."""
    block, found = unet.up_blocks[-1], []
    hook = block.resnets[-1].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    output = unet(sample, times, texts, added_cond_kwargs=more, return_dict=False)[0]
    hook.remove()
    return output, found[0][:, : -unet.config.block_out_channels[0]]


def _light(unet: Any, sample: Any, times: Any, texts: Any, more: dict[str, torch.Tensor], features: Any) -> torch.Tensor:
    """The UNet's first convolution and its last layer, on features of another step."""
    embedded = unet.time_embedding(unet.get_time_embed(sample, times))
    added = unet.get_aug_embed(emb=embedded, encoder_hidden_states=texts, added_cond_kwargs=more)
    embedded = embedded if added is None else embedded + added
    block = unet.up_blocks[-1]
    hidden = block.resnets[-1](torch.cat([features, unet.conv_in(sample)], dim=1), embedded)
    if hasattr(block, "attentions"):
        hidden = block.attentions[-1](hidden, encoder_hidden_states=texts, return_dict=False)[0]
    output: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return output


@pytest.fixture(scope="module")
def model(bundle: Get, tiny_model: Get) -> Model:
    return Model(bundle("sd1:fp32:speedups"), tiny_model("sd1"))


def ask(fidelity: Fidelity = FAST, seed: int = 3, **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "image": sample_image(64, 64), "prompt": "a lake", "strength": 0.8, "num_inference_steps": 10, "guidance_scale": 5.0,
        "seeds": (seed,), "fidelity": fidelity, **changes,
    }  # fmt: skip
    return make_request(**settings)


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_speedup_matches_a_skipping_loop_over_diffusers_modules(model: Model, name: str, guidance: float) -> None:
    model.offer(name)
    request = ask(guidance_scale=guidance)
    skips = SETTINGS[name] if guidance > 1 or name != "guidance" else None
    (image,) = run_alone(model.pipeline, request)
    assert difference(image, model.expected(request, skips)) <= 1
    if skips is not None:
        assert difference(image, model.expected(request, None)) > 1, "the speedup changes the image"


@pytest.mark.nightly
@pytest.mark.parametrize("name", SETTINGS)
def test_sdxl_speedup_matches_a_skipping_loop_over_diffusers_modules(bundle: Get, tiny_model: Get, name: str) -> None:
    model = Model(bundle("sdxl:fp32:speedups"), tiny_model("sdxl"))
    model.offer(name)
    request = ask()
    (image,) = run_alone(model.pipeline, request)
    assert difference(image, model.expected(request, SETTINGS[name])) <= 1
    assert difference(image, model.expected(request, None)) > 1


def test_requests_with_different_speedups_share_calls_and_do_not_change_each_other(model: Model) -> None:
    asked = [
        (ask(EXACT, seed=1), None),
        (ask(HIGH, seed=2), "both"),
        (ask(HIGH, seed=3, prompt="winter mountains", strength=1.0), "both"),
        (ask(HIGH, seed=4, guidance_scale=1.0), "both"),
        (ask(EXACT, seed=5, guidance_scale=1.0), None),
        (ask(seed=6), "fewer"),
    ]
    model.offer("both", "fewer")
    alone = [run_alone(model.pipeline, request)[0] for request, _ in asked]
    spans: list[Span] = []
    engine = Engine({"m": model.pipeline}, QueueLimits(max_batch_size=16, max_admitted=8), observe=spans.append)
    callers = [Caller(engine) for _ in asked]
    for (request, _), caller in zip(asked, callers, strict=True):
        engine.submit(request, caller.events.append)
    while engine.step():
        pass
    for (request, name), caller, own in zip(asked, callers, alone, strict=True):
        (ending,) = caller.endings
        assert isinstance(ending, Completed)
        assert (ending.speedup.name if ending.speedup else None) == name
        assert difference(ending.images[0], own) <= 1
        assert difference(own, model.expected(request, SETTINGS[name] if name else None)) <= 1
    assert max(span.requests for span in spans if span.stage == "denoise") > 1, "requests shared calls"


def test_exact_rows_keep_their_bits_beside_rows_with_a_speedup(model: Model) -> None:
    model.offer("features")
    exact, other = ask(EXACT, seed=1), ask(seed=2)
    found = []
    for companion in (other, dataclasses.replace(other, fidelity=EXACT)):
        states = list(model.pipeline.prepare([exact, companion]))
        for _ in range(3):  # in all of which the companion's steps are full
            assert not states[1].is_light
            model.pipeline.advance(states, model.pipeline.denoise(states))
        found.append(states[0].latents)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "guidance", "whole", "light"),
    [
        # PNDM repeats the second of 8 steps: 9 calls, of which the first 40 % (4) or 20 % (2) are full.
        ("guidance", 5.0, [2, 2, 2, 2, 2, 1, 2, 1, 2], []),
        ("features", 5.0, [2] * 5, [2, 2, 2, 2]),
        ("both", 5.0, [2, 2, 2, 2, 2, 2], [1, 1, 1]),
        ("both", 1.0, [1, 1, 1, 1, 1, 1], [1, 1, 1]),
        # Of 9 steps, CCC-C-C-C and CCCCCC-CC, called.
        ("fewer", 5.0, [2] * 6, []),
        ("all", 5.0, [2] * 5, [1, 1, 1]),
    ],
)
def test_calls_have_the_rows_that_the_plan_says(
    model: Model, name: str, guidance: float, whole: list[int], light: list[int]
) -> None:
    model.offer(name)
    request = ask(guidance_scale=guidance)
    plan = model.pipeline.plan(request)
    wholes, lights = model.counted()
    run_alone(model.pipeline, request)
    assert (wholes, lights) == (whole, light)
    assert plan.step_count == len(whole + light)
    assert sorted(call.rows for call in plan.calls or [plan] * plan.step_count) == sorted(whole + light)
    assert plan.speedup is not None
    cost = sum(whole) + LIGHT_COST * sum(light)
    exact = model.pipeline.plan(dataclasses.replace(request, fidelity=EXACT))
    assert plan.speedup.times_faster == pytest.approx(exact.step_count * plan.rows / cost)


def test_an_exact_request_has_a_plan_without_calls_of_its_own(model: Model) -> None:
    model.offer("both")
    plan = model.pipeline.plan(ask(EXACT))
    assert (plan.calls, plan.speedup, plan.warnings) == ((), None, ())


def test_the_fastest_speedup_that_keeps_the_bound_is_used(model: Model) -> None:
    def used(fidelity: Fidelity) -> str | None:
        plan = model.pipeline.plan(ask(fidelity))
        assert (plan.speedup is None) == (EXACT_CODE in {warning.code for warning in plan.warnings})
        return None if plan.speedup is None else plan.speedup.name

    steps = [("slow", 42.0, 0.99, 0.6), ("medium", 36.0, 0.98, 0.4), ("quick", 31.0, 0.95, 0.2)]
    table = tuple(Speedup(name, share, 2, True, True, psnr_db=psnr, ssim=ssim) for name, psnr, ssim, share in steps)
    model.pipeline.speedups.speedups = Speedups(table, 1, 4, 7.5, LIGHT_COST)
    assert [used(Fidelity(level)) for level in ("high", "fast")] == ["medium", "quick"]
    bounds = (30.0, 31.0, 31.1, 40.0, 42.1)
    assert [used(Fidelity(None, min_psnr_db=least)) for least in bounds] == ["quick", "quick", "medium", "slow", None]
    assert [used(Fidelity(None, min_ssim=least)) for least in (0.9, 0.96, 0.999)] == ["quick", "medium", None]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_inference_steps": 7}, "8 or more inference steps"),
        ({"guidance_scale": 7.6}, "guidance scale of up to 7.5"),
        ({"scheduler": "DDIMScheduler"}, "measured with PNDMScheduler"),
        ({"guidance_scale": 1.0}, "without guidance"),
        ({"fidelity": Fidelity(None, min_psnr_db=50.0)}, "no speedup of this model keeps a fidelity of 50 dB"),
    ],
)
def test_unmeasured_request_is_exact_with_a_warning(model: Model, changes: dict[str, Any], why: str) -> None:
    model.offer("guidance", least_steps=8)
    request = dataclasses.replace(ask(), **changes)
    plan = model.pipeline.plan(request)
    assert (plan.calls, plan.speedup) == ((), None)
    (warning,) = plan.warnings
    assert (warning.field, warning.code) == ("fidelity", EXACT_CODE)
    assert why in warning.description
    (image,), (exact,) = (
        run_alone(model.pipeline, request),
        run_alone(model.pipeline, dataclasses.replace(request, fidelity=EXACT)),
    )
    assert difference(image, exact) == 0


def test_model_without_measured_speedups_is_exact_with_a_warning(model: Model) -> None:
    model.offer()
    (warning,) = model.pipeline.plan(ask()).warnings
    assert "no measured speedups" in warning.description


def test_the_first_steps_are_full_and_then_every_period_th() -> None:
    def light(share: float, period: int, count: int) -> str:
        return "".join("-" if step else "F" for step in Speedup("", share, period, True, True).light_steps(count))

    assert light(0.4, 2, 10) == "FFFFF-F-F-"
    assert light(0.4, 3, 10) == "FFFFF--F--"
    assert light(0.2, 5, 3) == "FF-", "rounded up"
    assert [light(0.2, 2, count) for count in (0, 1, 2)] == ["", "F", "FF"]


def test_costs_of_light_steps_are_learnt_apart_and_forecasts_count_them(model: Model) -> None:
    model.offer("both")
    spans: list[Span] = []
    engine = Engine({"m": model.pipeline}, observe=spans.append)
    caller = Caller(engine)
    ticket = engine.submit(ask(), caller.events.append).ticket
    while engine.step():
        pass
    plan = ticket.plan
    light, full = plan.calls[-2], plan.calls[0]
    assert {light.shape, full.shape} == {call.shape for call in plan.calls}
    assert light.pixels == round(full.pixels * LIGHT_COST)
    for call in (light, full):
        seconds = engine.costs.seconds("denoise", ("m", call.shape), call.pixels, call.rows)
        assert seconds is not None
    again = engine.submit(ask(), caller.events.append)
    whole = engine.costs.seconds("denoise", ("m", full.shape), full.pixels, full.rows)
    assert again.ticket.forecast is not None
    assert whole is not None
    (waiting,) = [engine._scheduler._job(ticket) for ticket in engine._scheduler.waiting]
    assert 6 <= waiting.steps_left < 9, "six full steps, and light ones"
    while engine.step():
        pass


@pytest.mark.parametrize(
    ("share", "period", "called"),
    [
        (0.0, 4, "CCC-CCC-CC"),
        (0.0, 3, "CC-CC-CC-C"),
        (0.4, 2, "CCCCC-C-C-"),
        (0.45, 3, "CCCCCCC-CC"),
        (1.0, 0, "C" * 10),
        (0.0, 0, "C" * 10),
    ],
)
def test_the_first_steps_are_called_and_then_one_of_a_period_is_skipped(share: float, period: int, called: str) -> None:
    steps = Speedup("", 1.0, 1, False, False, share, period).called_steps(10)
    assert "".join("C" if step in steps else "-" for step in range(10)) == called
    assert [Speedup("", 1.0, 1, False, False, 0.0, 2).called_steps(count) for count in (0, 1, 2, 3)] == [(), (0,), (0,), (0, 2)]
