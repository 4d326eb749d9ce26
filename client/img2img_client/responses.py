"""Converts the server's messages and statuses to values and errors."""

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC
from typing import TYPE_CHECKING, TypedDict, cast

from img2img.v1 import asset_pb2, model_pb2
from img2img.v1 import image_to_image_pb2 as messages

from img2img_client import errors, values

if TYPE_CHECKING:
    import grpc
    from google.rpc import status_pb2  # type: ignore[import-untyped, unused-ignore]

ERROR_DOMAIN = "img2img"
"""The domain of an img2img server's ErrorInfo."""

REQUEST_ID = "x-request-id"
"""The metadata key of the request id."""

_ERROR_OF_STATUS: dict[str, type[errors.Img2ImgError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "NOT_FOUND": errors.ModelNotFound,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "FAILED_PRECONDITION": errors.ModelUnavailable,
    "UNIMPLEMENTED": errors.NotSupported,
    "INTERNAL": errors.ServerFailed,
    "UNKNOWN": errors.ServerFailed,
    "DATA_LOSS": errors.Damaged,
}

_ERROR_OF_REASON: dict[str, type[errors.Img2ImgError]] = {"ASSET_NOT_FOUND": errors.AssetNotFound}
"""Error classes by reason, for statuses with several meanings."""


def parse_result(message: messages.TransformResponse, request_id: str = "") -> values.TransformResult:
    """The result in a response. Raises ServerFailed if it contains no image."""
    if not message.images:
        raise errors.ServerFailed("the server's response contains no image", status="INTERNAL", request_id=request_id)
    timings = message.timings
    return values.TransformResult(
        images=tuple(_parse_image(image) for image in message.images),
        model_id=message.model_id,
        model_revision=message.model_revision,
        engine=message.engine,
        timings=values.Timings(
            queue_ms=timings.queue_ms,
            encode_ms=timings.encode_ms,
            denoise_ms=timings.denoise_ms,
            decode_ms=timings.decode_ms,
            total_ms=timings.total_ms,
        ),
        request_id=request_id,
        warnings=tuple(values.TransformWarning(warning.field, warning.description, warning.code) for warning in message.warnings),
        speedup=_parse_used(message.speedup) if message.HasField("speedup") else None,
    )


def _parse_used(message: messages.UsedSpeedup) -> values.UsedSpeedup:
    return values.UsedSpeedup(message.name, message.times_faster, message.min_psnr_db, message.min_ssim)


def _parse_image(message: messages.ImageResult) -> values.TransformedImage:
    name = messages.OutputFormat.Name(message.format).removeprefix("OUTPUT_FORMAT_").lower()
    return values.TransformedImage(
        data=message.data,
        format="png" if name == "unspecified" else cast(values.ImageFormat, name),
        width=message.width,
        height=message.height,
        seed=message.seed,
        asset_id=message.asset_id if message.HasField("asset_id") else None,
    )


def parse_event(message: messages.TransformStreamResponse, request_id: str = "") -> values.TransformEvent | None:
    """The event in a message; None for an unknown event of a newer server."""
    match message.WhichOneof("event"):
        case "queued":
            queued = message.queued
            return values.Queued(queued.position, queued.eta_seconds if queued.HasField("eta_seconds") else None)
        case "started":
            return values.Started(message.started.seed, message.started.engine)
        case "progress":
            progress = message.progress
            preview = progress.preview if progress.HasField("preview") else None
            eta = progress.eta_seconds if progress.HasField("eta_seconds") else None
            return values.Progress(progress.step, progress.step_count, preview, eta)
        case "completed":
            return values.Completed(parse_result(message.completed, request_id))
    return None


def parse_model(message: model_pb2.Model) -> values.ModelInfo:
    """The model in a message."""
    source = message.source
    known = message.state in model_pb2.ModelState.values()
    state = model_pb2.ModelState.Name(message.state) if known else "MODEL_STATE_UNSPECIFIED"
    return values.ModelInfo(
        id=message.id,
        source=values.ModelReference(
            repo_id=source.repo_id or None,
            path=source.path or None,
            variant=source.variant or None,
            revision=source.revision or None,
            allow_patterns=tuple(source.allow_patterns),
            ignore_patterns=tuple(source.ignore_patterns),
        ),
        family=message.family,
        pipeline_class=message.pipeline_class,
        backend=message.backend,
        backend_reason=message.backend_reason,
        engine=message.engine,
        state=cast(values.ModelState, state.removeprefix("MODEL_STATE_").lower()),
        size_multiple=message.size_multiple,
        is_default=message.is_default,
        schedulers=tuple(message.schedulers),
        engines=tuple(_parse_engine(engine) for engine in message.engines),
        memory_bytes=message.memory_bytes or None,
        detail=message.detail,
        fields=tuple(_parse_field(field) for field in message.fields),
        speedups=tuple(_parse_speedup(speedup) for speedup in message.speedups),
        controlnets=tuple(message.controlnets),
        image_adapters=tuple(message.image_adapters),
    )


def _parse_speedup(message: model_pb2.Speedup) -> values.SpeedupInfo:
    return values.SpeedupInfo(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def _parse_field(message: model_pb2.RequestField) -> values.FieldInfo:
    default = message.WhichOneof("default")
    return values.FieldInfo(
        name=message.name,
        required=message.required,
        default=None if default is None else getattr(message, default),
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
        exclusive_minimum=message.exclusive_minimum,
        max_count=message.max_count,
        needs=message.needs,
    )


def _parse_engine(message: model_pb2.EngineStatus) -> values.EngineStatus:
    known = message.state in model_pb2.EngineState.values()
    state = model_pb2.EngineState.Name(message.state) if known else "ENGINE_STATE_UNSPECIFIED"
    return values.EngineStatus(
        name=message.name,
        state=cast(values.EngineState, state.removeprefix("ENGINE_STATE_").lower()),
        detail=message.detail,
        progress=message.progress,
    )


def parse_asset(message: asset_pb2.Asset) -> values.Asset:
    """The asset in a message."""
    expires = message.expire_time.ToDatetime(tzinfo=UTC) if message.HasField("expire_time") else None
    return values.Asset(message.id, message.media_type, message.size, message.sha256, expires)


def parse_request_id(metadata: "Iterable[tuple[str, str | bytes]] | None") -> str:
    """The request id in a response's metadata, or ""."""
    return next((value for key, value in metadata or () if key == REQUEST_ID and isinstance(value, str)), "")


def parse_error(error: "grpc.RpcError") -> errors.Img2ImgError:
    """The error for a failed call's status, with the reason, fields and seconds in its details."""
    status = error.code().name
    message = error.details() or status
    rich = _rich_status(error)
    details: _Details = {} if rich is None else _parse_details(rich)
    kind = _ERROR_OF_REASON.get(details.get("reason", ""), _ERROR_OF_STATUS.get(status, errors.Img2ImgError))
    if status == "RESOURCE_EXHAUSTED" and "larger than max" in message:
        kind = errors.InvalidRequest  # gRPC's message for exceeding a size limit: retrying does not help.
    if rich is None and status == "DEADLINE_EXCEEDED":
        message = "the timeout expired before the server was done"  # gRPC's own message is about removed streams.
    details.setdefault("request_id", parse_request_id(cast("grpc.Call", error).trailing_metadata()))
    return kind(message, status=status, **details)


def parse_status(rich: "status_pb2.Status") -> errors.Img2ImgError:
    """The error in a google.rpc.Status that is part of a response."""
    from google.rpc import code_pb2

    status = code_pb2.Code.Name(rich.code)
    details = _parse_details(rich)
    kind = _ERROR_OF_REASON.get(details.get("reason", ""), _ERROR_OF_STATUS.get(status, errors.Img2ImgError))
    return kind(rich.message, status=status, **details)


def _rich_status(error: "grpc.RpcError") -> "status_pb2.Status | None":
    import grpc
    from grpc_status import rpc_status

    try:
        return cast("status_pb2.Status | None", rpc_status.from_call(cast(grpc.Call, error)))
    except ValueError:  # The details contradict the status: use the plain status.
        return None


class _Details(TypedDict, total=False):
    """Arguments of an Img2ImgError from the details of a status."""

    reason: str
    fields: tuple[tuple[str, str], ...]
    retry_after: float
    estimate: float
    request_id: str


def _parse_details(status: "status_pb2.Status") -> _Details:
    """The reason, invalid fields, retry delay, estimate and request id. Other details are ignored."""
    from google.rpc import error_details_pb2

    found: _Details = {}
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            found["reason"] = info.reason
            with suppress(KeyError, ValueError):
                found["estimate"] = float(info.metadata["estimate_seconds"])
            if "request_id" in info.metadata:
                found["request_id"] = info.metadata["request_id"]
        elif detail.Unpack(bad):
            more = ((violation.field, violation.description) for violation in bad.field_violations)
            found["fields"] = (*found.get("fields", ()), *more)
        elif detail.Unpack(retry):
            found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
    return found
