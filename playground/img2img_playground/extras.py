"""The images of a request beside its source: a mask, references, control images, and image prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from img2img_client import Control

from img2img_playground.image_prompts import PromptImages, most_prompts
from img2img_playground.images import ImageFile

if TYPE_CHECKING:
    from img2img_client.options import TransformOptions
    from img2img_client.values import ImageInput, ModelInfo


@dataclass(frozen=True, slots=True)
class ControlImage:
    """An image for the ControlNet `model`, "" if the request's model has a built-in control input; the factor of its effect,
    and the part of the steps that it applies to."""

    DEFAULTS: ClassVar[Mapping[str, float]] = {"scale": 1.0, "start": 0.0, "end": 1.0}

    image: ImageFile
    model: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def fitted(self, model: "ModelInfo", offered: Sequence[str]) -> Self | None:
        """The control image in the form that the model takes, None if it takes none. `offered` are the ControlNets that fit."""
        if names_controlnets(model):
            name = self.model or next(iter(offered), "")
            return replace(self, model=name) if name else None
        kept = {name: getattr(self, name) for name in control_numbers(model)}
        return type(self)(self.image, "", **kept)

    def control(self, image: "ImageInput") -> Control:
        """The client's value, with an image."""
        return Control(self.model or None, image, self.scale, self.start, self.end)


@dataclass(frozen=True, slots=True)
class Extras:
    """`mask` says what to redraw: white is redrawn, black is kept. `references` are images to edit by, `controls` images that the
    result follows, `prompts` images whose content and style it takes over."""

    mask: ImageFile | None = None
    references: tuple[ImageFile, ...] = ()
    controls: tuple[ControlImage, ...] = ()
    prompts: tuple[PromptImages, ...] = ()

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """All of them."""
        masks = () if self.mask is None else (self.mask,)
        prompts = (image for prompt in self.prompts for image in prompt.images)
        return (*masks, *self.references, *(control.image for control in self.controls), *prompts)

    def fitted(self, model: "ModelInfo | None", offered: Sequence[str] = ()) -> Self:
        """Without the images that the model does not take, which the server would refuse. `offered` are the ControlNets that fit
        it."""
        mask = self.mask if takes_mask(model) else None
        controls = () if model is None else (one.fitted(model, offered) for one in self.controls[: most_controls(model)])
        return replace(
            self,
            mask=mask,
            references=self.references[: most_references(model, mask is not None)],
            controls=tuple(one for one in controls if one is not None),
            prompts=self.prompts[: most_prompts(model)],
        )

    @property
    def given(self) -> frozenset[str]:
        """The names of the options that they set."""
        return frozenset(self.names())

    def options(self) -> "TransformOptions":
        """The client's options."""
        options: TransformOptions = {}
        if self.mask is not None:
            options["mask"] = self.mask.data
        if self.references:
            options["reference_images"] = [image.data for image in self.references]
        if self.controls:
            options["controls"] = [one.control(one.image.data) for one in self.controls]
        if self.prompts:
            options["image_prompts"] = [one.prompt([image.data for image in one.images]) for one in self.prompts]
        return options

    def names(self) -> dict[str, object]:
        """The options with the names of the files, for the copied program."""
        names: dict[str, object] = {}
        if self.mask is not None:
            names["mask"] = self.mask.name
        if self.references:
            names["reference_images"] = [image.name for image in self.references]
        if self.controls:
            names["controls"] = [one.control(one.image.name) for one in self.controls]
        if self.prompts:
            names["image_prompts"] = [one.prompt([image.name for image in one.images]) for one in self.prompts]
        return names


NO_EXTRAS = Extras()


def takes_mask(model: "ModelInfo | None") -> bool:
    """Whether the model is known to take a mask."""
    return model is not None and model.field("mask") is not None


def most_references(model: "ModelInfo | None", masked: bool) -> int:
    """The maximum number of references that the model is known to take, with or without a mask."""
    field = None if model is None else model.field("reference_images")
    return 0 if field is None or (field.needs == "mask" and not masked) else field.max_count


def most_controls(model: "ModelInfo | None") -> int:
    """The maximum number of control images that the model is known to take."""
    field = None if model is None else model.field("controls")
    return 0 if field is None else field.max_count


def names_controlnets(model: "ModelInfo | None") -> bool:
    """Whether the model's control images are for ControlNets, and not for the model itself, which then needs one."""
    field = None if model is None else model.field("controls")
    return field is not None and not field.required


def control_numbers(model: "ModelInfo | None") -> tuple[str, ...]:
    """The numbers of a control that the model takes."""
    if model is None or (names_controlnets(model) and model.field("controls.model") is None):  # of an older server
        return tuple(ControlImage.DEFAULTS)
    return tuple(name for name in ControlImage.DEFAULTS if model.field(f"controls.{name}") is not None)


def offered_controlnets(model: "ModelInfo | None", known: Sequence[str]) -> tuple[str, ...]:
    """The ControlNets to offer for the model. `known` are the ids of all ControlNets of the server."""
    if model is None or not names_controlnets(model):
        return ()
    if model.field("controls.model") is None:  # of a server that does not say which fit
        return tuple(known)
    return tuple(name for name in known if name in model.controlnets)
