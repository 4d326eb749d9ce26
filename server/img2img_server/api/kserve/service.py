"""KServe v2's GRPCInferenceService, with Triton's extensions, implemented by the services of img2img.v1."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from img2img.v1 import model_pb2 as pb
from tritonclient.grpc import model_config_pb2 as config_pb  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2 as kserve_pb
from tritonclient.grpc import service_pb2_grpc

from img2img_server.access.access import Access
from img2img_server.api.grpc_extensions import Handlers
from img2img_server.api.health import HealthServicer
from img2img_server.api.kserve import translation
from img2img_server.api.kserve.inference import Inference, request_stream
from img2img_server.api.kserve.tensors import Input, shown
from img2img_server.api.kserve.translation import FIELD_OF, INPUTS, OUTPUTS, VERSION
from img2img_server.api.models import ModelService
from img2img_server.api.transform import ImageToImageService
from img2img_server.codecs.pool import ImageMemory
from img2img_server.engine.interface import EngineInterface
from img2img_server.errors import InvalidField, ModelNotFound, NotSupported
from img2img_server.support import distribution
from img2img_server.telemetry.telemetry import Telemetry

_EXTENSIONS = ("model_repository", "model_configuration", "parameters")
_READY, _UNAVAILABLE, _LOADING = "READY", "UNAVAILABLE", "LOADING"
_STATES = {pb.MODEL_STATE_READY: _READY, pb.MODEL_STATE_LOADING: _LOADING}
_CONFIGURED = ("family", "pipeline_class", "backend", "engine", "size_multiple")
"""Fields of a model that become parameters of its configuration if they are set."""
_TYPES = {"BYTES": "STRING"}
"""Datatypes that have another name in a configuration."""


class Unsupported(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Methods that return UNIMPLEMENTED: statistics, shared memory, and trace and log settings."""

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        """Unsupported: metrics are served for Prometheus."""
        raise NotSupported("model statistics are not supported by this method: use the Prometheus metrics (--metrics-port)")

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        """Unsupported."""
        raise _no_shared_memory()

    async def TraceSetting(self, request: Any, context: Any) -> Any:
        """Unsupported: set when the server starts."""
        raise NotSupported("trace settings cannot be changed at run time: set --otlp-endpoint at start")

    async def LogSettings(self, request: Any, context: Any) -> Any:
        """Unsupported: set when the server starts."""
        raise NotSupported("log settings cannot be changed at run time: set --log-format at start")


def _no_shared_memory() -> NotSupported:
    return NotSupported("shared memory is not supported: send the tensors' contents")


_SERVICE = kserve_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
NAME: str = _SERVICE.full_name


class InferenceService(Unsupported):
    """Inference and metadata of the server and its models.

    A model is ready if it is in memory. A request for another one loads it if the server loads models on demand.
    """

    def __init__(
        self, inference: Inference, models: ModelService, health: HealthServicer, access: Access, telemetry: Telemetry
    ) -> None:
        self._inference = inference
        self._models = models
        self._health = health
        self._access = access
        self._telemetry = telemetry

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Always true."""
        return kserve_pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether the server accepts requests; false while it drains."""
        return kserve_pb.ServerReadyResponse(ready=self._health.is_serving())

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether a model is in memory and the server accepts requests. False for an unknown model."""
        try:
            found = await self._get(request, context)
        except ModelNotFound:
            return kserve_pb.ModelReadyResponse(ready=False)
        return kserve_pb.ModelReadyResponse(ready=found.state == pb.MODEL_STATE_READY and self._health.is_serving())

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """The server's name, version and extensions."""
        return _server_metadata()

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """A model's inputs and outputs."""
        return _model_metadata(await self._get(request, context))

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        """A model's inputs, outputs and parameters."""
        return _configuration(await self._get(request, context))

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """All models that the caller may use."""
        _check_repository(request)
        return _index(await self._models.ListModels(pb.ListModelsRequest(), context), request.ready)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Loads a model. Requires an admin token."""
        _check_repository(request)
        for key in sorted(request.parameters):
            raise NotSupported(f"parameters: models are loaded as stored; {shown(key)} is not supported")
        translation.check_name(request.model_name)
        with translation.renamed():
            await self._models.LoadModel(pb.LoadModelRequest(id=request.model_name), context)
        return kserve_pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        """Frees a model's memory. Requires an admin token."""
        _check_repository(request)
        for key in sorted(set(request.parameters) - {"unload_dependents"}):  # Triton's client always sends it
            raise InvalidField("parameters", f"unknown parameter {shown(key)}")
        await self._models.UnloadModel(pb.UnloadModelRequest(id=request.model_name), context)
        return kserve_pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Transforms one image and returns the result."""
        return await self._inference.once(request, context)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        """Transforms images as they arrive and yields each request's responses."""
        async for response in request_stream(self._inference, self._access, self._telemetry, context).responses(requests):
            yield response

    async def _get(self, request: Any, context: Any) -> pb.Model:
        translation.check_version(request.name, request.version)
        return (await self._models.GetModel(pb.GetModelRequest(id=request.name), context)).model


