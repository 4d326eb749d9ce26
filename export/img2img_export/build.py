"""The export from end to end: find, load, convert, verify, publish. Nothing is published that was not verified."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img_server.bundle import (
    Component,
    ComponentParity,
    Manifest,
    PictureParity,
    Verification,
    check_bundle,
    digest_files,
    list_files,
    read_manifest,
    write_manifest,
)
from img2img_server.errors import BundleError

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.source import Checkpoint, resolve
from img2img_export.staging import Staging, check_replaceable, stage

if TYPE_CHECKING:
    from img2img_export.models import Plan

Report = Callable[[str], None]
"""Is told each stage as it begins, in a few words."""

TOOLS = ("img2img", "diffusers", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "torch")
"""The distributions whose versions a bundle depends on: another version of any makes it out of date."""

_TRACES = ("_name_or_path", "name_or_path")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A bundle in its place. `up_to_date` says that it was there before, from the same source, options and tools."""

    path: Path
    manifest: Manifest
    up_to_date: bool

    def summary(self) -> str:
        """One line for a person: where it is, what it is, how large, and the worst that was measured."""
        manifest = self.manifest
        size = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        what = f"{manifest.family} on {manifest.backend}"
        if manifest.backend_reason:
            what += f" ({manifest.backend_reason})"
        drawn = manifest.verification.pictures
        worst = f"pictures within {max(part.max_abs_error for part in drawn)}/255 of diffusers'"
        if compared := manifest.verification.components:
            part = max(compared, key=lambda part: part.relative_error)
            worst += f", graphs within {part.relative_error:.1e} of PyTorch (worst: {part.component})"
        state = "up to date" if self.up_to_date else "exported"
        return f"{state}: {self.path}, {what}, {size / 1e6:.0f} MB, {worst}"


def export_model(options: ExportOptions, report: Report = lambda line: None) -> Outcome:
    """Exports and verifies `options.source`, and puts the bundle at `options.output`.

    Raises ExportError where it is refused or fails; the output is then as it was before.
    """
    output = options.output.absolute()
    check_replaceable(output, force=True)
    checkpoint = resolve(options, report)
    if (manifest := _find_up_to_date(output, checkpoint, options)) is not None:
        return Outcome(output, manifest, up_to_date=True)
    check_replaceable(output, options.force)
    with stage(output) as staging:
        report(f"loading {checkpoint.layout.pipeline_class}, {checkpoint.size / 1e6:.0f} MB")
        manifest = _build(checkpoint, options, staging, report)
        check_replaceable(output, options.force)
        staging.publish()
    return Outcome(output, manifest, up_to_date=False)


def tool_versions() -> dict[str, str]:
    """The versions of TOOLS, read without importing them."""
    return {name: metadata.version(name) for name in TOOLS}


def _find_up_to_date(output: Path, checkpoint: Checkpoint, options: ExportOptions) -> Manifest | None:
    """The manifest of the bundle at `output`, where a new export would make the same bundle again."""
    try:
        manifest = read_manifest(output)
        if (manifest.source, manifest.options, manifest.tools) != (checkpoint.source, _recorded(options), tool_versions()):
            return None
        check_bundle(output, manifest)
    except BundleError:
        return None
    return manifest


def _recorded(options: ExportOptions) -> dict[str, str]:
    """What shapes a bundle and is not part of its source. Bundles from before there were previews are out of date by it."""
    return {"backend": options.backend, "previews": "linear, with statistics"}


