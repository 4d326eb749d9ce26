"""The image prompts of a request: checked, their adapters found in the server's folder, and their images read as the squares that
the adapters' image encoders read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.image_files import ImageFiles
from img2img_server.api.loras import scaled_ids
from img2img_server.api.scales import check_scale, scale_of
from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.image_adapters import ImageAdapterFiles, ImageAdapterHeader, difference
from img2img_server.codecs.jobs import LoadReference
from img2img_server.codecs.pool import Codecs
from img2img_server.engine.request import ImagePromptUse
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from img2img_server.models.registry import Model
from img2img_server.sources.reading import Sources

MOST_PROMPTS = 4
MOST_IMAGES = 8
"""Maximum number of images of a request's image prompts together. The engine's thread encodes the new ones in one call, while
other requests wait."""
_FIELD = "image_prompts"
_SHOWN = 100
"""Maximum characters of an id in an error message."""


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """The adapter of an image prompt, and the digest of its file."""

    adapter: ImageAdapterHeader
    digest: str


def check_image_prompts(message: pb.TransformRequest, sources: Sources) -> None:
    """Checks the fields of a message's image prompts, at most MOST_PROMPTS (request_fields.py), without reading images. Raises
    InvalidField, or NotSupported for images that cannot be read."""
    total = 0
    for index, prompt in enumerate(message.image_prompts):
        field = f"{_FIELD}[{index}]"
        total += len(prompt.images)
        if not prompt.adapter:
            raise InvalidField(f"{field}.adapter", "no image adapter is named: set one of the model's image_adapters")
        if not prompt.images:
            raise InvalidField(f"{field}.images", "there is no image; send at least one")
        if total > MOST_IMAGES:
            so_far = f"there are {total}, with those of the image prompts before it" if index else f"there are {total}"
            raise InvalidField(f"{field}.images", f"{so_far}: the maximum is {MOST_IMAGES} in a request")
        for number, image in enumerate(prompt.images):
            sources.check(image, f"{field}.images[{number}]")
        check_scale(prompt, field)


def find_adapters(prompts: Sequence[pb.ImagePrompt], files: ImageAdapterFiles, used: Model) -> list[FoundAdapter]:
    """The adapters of checked image prompts to the model `used`. Raises InvalidField for one that the server does not have or
    that does not fit the model. Blocks."""
    found = []
    for index, prompt in enumerate(prompts):
        try:
            adapter = files.read(prompt.adapter)
            if problem := difference(adapter.needs.fits, used.prompt_kind):
                raise AdapterProblem(f"does not fit this model: {problem}")
            found.append(FoundAdapter(adapter, files.find(prompt.adapter).digest))
        except AdapterProblem as problem:
            raise adapter_error(index, prompt.adapter, problem) from None
    return found


def adapter_error(index: int, name: str, problem: AdapterProblem) -> InvalidField:
    """The error for the adapter of an image prompt."""
    return InvalidField(f"{_FIELD}[{index}].adapter", f"image adapter '{name[:_SHOWN]}' {problem}")


def image_prompts_from(text: str) -> list[pb.ImagePrompt]:
    """The image prompts of a text, as `scaled_ids` reads it, without images. Raises InvalidField."""
    return [pb.ImagePrompt(adapter=name, scale=scale) for name, scale in scaled_ids(text, _FIELD)]


def add_images(prompts: Iterable[pb.ImagePrompt], images: Sequence[pb.ImageSource], field: str) -> None:
    """Gives images to the prompts that have none: one to each, in order, or all of them to the only one. Raises InvalidField,
    naming the `field` that the images came in, if their numbers differ."""
    without = [prompt for prompt in prompts if not prompt.images]
    if len(without) == 1 and images:
        without[0].images.extend(images)
        return
    if len(images) != len(without):
        raise InvalidField(field, f"there are {len(images)}, but {len(without)} image prompts need one")
    for prompt, image in zip(without, images, strict=True):
        prompt.images.append(image)


class ImagePrompts:
    """Reads the images of image prompts. All fetched images share the `seconds` of one image."""

    def __init__(self, sources: Sources, codecs: Codecs, limits: ImageLimits, seconds: float) -> None:
        self._sources, self._codecs, self._limits, self._seconds = sources, codecs, limits, seconds

    async def read(
        self, prompts: Sequence[pb.ImagePrompt], adapters: Sequence[FoundAdapter], encoders: Sequence[Model]
    ) -> tuple[ImagePromptUse, ...]:
        """Reads the images of checked image prompts, one after the other, as squares for the loaded `encoders` of their adapters.

        Raises InvalidField, naming the image or the field for bounds of all, or an error of reading sources and images.
        """
        files = ImageFiles(_FIELD, self._sources, self._codecs.memory, self._limits, self._seconds)
        found = []
        for index, (prompt, one, encoder) in enumerate(zip(prompts, adapters, encoders, strict=True)):
            assert encoder.pipeline is not None, "leased models are loaded"
            side, squares = encoder.pipeline.native_size[0], []
            for number, source in enumerate(prompt.images):
                async with files.open(source, f"{_FIELD}[{index}].images[{number}]") as (field, data):
                    load = LoadReference(field, self._limits, files.pixels_left, side)
                    image, digest, (width, height) = await self._codecs.load_reference(data, load)
                files.pixels_left -= width * height
                squares.append((image, digest))
            images, digests = zip(*squares, strict=True)
            bundle = "" if encoder.manifest is None else encoder.manifest.digest
            found.append(ImagePromptUse(one.adapter.id, images, scale_of(prompt), one.digest, encoder.id, bundle, digests))
        return tuple(found)
