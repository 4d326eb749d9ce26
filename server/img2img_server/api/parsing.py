"""Converts messages to requests: checks every field, fills in defaults, and decodes the source image off the event loop."""

import math
import secrets
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server import images
from img2img_server.api.companions import CompanionLease
from img2img_server.api.controls import Controls, check_controls
from img2img_server.api.fidelity import fidelity_from
from img2img_server.api.image_files import held
from img2img_server.api.image_prompts import ImagePrompts, check_image_prompts, find_adapters
from img2img_server.api.loras import check_loras, find_loras
from img2img_server.api.more_images import References, mask_rule
from img2img_server.api.request_fields import RequestFields, fields_of
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.image_adapters import ImageAdapterFiles
from img2img_server.codecs.jobs import LoadImage, LoadMask
from img2img_server.codecs.pool import Codecs
from img2img_server.config import DEFAULT_PROMPT, ServerConfig
from img2img_server.engine.request import ImagePromptUse, Mask, Pipeline, Plan, Request
from img2img_server.errors import InvalidField
from img2img_server.models.registry import Model
from img2img_server.sources.reading import Sources, asset_of
from img2img_server.support.call import current
from img2img_server.support.fair_queue import FairThreads

_FORMATS: dict[int, images.WriteFormat] = {
    pb.OUTPUT_FORMAT_UNSPECIFIED: "PNG",
    pb.OUTPUT_FORMAT_PNG: "PNG",
    pb.OUTPUT_FORMAT_JPEG: "JPEG",
    pb.OUTPUT_FORMAT_WEBP: "WEBP",
}
_MAX_SEED = 2**63 - 1
_PLANNING = 2
"""Threads that plan requests, which may be slow the first time."""
_MOST_PLANNED = 64
"""Kinds of requests that are known to have been planned: fewer than the schedulers that a pipeline caches."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How another API than gRPC reads its messages.

    With `mask_by_alpha`, the mask's transparent areas are redrawn instead of its white ones. Fields that are `optional` were not
    set by the caller, and are cleared if the model makes no use of them. A stream has at most `preview_count` previews, spread
    over the request's steps; None if the message's preview_interval says when they are due.
    """

    mask_by_alpha: bool = False
    optional: tuple[str, ...] = ()
    preview_count: int | None = None


AS_WRITTEN = Reading()
"""How gRPC's messages are read."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request for the engine, and how to respond.

    `arrival` is in seconds (time.perf_counter). If `as_asset` is set, the images are stored and their ids sent. `source_asset` is
    the id of the source's asset, `mask_asset` of the mask's, `reference_assets` of the references', `control_assets` of the
    control images', `prompt_assets` of the images of each image prompt, empty if it is none; `mask_rule` is None without a mask.
    `model` has no pipeline, because the request may outlive the model in memory; `engine` names the pipeline's engine on arrival.
    `fields` are the names of the fields that affect it.
    """

    model: Model
    engine: str
    request: Request
    file_format: images.WriteFormat
    quality: int
    arrival: float
    as_asset: bool = False
    source_asset: str = ""
    mask_asset: str = ""
    mask_rule: images.MaskRule | None = None
    fields: frozenset[str] = frozenset()
    reference_assets: tuple[str, ...] = ()
    control_assets: tuple[str, ...] = ()
    prompt_assets: tuple[tuple[str, ...], ...] = ()


