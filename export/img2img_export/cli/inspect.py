"""`img2img inspect BUNDLE`: shows a bundle's contents, checks it against its checksums, and prints its verification results.

Needs the base installation only (neither torch nor ONNX Runtime), so a bundle can be inspected anywhere.
"""

import argparse
import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.manifest import ComponentParity, Manifest, list_files, numbers_in_words, read_manifest
from img2img_server.bundle.speedups import Speedups
from img2img_server.errors import BundleError

from img2img_export.cli.terminal import as_json, choose, quantity
from img2img_export.errors import ExportError
from img2img_export.progress import Advance, Progress
from img2img_export.report import FAILED, SHEET, clean, decibels, open_console, print_facts, print_line, print_table, verdict

if TYPE_CHECKING:
    from rich.console import Console

_CHUNK = 1 << 22
_SHOWN = 3
_GRAPH_COLUMNS = ("component", "graph", ">cases", ">greatest difference", ">relative error", "")
_SPEEDUP_COLUMNS = ("setting", ">less work", ">faster", ">PSNR", ">SSIM")
_IMAGE_COLUMNS = ("case", ">PSNR", ">SSIM", ">greatest difference", "")

_EPILOG = """\
examples:
  img2img inspect models/my-model
  img2img inspect models/my-model --sheet sheet.png
  img2img inspect models/my-model --json --no-checksums

The image sheet shows every image generated to verify the bundle: the source, the image from diffusers, the image from the
bundle, and their difference. Exit status: 0 verified and intact, 1 not verified, damaged or no bundle, 2 wrong arguments.
"""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection. `checked`: checksums were verified. `damages` has one message per damaged file.

    `strangers` are files that the manifest does not list (harmless). `sheet` is None without an image sheet.
    """

    path: Path
    manifest: Manifest
    bytes: int
    checked: bool
    damages: tuple[str, ...]
    strangers: tuple[str, ...]
    sheet: Path | None

    @property
    def passed(self) -> bool:
        """Whether the bundle was verified and no damage was found."""
        return self.manifest.verification.passed and not self.damages


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the directory of a bundle")
    parser.add_argument("--json", action="store_true", help="print everything, including the manifest, as one JSON object")
    parser.add_argument("--sheet", metavar="FILE", type=Path, help="copy the image sheet (a PNG) to FILE")
    parser.add_argument(
        "--no-checksums", action="store_true", help="skip the checksums: faster, but does not detect changed files"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the report. Returns the exit status: 0 verified and intact, 1 otherwise."""
    # With --json the report is the only output; otherwise progress goes to stderr, if that is a terminal.
    progress = choose(False, sys.stderr) if sys.stderr.isatty() and not arguments.json else Progress()
    try:
        found = inspect(arguments.bundle, not arguments.no_checksums, progress)
        if arguments.sheet is not None:
            copy_sheet(found, arguments.sheet)
    except (BundleError, ExportError, OSError) as error:
        print(f"img2img inspect: {clean(str(error))}", file=sys.stderr)
        return 1
    if arguments.json:
        print(as_json({**dataclasses.asdict(found), "passed": found.passed}))
    else:
        show(found, open_console(sys.stdout))
    return 0 if found.passed else 1


def inspect(bundle: Path, checksums: bool, progress: Progress) -> Inspection:
    """Inspects a bundle. Raises BundleError if there is none or its manifest is damaged."""
    manifest = read_manifest(bundle)
    present = list_files(bundle)
    sheet = bundle / SHEET
    return Inspection(
        path=bundle,
        manifest=manifest,
        bytes=sum((bundle / name).stat().st_size for name in present),
        checked=checksums,
        damages=tuple(find_damages(bundle, manifest, checksums, progress)),
        strangers=tuple(name for name in present if name not in manifest.files),
        sheet=sheet if sheet.is_file() else None,
    )


def find_damages(bundle: Path, manifest: Manifest, checksums: bool, progress: Progress) -> list[str]:
    """A message per file that differs from the manifest; without `checksums`, only for files that are missing or outside."""
    root, damages, present = bundle.resolve(), [], []
    for name in manifest.files:
        path = bundle / name
        if not path.resolve().is_relative_to(root):
            damages.append(f"{name} lies outside the bundle")
        elif not path.is_file():
            damages.append(f"{name} is missing")
        else:
            present.append(name)
    if not checksums:
        return damages
    with progress.task("checksums", sum((bundle / name).stat().st_size for name in present)) as advance:
        differ = [name for name in present if _sha256(bundle / name, advance) != manifest.files[name]]
    return damages + [f"{name} has changed since it was verified: its SHA-256 differs" for name in differ]


def copy_sheet(found: Inspection, target: Path) -> None:
    """Copies the image sheet to `target`. Raises ExportError if the bundle has none."""
    if found.sheet is None:
        raise ExportError(f"{found.path} has no image sheet")
    shutil.copyfile(found.sheet, target)


