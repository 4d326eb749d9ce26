"""Reads the prediction type from a single file, and derives the scheduler's configuration.

ComfyUI and community trainers mark v-prediction with an empty tensor `v_pred`, zero terminal SNR with `ztsnr`, and EDM models
with `edm_mean` and `edm_vpred.sigma_max`; sd-scripts and others write it into the metadata (modelspec, ss_*). diffusers ignores
all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from img2img_export.errors import ExportError
from img2img_export.read.texts import read_json
from img2img_export.read.weights_file import TensorInfo

Kind = Literal["epsilon", "v_prediction"]

_V_KEYS = ("v_pred", "vpred", "v_prediction")
_ZERO_KEYS = ("ztsnr", "zsnr", "zero_terminal_snr")
_EDM_MEAN, _EDM_STD = "edm_mean", "edm_std"
_EDM_V_MAX, _EDM_V_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
MARKERS = frozenset({*_V_KEYS, *_ZERO_KEYS, _EDM_MEAN, _EDM_STD, _EDM_V_MAX, _EDM_V_MIN})
"""Names of marker tensors that describe the sampling and are not weights."""

_PREDICTION_NOTES = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "ss_prediction_type")
_V_NOTES = ("ss_v_parameterization", "v_parameterization", *_V_KEYS)
_ZERO_NOTES = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr", *_ZERO_KEYS)
_WORDS: Mapping[str, Kind] = {
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "e", "noise"), "epsilon"),
}
_ARCHITECTURES: Mapping[str, Kind] = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}

_TRAILING = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_EDM_SCHEDULER = "EDMDPMSolverMultistepScheduler"
_EDM_SCALING_FACTOR = 0.5
"""For Playground v2.5's VAE, as in diffusers."""
_COSXL = ("EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"})
_COSXL_SIGMAS = (0.002, 120.0)
_ZERO_SNR_SCHEDULER = "DDIMScheduler"
"""Replaces a scheduler that does not support zero terminal SNR."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling that a single file declares: changes to the configurations of the scheduler and the VAE.

    `scheduler_class` is None to keep the template's.
    """

    scheduler_class: str | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)


def sampling_of(tensors: Mapping[str, TensorInfo], notes: Mapping[str, str], values: Mapping[str, Any]) -> Sampling:
    """The sampling declared by tensor names and metadata; `values` are the tensors. Names win: merges keep old metadata."""
    if {_EDM_MEAN, _EDM_STD} <= tensors.keys():
        mean, std = ([float(value) for value in values[name].flatten()] for name in (_EDM_MEAN, _EDM_STD))
        return Sampling(_EDM_SCHEDULER, {}, {"latents_mean": mean, "latents_std": std, "scaling_factor": _EDM_SCALING_FACTOR})
    if _EDM_V_MAX in tensors:
        least, most = _COSXL_SIGMAS
        most = float(values[_EDM_V_MAX])
        least = float(values[_EDM_V_MIN]) if _EDM_V_MIN in tensors else least
        return Sampling(_COSXL[0], {**_COSXL[1], "sigma_min": least, "sigma_max": most})
    zero = not tensors.keys().isdisjoint(_ZERO_KEYS) or any(_is_true(notes.get(name)) for name in _ZERO_NOTES)
    kind: Kind | None = "v_prediction" if not tensors.keys().isdisjoint(_V_KEYS) else _noted(notes)
    if kind is None and zero:
        kind = "v_prediction"  # without signal, predicting the noise says nothing about the image
    if kind is None:
        return Sampling()
    zero = zero and kind == "v_prediction"
    return Sampling(None, {"prediction_type": kind, **(_TRAILING if zero else {})})


def _noted(notes: Mapping[str, str]) -> Kind | None:
    """The prediction type in the metadata, or None."""
    words = [str(notes[name]).strip().lower() for name in _PREDICTION_NOTES if name in notes]
    if found := next((_WORDS[word] for word in words if word in _WORDS), None):
        return found
    if any(_is_true(notes.get(name)) for name in _V_NOTES):
        return "v_prediction"
    return _ARCHITECTURES.get(str(notes.get("modelspec.architecture", "")).partition("/")[0])


def _is_true(value: str | None) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes")


def apply(sampling: Sampling, directory: Path, scheduler_class: str) -> str:
    """Writes `sampling` into the configurations in `directory`, replacing links. Returns the scheduler's class.

    Raises ExportError if the template's scheduler does not support the prediction type.
    """
    import inspect

    import diffusers

    if sampling.vae:
        _rewrite(directory / "vae" / "config.json", sampling.vae)
    if sampling.scheduler_class is not None:
        kept = {"_class_name": sampling.scheduler_class, "num_train_timesteps": 1000}
        own = read_json(_scheduler_file(directory)) if scheduler_class == sampling.scheduler_class else kept
        _write(_scheduler_file(directory), {**own, **sampling.scheduler})
        return sampling.scheduler_class
    if not sampling.scheduler:
        return scheduler_class
    known = inspect.signature(getattr(diffusers, scheduler_class).__init__).parameters
    if "prediction_type" not in known:
        kind = sampling.scheduler["prediction_type"]
        raise ExportError(
            f"the file declares {kind}, which {scheduler_class} does not support: choose the --config of its base model"
        )
    replaced: dict[str, Any] = {}
    if sampling.scheduler.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        scheduler_class, replaced = _ZERO_SNR_SCHEDULER, {"clip_sample": False}
    known = inspect.signature(getattr(diffusers, scheduler_class).__init__).parameters
    own = {key: value for key, value in read_json(_scheduler_file(directory)).items() if key in known}
    _write(_scheduler_file(directory), {"_class_name": scheduler_class, **own, **replaced, **sampling.scheduler})
    return scheduler_class


def rename_scheduler(index: Path, scheduler_class: str) -> None:
    """Changes the scheduler's class in a model_index.json."""
    _rewrite(index, {"scheduler": ["diffusers", scheduler_class]})


def _scheduler_file(directory: Path) -> Path:
    return directory / "scheduler" / "scheduler_config.json"


def _rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    _write(path, {**read_json(path), **changes})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, replacing a link so that the template does not change."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
