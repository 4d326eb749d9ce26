"""One attempt at a bundle: reference images from diffusers, the graphs, the rest of the model, and the image comparison."""

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.image_prompts import PROMPTS_ONLY
from img2img_server.bundle.manifest import (
    Component,
    ImageParity,
    Manifest,
    Reference,
    Source,
    Verification,
    WeightFormat,
    is_text_encoder,
    limits_of,
)
from img2img_server.bundle.speedups import NONE, Speedups
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.fp32_compute import computing_in_fp32
from img2img_server.runtime.schedulers import registry
from PIL import Image

from img2img_export.component import STATIC, Converter, Made, release_memory
from img2img_export.convert import models, torch_bundle
from img2img_export.convert.making import STATIC_GRAPHS
from img2img_export.convert.models import Loader, Plan
from img2img_export.errors import ExportError, first_line, may_fall_back
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS, Layout
from img2img_export.report import SHEET
from img2img_export.verify import images
from img2img_export.verify import latent_preview as previews
from img2img_export.verify.images import ImageCase, make_sheet
from img2img_export.verify.latent_preview import LatentPreview
from img2img_export.verify.recorded_inputs import Calls, Recorder

_log = logging.getLogger(__name__)

CONTROLNETS = ("stable-diffusion", "stable-diffusion-xl")
"""The families whose requests may have ControlNets, and image prompts."""
CONTROL_GRAPHS = (*CONTROLNETS, *PROMPTS_ONLY)
"""The families that have a control graph."""
CONTROLS_IF_ASKED = ("flux",)
"""Families that have one if the options ask for it: a transformer takes long to trace and to compare."""
_AIM_DB = 25.0
"""PSNR of the worst image below which a graph in static int8 is quantized less. The limit is lower."""
_REFERENCES = "verification/references"
"""Folder in the bundle for the reference images and their sources."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A bundle before its manifest is written: the manifest's contents, including the verification result."""

    plan: Plan
    components: tuple[Component, ...]
    verification: Verification
    latent_preview: LatentPreview = ()
    size_multiple: int | None = None
    references: tuple[Reference, ...] = ()
    speedups: Speedups = NONE
    weight_format: WeightFormat = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The results of diffusers' pipeline: the requests, the images, and the recorded inputs of the parts that become graphs."""

    cases: tuple[ImageCase, ...]
    references: tuple[Image.Image, ...]
    calls: dict[str, Calls]
    latent_preview: LatentPreview


def make(source: Path, layout: Layout, options: ExportOptions, bundle: Path, progress: Progress) -> Attempt:
    """Fills the directory `bundle` from the checkpoint in `source`: with graphs if possible, else with PyTorch and the reason.

    Falls back to the next plan if images differ from those of diffusers or a library fails. Raises ExportError if the model does
    not run, or if the requested backend is not possible.
    """
    loader = Loader(source, layout, options.variant)
    *plans, last = models.plans_for(layout, options.backend)
    family = (*plans, last)[0].family
    if options.control_graphs and family not in (*CONTROLNETS, *CONTROLS_IF_ASKED):
        raise ExportError(f"--control-graphs: there are no ControlNets for models of the family {family}")
    drawn = draw(loader, plans[0] if plans else last, options, progress)
    release_memory()
    reason: str | None = None
    for plan in plans:
        try:
            return _attempt(loader, plan, reason, drawn, options, bundle, progress)
        except ExportError as error:
            reason = str(error)
        except Exception as error:
            if not may_fall_back(error):
                raise
            _log.debug("the attempt with %s failed", plan.backend, exc_info=True)
            reason = f"{type(error).__name__}: {first_line(error)}"
        progress.stage(f"falling back from {plan.backend}: {reason}")
        shutil.rmtree(bundle)
        bundle.mkdir()
    try:
        return _attempt(loader, last, reason, drawn, options, bundle, progress)
    except ExportError:
        raise
    except Exception as error:
        if not may_fall_back(error):
            raise
        before = f"; before that: {reason}" if reason else ""
        raise ExportError(f"{last.backend}: {type(error).__name__}: {first_line(error)}{before}") from error