def add(
    handlers: Handlers,
    transforms: ImageToImageService,
    runner: EngineInterface,
    models: ModelService,
    health: HealthServicer,
    access: Access,
    telemetry: Telemetry,
    memory: ImageMemory,
) -> None:
    """Adds KServe v2 to `handlers`."""
    telemetry.serves(_SERVICE)
    service = InferenceService(Inference(transforms, runner, memory), models, health, access, telemetry)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, handlers.as_server)


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise NotSupported("repository_name must be empty: the server has a single, unnamed repository")


def _server_metadata() -> Any:
    """The ServerMetadataResponse."""
    return kserve_pb.ServerMetadataResponse(name="img2img", version=distribution.version(), extensions=_EXTENSIONS)


def _inputs(found: pb.Model) -> list[Input]:
    """The inputs that a model takes; all if that is not known, because it is not loaded."""
    taken = {field.name for field in found.fields}
    return [one for one in INPUTS if not taken or FIELD_OF.get(one.name, one.name) in taken]


def _model_metadata(found: pb.Model) -> Any:
    """The ModelMetadataResponse of a model."""
    response = kserve_pb.ModelMetadataResponse(name=found.id, versions=[VERSION], platform=_platform(found))
    for one in _inputs(found):
        response.inputs.add(name=one.name, datatype=one.datatypes[0], shape=one.dims)
    for output in OUTPUTS:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.dims)
    return response


def _configuration(found: pb.Model) -> Any:
    """The ModelConfigResponse of a model. max_batch_size is 0: the server batches concurrent requests itself."""
    config = config_pb.ModelConfig(name=found.id, platform=_platform(found), backend="img2img", max_batch_size=0)
    config.model_transaction_policy.decoupled = False  # one response per request, unless progress is requested
    for one in _inputs(found):
        config.input.add(name=one.name, data_type=_type(one.datatypes[0]), dims=one.dims, optional=True)
    for output in OUTPUTS:
        config.output.add(name=output.name, data_type=_type(output.datatype), dims=output.dims)
    for name in _CONFIGURED:
        if value := getattr(found, name):
            config.parameters[name].string_value = str(value)
    if found.schedulers:
        config.parameters["schedulers"].string_value = ", ".join(found.schedulers)
    return kserve_pb.ModelConfigResponse(config=config)


def _index(found: pb.ListModelsResponse, ready: bool) -> Any:
    """The RepositoryIndexResponse of all models, or only of ready ones if `ready` is set."""
    response = kserve_pb.RepositoryIndexResponse()
    for one in found.models:
        state = _STATES.get(one.state, _UNAVAILABLE)
        reason = one.detail or ("unloaded" if one.state == pb.MODEL_STATE_UNLOADED else "")
        if not ready or state == _READY:
            response.models.add(name=one.id, version=VERSION, state=state, reason=reason)
    return response


def _platform(found: pb.Model) -> str:
    return f"img2img_{found.backend}" if found.backend else "img2img"


def _type(datatype: str) -> Any:
    return config_pb.DataType.Value(f"TYPE_{_TYPES.get(datatype, datatype)}")
