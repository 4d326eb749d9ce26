"""Generates the table of architectures in docs/export.md from the manifests of exported tiny models (tests/tiny_models.py).
Heavy imports are inside the functions."""

import argparse
import contextlib
import datetime
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from img2img_server.bundle.manifest import Manifest, read_manifest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "export.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->\n"

MODELS: dict[str, tuple[str, ...]] = {
    "Stable Diffusion 1": ("sd1",),
    "Stable Diffusion 2, Turbo": ("sd2",),
    "SDXL base, SDXL Turbo": ("sdxl",),
    "SDXL refiner": ("refiner",),
    "LCM": ("lcm",),
    "Stable Diffusion 1 and 2, inpainting": ("sd-inpaint",),
    "SDXL, inpainting": ("sdxl-inpaint",),
    "InstructPix2Pix": ("pix2pix",),
    "Stable Diffusion 3, with T5 and without": ("sd3", "sd3-no-t5"),
    "Flux, schnell and dev": ("flux", "flux-dev"),
    "Kandinsky 2.2": ("kandinsky22",),
    "Kandinsky 3": ("kandinsky3",),
    "Kolors": ("kolors",),
    "Z-Image": ("zimage",),
    "Qwen-Image": ("qwenimage",),
    "Stable Diffusion 1 with AutoencoderTiny": ("sd-tiny-vae",),
    "Stable Diffusion 1 with attention masks and a text embedding": ("sd-masked",),
    "Kandinsky 2.1": ("kandinsky21",),
    "DeepFloyd IF": ("if",),
    "Stable Diffusion 1 with PAG": ("sd-pag",),
    "SDXL with PAG": ("sdxl-pag",),
    "Stable Diffusion 3 with PAG": ("sd3-pag",),
    "Flux Kontext": ("kontext",),
    "FLUX.2 klein": ("klein",),
    "FLUX.2": ("flux2",),
    "Qwen-Image-Edit": ("qwenimage-edit",),
    "Qwen-Image-Edit-Plus": ("qwenimage-edit-plus",),
    "Qwen-Image 2.1": ("qwenimage2",),
    "LongCat-Image-Edit": ("longcat-edit",),
    "Chroma": ("chroma",),
    "SANA-Sprint": ("sana-sprint",),
    "Flux Fill": ("flux-fill",),
    "Flux Depth and Canny": ("flux-control",),
    "SDXL with a ControlNet and PAG": ("sdxl-control-pag",),
}
"""Common names of architectures, and their tiny models, which may differ in their graphs only."""

_HEAD = """\
| architecture | class | becomes | graphs | why not all | runs | verified |
|---|---|---|---|---|---|---|
"""


def row(name: str, manifests: Mapping[str, Manifest]) -> str:
    """The row of an architecture, from the manifests of its tiny models. Raises ValueError if they differ in more than graphs."""
    rows = {_cells(manifest) for manifest in manifests.values()}
    if len(rows) != 1:
        raise ValueError(f"the bundles of the tiny models of {name} differ: {', '.join(map(str, rows))}")
    kind, becomes, why, runs, verified = next(iter(rows))
    graphs: dict[str, None] = {}
    for manifest in manifests.values():
        graphs |= dict.fromkeys(one.name for one in manifest.components if one.backend == "onnx")
    return f"| {name} | `{kind}` | {becomes} | {', '.join(sorted(graphs)) or 'none'} | {why} | {runs} | {verified} |\n"


def _cells(manifest: Manifest) -> tuple[str, ...]:
    from img2img_server.runtime.loader import FAMILIES
    from img2img_server.runtime.opaque.batching_rules import RULES

    opaque = "batches of requests with equal settings" if manifest.pipeline_class in RULES else "one image at a time"
    runs = "batches at every step" if manifest.family in FAMILIES else opaque
    checked = manifest.verification
    most = checked.limits["max_abs_error"] if checked.passed and checked.pictures else None
    verified = "no" if most is None else f"{len(checked.pictures)} images, within {most:g}/255"
    why = (manifest.backend_reason or "").replace("|", "/")
    return manifest.pipeline_class, manifest.backend, why, runs, verified


