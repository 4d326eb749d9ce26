"""The schedulers that a request may name; makes them from a model's own scheduler, or from a configuration.

Imports diffusers only when a scheduler is made, so names can be checked without torch.
"""

import copy
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KARRAS = {**_SIGMAS, "use_karras_sigmas": True}
_MULTISTEP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = {**_MULTISTEP, "algorithm_type": "sde-dpmsolver++"}
# Otherwise set_timesteps changes these, with a warning.
_SINGLESTEP = {"algorithm_type": "dpmsolver++", "lower_order_final": True}
# The class's only values: it refuses or replaces others from a model's configuration.
_DEIS = {"algorithm_type": "deis", "solver_type": "logrho"}
# bh1 divides by zero at the last step, because the last sigma is 0.
_UNIPC = {"solver_type": "bh2"}
# Image-to-image cannot start in the middle of Runge-Kutta steps.
_PNDM = {"skip_prk_steps": True}

NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        # diffusers' classes, with the model's own configuration as far as the class accepts it.
        "DDIMScheduler": ("DDIMScheduler", {}),
        "DDPMScheduler": ("DDPMScheduler", {}),
        "DEISMultistepScheduler": ("DEISMultistepScheduler", _DEIS),
        "DPMSolverMultistepScheduler": ("DPMSolverMultistepScheduler", {}),
        "DPMSolverSinglestepScheduler": ("DPMSolverSinglestepScheduler", _SINGLESTEP),
        "EulerAncestralDiscreteScheduler": ("EulerAncestralDiscreteScheduler", {}),
        "EulerDiscreteScheduler": ("EulerDiscreteScheduler", {}),
        "HeunDiscreteScheduler": ("HeunDiscreteScheduler", {}),
        "KDPM2AncestralDiscreteScheduler": ("KDPM2AncestralDiscreteScheduler", {}),
        "KDPM2DiscreteScheduler": ("KDPM2DiscreteScheduler", {}),
        "LCMScheduler": ("LCMScheduler", {}),
        "PNDMScheduler": ("PNDMScheduler", _PNDM),
        "UniPCMultistepScheduler": ("UniPCMultistepScheduler", {}),
        # k-diffusion's names, by the table in diffusers' documentation of schedulers.
        "DPM++ 2M": ("DPMSolverMultistepScheduler", {**_MULTISTEP, **_SIGMAS}),
        "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**_MULTISTEP, **_KARRAS}),
        "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {**_SDE, **_SIGMAS}),
        "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}),
        "DPM++ SDE": ("DPMSolverSinglestepScheduler", {**_MULTISTEP, **_SINGLESTEP, **_SIGMAS}),
        "DPM++ SDE Karras": ("DPMSolverSinglestepScheduler", {**_MULTISTEP, **_SINGLESTEP, **_KARRAS}),
        "DPM2": ("KDPM2DiscreteScheduler", _SIGMAS),
        "DPM2 Karras": ("KDPM2DiscreteScheduler", _KARRAS),
        "DPM2 a": ("KDPM2AncestralDiscreteScheduler", _SIGMAS),
        "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", _KARRAS),
        "Euler": ("EulerDiscreteScheduler", _SIGMAS),
        "Euler a": ("EulerAncestralDiscreteScheduler", {}),
        "Heun": ("HeunDiscreteScheduler", _SIGMAS),
        # The other ones, by the names of their papers.
        "DDIM": ("DDIMScheduler", {}),
        "DDPM": ("DDPMScheduler", {}),
        "DEIS": ("DEISMultistepScheduler", {**_DEIS, **_SIGMAS}),
        "LCM": ("LCMScheduler", {}),
        "PNDM": ("PNDMScheduler", _PNDM),
        "UniPC": ("UniPCMultistepScheduler", {**_UNIPC, **_SIGMAS}),
    }
)
"""diffusers' class and settings that override the model's configuration, by canonical name. Schedulers that need scipy (LMS) or
torchsde are left out. "DPM++ SDE" is diffusers' closest equivalent, which draws no noise."""