class Parser:
    """Converts messages to ParsedRequests. `codecs` decode images; `clock` is the engine's clock in seconds, for deadlines."""

    def __init__(self, config: ServerConfig, sources: Sources, clock: Callable[[], float], codecs: Codecs) -> None:
        self._config = config
        self._sources = sources
        self._clock = clock
        self._codecs = codecs
        self._references = References(sources, codecs, config.image_limits, config.sources.http_seconds)
        self._controls = Controls(sources, codecs, config.image_limits)
        self._prompts = ImagePrompts(sources, codecs, config.image_limits, config.sources.http_seconds)
        self._threads = FairThreads(_PLANNING, "img2img-plan")
        # Of requests that were planned. Not by a pipeline's address, which may be that of a later one.
        self._planned: WeakKeyDictionary[Pipeline, set[Hashable]] = WeakKeyDictionary()
        self._loras = LoraFiles(config.loras.folder)
        self._adapters = ImageAdapterFiles(config.image_adapters.folder)

    async def parse(
        self,
        message: pb.TransformRequest,
        model: Model,
        seconds_left: float | None,
        previews: bool,
        reading: Reading = AS_WRITTEN,
        companions: CompanionLease | None = None,
    ) -> ParsedRequest:
        """Checks a message for `model` and fills in defaults. Previews are only drawn if `previews` is set. `companions` loads
        the ControlNets and image encoders that the message needs; without it, it must need none.

        Raises InvalidField, naming the first wrong field, or another ServerError.
        """
        arrival = time.perf_counter()
        deadline = None if seconds_left is None else self._clock() + seconds_left
        if model.companion:
            raise InvalidField("model", f"'{model.id}' is {model.companion}")
        fields = fields_of(self._config, _pipeline_of(model))
        for name in reading.optional:
            if name not in fields or not fields.uses(message, name):
                message.ClearField(name)  # type: ignore[arg-type]
        fields.check(message)
        prompt, negative_prompt = fields.text(message, "prompt"), fields.text(message, "negative_prompt")
        strength, steps = fields.number(message, "strength"), int(fields.number(message, "num_inference_steps"))
        guidance, true_cfg = fields.number(message, "guidance_scale"), _true_cfg(message, fields)
        fidelity = fidelity_from(message)
        seeds = _seeds(message, int(fields.number(message, "image_count")))
        scheduler = _scheduler(message.scheduler, model)
        interval = int(fields.number(message, "preview_interval"))
        file_format, quality = _file_format(message), int(fields.number(message, "output.quality"))
        size_rule = self._size_rule(message, model, file_format)
        if message.output.as_asset:
            self._sources.assets.require("output.as_asset")
        rule = mask_rule(message, fields, _pipeline_of(model).source_rule.mask, model.id, reading.mask_by_alpha)
        check_loras(message)
        names_nets = "controls.model" in fields
        check_controls(message, self._sources, names_nets)
        check_image_prompts(message, self._sources)
        self._sources.check(message.image)
        if rule is not None:
            self._sources.check(message.mask, "mask")
        self._references.check(message.reference_images)
        loras = await self._threads.run(find_loras, message.loras, self._loras) if message.loras else ()
        # Expensive work starts here, after all other fields have been checked.
        nets: Sequence[Model | None] = [None] * len(message.controls)
        if message.controls and names_nets:
            assert companions is not None, "there is a lease for companions"
            nets = await companions.controlnets(message.controls)
        image_prompts = await self._image_prompts(message, model, companions)
        references = await self._references.read(message.reference_images)
        field, data = await self._sources.read(message.image)
        call = current()
        edit_size = _pipeline_of(model).source_rule.edit_size
        load = LoadImage(
            field=field,
            limits=self._config.image_limits,
            size_rule=size_rule,
            multiple=_pipeline_of(model).size_multiple,
            file_format=file_format,
            source_rule=_pipeline_of(model).source_rule,
            sized_by=references[-1].image.size if references and edit_size is not None and edit_size.by_last else None,
        )
        with held(self._codecs.memory, message.image, data):
            image, digest, size = await self._codecs.load(data, load)
        mask = None if rule is None else await self._mask(message, rule, size)
        controls = await self._controls.read(message.controls, nets, size, _pipeline_of(model).size_multiple)
        request = Request(
            model=model.id,
            image=image,
            size=size,
            prompt=DEFAULT_PROMPT if prompt is None else prompt,
            negative_prompt=negative_prompt,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seeds=seeds,
            deadline=deadline,
            scheduler=scheduler,
            preview_interval=interval,
            image_digest=digest,
            client=call.client,
            id=call.request_id,
            follow=previews,
            loras=loras,
            cache_scope=call.client if call.authenticated and not self._config.share_caches else "",
            mask=mask,
            true_cfg_scale=true_cfg,
            references=tuple(reference.image for reference in references),
            reference_digests=tuple(reference.digest for reference in references),
            fidelity=fidelity,
            controls=controls,
            image_prompts=image_prompts,
        )
        plan = await self._plan(_pipeline_of(model), request)
        if not (previews and images.holds(size, "JPEG")):  # as previews are sent
            request = replace(request, preview_interval=0)
        elif reading.preview_count is not None:
            request = replace(request, preview_interval=_interval(reading.preview_count, plan.step_count))
        return ParsedRequest(
            replace(model, pipeline=None),
            _pipeline_of(model).engine,
            request,
            file_format,
            quality,
            arrival,
            message.output.as_asset,
            asset_of(message.image),
            asset_of(message.mask),
            rule,
            fields.used(message),
            tuple(map(asset_of, message.reference_images)),
            tuple(asset_of(control.image) for control in message.controls),
            tuple(tuple(map(asset_of, prompt.images)) for prompt in message.image_prompts),
        )

    async def _image_prompts(
        self, message: pb.TransformRequest, model: Model, companions: CompanionLease | None
    ) -> tuple[ImagePromptUse, ...]:
        """Finds the adapters of the message's image prompts, loads their image encoders and reads their images."""
        if not message.image_prompts:
            return ()
        assert companions is not None, "there is a lease for companions"
        adapters = await self._threads.run(find_adapters, message.image_prompts, self._adapters, model)
        encoders = await companions.encoders([found.adapter for found in adapters])
        return await self._prompts.read(message.image_prompts, adapters, encoders)

    async def _plan(self, pipeline: Pipeline, request: Request) -> Plan:
        """Plans a request, as the engine will again. The slow part of it is cached here, off the engine's and the event loop's
        threads. If one like it was planned before, there is no slow part, and no thread that would wake the event loop."""
        planned = self._planned.setdefault(pipeline, set())
        numbers = request.scheduler, request.num_inference_steps, request.strength, request.fidelity
        kind = *numbers, request.size, request.image.size, tuple(image.size for image in request.references)
        if kind in planned and not (request.loras or request.controls or request.image_prompts):
            return pipeline.plan(request)
        plan = await self._threads.run(pipeline.plan, request)
        if len(planned) >= _MOST_PLANNED:
            planned.clear()
        planned.add(kind)
        return plan

    async def _mask(self, message: pb.TransformRequest, rule: images.MaskRule, size: tuple[int, int]) -> Mask:
        """Reads and decodes the message's mask for a result of `size`."""
        field, data = await self._sources.read(message.mask, "mask")
        with held(self._codecs.memory, message.mask, data):
            image, digest = await self._codecs.load_mask(data, LoadMask(field, self._config.image_limits, size, rule))
        return Mask(image, digest, not message.HasField("mask_paste") or message.mask_paste)

    def _size_rule(self, message: pb.TransformRequest, model: Model, file_format: images.WriteFormat) -> images.SizeRule:
        """The message's rule for the result's size. Raises InvalidField if no source could satisfy it."""
        pipeline = _pipeline_of(model)
        rule = _fit(message, pipeline) if message.HasField("fit") else _sides(message)
        if not pipeline.source_rule.sets_size:
            images.check_side(images.least_size(rule, pipeline.size_multiple, self._config.image_limits), file_format)
        return rule


