"""Previews with every scheduler: they show what the scheduler itself predicts, and they never end a request.

The oracle is diffusers: a scheduler takes part if diffusers' own pipeline draws an image with it.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Request
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.schedulers.noise_levels import predict_original
from PIL import Image
from tiny_parts import BETAS

KNOWN = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "PNDMScheduler",
    "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
"""Schedulers of diffusers that image-to-image with SDXL works with, at least. Others of the installed version are tried too."""
WEIGHTS = [[0.1] * 16 + [0.5]] * 3
STEPS = 4
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"prediction_type": "sample"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}],
    "EulerDiscreteScheduler": [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 120.0},
        {"use_karras_sigmas": True},
    ],
    "DPMSolverMultistepScheduler": [
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"prediction_type": "sample"},
    ],
    "UniPCMultistepScheduler": [{"use_flow_sigmas": True, "prediction_type": "flow_prediction"}],
    "EDMEulerScheduler": [{"prediction_type": "v_prediction", "sigma_max": 120.0, "sigma_data": 1.0}],
    "EDMDPMSolverMultistepScheduler": [{"prediction_type": "v_prediction"}, {"algorithm_type": "sde-dpmsolver++"}],
}


@pytest.fixture(scope="module")
def pipe(tiny_model: Callable[[str], Path]) -> Any:
    """SDXL with a VAE that has a mean and a deviation for each channel, as Playground v2.5 has them."""
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_model("sdxl"), use_safetensors=True, local_files_only=True)
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image() -> Image.Image:
    return Image.radial_gradient("L").resize((64, 64)).convert("RGB")


def made(name: str, options: dict[str, Any]) -> Any:
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    noise = {**BETAS, "skip_prk_steps": True, "clip_sample": False}
    return kind(**{key: value for key, value in noise.items() if key in known}, **options)


@pytest.fixture(scope="module")
def drawing(pipe: Any) -> list[tuple[str, Any]]:
    """Every scheduler of the installed diffusers that its own SDXL pipeline draws with, by what a failure is to be named."""
    found = []
    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        for options in ({}, *OPTIONS.get(name, ())):
            try:
                scheduler = made(name, options)
                pipe.scheduler = copy.deepcopy(scheduler)
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    pipe("a lake", image=image(), num_inference_steps=STEPS, generator=generator, output_type="latent")
            except Exception:  # noqa: BLE001 - any error of an unsupported scheduler
                assert not options, f"{name} with {options} is a test case, so diffusers has to draw with it"
                continue
            found.append((f"{name} {options}", scheduler))
    assert {name.split()[0] for name, _ in found} >= KNOWN
    return found


def test_previews_never_fail_a_request_with_any_scheduler(drawing: list[tuple[str, Any]], pipe: Any) -> None:
    drawn: dict[str, int] = {}
    for name, scheduler in drawing:
        pipe.scheduler = scheduler
        server = StableDiffusionXL(pipe, "torch:cpu", 1, Cache(0), WEIGHTS)
        with torch.no_grad():
            (state,) = server.prepare([Request("m", image(), "a lake", "", 0.8, STEPS, 5.0, (1,), preview_interval=1)])
            drawn[name] = 0
            while state.step < state.step_count:
                server.advance([state], server.denoise([state]))
                (preview,) = server.preview([state])
                drawn[name] += preview is not None
            ((result,),) = server.finish([state])
        assert result.size == (64, 64), name
    without = {name.split()[0] for name, count in drawn.items() if count == 0}
    assert without.isdisjoint(KNOWN), "these say what they predict"


def own_prediction(scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
    """x0 as a scheduler's class computes it: what DPM-Solver++ converts outputs to, else what its step returns, if it does."""
    probe = copy.deepcopy(scheduler)
    if probe.config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++"):
        if probe.step_index is None:
            probe._init_step_index(timestep)
        converted: torch.Tensor = probe.convert_model_output(output, sample=sample)
        return converted
    return getattr(probe.step(output, timestep, sample), "pred_original_sample", None)


def test_preview_shows_the_schedulers_prediction(drawing: list[tuple[str, Any]]) -> None:
    compared: dict[str, int] = {}
    for name, scheduler in drawing:
        scheduler.set_timesteps(STEPS)
        start = scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        begun, stepped = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
        random = torch.Generator().manual_seed(3)
        sample = 2 * torch.randn(1, 4, 8, 8, generator=random)
        for index, timestep in enumerate(scheduler.timesteps[start:], start=start):
            output = torch.randn(1, 4, 8, 8, generator=random)
            scale = float(copy.copy(stepped).scale_model_input(torch.ones(1), timestep))
            stepped.scale_model_input(sample, timestep)
            found = predict_original(begun, index, timestep, sample, output, scale)
            wanted = own_prediction(stepped, output, timestep, sample)
            if wanted is not None and found is not None:
                compared[name] = compared.get(name, 0) + 1
                scale = float(wanted.abs().max())
                assert torch.allclose(found, wanted, atol=2e-3 * scale), f"{name} at step {index}"
            sample = stepped.step(output, timestep, sample, return_dict=False)[0]
    kinds = {name.split()[0] for name in compared}
    assert kinds >= {"DDIMScheduler", "EulerDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler"}
    assert kinds >= {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
    assert sum("flow" in name for name in compared) > 0


def test_unknown_prediction_type_has_no_preview(tiny_model: Callable[[str], Path]) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_model("sd1"), use_safetensors=True, local_files_only=True)
    pipe.scheduler = made("EulerDiscreteScheduler", {})
    server = StableDiffusion(pipe, "torch:cpu", 1, Cache(0), WEIGHTS)
    with torch.no_grad():
        (state,) = server.prepare([Request("m", image(), "a lake", "", 0.8, STEPS, 1.0, (1,), preview_interval=1)])
        server.advance([state], server.denoise([state]))
        assert server.preview([state])[0] is not None
        state.begun.register_to_config(prediction_type="score")
        assert server.preview([state]) == [None]
