"""The documentation's tables say what bundles say."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from img2img_server.bundle import read_manifest
from img2img_server.limits import LIMITS
from img2img_server.pipelines.sharing import RULES

_MODELS = {
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
"""The rows of the table of architectures, and the tiny models of each."""


def rows(heading: str) -> list[list[str]]:
    """The table of docs/export.md below `heading`, without its head."""
    text = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", rows("What becomes of it"), ids=lambda row: row[0])
def test_the_table_of_architectures_is_true(row: list[str], bundle: Callable[[str], Path]) -> None:
    for name in _MODELS[row[0]]:
        manifest = read_manifest(bundle(name))
        together = "with requests of equal settings" if manifest.pipeline_class in RULES else "one picture at a time"
        runs = together if manifest.family == "whole" else "step by step, in batches"
        assert row[1:] == [f"`{manifest.pipeline_class}`", manifest.backend, runs], name


def test_the_table_of_limits_is_true() -> None:
    for precision, relative, worst, picture in rows("Verification"):
        limits = LIMITS[precision]  # type: ignore[index]
        assert (float(relative), float(worst)) == (limits.relative_error, limits.worst)
        greatest = re.search(r"within (\d+)/255", picture)
        assert limits.max_abs_error == (int(greatest[1]) if greatest else 255)
        assert f"{limits.psnr_db:.0f} dB, SSIM " in picture
        assert float(picture.rpartition(" ")[2]) == limits.ssim
