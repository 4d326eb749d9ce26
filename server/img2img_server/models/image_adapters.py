"""Finds the image adapters that fit a model, and the image encoder that an adapter reads, before anything is loaded."""

from collections.abc import Iterable

from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.image_adapters import ImageAdapterHeader
from img2img_server.models.registry import Allowed, Model, ModelRegistry

FIELD = "image_prompts"
"""The field of requests that ready models which take image prompts list."""


def fitting(models: ModelRegistry, model: Model, adapters: Iterable[ImageAdapterHeader], allowed: Allowed) -> list[str]:
    """The ids of the adapters that fit a model, and whose image encoder is known and may be used by the caller."""
    if model.prompt_kind is None or (model.pipeline is not None and FIELD not in model.pipeline.fields):
        return []
    return [one.id for one in adapters if one.needs.fits == model.prompt_kind and len(_encoders(models, one, allowed)) == 1]


def encoder_of(models: ModelRegistry, adapter: ImageAdapterHeader, allowed: Allowed) -> Model:
    """The image encoder that an adapter reads, ready or not: the one that its NAME.json names, else the only one that fits.
    Raises AdapterProblem."""
    found = _encoders(models, adapter, allowed)
    if len(found) == 1:
        return found[0]
    if found:
        names, named = ", ".join(encoder.id for encoder in found), f'{{"image_encoder": "{found[0].id}"}}'
        raise AdapterProblem(
            f"fits several image encoders of this server ({names}): its operator can name one in {adapter.id}.json, such as "
            f"{named}, or remove the others"
        )
    named = f"'{adapter.encoder}', which {adapter.id}.json names, as " if adapter.encoder else ""
    raise AdapterProblem(
        f"needs {named}{adapter.needs}, and you may use no such model of this server: its operator can export one (docs/loras.md)"
    )


def _encoders(models: ModelRegistry, adapter: ImageAdapterHeader, allowed: Allowed) -> list[Model]:
    return [
        model
        for model in models
        if model.encoder_widths is not None
        and adapter.needs.reads(model.encoder_widths)
        and adapter.encoder in ("", model.id)
        and allowed(model.id)
    ]