FLOW_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "FlowMatchEulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {}),
        "FlowMatchHeunDiscreteScheduler": ("FlowMatchHeunDiscreteScheduler", {}),
        "Euler": ("FlowMatchEulerDiscreteScheduler", {**_SIGMAS, "stochastic_sampling": False}),
        "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    }
)
"""The same for flow-matching models: the classes with which diffusers' img2img pipelines of Stable Diffusion 3 and Flux start
from an image, and that draw no noise in a step, as those pipelines hand no generator to it."""

_CLASSES = frozenset(class_name for class_name, _ in NAMES.values())
_BY_FOLDED_NAME = {name.casefold(): name for name in (*NAMES, *FLOW_NAMES)}
# Settings that the constructors of the Stable Diffusion pipelines force on their schedulers.
_CORRECTIONS = {"steps_offset": 1, "clip_sample": False}
# Values that all of the classes support.
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTION_TYPES = ("epsilon", "v_prediction")


def find(name: str) -> str | None:
    """The canonical name in NAMES or FLOW_NAMES that equals `name`, ignoring case; None if there is none."""
    return _BY_FOLDED_NAME.get(name.casefold())


def supported(own_scheduler: Any) -> tuple[str, ...]:
    """The canonical names that can replace a pipeline's own scheduler: all of NAMES, some of FLOW_NAMES, or none.

    None if its class is not compatible by diffusers' list (EDM), or if not all of NAMES support its prediction type or beta
    schedule. LCM's class has no such list, but is compatible.
    """
    own_class = type(own_scheduler)
    if is_flow(own_scheduler):
        # Heun's class cannot shift timesteps by the image's size.
        shifts = bool(own_scheduler.config.get("use_dynamic_shifting"))
        return tuple(name for name, (class_name, _) in FLOW_NAMES.items() if not (shifts and "Heun" in class_name))
    related = own_class.__name__ in _CLASSES or not _CLASSES.isdisjoint(own_class._compatibles)
    config = own_scheduler.config
    known = config.get("prediction_type") in _PREDICTION_TYPES and config.get("beta_schedule") in _BETA_SCHEDULES
    return tuple(NAMES) if related and known and not config.get("use_flow_sigmas") else ()


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching, with `scale_noise` in place of `add_noise`."""
    return hasattr(scheduler, "scale_noise")


def make(name: str | None, own_scheduler: Any) -> Any:
    """A new diffusers scheduler of a canonical name, with the model's noise schedule; for None a copy of `own_scheduler`.

    Raises KeyError for a name that is not in NAMES (FLOW_NAMES for a flow-matching model). Making DPM2 takes half a second, so
    callers should keep the result and copy it.
    """
    if name is None:
        return copy.deepcopy(own_scheduler)
    class_name, overrides = (FLOW_NAMES if is_flow(own_scheduler) else NAMES)[name]
    scheduler_class = getattr(importlib.import_module("diffusers"), class_name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    # With the list of default values each class uses its own defaults.
    known = {key: value for key, value in own_scheduler.config.items() if key in accepted or key == "_use_default_values"}
    corrections = {key: value for key, value in _CORRECTIONS.items() if key in accepted}
    return build(scheduler_class, known, **{**overrides, **corrections})


def build(kind: Any, config: Mapping[str, Any], **overrides: Any) -> Any:
    """The scheduler that `kind.from_config(config, **overrides)` makes. Raises the class's errors for unsupported values.

    diffusers' own `from_config` imports every class that a scheduler is compatible with, and these import scipy if it is
    installed: 570 modules and 0.8 s of CPU time. It needs them only to warn of settings that none of them has; the server logs no
    such warnings.
    """
    defaults = {*config.get("_use_default_values", ()), "_use_default_values"}
    given = {key: value for key, value in config.items() if key not in defaults}
    accepted = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in {**given, **overrides}.items() if key in accepted}
    made = kind(**settings)
    # Settings of other classes stay in the configuration, from which a compatible scheduler may be made.
    others = {key: kind.__name__ if key == "_class_name" else value for key, value in given.items() if key not in settings}
    made.register_to_config(**others)
    return made


def read(kind: Any, folder: Path) -> Any:
    """The scheduler that `kind.from_pretrained(folder)` loads. Raises OSError for a missing or invalid file, and the errors of
    build()."""
    return build(kind, kind.load_config(folder, local_files_only=True))
