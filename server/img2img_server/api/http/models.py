"""The models as OpenAI lists them, with what img2img knows of each beside."""

import json
import time
from typing import Any

from img2img.v1 import model_pb2 as pb

from img2img_server.api.http.exchange import Exchange
from img2img_server.api.models import ModelService

_KNOWN = ("family", "pipeline_class", "backend", "engine", "size_multiple", "detail")


class ModelList:
    """GET /v1/models and GET /v1/models/{id} by ModelService."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._since = int(time.time())

    async def list(self, exchange: Exchange) -> None:
        """Answers with every model that the caller may use."""
        found = await self._service.ListModels(pb.ListModelsRequest(), exchange)
        await self._answer(exchange, {"object": "list", "data": [self._object(model) for model in found.models]})

    async def get(self, exchange: Exchange) -> None:
        """Answers with one model."""
        found = await self._service.GetModel(pb.GetModelRequest(id=exchange.path["id"]), exchange)
        await self._answer(exchange, self._object(found.model))

    async def _answer(self, exchange: Exchange, value: dict[str, Any]) -> None:
        await exchange.answer(200, json.dumps(value).encode(), {})

    def _object(self, model: pb.Model) -> dict[str, Any]:
        """OpenAI's four fields, and this server's. `created` is when this server began, as bundles have no date."""
        known = {name: value for name in _KNOWN if (value := getattr(model, name))}
        return {
            "id": model.id,
            "object": "model",
            "created": self._since,
            "owned_by": "img2img",
            "state": pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
            "is_default": model.is_default,
            **known,
            "schedulers": list(model.schedulers),
            "fields": [_field(field) for field in model.fields],
            "controlnets": list(model.controlnets),
            "image_adapters": list(model.image_adapters),
        }


def _field(field: pb.RequestField) -> dict[str, Any]:
    """A field as JSON, without unset keys."""
    return {"default" if part.name.startswith("default_") else part.name: value for part, value in field.ListFields()}