def table(manifests: Mapping[str, Manifest], date: datetime.date) -> str:
    """When and with what the models were exported, and both tables: of architectures, and of the keys of
    AutoPipelineForImage2Image."""
    rows = "".join(row(name, {model: manifests[model] for model in models}) for name, models in MODELS.items())
    becomes = {manifest.pipeline_class: manifest.backend for manifest in manifests.values()}
    return f"{made_with(manifests, date)}\n{_HEAD}{rows}\n{keys(becomes)}"


def made_with(manifests: Mapping[str, Manifest], date: datetime.date) -> str:
    """A line with the date of the run and the versions of its tools. Raises ValueError if models were exported with others."""
    used = {tuple(manifest.tools.items()) for manifest in manifests.values()}
    if len(used) != 1:
        raise ValueError(f"models were exported with different versions: {', '.join(map(str, used))}; empty the folder")
    versions = ", ".join(f"{tool} {version.partition('+')[0]}" for tool, version in used.pop())
    return f"Exported on {date}, by `scripts/architectures`, with {versions}.\n"


_KEYS_HEAD = """\
| key of AutoPipelineForImage2Image | class | becomes |
|---|---|---|
"""


def keys(becomes: Mapping[str, str]) -> str:
    """The table of diffusers' keys. `becomes` has the kind of bundle of each class; other classes are refused, with a reason.

    Raises ValueError for a class that was neither exported nor is refused.
    """
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    from img2img_export.convert.models import CONTROLLED

    rows = ""
    for key, kind in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.items():
        name = kind.__name__
        found = becomes.get(name) or f"not served: {_refusal(name)}"
        if name in CONTROLLED:
            found = f"{becomes[CONTROLLED[name]]}: the plain model and the ControlNet are bundles of their own"
        rows += f"| {key} | `{name}` | {found} |\n"
    return f"{_KEYS_HEAD}{rows}"


def _refusal(name: str) -> str:
    from img2img_export.convert.models import plan
    from img2img_export.errors import ExportError
    from img2img_export.read.checkpoint import Layout

    try:
        plan(Layout(name, {}, ()), "auto")
    except ExportError as error:
        return str(error)
    raise ValueError(f"{name} is not refused, and MODELS has no tiny model of it")


def on_page() -> str:
    """The table in the page. Raises ValueError if the page has no markers for it."""
    _, begun, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    found, ended, _ = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"{PAGE.name} has no markers for the table: {BEGIN.strip()} and {END.strip()}")
    return found


def exported(folder: Path) -> Callable[[str], Manifest]:
    """A function that exports a tiny model to `folder`, unless it is there already, and returns the manifest."""
    from img2img_export.build import export_model
    from img2img_export.options import ExportOptions

    sys.path.insert(0, str(REPOSITORY / "tests"))
    import tiny_models

    def make(name: str) -> Manifest:
        source, output = folder / "models" / name, folder / "bundles" / name
        if not source.exists():
            building = source.with_name(f".{name}")
            shutil.rmtree(building, ignore_errors=True)
            tiny_models.build(name, building).rename(source)
        started = time.monotonic()
        # The tables say nothing of the graphs for LoRAs, which take most of the time.
        export_model(ExportOptions(source=str(source), output=output, lora_graphs=False))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return read_manifest(output)

    return make


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports every tiny model and writes the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/architectures", description="Generates the table of architectures in docs/export.md."
    )
    models = [model for models in MODELS.values() for model in models]
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"only export these to --folder, of {', '.join(models)}; the page stays"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="directory for the models and bundles; a later run does not make models again that are up to date",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.models) - set(models)):
        parser.error(f"unknown models: {', '.join(unknown)}")
    if options.models and options.folder is None:
        parser.error("models without --folder would be deleted at the end")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="img2img-architectures-")))
        make = exported(folder.absolute())
        manifests = {model: make(model) for model in options.models or models}
    if not options.models:
        before, made = on_page(), table(manifests, datetime.datetime.now(datetime.UTC).date())
        text = PAGE.read_text(encoding="utf-8").replace(f"{BEGIN}{before}{END}", f"{BEGIN}{made}{END}")
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
