"""KServe's metadata of the server and its models, model configurations, and the repository index."""

from typing import Any

from img2img.v1 import model_pb2 as pb
from tritonclient.grpc import model_config_pb2 as config_pb  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2 as kserve_pb

from img2img_server.api.kserve.translation import OUTPUTS, SETTINGS, SOURCES, VERSION
from img2img_server.support import distribution

_EXTENSIONS = ("model_repository", "model_configuration", "parameters")
_READY, _UNAVAILABLE, _LOADING = "READY", "UNAVAILABLE", "LOADING"
_STATES = {pb.MODEL_STATE_READY: _READY, pb.MODEL_STATE_LOADING: _LOADING}
_CONFIGURED = ("family", "pipeline_class", "backend", "engine", "size_multiple")
"""Fields of a model that become parameters of its configuration if they are set."""
_TYPES = {"BYTES": "STRING"}
"""Datatypes that have another name in a configuration."""


def server() -> Any:
    """The ServerMetadataResponse."""
    return kserve_pb.ServerMetadataResponse(name="img2img", version=distribution.version(), extensions=_EXTENSIONS)


def model(found: pb.Model) -> Any:
    """The ModelMetadataResponse of a model."""
    response = kserve_pb.ModelMetadataResponse(name=found.id, versions=[VERSION], platform=_platform(found))
    for one in (*SOURCES, *SETTINGS):
        response.inputs.add(name=one.name, datatype=one.datatypes[0], shape=one.dims)
    for output in OUTPUTS:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.dims)
    return response


def configuration(found: pb.Model) -> Any:
    """The ModelConfigResponse of a model. max_batch_size is 0: the server batches concurrent requests itself."""
    config = config_pb.ModelConfig(name=found.id, platform=_platform(found), backend="img2img", max_batch_size=0)
    config.model_transaction_policy.decoupled = False  # one response per request, unless progress is requested
    for one in (*SOURCES, *SETTINGS):
        config.input.add(name=one.name, data_type=_type(one.datatypes[0]), dims=one.dims, optional=True)
    for output in OUTPUTS:
        config.output.add(name=output.name, data_type=_type(output.datatype), dims=output.dims)
    for name in _CONFIGURED:
        if value := getattr(found, name):
            config.parameters[name].string_value = str(value)
    if found.schedulers:
        config.parameters["schedulers"].string_value = ", ".join(found.schedulers)
    return kserve_pb.ModelConfigResponse(config=config)


def index(found: pb.ListModelsResponse, ready: bool) -> Any:
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
