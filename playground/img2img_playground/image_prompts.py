"""The image prompts of a request, as the page has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from img2img_client import ImagePrompt

from img2img_playground.images import ImageFile

if TYPE_CHECKING:
    from img2img_client.values import ImageInput, ModelInfo

DEFAULT_SCALE = 1.0


@dataclass(frozen=True, slots=True)
class PromptImages:
    """An image prompt: `images` for the image adapter `adapter`, and the factor of their effect. `id` stays the same while its
    images and settings change."""

    id: str
    adapter: str
    images: tuple[ImageFile, ...]
    scale: float = DEFAULT_SCALE

    def prompt(self, images: "Sequence[ImageInput]") -> ImagePrompt:
        """The client's value, with images."""
        return ImagePrompt(self.adapter, images, self.scale)


def most_prompts(model: "ModelInfo | None") -> int:
    """The maximum number of image prompts that the model is known to take."""
    return _most(model, "image_prompts")


def most_prompt_images(model: "ModelInfo | None") -> int:
    """The maximum number of images of an image prompt."""
    return _most(model, "image_prompts.images")


def _most(model: "ModelInfo | None", name: str) -> int:
    field = None if model is None else model.field(name)
    return 0 if field is None else field.max_count
