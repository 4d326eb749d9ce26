"""Schedulers by name, against what diffusers makes of the same wishes."""

import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from covering import covering
from diffusers import StableDiffusionImg2ImgPipeline
from img2img_server.runtime.schedulers.registry import FLOW_NAMES, NAMES, build, find, make, read, supported

# Few timesteps, because diffusers' KDPM2 loops over all of them slowly in its constructor.
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 60}

# diffusers' KDPM2 schedulers hand torch's tensors to numpy's functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

# As models bring them: some with what other classes would refuse, or would warn of.
OWN: dict[str, Any] = {
    "bare": diffusers.DDIMScheduler(**NOISE),
    "pndm": diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1),
    "euler": diffusers.EulerDiscreteScheduler(**NOISE, use_karras_sigmas=True, timestep_spacing="leading"),
    "exponential": diffusers.EulerDiscreteScheduler(**NOISE, use_exponential_sigmas=True),
    "sde": diffusers.DPMSolverMultistepScheduler(**NOISE, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun"),
    "unipc": diffusers.UniPCMultistepScheduler(**NOISE, solver_order=3, solver_type="bh1", prediction_type="v_prediction"),
    "deis": diffusers.DEISMultistepScheduler(**NOISE),
    "lcm": diffusers.LCMScheduler(**NOISE, original_inference_steps=60),
    "unknown words": diffusers.PNDMScheduler.from_config({**NOISE, "skip_prk_steps": True, "clip_sample": False}),
}
OWN["unknown words"].register_to_config(invented_by_the_models_author=3)


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """diffusers' log from WARNING on."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("diffusers").addHandler(handler)
    yield seen
    logging.getLogger("diffusers").removeHandler(handler)


@pytest.mark.parametrize("name", sorted({*NAMES, *FLOW_NAMES}))
def test_a_name_is_found_in_any_case(name: str) -> None:
    assert {find(name), find(name.upper()), find(name.lower())} == {name}


@pytest.mark.parametrize("name", ["", "Euler b", "EulerScheduler", "LMS", "FlowMatchEuler"])
def test_an_unknown_name_is_not_found(name: str) -> None:
    assert find(name) is None


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from img2img_server.runtime.schedulers.registry import find; print(find('euler a'), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["Euler", "a", "False"]


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_discrete_noise_model_supports_every_scheduler(own: Any) -> None:
    assert supported(own) == tuple(NAMES)


@pytest.mark.parametrize(
    "own",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
        diffusers.DDIMScheduler(prediction_type="sample"),
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_other_model_kinds_support_no_scheduler(own: Any) -> None:
    assert supported(own) == ()


@pytest.mark.parametrize(
    ("own", "heun"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), True),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), False),
        (diffusers.FlowMatchHeunDiscreteScheduler(), True),
        (diffusers.FlowMatchLCMScheduler(shift=2.0), True),
    ],
    ids=["euler", "dynamic", "heun", "lcm"],
)
def test_flow_matching_model_supports_flow_matching_schedulers(own: Any, heun: bool, complaints: list[str]) -> None:
    """Heun's class knows no dynamic shifting."""
    assert supported(own) == tuple(name for name in FLOW_NAMES if heun or "Heun" not in name)
    for name in supported(own):
        scheduler, (class_name, overrides) = make(name, own), FLOW_NAMES[name]
        assert type(scheduler).__name__ == class_name
        assert {key: scheduler.config[key] for key in overrides} == dict(overrides)
        assert scheduler.config.shift == own.config.shift
    assert complaints == []


@covering(name=NAMES, kind=OWN)
def test_every_scheduler_is_built_from_every_model_without_warnings(name: str, kind: str, complaints: list[str]) -> None:
    own = OWN[kind]
    before = pickle.dumps(own)
    scheduler = make(name, own)
    scheduler.set_timesteps(5)
    class_name, overrides = NAMES[name]
    assert type(scheduler).__name__ == class_name
    assert {key: scheduler.config[key] for key in overrides} == dict(overrides)
    assert scheduler.config.prediction_type == own.config.prediction_type
    torch.testing.assert_close(scheduler.betas, own.betas)
    assert complaints == []
    assert pickle.dumps(own) == before


@pytest.mark.filterwarnings("ignore::FutureWarning")
@covering(name=NAMES, kind=["bare", "sde", "unknown words"])
def test_scheduler_config_is_corrected_as_by_the_diffusers_pipeline(name: str, kind: str) -> None:
    own, (class_name, overrides) = OWN[kind], NAMES[name]
    theirs = getattr(diffusers, class_name).from_config(own.config, **overrides)
    StableDiffusionImg2ImgPipeline(None, None, None, None, theirs, None, None, requires_safety_checker=False)
    ours = make(name, own)
    accepted = inspect.signature(type(ours).__init__).parameters
    assert {key: value for key, value in ours.config.items() if key in accepted} == {
        key: value for key, value in theirs.config.items() if key in accepted
    }
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@covering(name=NAMES, kind=["bare", "sde", "unknown words"])
def test_scheduler_is_built_as_by_diffusers(name: str, kind: str, tmp_path: Path) -> None:
    """diffusers would import all compatible classes for it."""
    config, (class_name, overrides) = OWN[kind].config, NAMES[name]
    scheduler_class = getattr(diffusers, class_name)
    ours, theirs = build(scheduler_class, config, **overrides), scheduler_class.from_config(config, **overrides)
    assert type(ours) is type(theirs)
    assert dict(ours.config) == dict(theirs.config)
    ours.save_pretrained(tmp_path)
    loaded, expected = read(scheduler_class, tmp_path), scheduler_class.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(expected.config)
    torch.testing.assert_close(loaded.betas, expected.betas, rtol=0.0, atol=0.0)


def test_default_scheduler_is_a_copy_of_the_models_own() -> None:
    own = OWN["sde"]
    made = make(None, own)
    assert made is not own
    assert (type(made), made.config) == (type(own), own.config)


def test_noncanonical_scheduler_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        make("euler a", OWN["bare"])