def show(found: Inspection, console: "Console") -> None:
    """Prints the report as text."""
    manifest = found.manifest
    state = "verified" if manifest.verification.passed else "NOT VERIFIED"
    intact = "DAMAGED" if found.damages else "intact" if found.checked else "checksums not verified"
    print_line(console, f"{found.path}: {state}, {intact}")
    print_facts(console, _facts(found))
    columns = ("component", "becomes", "precision", "opset", ">weights", "fused graph", "LoRA graph", "")
    rows = (
        (
            part.name,
            {"onnx": "ONNX graph", "torch": "PyTorch"}[part.backend],
            part.numbers,
            str(part.opset or ""),
            quantity(part.bytes) if part.bytes else "",
            part.fused,
            part.lora,
            part.reason or _kept(part.kept_in_fp32),
        )
        for part in manifest.components
    )
    print_table(console, "components", columns, rows)
    if manifest.speedups.table:
        _show_speedups(manifest.speedups, console)
    _show_verification(found, console)


def _show_speedups(speedups: Speedups, console: "Console") -> None:
    title = (
        f"speedups, on {speedups.images} images of {speedups.least_steps} or more inference steps, guidance scale up to "
        f"{speedups.most_guidance:g}: work, time, PSNR and SSIM (worst and mean)"
    )
    rows = (
        (
            one.name,
            f"{one.times_faster:.2f} x",
            f"{one.cpu_times_faster:.2f} x" if one.cpu_times_faster else "",
            f"{decibels(one.psnr_db)} ({decibels(one.mean_psnr_db)})",
            f"{one.ssim:.4f} ({one.mean_ssim:.4f})",
        )
        for one in speedups.table
    )
    print_table(console, title, _SPEEDUP_COLUMNS, rows)


def _kept(layers: tuple[str, ...]) -> str:
    """The layers of an int8 graph that stayed in fp32."""
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return f"in fp32: {', '.join(layers[:_SHOWN])}{more}" if layers else ""


def _facts(found: Inspection) -> list[tuple[str, str]]:
    manifest, source = found.manifest, found.manifest.source
    origin = [source.repo_id or source.path or "", source.revision or "", source.variant and f"variant {source.variant}"]
    checksums = f"all {len(manifest.files)} files match" if found.checked else "not verified"
    return [
        ("source", ", ".join(filter(None, origin))),
        *((name, ", ".join(patterns)) for name, patterns in _patterns(manifest)),
        ("pipeline", f"{manifest.pipeline_class} (family {manifest.family})"),
        ("backend", manifest.backend + (f": {manifest.backend_reason}" if manifest.backend_reason else "")),
        ("precision", numbers_in_words(manifest.precision, manifest.weight_format)),
        *(("LoRA", f"{lora.name} at {lora.scale:g}") for lora in manifest.loras),
        ("image sizes", f"multiples of {manifest.size_multiple} pixels" if manifest.size_multiple else ""),
        ("size", f"{quantity(found.bytes)} in {len(manifest.files)} files"),
        ("checksums", "" if found.damages else checksums),
        *(("damage", damage) for damage in found.damages),
        ("not in manifest", ", ".join(found.strangers)),
        ("options", ", ".join(f"{name} {value}" for name, value in manifest.options.items())),
        ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]


def _patterns(manifest: Manifest) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("only files", manifest.source.allow_patterns), ("without files", manifest.source.ignore_patterns))


def _show_verification(found: Inspection, console: "Console") -> None:
    verification = found.manifest.verification
    if verification.components:
        print_table(console, f"graphs, compared with {verification.reference}", _GRAPH_COLUMNS, _worst(verification.components))
    if verification.pictures:
        rows = (
            (part.case, decibels(part.psnr_db), f"{part.ssim:.4f}", f"{part.max_abs_error}/255", verdict(part.passed))
            for part in verification.pictures
        )
        print_table(console, f"images, compared with {verification.reference}", _IMAGE_COLUMNS, rows)
    console.print()
    print_facts(
        console,
        [
            ("limits", ", ".join(f"{name} {value:g}" for name, value in verification.limits.items())),
            *((FAILED, problem) for problem in verification.problems),
            ("image sheet", str(found.sheet or "")),
        ],
    )


def _worst(parts: Iterable[ComponentParity]) -> list[tuple[str, ...]]:
    """One row per graph: the worst of its cases."""
    graphs: dict[tuple[str, str], list[ComponentParity]] = {}
    for part in parts:
        graphs.setdefault((part.component, part.graph), []).append(part)
    return [
        (
            component,
            graph,
            str(len(cases)),
            f"{max(part.max_abs_error for part in cases):.1e}",
            f"{max(part.relative_error for part in cases):.1e}",
            verdict(all(part.passed for part in cases)),
        )
        for (component, graph), cases in graphs.items()
    ]


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