def _attempt(
    loader: Loader, plan: Plan, reason: str | None, drawn: Drawn, options: ExportOptions, bundle: Path, progress: Progress
) -> Attempt:
    """Carries out `plan` and verifies the result. `reason` is why the previous plan failed, or None."""
    plan = dataclasses.replace(plan, reason=reason or plan.reason)
    # Only families that the server steps take LoRAs per request, and only if the denoiser is a graph.
    lora_graphs = options.lora_graphs and plan.family != models.WHOLE and not set(DENOISERS).isdisjoint(plan.graphs)
    options = dataclasses.replace(options, lora_graphs=lora_graphs)
    has_controls = plan.family in (*CONTROL_GRAPHS, *(CONTROLS_IF_ASKED if options.control_graphs else ()))
    converter = Converter(loader, drawn.calls, options, bundle, progress, control_graphs=has_controls)
    made = {part.component.name: part for component in plan.graphs for part in converter.convert(component)}
    progress.stage("saving the rest of the pipeline" if plan.graphs else "saving the PyTorch pipeline")
    saved = _save_rest(converter, loader, plan, options, bundle)
    while True:
        release_memory()
        progress.stage("comparing images from the server's pipeline with the references")
        components = (*(part.component for part in made.values()), *saved)
        narrow = converter.weight_format
        attempt = Attempt(plan, components, measured(made), drawn.latent_preview, weight_format=narrow)
        compared, generated = images.compare_images(
            bundle, describe(attempt, options), drawn.cases, drawn.references, options.precision
        )
        worst = min(part.psnr_db for part in compared)
        enough = all(part.passed for part in compared) and (worst >= _AIM_DB or converter.is_strictest)
        if enough or not (again := converter.tighten()):
            judged = _judge(attempt, drawn.cases, drawn.references, compared, generated, options, bundle)
            return _with_speedups(judged, made, options, bundle, progress)
        progress.stage(f"the worst image has {worst:.1f} dB: quantizing less")
        graphs = [component for component in again if component in plan.graphs]
        made |= {part.component.name: part for component in graphs for part in converter.convert(component)}
        if not set(again) <= set(plan.graphs):
            saved = _save_rest(converter, loader, plan, options, bundle)


def _save_rest(converter: Converter, loader: Loader, plan: Plan, options: ExportOptions, bundle: Path) -> tuple[Component, ...]:
    """Saves the components that are not graphs, text encoders beside graphs in the converter's format of weights."""
    wanted: WeightFormat = converter.wanted_format if plan.graphs else ""
    saved = torch_bundle.save(_load(loader, options), plan.graphs, options.precision, bundle, wanted, options.group_size)
    for part in saved:
        if part.weight_format:
            converter.count_module(part.name)
    return tuple(
        dataclasses.replace(part, reason=converter.coarsening) if is_text_encoder(part.name) and plan.graphs else part
        for part in saved
    )


def _with_speedups(
    attempt: Attempt, made: Mapping[str, Made], options: ExportOptions, bundle: Path, progress: Progress
) -> Attempt:
    """The attempt with the measured speedups, if the options ask for them."""
    if not options.speedups:
        return attempt
    if attempt.plan.family == models.WHOLE:
        progress.stage("no speedups: the model runs as a whole")
        return attempt
    from img2img_export.verify.speedups import measure_speedups

    cost = min((part.light_cost for part in made.values()), default=1.0)
    # Emulated graphs take other times than those on a GPU.
    timed = options.precision in ("fp32", "int8")
    try:
        with images.loaded(bundle, describe(attempt, options), options.precision) as pipeline:
            return dataclasses.replace(attempt, speedups=measure_speedups(pipeline, cost, progress, timed))
    except InvalidField as error:
        progress.stage(f"no speedups: {error}")
        return attempt


def verify(
    attempt: Attempt, cases: Sequence[ImageCase], references: Sequence[Image.Image], options: ExportOptions, bundle: Path
) -> Attempt:
    """Runs the cases through the server's pipeline, saves the image sheet and the references, and returns the verified attempt.

    Raises ExportError if an image differs too much from its reference, unless `options.allow_unverified`.
    """
    compared, generated = images.compare_images(bundle, describe(attempt, options), cases, references, options.precision)
    return _judge(attempt, cases, references, compared, generated, options, bundle)


