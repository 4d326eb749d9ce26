"""Inputs and results as frozen dataclasses, independent of gRPC."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_TARGET = "localhost:50051"
"""The default address of `img2img serve`."""

ImageFormat = Literal["png", "jpeg", "webp"]
"""An image's file format."""

ModelState = Literal["unspecified", "unloaded", "loading", "ready", "failed"]
"""A model's state. "unspecified" also stands for a state that this client does not know."""

EngineState = Literal["unspecified", "building", "checking", "serving", "rejected", "failed"]
"""The state of a candidate engine for a model."""

Level = Literal["exact", "high", "fast"]
"""A named bound of how near an image must be to the exact one."""

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Image formats by file suffix."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A reference to one of the server's models. Fields that are not None must match the model's bundle.

    `path` is the model's id on the server; `repo_id`, `variant`, `revision` and the patterns are those of its export.
    """

    repo_id: str | None = None
    path: str | None = None
    variant: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Control:
    """An image for a ControlNet of the server, and how strongly the result follows it.

    `model` is the ControlNet's id or a ModelReference; None for models with a built-in control input. `image` is a
    file's path, a file's bytes, a Pillow image, an Asset, or an address that the server reads. `scale` is the factor of its
    effect; it applies to the steps from `start` to `end`, both fractions of all steps. None means the server's default: 1, 0 and
    1. `control_mode` is the kind of the image for a union ControlNet, which needs one; None for others.
    """

    model: str | ModelReference | None
    image: "ImageInput"
    scale: float | None = None
    start: float | None = None
    end: float | None = None
    control_mode: int | None = None


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """Images that an image adapter (IP-Adapter) of the server reads beside the prompt: the result takes over their content and
    style, not their layout.

    `adapter` is the adapter's id, one of the ModelInfo's `image_adapters`. `images` are at least one, each a file's path, a
    file's bytes, a Pillow image, an Asset, or an address that the server reads; their effects are mixed. `scale` is the factor
    of the effect; None means the server's default, 1.
    """

    adapter: str
    images: "Sequence[ImageInput]"
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A candidate engine, such as "onnx:tensorrt", that is or was built in the background for a model.

    `detail` is a readable text: the current work, the result, or why it is not used; `progress` of the build or the check is from
    0 to 1.
    """

    name: str
    state: EngineState
    detail: str
    progress: float


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """An option that requests to a model can set: a field of the contract's TransformRequest, such as "strength".

    `default` is what an unset option means, None if that is not a fixed value. Numbers are from `minimum` (above it, if
    `exclusive_minimum`) to `maximum`, texts have as many characters; None means no bound. `max_count` is the maximum number of
    elements of a list, 0 for other options. `needs` is another option, without which the model makes no use of this one and the
    server refuses it; "" for most.
    """

    name: str
    required: bool = False
    default: float | str | bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    max_count: int = 0
    needs: str = ""


@dataclass(frozen=True, slots=True)
class SpeedupInfo:
    """A way in which a model skips work for requests with a `fidelity`: how many times less work on average, the PSNR (in
    decibels) and SSIM of the worst reference image and their means, and the requests that it is used for."""

    name: str
    times_faster: float
    min_psnr_db: float
    mean_psnr_db: float
    min_ssim: float
    mean_ssim: float
    min_inference_steps: int
    max_guidance_scale: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model on the server.

    `backend` is "onnx" or "torch", with the reason for torch in `backend_reason`. `engine`, such as "onnx:cpu", is "" unless the
    model is ready. Width and height of its results are multiples of `size_multiple` pixels. `schedulers` are the names that a
    request can choose, empty if the model supports only its own. `engines` are candidate engines. `memory_bytes` were measured
    when it was loaded, None if unknown. `detail` is a readable text: the current loading step, or why the model is not ready.
    `fields` are the options that requests can set, empty if the model is not ready or the server is older than this list.
    `speedups` are what a request's `fidelity` can buy, the fastest first. `controlnets` are the ids of the ControlNets that the
    `controls` of its requests may name, `image_adapters` those of the adapters that `image_prompts` may name.
    """

    id: str
    source: ModelReference
    family: str
    pipeline_class: str
    backend: str
    backend_reason: str
    engine: str
    state: ModelState
    size_multiple: int
    is_default: bool
    schedulers: tuple[str, ...] = ()
    engines: tuple[EngineStatus, ...] = ()
    memory_bytes: int | None = None
    detail: str = ""
    fields: tuple[FieldInfo, ...] = ()
    speedups: tuple[SpeedupInfo, ...] = ()
    controlnets: tuple[str, ...] = ()
    image_adapters: tuple[str, ...] = ()

    def field(self, name: str) -> FieldInfo | None:
        """The option of that name, None if the model does not take it or `fields` is empty."""
        return next((field for field in self.fields if field.name == name), None)

    def takes(self, name: str, given: Collection[str] | None = None) -> bool:
        """Whether requests can set the option of that name, as far as is known: True if `fields` is empty. With `given`, the
        names of a request's other options, whether that request can: a few options need another."""
        field = self.field(name)
        if field is None:
            return not self.fields
        return given is None or not field.needs or field.needs in given


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A LoRA on the server, which requests name by its `id`. `size` is in bytes."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Asset:
    """An image stored on the server: pass it as the source of a transform, or download it.

    `id` is derived from the content, `size` is in bytes, `sha256` in lower-case hexadecimal. `expire_time`, in UTC, is when it is
    deleted unless it is used before, None if the server sent none.
    """

    id: str
    media_type: str
    size: int
    sha256: str
    expire_time: datetime | None = None

    @property
    def uri(self) -> str:
        """The address, which the server accepts as a source image."""
        return f"asset:{self.id}"


