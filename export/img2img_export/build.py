"""The export from end to end: find, load, convert, verify, publish. Unverified bundles are published only on request."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from img2img_server.bundle.manifest import Manifest, list_files, read_manifest, write_manifest
from img2img_server.errors import BundleError
from img2img_server.support import distribution

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.publish.staging import Staging, check_replaceable, stage
from img2img_export.read import lora
from img2img_export.read.digests import Digests
from img2img_export.read.source import Checkpoint, resolve

TOOLS = ("diffusers", "transformers", "optimum", "onnx", "onnxruntime", "torch")
"""Distributions, besides our own, that a bundle depends on: a bundle is out of date if any of their versions changes."""

_TRACES = ("_name_or_path", "name_or_path")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A published bundle. `up_to_date`: it existed already, from the same source, options and tool versions."""

    path: Path
    manifest: Manifest
    up_to_date: bool

    def summary(self) -> str:
        """One line of text: path, kind, size and the largest measured differences."""
        manifest = self.manifest
        size = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        what = f"{manifest.family} on {manifest.backend} in {manifest.precision}"
        if manifest.weight_format:
            what += f" with weights in {manifest.weight_format}"
        if manifest.backend_reason:
            what += f" ({manifest.backend_reason})"
        found = []
        if drawn := manifest.verification.pictures:
            images = f"images within {max(part.max_abs_error for part in drawn)}/255 of {manifest.verification.reference}"
            least = (
                f" (PSNR at least {min(part.psnr_db for part in drawn):.1f} dB)"
                if manifest.precision != "fp32" or manifest.weight_format
                else ""
            )
            found.append(images + least)
        if compared := manifest.verification.components:
            part = max(compared, key=lambda part: part.relative_error)
            found.append(f"graphs within {part.relative_error:.1e} (worst: {part.component})")
        worst = ", ".join(found)
        if not manifest.verification.passed:
            worst += f"; NOT VERIFIED: {manifest.verification.problems[0]}"
        state = "up to date" if self.up_to_date else "exported"
        return f"{state}: {self.path}, {what}, {size / 1e6:.0f} MB, {worst}"


def export_model(options: ExportOptions, progress: Progress | None = None) -> Outcome:
    """Exports and verifies `options.source`, and publishes the bundle at `options.output`.

    Raises ExportError if the source is refused or the export fails; the output is then unchanged.
    """
    progress = progress or Progress()
    output = options.output.absolute()
    check_replaceable(output, force=True)
    checkpoint = resolve(options, progress)
    check_weight_format(options, checkpoint.kind)
    digests = Digests()
    if (manifest := _find_up_to_date(output, checkpoint, options, digests, progress)) is not None:
        return Outcome(output, manifest, up_to_date=True)
    check_replaceable(output, options.force)
    with stage(output) as staging:
        progress.stage(f"loading {checkpoint.layout.pipeline_class}, {checkpoint.size / 1e6:.0f} MB")
        manifest = _build(checkpoint, options, staging, digests, progress)
        check_replaceable(output, options.force)
        staging.publish()
    for name, digest in manifest.files.items():
        digests.remember(output / name, digest)
    digests.save()
    return Outcome(output, manifest, up_to_date=False)


def check_weight_format(options: ExportOptions, kind: str) -> None:
    """Raises ExportError if weights cannot be stored in the requested format. `kind` is the checkpoint's."""
    if not options.weight_format:
        return
    if options.precision == "int8":
        raise ExportError("--weight-format is for weights of graphs that compute in fp32, fp16 or bf16, not --precision int8")
    if kind in ("onnx", "companion"):
        what = "a single component" if kind == "companion" else "a directory of graphs"
        raise ExportError(f"--weight-format applies to transformers and text encoders, and {options.source} is {what}")


def tool_versions() -> dict[str, str]:
    """The versions of our own distribution, as "img2img", and of TOOLS, read without importing them."""
    return {"img2img": distribution.version()} | {name: metadata.version(name) for name in TOOLS}


def _find_up_to_date(
    output: Path, checkpoint: Checkpoint, options: ExportOptions, digests: Digests, progress: Progress
) -> Manifest | None:
    """The manifest of the bundle at `output` if a new export would produce the same bundle, else None."""
    try:
        manifest = read_manifest(output)
    except BundleError:
        return None
    wanted = (checkpoint.source, _recorded(options), tool_versions(), lora.records(options.loras))
    if wanted != (manifest.source, manifest.options, manifest.tools, manifest.loras):
        return None
    if set(list_files(output)) != set(manifest.files):
        return None
    found = digests.digest_files(output, manifest.files, progress)
    digests.save()
    return manifest if found == manifest.files else None


def _recorded(options: ExportOptions) -> dict[str, str]:
    """The options that determine a bundle, besides its source. `made` is the exporter's own version: others are out of date."""
    recorded = {"backend": options.backend, "precision": options.precision, "made": "7"}
    if options.precision == "int8":
        recorded["int8"] = "static"
    if options.scheduler is not None:
        recorded["scheduler"] = options.scheduler
    if options.reference is not None:
        recorded["reference"] = options.reference
    if options.allow_unverified:
        recorded["allow_unverified"] = "yes"
    if not options.lora_graphs:
        recorded["lora_graphs"] = "no"
    if options.control_graphs:
        recorded["control_graphs"] = "yes"
    if options.speedups:
        recorded["speedups"] = "yes"
    if options.weight_format:
        recorded |= {"weight_format": options.weight_format, "group_size": str(options.group_size)}
    return recorded


def _build(checkpoint: Checkpoint, options: ExportOptions, staging: Staging, digests: Digests, progress: Progress) -> Manifest:
    """Builds and verifies the bundle in the staging directory, and writes its manifest last."""
    from img2img_export import attempts
    from img2img_export.read.source import fill_tree

    layout, loras = fill_tree(checkpoint, options, staging.source, progress)
    if checkpoint.kind == "onnx":
        from img2img_export import adoption

        attempt = adoption.adopt(staging.source, layout, options, staging.bundle, progress)
    elif checkpoint.kind == "companion":
        from img2img_export import companion

        attempt = companion.make(staging.source, layout, options, staging.bundle, progress)
    else:
        attempt = attempts.make(staging.source, layout, options, staging.bundle, progress)
    _tidy(staging.bundle)
    manifest = dataclasses.replace(
        attempts.describe(attempt, options),
        source=checkpoint.source,
        files=digests.digest_files(staging.bundle, list_files(staging.bundle), progress),
        tools=tool_versions(),
        options=_recorded(options),
        loras=loras,
    )
    write_manifest(staging.bundle, manifest)
    return manifest


def _tidy(bundle: Path) -> None:
    """Removes local paths from the configurations, and makes every file readable by the server's user."""
    for path in sorted(bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.suffix != ".json" or path.is_dir():
            continue
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and any(key in data for key in _TRACES):
            kept = {key: value for key, value in data.items() if key not in _TRACES}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    bundle.chmod(0o755)
