"""Models saved with other schedulers than their families': a model that edits runs them as its pipeline in diffusers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_oracle import oracle, source
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Pipeline, run_alone
from img2img_server.errors import InvalidField
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_SHIFTED = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {**_FLOW, "flow_shift": 3.0}),
    "unipc-shifted": ("UniPCMultistepScheduler", {**_FLOW, **_SHIFTED}),
    "dpm-shifted": ("DPMSolverMultistepScheduler", {**_FLOW, **_SHIFTED}),
    "euler-linear": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    "euler-beta": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "use_beta_sigmas": True}),
    "euler-terminal": ("FlowMatchEulerDiscreteScheduler", {**_SHIFTED, "shift_terminal": 0.02}),
}
"""Class and settings. Of UniPC's and DPM++'s settings, none are of the shift by size, so its own defaults hold."""


@pytest.fixture
def load(bundle: Callable[[str], Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[str, str], Any]:
    """A tiny model with another scheduler: as the server has it, and as diffusers has it."""

    def loaded(name: str, scheduler: str) -> tuple[Pipeline, Any]:
        directory = Path(shutil.copytree(bundle(name), tmp_path / "bundle"))
        kind, settings = SCHEDULERS[scheduler]
        made = getattr(diffusers, kind)(**settings)
        made.save_pretrained(directory / "scheduler")
        index = json.loads((directory / "model_index.json").read_text())
        (directory / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
        manifest = read_manifest(directory)
        pipe = oracle(tiny_model(name), manifest.pipeline_class)
        pipe.scheduler = made
        return load_pipeline(directory, manifest, Execution("cpu")), pipe

    return loaded


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_own_scheduler_matches_diffusers(scheduler: str, load: Callable[[str, str], tuple[Pipeline, Any]]) -> None:
    """FLUX.2's pipeline lets schedulers of `use_flow_sigmas` space the noise levels themselves."""
    pipeline, pipe = load("klein", scheduler)
    for steps, size in ((5, (64, 96)), (2, (80, 64))):
        settings: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": steps}
        (ours,) = run_alone(pipeline, make_request(image=source(*size), seeds=(3,), **settings))
        theirs = pipe(
            image=source(*size), width=size[0], height=size[1], generator=torch.Generator().manual_seed(3), **settings
        ).images[0]
        assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("scheduler", ["unipc", "unipc-shifted"])
def test_own_scheduler_of_a_model_that_gives_the_noise_levels_matches_diffusers(
    scheduler: str, load: Callable[[str, str], tuple[Pipeline, Any]]
) -> None:
    pipeline, pipe = load("kontext", scheduler)
    settings: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 2, "guidance_scale": 2.0}
    (ours,) = run_alone(pipeline, make_request(image=source(96, 64), seeds=(3,), **settings))
    theirs = pipe(
        image=source(96, 64), width=96, height=64, max_area=96 * 64, generator=torch.Generator().manual_seed(3), **settings
    ).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_steps_of_which_the_scheduler_makes_no_noise_levels_are_an_invalid_number(
    load: Callable[[str, str], tuple[Pipeline, Any]],
) -> None:
    """diffusers divides by zero to stretch a single step, and its image is black. Qwen-Image's own scheduler does that."""
    pipeline, _ = load("klein", "euler-terminal")
    request = make_request(image=source(64, 64), num_inference_steps=1)
    with pytest.raises(InvalidField, match="increase it") as raised:
        pipeline.plan(request)
    assert raised.value.field == "num_inference_steps"
