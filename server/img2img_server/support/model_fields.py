"""How a model's pipeline says which fields of TransformRequest it takes. The fields themselves are in api/request_fields.py."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldRule:
    """A field that a model takes, with the model's own `default`, or None for the server's.

    `needs` is another field, without which the model makes no use of this one. `max_count` bounds a repeated field below the
    server's own maximum. Requests must set a field that is `required`.
    """

    default: float | None = None
    needs: str = ""
    max_count: int | None = None
    required: bool = False


ModelFields = Mapping[str, FieldRule]
"""The optional fields that a model takes, by name."""

GUIDED: ModelFields = {name: FieldRule() for name in ("negative_prompt", "strength", "guidance_scale")}
"""The fields of most models, which start from the noised source and are guided by two prompts."""

_EFFECT = ("controls.scale", "controls.start", "controls.end")
CONTROLNETS: ModelFields = {name: FieldRule() for name in ("controls", "controls.model", *_EFFECT, "controls.control_mode")}
"""The fields of models whose requests name ControlNets."""
OWN_CONTROL: ModelFields = {"controls": FieldRule(max_count=1, required=True)}
"""The fields of models with a built-in control input."""
OWN_CONTROLNET: ModelFields = {**OWN_CONTROL, **{name: FieldRule() for name in _EFFECT}}
"""The fields of models with a built-in ControlNet."""

IMAGE_PROMPTS: ModelFields = {name: FieldRule() for name in ("image_prompts", "image_prompts.images", "image_prompts.scale")}
"""The fields of models whose requests have image prompts."""
