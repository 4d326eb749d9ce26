"""A scripted gRPC server that records its requests."""

import io
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from fake_asset_service import FakeAssetService, Observed
from fake_statuses import abort, error_info, rich_status
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from img2img.v1 import asset_pb2_grpc, model_pb2, model_pb2_grpc
from img2img.v1 import image_to_image_pb2 as messages
from img2img.v1 import image_to_image_pb2_grpc as services
from PIL import Image

PATIENCE = 20.0
"""Seconds after which a test that waits for an event has failed."""

MAX_REQUEST_BYTES = 32 * 1024 * 1024
"""The largest message that the fake server accepts, smaller than the client's."""


def image_bytes(colour: str = "red", size: tuple[int, int] = (4, 2), image_format: str = "PNG") -> bytes:
    """A small image's file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, image_format)
    return file.getvalue()


def response(*seeds: int) -> messages.TransformResponse:
    """A result with an image for each seed."""
    return messages.TransformResponse(
        images=[
            messages.ImageResult(data=image_bytes(), format=messages.OUTPUT_FORMAT_PNG, width=4, height=2, seed=seed)
            for seed in seeds or (7,)
        ],
        model_id="demo",
        model_revision="main",
        engine="onnx:cpu",
        timings=messages.Timings(queue_ms=1, encode_ms=2, denoise_ms=3, decode_ms=4, total_ms=11),
    )


def kept_response() -> messages.TransformResponse:
    """A result whose image the server keeps."""
    made = response()
    made.images[0].asset_id = "kept"
    return made


def events(*seeds: int, steps: int = 2, preview_interval: int = 0) -> list[messages.TransformStreamResponse]:
    """The events of a successful request, with a preview every `preview_interval` steps except the last."""
    event = messages.TransformStreamResponse
    previews = {
        step: image_bytes(image_format="JPEG") for step in range(1, steps) if preview_interval and step % preview_interval == 0
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


class FakeService(Observed, services.ImageToImageServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Both services.

    `script` holds the events of a stream; a failure is sent before the event `fail_before`, by default the last one. `warnings`
    are returned with unary transforms; a stream's are in its script. If `hold` is set, a transform does not end before its caller
    cancels: `holding` is set when it has begun, `released` when the caller has gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[messages.TransformRequest] = []
        self.script: list[messages.TransformStreamResponse] = events()
        self.warnings: list[messages.Warning] = []
        self.fail_before: int | None = None
        self.loras: list[model_pb2.LoraFile] = []
        self.models: list[model_pb2.Model] = []
        self.loads: list[model_pb2.LoadModelRequest] = []
        self.unloads: list[str] = []
        self.hold = False
        self.holding = threading.Event()
        self.released = threading.Event()

    def Transform(self, request: messages.TransformRequest, context: Any) -> messages.TransformResponse:
        self._accept(request, context)
        if request.output.as_asset:
            return kept_response()
        made = response()
        made.warnings.extend(self.warnings)
        return made

    def TransformStream(
        self, request: messages.TransformStreamRequest, context: Any
    ) -> Iterator[messages.TransformStreamResponse]:
        last = len(self.script) - 1 if self.fail_before is None else self.fail_before
        if last > 0:
            self.name(context)
        for number, step in enumerate(self.script):
            if number == last:
                self._accept(request.request, context, begun=number > 0)
            yield step

    def TransformBatch(self, requests: Iterator[messages.TransformBatchRequest], context: Any) -> Iterator[Any]:
        for number, request in enumerate(requests):
            yield messages.TransformBatchResponse(index=number, response=self.Transform(request.request, context))

    def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        self.meet(context)
        return model_pb2.ListModelsResponse(models=self.models)

    def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.GetModelResponse:
        self.meet(context)
        return model_pb2.GetModelResponse(model=self._model(request.id, context))

    def ListLoras(self, request: model_pb2.ListLorasRequest, context: Any) -> model_pb2.ListLorasResponse:
        self.meet(context)
        return model_pb2.ListLorasResponse(loras=self.loras)

    def LoadModel(self, request: model_pb2.LoadModelRequest, context: Any) -> model_pb2.LoadModelResponse:
        self.loads.append(request)
        self.meet(context)
        model = self._model(request.id or request.source.repo_id, context)
        model.state, model.memory_bytes = model_pb2.MODEL_STATE_READY, 3 * 2**20
        return model_pb2.LoadModelResponse(model=model)

    def UnloadModel(self, request: model_pb2.UnloadModelRequest, context: Any) -> model_pb2.UnloadModelResponse:
        self.unloads.append(request.id)
        self.meet(context)
        model = self._model(request.id, context)
        model.state, freed = model_pb2.MODEL_STATE_UNLOADED, model.memory_bytes
        model.memory_bytes = 0
        return model_pb2.UnloadModelResponse(model=model, freed_bytes=freed)

    def _model(self, name: str, context: Any) -> model_pb2.Model:
        for model in self.models:
            if model.id == name:
                return model
        abort(context, rich_status(code_pb2.NOT_FOUND, f"no model {name}", error_info("MODEL_NOT_FOUND")))

    def _accept(self, request: messages.TransformRequest, context: Any, begun: bool = False) -> None:
        self.requests.append(request)
        self.meet(context, begun)
        if self.hold:
            context.add_callback(self.released.set)
            self.holding.set()
            self.released.wait(PATIENCE)


class FakeHealth(health.HealthServicer):
    """The standard health service, with one thread per watch. gRPC's default one can deadlock: it sends while it holds the lock
    that the end of another watch waits for, on the only thread that could complete the send."""

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=False)

    def Watch(self, request: health_pb2.HealthCheckRequest, context: Any, send_response_callback: Any = None) -> Any:
        watcher = super().Watch(request, context)
        if not context.is_active():  # Cancelled before it began; otherwise it would never end.
            watcher.close()
        return watcher


class FakeServer:
    """The services on a port of their own, or on `port`, with the standard health service beside them."""

    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None, host: str = "127.0.0.1") -> None:
        self.service = FakeService()
        self.assets = FakeAssetService()
        self.health = FakeHealth()
        limits = (("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.max_send_message_length", -1))
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=32), options=limits)
        services.add_ImageToImageServiceServicer_to_server(self.service, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self.service, self._server)
        asset_pb2_grpc.add_AssetServiceServicer_to_server(self.assets, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        address = f"{host}:{port}"
        add = self._server.add_insecure_port
        self.port = add(address) if credentials is None else self._server.add_secure_port(address, credentials)
        self.target = f"{host}:{self.port}"

    def start(self) -> None:
        """Starts to answer; healthy from the start."""
        self.set_serving(True)
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """Sets the server's health."""
        states = health_pb2.HealthCheckResponse
        self.health.set("", states.SERVING if serving else states.NOT_SERVING)

    def stop(self) -> None:
        """Ends every call and waits until all is down."""
        self.service.released.set()
        self._server.stop(None).wait(PATIENCE)