ImageInput: TypeAlias = Union[str, os.PathLike[str], bytes, "Image.Image", Asset]
"""A source image: a file's path, a file's bytes, a Pillow image, an Asset, or an address that the server reads.

A str that begins with one of `options.ADDRESS_SCHEMES` is an address; any other str is a path.
"""


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a request on the server in milliseconds; only `total_ms` includes the image codecs."""

    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class TransformedImage:
    """A finished image: its file's bytes, their format, its size in pixels, and the seed that reproduces it as a single image.

    With `as_asset`, the server stores the file as the asset `asset_id`, and `data` is empty.
    """

    data: bytes
    format: ImageFormat
    width: int
    height: int
    seed: int
    asset_id: str | None = None

    @property
    def image(self) -> "Image.Image":
        """The image. Each access opens it again; Pillow decodes its pixels when they are needed.

        Raises ValueError if the image was stored as an asset and not sent.
        """
        self._require_data()
        return _open(self.data, self.format)

    def save(self, path: str | Path) -> None:
        """Writes the file unchanged. Raises ValueError if the path's suffix is of another format, or if the image was stored as
        an asset."""
        self._require_data()
        expected = FORMAT_OF_SUFFIX.get(Path(path).suffix.lower(), self.format)
        if expected != self.format:
            raise ValueError(f"{path}: the suffix means {expected}, but the image is {self.format}: request format={expected!r}")
        Path(path).write_bytes(self.data)

    def _require_data(self) -> None:
        if self.asset_id is not None:
            raise ValueError(
                f"the image is stored on the server (as_asset): get its file with client.download({self.asset_id!r})"
            )


@dataclass(frozen=True, slots=True)
class TransformWarning:
    """A warning about a finished request.

    `field` is the option, `description` a readable text, and `code` a stable name for programs, such as "PROMPT_TRUNCATED" for a
    prompt that is too long for the model.
    """

    field: str
    description: str
    code: str


@dataclass(frozen=True, slots=True)
class UsedSpeedup:
    """The speedup that a request ran with: its name, how many times less work the request was, and the PSNR (in decibels) and
    SSIM of the worst reference image."""

    name: str
    times_faster: float
    min_psnr_db: float
    min_ssim: float


@dataclass(frozen=True, slots=True)
class TransformResult:
    """The finished images, at least one, with their model and engine (such as "onnx:cuda" or "torch:cpu").

    `request_id` identifies the call in the server's log, "" if the server sent none. `speedup` is None if all steps were
    computed in full.
    """

    images: tuple[TransformedImage, ...]
    model_id: str
    model_revision: str
    engine: str
    timings: Timings
    request_id: str = ""
    warnings: tuple[TransformWarning, ...] = ()
    speedup: UsedSpeedup | None = None

    @property
    def image(self) -> "Image.Image":
        """The first image, opened."""
        return self.images[0].image

    def save(self, path: str | Path) -> None:
        """Writes the first image. Raises ValueError if the path's suffix is of another format."""
        self.images[0].save(path)


@dataclass(frozen=True, slots=True)
class Queued:
    """The request is queued: `position` others are ahead, and it will finish in about `eta_seconds` (None if unknown).

    The first event, repeated if the position changes.
    """

    position: int
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The request has started. `seed` is that of the first image, random if none was requested."""

    seed: int
    engine: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `step_count` steps are done; the request will finish in about `eta_seconds` (None if unknown).

    `preview` is a small JPEG file, a preview of the first image, at the requested steps.
    """

    step: int
    step_count: int
    preview: bytes | None = None
    eta_seconds: float | None = None

    @property
    def preview_image(self) -> "Image.Image | None":
        """The preview, or None. Each access opens it again."""
        return None if self.preview is None else _open(self.preview, "jpeg")


@dataclass(frozen=True, slots=True)
class Completed:
    """The request has finished. Always the last event."""

    result: TransformResult


TransformEvent = Queued | Started | Progress | Completed
"""One event of a request."""


def _open(data: bytes, image_format: ImageFormat) -> "Image.Image":
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data), formats=(image_format,))


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The outcome of one request of a batch: a `result`, or the `error` that Client.transform would have raised for it.

    `index` is the request's position in the batch, from 0.
    """

    index: int
    result: TransformResult | None = None
    error: Exception | None = None
