"""Code shared by both clients: requests with several fields, and the health watch."""

from collections.abc import Sequence

from img2img.v1 import model_pb2

from img2img_client.calls import CallSettings
from img2img_client.channel import Access, ChannelFactory
from img2img_client.errors import DeadlineExceeded, Img2ImgError, Unavailable
from img2img_client.options import model_message
from img2img_client.retry import RetryPolicy
from img2img_client.targets import Target, parse_target
from img2img_client.values import Asset, ModelReference

# grpc.health.v1 encoded by hand, to avoid a dependency: an empty HealthCheckRequest is about the server as a whole, and a
# HealthCheckResponse is one varint, field 1, with SERVING = 1.
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
) -> tuple[Target, ChannelFactory, CallSettings]:
    """A client's servers, channel factory and call settings. Raises ValueError and OSError like ChannelFactory."""
    found = parse_target(target, balance)
    channels = ChannelFactory(found, access, retries, dns_config=dns_config)
    counted = found.several and not dns_config
    return found, channels, CallSettings(found.shown, access.metadata, timeout, retries, found.several, counted)


def load_request(model: str | ModelReference) -> model_pb2.LoadModelRequest:
    """The request to load a model by its id or its source."""
    if isinstance(model, str):
        return model_pb2.LoadModelRequest(id=model)
    return model_pb2.LoadModelRequest(source=model_message(model))


def asset_id(asset: Asset | str) -> str:
    """The id of a stored image, from an Asset, an id or an address ("asset:ID")."""
    return asset.id if isinstance(asset, Asset) else asset.removeprefix("asset:")


def not_ready(failure: Img2ImgError, target: str) -> Img2ImgError:
    """The error of `wait_until_ready` for a failed health watch."""
    if isinstance(failure, DeadlineExceeded):
        return DeadlineExceeded(f"{target} was not ready in time", status=failure.status)
    return failure


def watch_ended(target: str) -> Img2ImgError:
    """The error for a health watch that the server ended."""
    return Unavailable(f"{target} ended its health watch", status="UNAVAILABLE")
