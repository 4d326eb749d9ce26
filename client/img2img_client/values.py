"""What a caller gives and gets: plain frozen values, free of gRPC."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_TARGET = "localhost:50051"
"""Where `img2img serve` listens unless it is told otherwise."""

ImageFormat = Literal["png", "jpeg", "webp"]
"""An image's file format."""

ModelState = Literal["unspecified", "unloaded", "loading", "ready", "failed"]
"""Whether a model is ready. "unspecified" is what a state that this client does not know reads as, too."""

EngineState = Literal["unspecified", "building", "checking", "serving", "rejected", "failed"]
"""How far an engine has come that may take over a model."""

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""The format that a file's name promises."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Names one of the server's models. What is None is not asked about; the rest must agree with the model's bundle.

    `path` is the model's id on the server; `repo_id`, `variant`, `revision` and the patterns are what it was exported from.
    """

    repo_id: str | None = None
    path: str | None = None
    variant: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """An engine, such as "onnx:tensorrt", that is being built in the background to take over a model, or has been.

    `detail` says for people to read what is being done, how it did or why it does not serve; `progress` is the share of the
    building, or of the checking, that is done, from 0 to 1.
    """

    name: str
    state: EngineState
    detail: str
    progress: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model of the server's store.

    `backend` is "onnx" or "torch", with `backend_reason` saying why where it is torch. `engine`, such as "onnx:cpu", is empty
    unless the model is ready. Width and height of its results are multiples of `size_multiple` pixels. `schedulers` are the
    names that a request may ask for, none where the model has only its own. `engines` may take over, or have done so.
    `memory_bytes` were measured when it was loaded, None where they are not known. `detail` says for people to read what is being
    done to make it ready, or why it is not.
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


@dataclass(frozen=True, slots=True)
class Asset:
    """An image that a server keeps: give it as the source of a transform, or download it.

    `id` comes from its content, `size` is in bytes, `sha256` in lower-case hexadecimal. `expire_time`, in UTC, is when it is
    deleted unless it is used again, None where the server did not say.
    """

    id: str
    media_type: str
    size: int
    sha256: str
    expire_time: datetime | None = None

    @property
    def uri(self) -> str:
        """Its address, which the server takes in place of the image."""
        return f"asset:{self.id}"


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds that a request took on the server; `total_ms` has the image codecs in it, the other four do not."""

    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class TransformedImage:
    """A finished image: its file's bytes, their format, its size in pixels and the seed that makes it again, alone.

    Where `as_asset` was asked for, the server keeps the file as the asset `asset_id`, and `data` is empty.
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
        """Writes the file as the server sent it. Raises ValueError if the path's suffix is of another format, or if the image was
        not sent."""
        self._require_data()
        promised = FORMAT_OF_SUFFIX.get(Path(path).suffix.lower(), self.format)
        if promised != self.format:
            raise ValueError(f"{path} promises {promised}, the picture is {self.format}: ask the server for format={promised!r}")
        Path(path).write_bytes(self.data)

    def _require_data(self) -> None:
        if self.asset_id is not None:
            raise ValueError(f"the server keeps this picture, as was asked: client.download({self.asset_id!r}) gets its file")


@dataclass(frozen=True, slots=True)
class TransformWarning:
    """Something about a finished request that its caller may not have meant.

    `field` is the option that it is about, `description` what happened, `code` a stable name of that for programs:
    "PROMPT_TRUNCATED" for a prompt of which the model read the beginning only.
    """

    field: str
    description: str
    code: str


@dataclass(frozen=True, slots=True)
class TransformResult:
    """The finished images, at least one, and what made them. `engine` is such as "onnx:cuda" or "torch:cpu".

    `request_id` is the name of the call in the server's log, empty if the server sent none. `warnings` is mostly empty.
    """

    images: tuple[TransformedImage, ...]
    model_id: str
    model_revision: str
    engine: str
    timings: Timings
    request_id: str = ""
    warnings: tuple[TransformWarning, ...] = ()

    @property
    def image(self) -> "Image.Image":
        """The first image, opened."""
        return self.images[0].image

    def save(self, path: str | Path) -> None:
        """Writes the first image. ValueError where the path's suffix promises another format."""
        self.images[0].save(path)


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits: `position` others come before it, and it will be finished in about `eta_seconds`, None where unknown.

    Comes first, and again when its place in the queue changes.
    """

    position: int
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The request's first turn came. `seed` is the first image's, drawn where none was asked for."""

    seed: int
    engine: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `step_count` steps are done; the request will be finished in about `eta_seconds`, None where unknown.

    `preview` is a small JPEG file of what the first image is about to become, at the steps where one was asked for.
    """

    step: int
    step_count: int
    preview: bytes | None = None
    eta_seconds: float | None = None

    @property
    def preview_image(self) -> "Image.Image | None":
        """The preview, None if there is none. Each access opens it again."""
        return None if self.preview is None else _open(self.preview, "jpeg")


@dataclass(frozen=True, slots=True)
class Completed:
    """The request is finished. Always the last event."""

    result: TransformResult


TransformEvent = Queued | Started | Progress | Completed
"""One event in the life of a request."""


def _open(data: bytes, image_format: ImageFormat) -> "Image.Image":
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data), formats=(image_format,))
