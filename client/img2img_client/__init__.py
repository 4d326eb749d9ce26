"""A small typed client of an img2img server.

    from img2img_client import Client

    with Client("localhost:50051") as client:
        client.transform("photo.jpg", prompt="the same place in winter").image.show()

Importing this package is quick: `Client` brings gRPC in when it is first named.
"""

from typing import TYPE_CHECKING, Any

from img2img_client.errors import (
    AssetNotFound,
    Cancelled,
    DeadlineExceeded,
    Img2ImgError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from img2img_client.retry import RetryPolicy
from img2img_client.values import (
    Asset,
    Completed,
    EngineState,
    EngineStatus,
    ImageFormat,
    ModelInfo,
    ModelReference,
    ModelState,
    Progress,
    Queued,
    Started,
    Timings,
    TransformedImage,
    TransformEvent,
    TransformResult,
)

if TYPE_CHECKING:
    from img2img_client.client import Client
    from img2img_client.options import ImageInput, TransformOptions
    from img2img_client.stream import TransformStream

__all__ = [
    "Asset",
    "AssetNotFound",
    "Cancelled",
    "Client",
    "Completed",
    "DeadlineExceeded",
    "EngineState",
    "EngineStatus",
    "ImageFormat",
    "ImageInput",
    "Img2ImgError",
    "InvalidRequest",
    "ModelInfo",
    "ModelNotFound",
    "ModelReference",
    "ModelState",
    "Overloaded",
    "PermissionDenied",
    "Progress",
    "Queued",
    "RetryPolicy",
    "Started",
    "Timings",
    "TransformEvent",
    "TransformOptions",
    "TransformResult",
    "TransformStream",
    "TransformedImage",
    "Unauthenticated",
    "Unavailable",
]

_LAZY = {
    "Client": "img2img_client.client",
    "TransformStream": "img2img_client.stream",
    "ImageInput": "img2img_client.options",
    "TransformOptions": "img2img_client.options",
}


def __getattr__(name: str) -> Any:
    """Imports what needs gRPC when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
