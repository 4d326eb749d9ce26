"""A bundle in the making: what diffusers draws, the graphs, the rest of the model, and the comparison of finished images."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2img_server.bundle.limits import LIMITS
from img2img_server.bundle.manifest import Component, Manifest, Reference, Source, Verification
from img2img_server.runtime.schedulers import registry
from PIL import Image

from img2img_export.component import Converter, give_back
from img2img_export.convert import models, torch_bundle
from img2img_export.convert.fp32_compute import computing_in_fp32
from img2img_export.convert.models import Loader, Plan
from img2img_export.errors import ExportError, first_line, may_fall_back
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import Layout
from img2img_export.report import SHEET
from img2img_export.verify import images as pictures
from img2img_export.verify import latent_preview as previews
from img2img_export.verify.images import ImageCase, make_sheet
from img2img_export.verify.latent_preview import LatentPreview
from img2img_export.verify.recorded_inputs import Calls, Recorder

_log = logging.getLogger(__name__)

_REFERENCES = "verification/references"
"""Below the bundle: the reference images and their sources."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A bundle but for its manifest's file: what that says of it, with the verdict."""

    plan: Plan
    components: tuple[Component, ...]
    verification: Verification
    latent_preview: LatentPreview = ()
    size_multiple: int | None = None
    references: tuple[Reference, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """What diffusers drew, and with what: requests, images, what it gave to the parts that are to be graphs."""

    cases: tuple[ImageCase, ...]
    references: tuple[Image.Image, ...]
    calls: dict[str, Calls]
    latent_preview: LatentPreview


def make(source: Path, layout: Layout, options: ExportOptions, bundle: Path, progress: Progress) -> Attempt:
    """Fills the directory `bundle` from the checkpoint in `source`: with graphs where it can, else with PyTorch and the reason.

    What does not draw what diffusers draws counts as a graph that cannot be made, and so does any failure of the libraries that
    make it. Raises ExportError if the model does not run, or the backend that was asked for cannot be had.
    """
    loader = Loader(source, layout, options.variant)
    *plans, last = models.plans_for(layout, options.backend)
    drawn = draw(loader, plans[0] if plans else last, options, progress)
    give_back()
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
    """Makes what `plan` says, and verifies it. `reason` says why it is not the plan before it."""
    plan = dataclasses.replace(plan, reason=reason or plan.reason)
    components, measured = _convert(loader, plan, drawn.calls, options, bundle, progress)
    give_back()
    progress.stage("comparing pictures drawn by the server's pipeline")
    draft = Attempt(plan, components, measured, drawn.latent_preview)
    return verify(draft, drawn.cases, drawn.references, options, bundle)


def verify(
    draft: Attempt, cases: Sequence[ImageCase], references: Sequence[Image.Image], options: ExportOptions, bundle: Path
) -> Attempt:
    """The draft with the verdict: draws the cases through the server's pipeline, and keeps a sheet and the references.

    Raises ExportError where an image is too far from the reference, unless the bundle may be published unverified.
    """
    manifest = describe(draft, options)
    drawn, images = pictures.compare_pictures(bundle, manifest, cases, references, options.precision)
    reference = draft.verification.reference
    problems = list(draft.verification.problems)
    for part in drawn:
        if not part.passed:
            problems.append(
                f"the picture differs from {reference} ({part.case}): by {part.max_abs_error}/255, "
                f"PSNR {part.psnr_db:.1f} dB, SSIM {part.ssim:.3f}"
            )
    if problems and not options.allow_unverified:
        raise ExportError(problems[0])
    sheet = bundle / SHEET
    sheet.parent.mkdir()
    make_sheet(cases, references, images, drawn).save(sheet)
    limits = {name: float(value) for name, value in dataclasses.asdict(LIMITS[options.precision]).items()}
    verification = dataclasses.replace(
        draft.verification, passed=not problems, pictures=drawn, problems=tuple(problems), limits=limits
    )
    return dataclasses.replace(draft, verification=verification, references=_save_references(cases, references, bundle))


def describe(draft: Attempt, options: ExportOptions) -> Manifest:
    """The manifest of a draft, without what only the finished bundle has: its source, files and tools."""
    return Manifest(
        source=Source(),
        pipeline_class=draft.plan.pipeline_class,
        family=draft.plan.family,
        backend=draft.plan.backend,
        backend_reason=draft.plan.reason,
        components=draft.components,
        files={},
        tools={},
        verification=draft.verification,
        latent_preview=draft.latent_preview,
        precision=options.precision,
        size_multiple=draft.size_multiple,
        references=draft.references,
    )


def draw(loader: Loader, plan: Plan, options: ExportOptions, progress: Progress) -> Drawn:
    """Draws with diffusers in fp32, and fits the map to draw previews with."""
    pipeline = _load(loader, options)
    cases = pictures.picture_cases(pipeline, plan.family)
    progress.stage(f"drawing {len(cases)} reference pictures with diffusers")
    with computing_in_fp32(*models.modules(pipeline).values()):
        with Recorder(pipeline, plan.graphs) as recorder:
            references = tuple(pictures.draw_references(pipeline, cases))
        if plan.family == models.WHOLE:
            return Drawn(cases, references, recorder.calls, ())
        progress.stage("fitting previews")
        return Drawn(cases, references, recorder.calls, previews.fit(pipeline))


def _load(loader: Loader, options: ExportOptions) -> Any:
    """The pipeline with the scheduler that was asked for."""
    pipeline = loader.pipeline()
    if options.scheduler is not None:
        pipeline.scheduler = registry.make(options.scheduler, pipeline.scheduler)
    return pipeline


def _convert(
    loader: Loader, plan: Plan, calls: dict[str, Calls], options: ExportOptions, bundle: Path, progress: Progress
) -> tuple[tuple[Component, ...], Verification]:
    """Makes the graphs of `plan`, and saves the rest of the model."""
    converter = Converter(loader, calls, options, bundle, progress)
    made = [part for component in plan.graphs for part in converter.convert(component)]
    progress.stage("saving the rest of the pipeline" if plan.graphs else "saving the PyTorch pipeline")
    saved = torch_bundle.save(_load(loader, options), plan.graphs, options.precision, bundle)
    verification = Verification(
        passed=False,
        components=tuple(parity for part in made for parity in part.parities),
        problems=tuple(problem for part in made for problem in part.problems),
    )
    return (*(part.component for part in made), *saved), verification


def _save_references(cases: Sequence[ImageCase], pictures: Sequence[Image.Image], bundle: Path) -> tuple[Reference, ...]:
    """Writes each case's source and image into `bundle` as PNG, and gives what the manifest says of them."""
    (bundle / _REFERENCES).mkdir(parents=True, exist_ok=True)
    references = []
    for number, (case, picture) in enumerate(zip(cases, pictures, strict=True), start=1):
        request = case.request
        # Cases of one size have the same source.
        source = f"{_REFERENCES}/source-{request.image.width}x{request.image.height}.png"
        drawn = f"{_REFERENCES}/{number}.png"
        request.image.save(bundle / source, optimize=True)
        picture.save(bundle / drawn, optimize=True)
        references.append(
            Reference(
                case=case.name,
                source=source,
                picture=drawn,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt or "",
                strength=request.strength,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                seed=request.seeds[0],
            )
        )
    return tuple(references)
