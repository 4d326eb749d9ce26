"""Generates the table of architectures in docs/export.md from the manifests of exported tiny models (tests/tiny_models.py).
Heavy imports are inside the functions."""

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
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
    "InstructPix2Pix": ("pix2pix",),
    "Stable Diffusion 3, with T5 and without": ("sd3", "sd3-no-t5"),
    "Flux, schnell and dev": ("flux", "flux-dev"),
    "Kandinsky 2.2": ("kandinsky22",),
    "Kandinsky 3": ("kandinsky3",),
    "Kolors": ("kolors",),
    "Z-Image": ("zimage",),
    "Qwen-Image": ("qwenimage",),
}
"""Common names of architectures, and their tiny models, which may differ in their graphs only."""

_HEAD = """\
| architecture | class | becomes | graphs | runs | verified |
|---|---|---|---|---|---|
"""


def row(name: str, manifests: Mapping[str, Manifest]) -> str:
    """The row of an architecture, from the manifests of its tiny models. Raises ValueError if they differ in more than graphs."""
    rows = {_cells(manifest) for manifest in manifests.values()}
    if len(rows) != 1:
        raise ValueError(f"the bundles of the tiny models of {name} differ: {', '.join(map(str, rows))}")
    kind, becomes, runs, verified = next(iter(rows))
    graphs: dict[str, None] = {}
    for manifest in manifests.values():
        graphs |= dict.fromkeys(one.name for one in manifest.components if one.backend == "onnx")
    return f"| {name} | `{kind}` | {becomes} | {', '.join(sorted(graphs)) or 'none'} | {runs} | {verified} |\n"


def _cells(manifest: Manifest) -> tuple[str, str, str, str]:
    from img2img_server.runtime.loader import FAMILIES
    from img2img_server.runtime.opaque.batching_rules import RULES

    opaque = "batches of requests with equal settings" if manifest.pipeline_class in RULES else "one image at a time"
    runs = "batches at every step" if manifest.family in FAMILIES else opaque
    checked = manifest.verification
    most = checked.limits["max_abs_error"] if checked.passed and checked.pictures else None
    verified = "no" if most is None else f"{len(checked.pictures)} images, within {most:g}/255"
    return manifest.pipeline_class, manifest.backend, runs, verified


def table(manifests: Mapping[str, Manifest]) -> str:
    """The table, and the paragraph about untested classes."""
    rows = "".join(row(name, {model: manifests[model] for model in models}) for name, models in MODELS.items())
    tried = {manifest.pipeline_class for manifest in manifests.values()}
    return f"{_HEAD}{rows}\n{untried(tried)}"


def untried(tried: set[str]) -> str:
    """A paragraph about the classes of AutoPipelineForImage2Image that are not tested."""
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING

    others = sorted({kind.__name__ for kind in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values()} - tried)
    text = (
        "For other classes of diffusers' AutoPipelineForImage2Image, the export tries a hybrid bundle, then torch, and publishes "
        "it if its images match those of diffusers; the server then runs one image at a time. They are not tested. Classes "
        f"that require more inputs than a prompt and an image (such as ControlNet) cannot be served: {', '.join(others)}."
    )
    return textwrap.fill(text, 130, break_on_hyphens=False) + "\n"


def on_page() -> str:
    """The table in the page. Raises ValueError if the page has no markers for it."""
    _, begun, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    found, ended, _ = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"{PAGE.name} has no markers for the table: {BEGIN.strip()} and {END.strip()}")
    return found


def exported(folder: Path) -> Callable[[str], Manifest]:
    """A function that exports a tiny model to `folder` and returns the manifest."""
    from img2img_export.build import export_model
    from img2img_export.options import ExportOptions

    sys.path.insert(0, str(REPOSITORY / "tests"))
    import tiny_models

    def make(name: str) -> Manifest:
        print(f"exporting {name}", flush=True)
        source, output = tiny_models.build(name, folder / "models" / name), folder / "bundles" / name
        export_model(ExportOptions(source=str(source), output=output))
        return read_manifest(output)

    return make


def main() -> int:
    """Exports every tiny model and writes the table. Returns the exit status."""
    argparse.ArgumentParser(
        prog="scripts/architectures", description="Generates the table of architectures in docs/export.md."
    ).parse_args()
    before = on_page()
    with tempfile.TemporaryDirectory(prefix="img2img-architectures-") as folder:
        make = exported(Path(folder))
        made = table({model: make(model) for models in MODELS.values() for model in models})
    text = PAGE.read_text(encoding="utf-8").replace(f"{BEGIN}{before}{END}", f"{BEGIN}{made}{END}")
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