def _build(checkpoint: Checkpoint, options: ExportOptions, staging: Staging, report: Report) -> Manifest:
    """Fills the staging's bundle, verifies it, and writes its manifest last."""
    from img2img_export import models, pictures

    checkpoint.link_into(staging.source)

    def load() -> Any:
        return models.load(staging.source, checkpoint.layout, options.variant)

    pipeline = load()
    plan = models.plan(pipeline, options.backend)
    cases = pictures.picture_cases(pipeline, plan.family)
    report(f"drawing {len(cases)} reference pictures with diffusers")
    references = pictures.draw_references(pipeline, cases)
    latent_preview = _fit_preview(pipeline, plan, report)
    pipeline, plan, components = _convert(pipeline, load, plan, options, staging.bundle, report)
    _tidy(staging.bundle)
    compared = _compare(pipeline, plan, staging.bundle, report)
    del pipeline
    manifest = Manifest(
        source=checkpoint.source,
        pipeline_class=plan.pipeline_class,
        family=plan.family,
        backend=plan.backend,
        backend_reason=plan.reason,
        components=components,
        files=digest_files(staging.bundle, list_files(staging.bundle)),
        tools=tool_versions(),
        options=_recorded(options),
        verification=Verification(passed=False, components=compared),
        latent_preview=latent_preview,
    )
    report("comparing pictures drawn by the server's pipeline")
    drawn = pictures.compare_pictures(staging.bundle, manifest, cases, references)
    _check_pictures(drawn)
    manifest = dataclasses.replace(manifest, verification=Verification(True, compared, drawn))
    write_manifest(staging.bundle, manifest)
    return manifest


def _fit_preview(pipeline: Any, plan: "Plan", report: Report) -> tuple[tuple[float, ...], ...]:
    """The map that previews are drawn with, () where the pipeline runs whole. To be called before optimum changes the VAE."""
    from img2img_export import latent_preview, models

    if plan.family == models.WHOLE:
        return ()
    report("fitting previews")
    return latent_preview.fit(pipeline)


def _convert(
    pipeline: Any, load: Callable[[], Any], plan: "Plan", options: ExportOptions, bundle: Path, report: Report
) -> tuple[Any, "Plan", tuple[Component, ...]]:
    """Makes graphs where the plan says so, else a PyTorch bundle.

    Where graphs failed, the plan comes back with the reason, and the pipeline loaded anew: optimum changes what it is given.
    """
    from img2img_export import graphs, torch_bundle

    if plan.backend == "onnx":
        report("making ONNX graphs")
        try:
            graphs.export_graphs(pipeline, bundle)
            return pipeline, plan, graphs.describe_graphs(bundle)
        except ExportError as error:
            if options.backend == "onnx":
                raise
            report(f"falling back to torch: {error}")
            plan = dataclasses.replace(plan, backend="torch", reason=str(error))
        torch_bundle.clear(bundle)
        pipeline = load()
    report("saving the PyTorch pipeline")
    return pipeline, plan, torch_bundle.save(pipeline, bundle)


def _compare(pipeline: Any, plan: "Plan", bundle: Path, report: Report) -> tuple[ComponentParity, ...]:
    """Compares the graphs, if there are any, with the pipeline. Raises ExportError for the worst that did not pass."""
    if plan.backend == "torch":
        return ()
    from img2img_export import parity

    report("comparing each graph with PyTorch")
    compared = parity.compare_components(pipeline, bundle)
    for part in sorted(compared, key=lambda part: -part.relative_error):
        if not part.passed:
            raise ExportError(
                f"{part.component} differs from PyTorch ({part.case}): relative error {part.relative_error:.2e}, "
                f"greatest {part.max_abs_error:.2e}; --backend torch would serve PyTorch's own"
            )
    return compared


def _check_pictures(drawn: tuple[PictureParity, ...]) -> None:
    for part in drawn:
        if not part.passed:
            raise ExportError(
                f"the picture differs from diffusers' ({part.case}): by {part.max_abs_error}/255, PSNR {part.psnr_db:.1f} dB"
            )


def _tidy(bundle: Path) -> None:
    """Takes the paths of this machine out of the configurations, and makes every file readable by the server's user."""
    for path in sorted(bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.suffix != ".json" or path.is_dir():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and any(key in data for key in _TRACES):
            kept = {key: value for key, value in data.items() if key not in _TRACES}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    bundle.chmod(0o755)
