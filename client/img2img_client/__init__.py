"""A small typed client of an img2img server.

    from img2img_client import Client

    with Client("localhost:50051") as client:
        client.transform("photo.jpg", prompt="the same place in winter").image.show()

Importing this package is quick: `Client` brings gRPC in when it is first named.
"""

from typing import TYPE_CHECKING, Any

from img2img_client.errors import (
    Cancelled,
    DeadlineExceeded,
    Img2ImgError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from img2img_client.values import (
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
    from img2img_client.client import Client, TransformStream
    from img2img_client.options import ImageInput, TransformOptions

__all__ = [
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
    "Progress",
    "Queued",
    "Started",
    "Timings",
    "TransformEvent",
    "TransformOptions",
    "TransformResult",
    "TransformStream",
    "TransformedImage",
    "Unavailable",
]

_LAZY = {
    "Client": "img2img_client.client",
    "TransformStream": "img2img_client.client",
    "ImageInput": "img2img_client.options",
    "TransformOptions": "img2img_client.options",
}


def __getattr__(name: str) -> Any:
    """Imports what needs gRPC when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
