"""The companions of one request, ControlNets and image encoders: found, checked, loaded, and kept in memory while it runs."""

from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.controls import check_controlnet
from img2img_server.api.image_prompts import adapter_error
from img2img_server.api.models import reference_from
from img2img_server.backends.base import Models
from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.image_adapters import ImageAdapterHeader
from img2img_server.bundle.manifest import Source
from img2img_server.errors import InvalidField, ModelNotFound
from img2img_server.models.image_adapters import encoder_of
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.call import current


class CompanionLease:
    """Keeps companions of a request to the model `used` in memory until `lease` is closed, and opens the control graph of the
    model, which all of them need."""

    def __init__(self, models: ModelRegistry, residency: Models, used: Model, lease: AsyncExitStack) -> None:
        self._models, self._residency, self._used, self._lease = models, residency, used, lease

    async def controlnets(self, controls: Sequence[pb.Control]) -> list[Model]:
        """The ControlNets of controls, in order. Raises InvalidField and the errors of finding and loading models, with the
        control's field."""
        found = []
        for index, control in enumerate(controls):
            field, reference = f"controls[{index}].model", reference_from(control.model)
            try:
                with suppress(ModelNotFound):  # it may have to be exported first
                    check_controlnet(self._models.find(reference, current().may_use), self._used, field)
                model = await self._loaded(reference)
            except InvalidField as error:
                raise InvalidField(field, error.description) from None
            except ModelNotFound as error:
                raise ModelNotFound(f"{field}: {error}") from None
            check_controlnet(model, self._used, field)
            found.append(model)
        return await self._with_control_graph(found)

    async def encoders(self, adapters: Sequence[ImageAdapterHeader]) -> list[Model]:
        """The image encoders that the adapters of image prompts read, in order. Raises InvalidField, with the adapter's field,
        and the errors of loading models."""
        found = []
        for index, adapter in enumerate(adapters):
            try:
                encoder = encoder_of(self._models, adapter, current().may_use)
            except AdapterProblem as problem:
                raise adapter_error(index, adapter.id, problem) from None
            found.append(await self._loaded(Source(path=encoder.id)))
        return await self._with_control_graph(found)

    async def _loaded(self, reference: Source) -> Model:
        return await self._lease.enter_async_context(self._residency.using(reference))

    async def _with_control_graph(self, companions: list[Model]) -> list[Model]:
        if companions:
            await self._residency.open_control(self._used.id)
        return companions
