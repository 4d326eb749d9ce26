"""A gRPC server that does what a test tells it to and remembers what it was asked."""

import io
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped, unused-ignore]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from img2img.v1 import image_to_image_pb2 as messages
from img2img.v1 import image_to_image_pb2_grpc as services
from img2img.v1 import model_pb2, model_pb2_grpc
from PIL import Image

PATIENCE = 20.0
"""Seconds after which a test that waits for an event has failed."""

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""What the fake server takes; less than the client would send."""


def picture(colour: str = "red", size: tuple[int, int] = (4, 2), image_format: str = "PNG") -> bytes:
    """A small picture's file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, image_format)
    return file.getvalue()


def response(*seeds: int) -> messages.TransformResponse:
    """A result with a picture for each seed."""
    return messages.TransformResponse(
        images=[
            messages.ImageResult(data=picture(), format=messages.OUTPUT_FORMAT_PNG, width=4, height=2, seed=seed)
            for seed in seeds or (7,)
        ],
        model_id="demo",
        model_revision="main",
        engine="onnx:cpu",
        timings=messages.Timings(queue_ms=1, encode_ms=2, denoise_ms=3, decode_ms=4, total_ms=11),
    )


def events(*seeds: int, steps: int = 2, preview_interval: int = 0) -> list[messages.TransformStreamResponse]:
    """The life of a request that goes well, with a preview every so many steps but the last."""
    event = messages.TransformStreamResponse
    previews = {
        step: picture(image_format="JPEG") for step in range(1, steps) if preview_interval and step % preview_interval == 0
    }
    return [
        event(queued=messages.Queued(position=3, eta_seconds=1.5)),
        event(started=messages.Started(seed=7, engine="onnx:cpu")),
        *(
            event(progress=messages.Progress(step=step, step_count=steps, preview=previews.get(step)))
            for step in range(1, steps + 1)
        ),
        event(completed=response(*seeds)),
    ]


def rich_status(code: int, message: str, *details: Message) -> grpc.Status:
    """A status as an img2img server sends it."""
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed))


def error_info(reason: str, domain: str = "img2img", **metadata: str) -> error_details_pb2.ErrorInfo:
    """The detail that gives a reason."""
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


def wrong_field(field: str, description: str) -> grpc.Status:
    """What the server answers to a wrong field."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    return rich_status(code_pb2.INVALID_ARGUMENT, f"{field}: {description}", error_info("INVALID_FIELD"), bad_request)


def queue_full(retry_after: float) -> grpc.Status:
    """What the server answers when it has no room."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(retry_after * 1000))
    retry = error_details_pb2.RetryInfo(retry_delay=delay)
    return rich_status(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", error_info("QUEUE_FULL"), retry)


class FakeService(services.ImageToImageServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Both services. `script` is what a stream yields, `failure` a status that every call ends with.

    Where `hold` is set, a transform does not end before its caller does: `holding` tells that it is there, `released` that the
    caller has gone.
    """

    def __init__(self) -> None:
        self.requests: list[messages.TransformRequest] = []
        self.seconds_left: list[float | None] = []
        self.script: list[messages.TransformStreamResponse] = events()
        self.models: list[model_pb2.Model] = []
        self.failure: grpc.Status | None = None
        self.hold = False
        self.holding = threading.Event()
        self.released = threading.Event()

    def Transform(self, request: messages.TransformRequest, context: Any) -> messages.TransformResponse:
        self._accept(request, context)
        return response()

    def TransformStream(
        self, request: messages.TransformStreamRequest, context: Any
    ) -> Iterator[messages.TransformStreamResponse]:
        for number, step in enumerate(self.script):
            if number == len(self.script) - 1:
                self._accept(request.request, context)
            yield step

    def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        self._fail(context)
        return model_pb2.ListModelsResponse(models=self.models)

    def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.GetModelResponse:
        for model in self.models:
            if model.id == request.id:
                return model_pb2.GetModelResponse(model=model)
        abort(context, rich_status(code_pb2.NOT_FOUND, f"no model {request.id}", error_info("MODEL_NOT_FOUND")))

    def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> NoReturn:
        abort(context, rich_status(code_pb2.UNIMPLEMENTED, "no loading", error_info("NOT_SUPPORTED")))

    def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> NoReturn:
        abort(context, rich_status(code_pb2.UNIMPLEMENTED, "no unloading", error_info("NOT_SUPPORTED")))

    def _accept(self, request: messages.TransformRequest, context: Any) -> None:
        self.requests.append(request)
        self.seconds_left.append(context.time_remaining())
        self._fail(context)
        if self.hold:
            context.add_callback(self.released.set)
            self.holding.set()
            self.released.wait(PATIENCE)

    def _fail(self, context: Any) -> None:
        if self.failure is not None:
            abort(context, self.failure)


def abort(context: Any, status: grpc.Status) -> NoReturn:
    """Ends the call with a rich status."""
    context.abort_with_status(status)
    raise AssertionError("abort_with_status raises")


class FakeServer:
    """The service on a port of its own, with the standard health service beside it."""

    def __init__(self) -> None:
        self.service = FakeService()
        self.health = health.HealthServicer()
        limits = (("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.max_send_message_length", -1))
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=limits)
        services.add_ImageToImageServiceServicer_to_server(self.service, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def start(self) -> None:
        """Starts to answer; healthy from the start."""
        self.set_serving(True)
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """Says how the server's health is."""
        states = health_pb2.HealthCheckResponse
        self.health.set("", states.SERVING if serving else states.NOT_SERVING)

    def stop(self) -> None:
        """Ends every call and waits until all is down."""
        self.service.released.set()
        self._server.stop(None).wait(PATIENCE)
