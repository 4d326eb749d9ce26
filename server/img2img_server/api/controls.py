"""The control images of a request: checked, their ControlNets found, and the images read at the result's size."""

from collections.abc import Sequence

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.image_files import held
from img2img_server.api.scales import check_scale, scale_of
from img2img_server.bundle.control_kinds import check_fit
from img2img_server.bundle.controls import FAMILY, MODE
from img2img_server.codecs.jobs import LoadImage
from img2img_server.codecs.pool import Codecs
from img2img_server.engine.request import ControlUse
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule
from img2img_server.models.registry import Model
from img2img_server.sources.reading import Sources

MOST_CONTROLS = 4
_NUMBERS = ("scale", "start", "end", MODE)


def check_controls(message: pb.TransformRequest, sources: Sources, names_nets: bool) -> None:
    """Checks the fields of a message's controls, which its model takes (request_fields.py), without reading images. With
    `names_nets` each names a ControlNet. Raises InvalidField, or NotSupported for images that cannot be read."""
    for index, control in enumerate(message.controls):
        field = f"controls[{index}]"
        if names_nets and control.model == pb.ModelReference():
            raise InvalidField(f"{field}.model", f"no model is named: set one of the family {FAMILY}, as ListModels lists them")
        sources.check(control.image, f"{field}.image")
        check_scale(control, field)
        _, start, end = numbers_of(control)
        if not 0 <= start < 1:
            raise InvalidField(f"{field}.start", f"{start:g} is not in 0 to 1, below 1")
        if not start < end <= 1:
            raise InvalidField(f"{field}.end", f"{end:g} is not above start ({start:g}) and up to 1")


def numbers_of(control: pb.Control) -> tuple[float, float, float]:
    """The scale, start and end of a control, with defaults."""
    return (
        scale_of(control),
        control.start if control.HasField("start") else 0.0,
        control.end if control.HasField("end") else 1.0,
    )


def controls_from(text: str) -> list[pb.Control]:
    """Parses "ID", "ID:SCALE", "ID:SCALE:START", "ID:SCALE:START:END" or "ID:SCALE:START:END:MODE", several separated by commas;
    images are given elsewhere. Without an id, as in ":0.5", it is the image for a built-in control input.

    Raises InvalidField for an empty id and a mode that is not an integer.
    """
    controls = []
    for part in text.split(",") if text.strip() else ():
        name, numbers = part.strip(), list[float]()
        while len(numbers) < len(_NUMBERS) and (found := _last_number(name)) is not None:
            name, number = found
            numbers.insert(0, number)
        if not name and not numbers:
            raise InvalidField("controls", "an id is empty: write ID:SCALE, separated by commas")
        control = pb.Control(model=pb.ModelReference(path=name) if name else None)
        for field, number in zip(_NUMBERS, numbers, strict=False):
            if field == MODE:
                if not 0 <= number < 2**31 or number % 1:
                    raise InvalidField("controls", f"the mode of {name or 'a control'} is {number:g}, not an integer from 0")
                number = int(number)
            setattr(control, field, number)
        controls.append(control)
    return controls


def _last_number(text: str) -> tuple[str, float] | None:
    """The text before the last colon, and the number after it; None if it is not one."""
    before, colon, last = text.rpartition(":")
    try:
        return (before, float(last)) if colon else None
    except ValueError:
        return None


def check_controlnet(model: Model, used: Model, field: str) -> None:
    """Raises InvalidField, naming `field`, if a model is not a ControlNet, or not one for the model that is `used`."""
    if model.manifest is not None and not model.is_controlnet:
        raise InvalidField(field, f"model '{model.id}' is not a ControlNet, but of the family {model.manifest.family}")
    if model.control_kind and used.control_kind:
        check_fit(field, model.id, model.control_kind, used.control_kind)


class Controls:
    """Reads the control images of requests."""

    def __init__(self, sources: Sources, codecs: Codecs, limits: ImageLimits) -> None:
        self._sources, self._codecs, self._limits = sources, codecs, limits

    async def read(
        self, controls: Sequence[pb.Control], nets: Sequence[Model | None], size: tuple[int, int], multiple: int
    ) -> tuple[ControlUse, ...]:
        """Reads the images of checked controls one after the other, resized to `size` as diffusers does. `nets` are their
        ControlNets, None for the image of a built-in control input. Raises InvalidField, or an error of reading sources and
        images."""
        found = []
        for index, (control, net) in enumerate(zip(controls, nets, strict=True)):
            field, data = await self._sources.read(control.image, f"controls[{index}].image")
            load = LoadImage(field, self._limits, SizeRule(*size), multiple, "PNG")
            with held(self._codecs.memory, control.image, data):
                image, digest, _ = await self._codecs.load(data, load)
            scale, start, end = numbers_of(control)
            name, manifest = ("", None) if net is None else (net.id, net.manifest)
            bundle = "" if manifest is None else manifest.digest
            mode = control.control_mode if control.HasField("control_mode") else None
            found.append(ControlUse(name, image, scale, start, end, bundle, digest, mode))
        return tuple(found)
