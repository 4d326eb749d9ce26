"""Finds tensors of a checkpoint that the model does not use; all except known harmless ones are refused.

diffusers and transformers only warn about unused weights, and then run a model that differs from the one in the file. So each
tensor carries its name through the conversion, and the converted parameters know their origins.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from img2img_export.errors import ExportError

_TEXT = r"((cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.((model|transformer)\.)?)?"
"""Prefixes of a text encoder's tensors in a single file; in a component folder there is none."""

_HARMLESS = (
    # Position numbers: a buffer that transformers creates.
    rf"{_TEXT}(text_model\.)?embeddings\.position_ids",
    # CLIP's training temperature, a mask, and CLIP's image encoder.
    rf"{_TEXT}(logit_scale|attn_mask|visual_projection\.weight)",
    rf"{_TEXT}(visual|vision_model)\..*",
    # A T5's input embedding is `shared`; older files have it twice. `spiece_model` is the tokenizer.
    rf"{_TEXT}(encoder\.embed_tokens\.weight|spiece_model)",
    # The moving average of the weights.
    r"model_ema\..*",
    # The noise schedule, which is in the scheduler's configuration.
    r"(model\.|denoiser\.|model_sampling\.)?(betas|alphas_cumprod(_prev)?|(log_)?sigmas|lvlb_weights|logvar|log_one_minus_alphas_cumprod)",
    r"(model\.)?(sqrt|posterior)_\w+",
    # Losses and discriminators of VAE training.
    r"(first_stage_model\.|vae\.)?(loss|discriminator|perceptual_loss)\..*",
    # Training counters.
    r"(global_step|epoch|step|iteration)",
    # Checks finished images; not part of bundles.
    r"safety_checker\..*",
)
"""Names of tensors that do not affect the output."""
_HARMLESS_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in _HARMLESS))

_SPARE_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\..*")
"""Stable Diffusion 2 reads the second-to-last layer of its text encoder; files also contain the last one."""
_PROJECTION = re.compile(r"(.*\.)?text_projection(\.weight)?")
_SHOWN = 4


class Traced(torch.Tensor):
    """A tensor that tracks the names of the tensors it was computed from, in `origins`."""

    origins: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Propagates the origins of the arguments to the result."""
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        origins = frozenset[str]().union(*_origins((args, kwargs or {})))
        _mark(result, origins)
        return result


def traced(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` as a tensor with the origin `name`, sharing its memory."""
    result = value.as_subclass(Traced)
    result.origins = frozenset({name})
    return result


def untraced(module: torch.nn.Module) -> frozenset[str]:
    """Converts the parameters and buffers of `module` back to plain tensors, and returns their origins."""
    state = module.state_dict()
    used = frozenset[str]().union(*_origins(state))
    module.load_state_dict({name: value.as_subclass(torch.Tensor) for name, value in state.items()}, assign=True)
    return used


def refuse_unused(what: str, unused: Iterable[str], used: Iterable[str] = (), advice: str = "") -> None:
    """Raises ExportError if any of the tensors `unused` is not known to be harmless. `what` names the file or component."""
    layers = [int(match[1]) for name in used if (match := _SPARE_LAYER.fullmatch(name))]
    spare = 1 + max(layers, default=-1)
    left = sorted(name for name in unused if not _HARMLESS_PATTERN.fullmatch(name) and not _is_layer(name, spare))
    if left:
        shown = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else "")
        counted = f"{len(left)} tensors" if len(left) > 1 else "a tensor"
        raise ExportError(f"{what} holds {counted} that the model does not use ({shown}), so it is a different model{advice}")


def is_idle_projection(name: str, value: torch.Tensor, text_class: str) -> bool:
    """Whether a text encoder's projection has no effect: its class has none, or it is the identity, as ComfyUI saves it."""
    if not _PROJECTION.fullmatch(name):
        return False
    if text_class != "CLIPTextModelWithProjection":
        return True
    return value.ndim == 2 and value.shape[0] == value.shape[1] and torch.equal(value.float(), torch.eye(len(value)))


def _is_layer(name: str, index: int) -> bool:
    match = _SPARE_LAYER.fullmatch(name)
    return match is not None and int(match[1]) == index


def _origins(value: Any) -> Iterable[frozenset[str]]:
    if isinstance(value, Traced):
        yield value.origins
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _origins(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _origins(item)


def _mark(value: Any, origins: frozenset[str]) -> None:
    if isinstance(value, Traced):
        value.origins = value.origins | origins
    elif isinstance(value, (list, tuple)):
        for item in value:
            _mark(item, origins)
