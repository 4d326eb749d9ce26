"""The fields of a request about its mask: checked by the model, and the rule for its pixels."""

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.request_fields import RequestFields
from img2img_server.errors import InvalidField
from img2img_server.images import MaskRule
from img2img_server.support.source_rule import MaskUse


def mask_rule(message: pb.TransformRequest, fields: RequestFields, use: MaskUse, model: str, by_alpha: bool) -> MaskRule | None:
    """How the message's mask is prepared for the model, or None if the message has no mask. `fields` are the model's request
    fields, and `use` says whether it takes a mask.

    With `by_alpha` the mask's transparent areas are redrawn. Raises InvalidField for a mask that the model cannot use, a missing
    mask that it needs, and settings without a mask.
    """
    if not message.HasField("mask"):
        _check_no_settings(message)
        if use == "required":
            raise InvalidField("mask", f"model '{model}' is an inpainting model, which needs a mask: white is redrawn")
        return None
    if use == "none":
        raise InvalidField("mask", f"model '{model}' does not take a mask: leave mask unset, or use another model")
    return MaskRule(fields.number(message, "mask_blur"), message.mask_invert, by_alpha)


def _check_no_settings(message: pb.TransformRequest) -> None:
    """Raises InvalidField for a setting of the mask that would have no effect. Defaults are accepted."""
    changed = {
        "mask_blur": message.mask_blur != 0,
        "mask_invert": message.mask_invert,
        "mask_paste": message.HasField("mask_paste") and not message.mask_paste,
    }
    for field, is_set in changed.items():
        if is_set:
            raise InvalidField(field, "it has no effect without a mask: set mask, too")
