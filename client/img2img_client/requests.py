"""What both clients say in the same words: requests that take more than a field, and the health watch."""

from collections.abc import Sequence

from img2img.v1 import model_pb2

from img2img_client.calls import Calling
from img2img_client.channel import Access, Line
from img2img_client.errors import DeadlineExceeded, Img2ImgError, Unavailable
from img2img_client.options import model_message
from img2img_client.retry import RetryPolicy
from img2img_client.targets import Target, parse_target
from img2img_client.values import Asset, ModelReference

# grpc.health.v1 by hand, because its package is not needed otherwise: an empty HealthCheckRequest asks about the server as a
# whole, and a HealthCheckResponse is one varint, field 1, where SERVING is 1.
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"


def plan(
    target: str | Sequence[str],
    balance: bool | None,
    access: Access,
    timeout: float | None,
    retries: RetryPolicy | None,
    dns_config: bool,
) -> tuple[Target, Line, Calling]:
    """Where a client's servers are, its channel to be, and what its calls have in common. ValueError and OSError as Line's."""
    found = parse_target(target, balance)
    line = Line(found, access, retries, dns_config=dns_config)
    counted = found.several and not dns_config
    return found, line, Calling(found.shown, access.metadata, timeout, retries, found.several, counted)


def load_request(model: str | ModelReference) -> model_pb2.LoadModelRequest:
    """The request to make a model ready, by its id or by where it comes from."""
    if isinstance(model, str):
        return model_pb2.LoadModelRequest(id=model)
    return model_pb2.LoadModelRequest(source=model_message(model))


def asset_id(asset: Asset | str) -> str:
    """The id of an image that a server keeps, from what names it: itself, its id or its address."""
    return asset.id if isinstance(asset, Asset) else asset.removeprefix("asset:")


def not_ready(failure: Img2ImgError, target: str) -> Img2ImgError:
    """The error of a wait for a server that ended with this one."""
    if isinstance(failure, DeadlineExceeded):
        return DeadlineExceeded(f"{target} was not ready in time", status=failure.status)
    return failure


def watch_ended(target: str) -> Img2ImgError:
    """The error of a server that says no more how it is."""
    return Unavailable(f"{target} ended its health watch", status="UNAVAILABLE")