def _judge(
    attempt: Attempt,
    cases: Sequence[ImageCase],
    references: Sequence[Image.Image],
    compared: tuple[ImageParity, ...],
    generated: list[Image.Image],
    options: ExportOptions,
    bundle: Path,
) -> Attempt:
    """`verify` after the images were generated and compared."""
    reference = attempt.verification.reference
    problems = list(attempt.verification.problems)
    for part in compared:
        if not part.passed:
            problems.append(
                f"the image differs from {reference} ({part.case}): by {part.max_abs_error}/255, "
                f"PSNR {part.psnr_db:.1f} dB, SSIM {part.ssim:.3f}"
            )
    if problems and not options.allow_unverified:
        raise ExportError(problems[0])
    sheet = bundle / SHEET
    sheet.parent.mkdir()
    make_sheet(cases, references, generated, compared).save(sheet)
    allowed = limits_of(options.precision, attempt.weight_format)
    limits = {name: float(value) for name, value in dataclasses.asdict(allowed).items()}
    verification = dataclasses.replace(
        attempt.verification, passed=not problems, pictures=compared, problems=tuple(problems), limits=limits
    )
    return dataclasses.replace(attempt, verification=verification, references=_save_references(cases, references, bundle))


def describe(attempt: Attempt, options: ExportOptions) -> Manifest:
    """The manifest of an attempt, without the source and tools of the finished bundle. Its only files are the fused graphs, which
    the server's pipeline needs for the comparison of images."""
    return Manifest(
        source=Source(),
        pipeline_class=attempt.plan.pipeline_class,
        family=attempt.plan.family,
        backend=attempt.plan.backend,
        backend_reason=attempt.plan.reason,
        components=attempt.components,
        files={part.fused: "" for part in attempt.components if part.fused},
        tools={},
        verification=attempt.verification,
        latent_preview=attempt.latent_preview,
        precision=options.precision,
        size_multiple=attempt.size_multiple,
        references=attempt.references,
        speedups=attempt.speedups,
        weight_format=attempt.weight_format,
    )


def draw(loader: Loader, plan: Plan, options: ExportOptions, progress: Progress, ours: bool = True) -> Drawn:
    """Generates the references with diffusers in fp32, and fits the linear map for previews. Graphs that are not `ours` take no
    tokens, but what diffusers' classes take."""
    pipeline = _load(loader, options)
    cases = images.image_cases(pipeline, plan.family)
    progress.stage(f"generating {len(cases)} reference images with diffusers")
    with computing_in_fp32(*models.modules(pipeline).values()):
        # Static int8 needs the ranges of many calls.
        is_calibrated = options.precision == "int8" and not STATIC.isdisjoint(plan.graphs)
        with Recorder(pipeline, plan.graphs, STATIC_GRAPHS if is_calibrated else (), plan.tokens if ours else ()) as recorder:
            references = tuple(images.make_references(pipeline, cases))
            if is_calibrated:
                more = images.calibration_cases(pipeline, plan.family)
                progress.stage(f"generating {len(more)} more images to calibrate int8 with")
                images.make_references(pipeline, more)
        if plan.family == models.WHOLE:
            return Drawn(cases, references, recorder.calls, ())
        progress.stage("fitting previews")
        return Drawn(cases, references, recorder.calls, previews.fit(pipeline))


def _load(loader: Loader, options: ExportOptions) -> Any:
    """Loads the pipeline with the requested scheduler."""
    pipeline = loader.pipeline()
    if options.scheduler is not None:
        try:
            pipeline.scheduler = registry.make(options.scheduler, pipeline.scheduler)
        except KeyError:
            names = ", ".join(registry.FLOW_NAMES if registry.is_flow(pipeline.scheduler) else registry.NAMES)
            raise ExportError(f"--scheduler: this model cannot use '{options.scheduler}': use one of {names}") from None
    return pipeline


def measured(made: Mapping[str, Made]) -> Verification:
    """The measurements of the graphs."""
    return Verification(
        passed=False,
        components=tuple(parity for part in made.values() for parity in part.parities),
        problems=tuple(problem for part in made.values() for problem in part.problems),
    )


def _save_references(cases: Sequence[ImageCase], references: Sequence[Image.Image], bundle: Path) -> tuple[Reference, ...]:
    """Writes each case's source and reference image into `bundle` as PNG, and returns their manifest entries."""
    (bundle / _REFERENCES).mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (case, reference) in enumerate(zip(cases, references, strict=True), start=1):
        request = case.request
        # Cases of one size share a source.
        source = f"{_REFERENCES}/source-{request.image.width}x{request.image.height}.png"
        path = f"{_REFERENCES}/{number}.png"
        request.image.save(bundle / source, optimize=True)
        reference.save(bundle / path, optimize=True)
        entries.append(
            Reference(
                case=case.name,
                source=source,
                picture=path,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt or "",
                strength=request.strength,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                seed=request.seeds[0],
            )
        )
    return tuple(entries)
