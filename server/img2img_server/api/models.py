"""ModelService: the gRPC API of the model registry."""

from collections.abc import Sequence
from typing import Any

from img2img.v1 import image_to_image_pb2 as image_pb
from img2img.v1 import model_pb2 as pb
from img2img.v1 import model_pb2_grpc as pb_grpc

from img2img_server.api.fidelity import speedup_messages
from img2img_server.api.request_fields import fields_of
from img2img_server.backends.base import Models
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.image_adapters import ImageAdapterFiles, ImageAdapterHeader
from img2img_server.bundle.manifest import Source
from img2img_server.config import ServerConfig
from img2img_server.errors import InvalidField
from img2img_server.models.image_adapters import fitting
from img2img_server.models.registry import EngineStatus, Model, ModelRegistry
from img2img_server.support.call import current
from img2img_server.support.threads import in_thread


class ModelService(pb_grpc.ModelServiceServicer):
    """Lists, loads and unloads models, and lists LoRAs."""

    def __init__(self, models: ModelRegistry, residency: Models, config: ServerConfig) -> None:
        self._models = models
        self._config = config
        self._residency = residency
        self._loras = LoraFiles(config.loras.folder)
        self._adapters = ImageAdapterFiles(config.image_adapters.folder)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """All models that the caller may use, in order of id."""
        allowed = current().may_use
        adapters = await self._known_adapters()
        return pb.ListModelsResponse(models=[self._message(model, adapters) for model in self._models if allowed(model.id)])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """One model. NOT_FOUND if it does not exist or the caller may not use it."""
        model = self._models.get(request.id, current().may_use)
        return pb.GetModelResponse(model=self._message(model, await self._known_adapters()))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """Loads a model and waits until it is ready."""
        current().require_admin()
        if bool(request.id) == request.HasField("source"):
            raise InvalidField("id", "set exactly one of id and source")
        reference = reference_from(request.source) if request.HasField("source") else Source(path=request.id)
        if reference == Source():
            raise InvalidField("source", "the reference names no model: set name or path")
        model = await self._residency.load(reference)
        return pb.LoadModelResponse(model=self._message(model, await self._known_adapters()))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """Frees a model's memory."""
        current().require_admin()
        freed = await self._residency.unload(request.id)
        adapters = await self._known_adapters()
        return pb.UnloadModelResponse(model=self._message(self._models.get(request.id), adapters), freed_bytes=freed)

    async def ListLoras(self, request: pb.ListLorasRequest, context: Any) -> pb.ListLorasResponse:
        """The files in the folder of LoRAs, in order of id."""
        files = await in_thread(self._loras.sizes)
        return pb.ListLorasResponse(loras=[pb.LoraFile(id=name, size_bytes=size) for name, size in files])

    async def _known_adapters(self) -> Sequence[ImageAdapterHeader]:
        """The image adapters in the server's folder."""
        return () if self._adapters.folder is None else await in_thread(lambda: tuple(self._adapters.known()))

    def _message(self, model: Model, adapters: Sequence[ImageAdapterHeader]) -> pb.Model:
        state = pb.ModelState.Value(f"MODEL_STATE_{model.state.name}")
        message = pb.Model(
            id=model.id,
            state=state,
            is_default=model.id == self._models.default,
            memory_bytes=model.memory + model.slot_memory,
            detail=model.detail,
        )
        if model.manifest is not None:
            message.MergeFrom(
                pb.Model(
                    source=reference_to(model.manifest.source),
                    family=model.manifest.family,
                    pipeline_class=model.manifest.pipeline_class,
                    backend=model.manifest.backend,
                    backend_reason=model.manifest.backend_reason or "",
                )
            )
        message.controlnets.extend(self._models.controlnets(model, current().may_use))
        message.image_adapters.extend(fitting(self._models, model, adapters, current().may_use))
        if model.pipeline is not None:
            message.engine = model.pipeline.engine
            message.size_multiple = model.pipeline.size_multiple
            message.schedulers.extend(model.pipeline.schedulers)
            message.engines.extend(map(_engine_to, model.engines))
        if model.pipeline is not None and not model.companion:
            message.fields.extend(fields_of(self._config, model.pipeline).messages())
            if model.manifest is not None:
                message.speedups.extend(speedup_messages(model.manifest.speedups))
        return message


def _engine_to(status: EngineStatus) -> pb.EngineStatus:
    state = pb.EngineState.Value(f"ENGINE_STATE_{status.state.name}")
    return pb.EngineStatus(name=status.name, state=state, detail=status.detail, progress=status.progress)


def reference_from(message: image_pb.ModelReference) -> Source:
    """Converts a message to a Source. Fields that are not set are None or empty."""
    return Source(
        repo_id=message.repo_id or None,
        path=message.path or None,
        variant=message.variant or None,
        revision=message.revision or None,
        allow_patterns=tuple(message.allow_patterns),
        ignore_patterns=tuple(message.ignore_patterns),
    )


def reference_to(source: Source) -> image_pb.ModelReference:
    """Converts a bundle's source to a message, without a local path, which would reveal the server's file system."""
    return image_pb.ModelReference(
        repo_id=source.repo_id or "",
        variant=source.variant or "",
        revision=source.revision or "",
        allow_patterns=source.allow_patterns,
        ignore_patterns=source.ignore_patterns,
    )
