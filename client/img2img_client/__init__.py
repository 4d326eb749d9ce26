"""A small typed client of an img2img server.

    from img2img_client import Client

    with Client("localhost:50051") as client:
        client.transform("photo.jpg", prompt="the same place in winter").image.show()

`AsyncClient` is the same for asyncio. Importing this package is fast: gRPC is imported when a client class is first accessed.
"""

from typing import TYPE_CHECKING, Any

from img2img_client.errors import (
    AssetNotFound,
    Cancelled,
    Damaged,
    DeadlineExceeded,
    Img2ImgError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotSupported,
    Overloaded,
    PermissionDenied,
    ServerFailed,
    Unauthenticated,
    Unavailable,
)
from img2img_client.retry import RetryPolicy
from img2img_client.values import (
    Asset,
    BatchResult,
    Completed,
    Control,
    EngineState,
    EngineStatus,
    FieldInfo,
    ImageFormat,
    ImageInput,
    ImagePrompt,
    LoraInfo,
    ModelInfo,
    ModelReference,
    ModelState,
    Progress,
    Queued,
    SpeedupInfo,
    Started,
    Timings,
    TransformedImage,
    TransformEvent,
    TransformResult,
    TransformWarning,
    UsedSpeedup,
)

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.async_stream import AsyncTransformStream
    from img2img_client.client import Client
    from img2img_client.options import Fit, TransformOptions, taken_options
    from img2img_client.outpainting import Margins, expand
    from img2img_client.provenance import read_provenance, recorded_options
    from img2img_client.stream import TransformStream

__all__ = [
    "Asset",
    "AssetNotFound",
    "AsyncClient",
    "AsyncTransformStream",
    "BatchResult",
    "Cancelled",
    "Client",
    "Completed",
    "Control",
    "Damaged",
    "DeadlineExceeded",
    "EngineState",
    "EngineStatus",
    "FieldInfo",
    "Fit",
    "ImageFormat",
    "ImageInput",
    "ImagePrompt",
    "Img2ImgError",
    "InvalidRequest",
    "LoraInfo",
    "Margins",
    "ModelInfo",
    "ModelNotFound",
    "ModelReference",
    "ModelState",
    "ModelUnavailable",
    "NotSupported",
    "Overloaded",
    "PermissionDenied",
    "Progress",
    "Queued",
    "RetryPolicy",
    "ServerFailed",
    "SpeedupInfo",
    "Started",
    "Timings",
    "TransformEvent",
    "TransformOptions",
    "TransformResult",
    "TransformStream",
    "TransformWarning",
    "TransformedImage",
    "Unauthenticated",
    "Unavailable",
    "UsedSpeedup",
    "expand",
    "read_provenance",
    "recorded_options",
    "taken_options",
]

_LAZY = {
    "AsyncClient": "img2img_client.async_client",
    "AsyncTransformStream": "img2img_client.async_stream",
    "Client": "img2img_client.client",
    "TransformStream": "img2img_client.stream",
    "Fit": "img2img_client.options",
    "TransformOptions": "img2img_client.options",
    "Margins": "img2img_client.outpainting",
    "expand": "img2img_client.outpainting",
    "read_provenance": "img2img_client.provenance",
    "recorded_options": "img2img_client.provenance",
    "taken_options": "img2img_client.options",
}


def __getattr__(name: str) -> Any:
    """Imports names that need gRPC on first access."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