def _interval(count: int, steps: int) -> int:
    """The steps between at most `count` previews of a request with so many steps, of which the last has none; 0 for none."""
    return max(1, math.ceil(steps / (count + 1))) if count else 0


def _sides(message: pb.TransformRequest) -> images.SizeRule:
    width = message.width if message.HasField("width") else None
    height = message.height if message.HasField("height") else None
    return images.SizeRule(width, height)


def _fit(message: pb.TransformRequest, pipeline: Pipeline) -> images.SizeRule:
    for side in ("width", "height"):
        _check("fit", not message.HasField(side), f"fit and {side} both set the size: set only one of them")
    rule = message.fit.WhichOneof("rule")
    _check("fit", rule is not None, "fit has no known rule: set longest_side or native_area")
    if rule == "longest_side":
        return images.SizeRule(longest_side=message.fit.longest_side)
    width, height = pipeline.native_size
    return images.SizeRule(area=width * height)


def _seeds(message: pb.TransformRequest, count: int) -> tuple[int, ...]:
    """The seeds of `count` images."""
    first = message.seed if message.HasField("seed") else -1
    _check("seed", first >= -1, f"{first} is neither -1 (random) nor in 0 to 2^63 - 1")
    last = _MAX_SEED - count + 1
    together = f"{first} is too large for image_count {count}: the last image's seed would exceed 2^63 - 1"
    _check("seed", first <= last, f"{together}. For {count} images, the maximum seed is {last}")
    if first == -1:
        first = secrets.randbelow(2**32)
    return tuple(range(first, first + count))


def _true_cfg(message: pb.TransformRequest, fields: RequestFields) -> float | None:
    """The request's true_cfg_scale, None if the model takes none. It and the negative prompt need each other."""
    if "true_cfg_scale" not in fields:
        return None
    scale, is_set = fields.number(message, "true_cfg_scale"), message.HasField("true_cfg_scale")
    needs = "it leads away from a negative prompt: set negative_prompt too, which may be empty"
    _check("true_cfg_scale", not is_set or scale <= 1 or message.HasField("negative_prompt"), needs)
    unused = f"this model uses it only with a true_cfg_scale above 1, and its own is {scale:g}: set true_cfg_scale too"
    _check("negative_prompt", is_set or scale > 1 or not message.negative_prompt, unused)
    return scale


def _scheduler(asked: str, model: Model) -> str | None:
    """The requested scheduler in the pipeline's spelling; None for the model's default."""
    if not asked:
        return None
    known = {name.casefold(): name for name in _pipeline_of(model).schedulers}
    hint = (
        f"known are {', '.join(known.values())}" if known else "this model supports only its own scheduler: leave the field empty"
    )
    _check("scheduler", asked.casefold() in known, f"model '{model.id}' does not support this scheduler; {hint}")
    return known[asked.casefold()]


def _file_format(message: pb.TransformRequest) -> images.WriteFormat:
    _check("output.format", message.output.format in _FORMATS, f"{message.output.format} is not a known format")
    return _FORMATS[message.output.format]


def _check(field: str, holds: bool, description: str) -> None:
    if not holds:
        raise InvalidField(field, description)


def _pipeline_of(model: Model) -> Pipeline:
    assert model.pipeline is not None, "resolved models are loaded"
    return model.pipeline
