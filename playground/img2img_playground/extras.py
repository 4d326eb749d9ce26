"""The images of a request beside its source: a mask, and references."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from img2img_playground.images import ImageFile

if TYPE_CHECKING:
    from img2img_client.options import TransformOptions
    from img2img_client.values import ModelInfo


@dataclass(frozen=True, slots=True)
class Extras:
    """`mask` says what to redraw: white is redrawn, black is kept. `references` are images to edit by."""

    mask: ImageFile | None = None
    references: tuple[ImageFile, ...] = ()

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """All of them."""
        return self.references if self.mask is None else (self.mask, *self.references)

    def fitted(self, model: "ModelInfo | None") -> Self:
        """Without the images that the model does not take, which the server would refuse."""
        mask = self.mask if takes_mask(model) else None
        return replace(self, mask=mask, references=self.references[: most_references(model, mask is not None)])

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
        return options

    def names(self) -> dict[str, object]:
        """The options with the names of the files, for the copied program."""
        names: dict[str, object] = {}
        if self.mask is not None:
            names["mask"] = self.mask.name
        if self.references:
            names["reference_images"] = [image.name for image in self.references]
        return names


NO_EXTRAS = Extras()


def takes_mask(model: "ModelInfo | None") -> bool:
    """Whether the model is known to take a mask."""
    return model is not None and model.field("mask") is not None


def most_references(model: "ModelInfo | None", masked: bool) -> int:
    """The maximum number of references that the model is known to take, with or without a mask."""
    field = None if model is None else model.field("reference_images")
    return 0 if field is None or (field.needs == "mask" and not masked) else field.max_count
