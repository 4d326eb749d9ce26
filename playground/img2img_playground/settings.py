"""The settings on the page, which determine the request and the copied program."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, cast

from img2img_client import ModelReference, recorded_options

if TYPE_CHECKING:
    from img2img_client.options import Fit, TransformOptions
    from img2img_client.values import Level, ModelInfo

DEFAULT_PROMPT = "A beautiful landscape with mountains and a lake at sunset"
"""The contract's default prompt (image_to_image.proto)."""

_USUAL = {"strength": 0.8, "num_inference_steps": 25, "guidance_scale": 7.5, "true_cfg_scale": None}
"""The numbers, with the defaults that most models have (image_to_image.proto)."""

_PREVIEWS = 12
"""Approximate number of previews per run, whatever the number of steps: each costs some device time."""

_MOST = {"seed": 2**63 - 1}
_MOST_NUMBER = 2**31 - 1
"""Maximum of the other numbers, as in the contract."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one transform. None is the server's default: its default model, the model's scheduler, a random seed, and
    for `fit`, `width` and `height` the size of the source. A width or height replaces `fit`.

    Numbers are sent unchecked: the server validates them, and its error names the field.
    """

    model: str | None = None
    prompt: str = DEFAULT_PROMPT
    negative_prompt: str = ""
    scheduler: str | None = None
    strength: float | None = 0.8
    num_inference_steps: int | None = 25
    guidance_scale: float | None = 7.5
    seed: int | None = None
    fit: "Fit | None" = "native"
    true_cfg_scale: float | None = None
    image_count: int | None = 1
    width: int | None = None
    height: int | None = None
    mask_blur: float | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    fidelity: str | None = None

    @property
    def has_exact_size(self) -> bool:
        """Whether width or height is set."""
        return self.width is not None or self.height is not None

    def options(self) -> "TransformOptions":
        """The client's options, without None values and a single image, the default."""
        options: TransformOptions = {
            "model": self.model,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "scheduler": self.scheduler,
            "strength": self.strength,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "fit": None if self.has_exact_size else self.fit,
            "image_count": None if self.image_count == 1 else self.image_count,
            "width": self.width,
            "height": self.height,
            "true_cfg_scale": self.true_cfg_scale,
            "mask_blur": self.mask_blur or None,
            "loras": dict(self.loras) or None,
            "fidelity": cast("Level | None", self.fidelity),
        }
        return {name: value for name, value in options.items() if value is not None}  # type: ignore[return-value]

    def fitted(self, model: "ModelInfo | None", given: Collection[str] = ()) -> "Settings":
        """Without the settings that the model does not take beside the other options `given`, which the server would refuse."""
        if model is None:
            return self
        numbers = {name: None for name in _USUAL if not model.takes(name, given)}
        kept = self if model.takes("negative_prompt") else replace(self, negative_prompt="")
        if not model.takes("scheduler"):
            kept = replace(kept, scheduler=None)
        if not model.takes("loras"):
            kept = replace(kept, loras={})
        if not model.speedups:
            kept = replace(kept, fidelity=None)
        if not kept.negative_prompt:  # true_cfg_scale needs one
            numbers["true_cfg_scale"] = None
        return replace(kept, **numbers)  # type: ignore[arg-type]

    def followed(self, before: "ModelInfo | None", after: "ModelInfo | None") -> "Settings":
        """With the defaults of the model `after` in place of those of the model `before`; None is one that is not known."""
        changes = {}
        for name in _USUAL:
            field, old = (None if model is None else model.field(name) for model in (after, before))
            untouched = (None, _USUAL[name] if old is None else old.default)
            if field is not None and isinstance(field.default, int | float) and getattr(self, name) in untouched:
                changes[name] = int(field.default) if name == "num_inference_steps" else field.default
        return replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The settings of a single image from the record in its file. Raises ValueError if the record is damaged."""
        options = recorded_options(record)
        model = options["model"]
        assert isinstance(model, ModelReference), "a record names its model by id"
        known = {name: value for name, value in options.items() if name in _NAMES and value is not None}
        return cls.checked({**known, "model": model.path, "fit": None})

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Settings from values that may be of any type or size. Raises ValueError; ignores unknown names."""
        settings = cls(**{name: value for name, value in values.items() if name in _NAMES})
        for name, value in asdict(settings).items():
            if not _is_valid(name, value):
                raise ValueError(f"{name} is {value!r}")
        return settings

    def preview_interval(self, model: "ModelInfo | None", given: Collection[str] = ()) -> int:
        """Steps between previews by the model, with the other options `given`."""
        steps: float = self.num_inference_steps or _default(model, "num_inference_steps")
        if model is None or model.takes("strength", given):  # Others run all steps.
            steps *= self.strength or _default(model, "strength")
        return max(1, math.ceil(steps / _PREVIEWS)) if math.isfinite(steps) else 1


def _default(model: "ModelInfo | None", name: str) -> float:
    """The number that the model uses if it is not set."""
    field = None if model is None else model.field(name)
    default = _USUAL[name] if field is None else field.default
    return default if isinstance(default, int | float) else 1


def model_of(settings: Settings, models: "Sequence[ModelInfo]") -> "ModelInfo | None":
    """The server's model that runs these settings, or None if it is unknown."""
    if settings.model:
        return next((model for model in models if model.id == settings.model), None)
    return next((model for model in models if model.is_default), models[0] if len(models) == 1 else None)


_NAMES = frozenset(item.name for item in fields(Settings))
_TEXTS = frozenset(("prompt", "negative_prompt"))
_NAMED = frozenset(("model", "scheduler", "fidelity"))
_DECIMALS = frozenset(("strength", "guidance_scale", "true_cfg_scale", "mask_blur"))


def _is_valid(name: str, value: object) -> bool:
    if name == "loras":
        return isinstance(value, Mapping) and all(isinstance(key, str) and _is_number(scale) for key, scale in value.items())
    if name in _TEXTS:
        return isinstance(value, str)
    if value is None or name in _NAMED:
        return value is None or isinstance(value, str)
    if name == "fit" and value == "native":
        return True
    if name in _DECIMALS:
        return _is_number(value)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST.get(name, _MOST_NUMBER)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_NUMBER
