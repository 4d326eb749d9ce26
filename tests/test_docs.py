"""The documentation's tables say what bundles and the code say, and what it names is there."""

import argparse
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from img2img_cli.__main__ import COMMANDS
from img2img_server import errors
from img2img_server.__main__ import CLIENT_VARIABLES, CONFIG_VARIABLE, VARIABLES
from img2img_server.bundle import read_manifest
from img2img_server.config import ServerConfig
from img2img_server.limits import LIMITS
from img2img_server.pipelines.sharing import RULES
from img2img_server.settings.setting import settings_of

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


_FLAGS_OF = {
    "README.md": tuple(COMMANDS),
    "docs/architecture.md": ("serve",),
    "docs/clients.md": ("transform", "models", "assets", "serve"),
    "docs/export.md": ("export", "inspect", "transform", "serve"),
    "docs/operations.md": ("serve", "top", "export", "models"),
    "docs/reliability.md": ("serve",),
    "docs/security.md": ("serve", "token", "models"),
    "dashboards/alerts.yaml": ("serve",),
    "dashboards/img2img.json": ("serve",),
}
"""What is read by people, and the commands whose flags it names. benchmarks.md is about scripts."""


def rows(heading: str, document: str = "export.md") -> list[list[str]]:
    """The table of a document below `heading`, without its head."""
    text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
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


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags(inner)


def tree(error: type[errors.ServerError]) -> Iterator[type[errors.ServerError]]:
    yield error
    for below in error.__subclasses__():
        yield from tree(below)


def test_every_reason_that_callers_may_get_is_in_the_table_of_errors_and_no_other() -> None:
    told = [(reason.strip("`"), status.strip("`")) for reason, status, _ in rows("Errors", "operations.md")]
    own = [error for error in tree(errors.ServerError) if error.__module__ == errors.__name__]
    assert sorted(told) == sorted((error.reason, error.status) for error in own)


@pytest.mark.parametrize("document", _FLAGS_OF)
def test_every_flag_and_variable_that_is_named_is_there(document: str) -> None:
    known = {"--help"}
    for command in _FLAGS_OF[document]:
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[command][0]).configure(parser)
        known.update(flags(parser))
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    ours = "\n".join(line for line in text.splitlines() if not re.search(r"\b(scripts/\w|buf curl|pip install|openssl )", line))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ours))
    assert named <= known, f"{document} names {sorted(named - known)}"
    variables = {VARIABLES + one.name.upper() for one in settings_of(ServerConfig)}
    variables |= {CONFIG_VARIABLE, *CLIENT_VARIABLES, "IMG2IMG_MAX_WAITNG"}  # the last is what a typing error is shown by
    assert set(re.findall(r"\bIMG2IMG_[A-Z_]*[A-Z]", text)) <= variables


def test_every_setting_is_explained() -> None:
    text = "".join((REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("operations", "security"))
    for one in settings_of(ServerConfig):
        assert one.flag in text or one.flag.replace("--", "--no-", 1) in text, one.flag


def test_every_file_that_is_named_is_there() -> None:
    places = ("", "docs", "dashboards", "server/img2img_server", "tests", "tests/server", "tests/client", "export/img2img_export")
    inside = ("engine", "pipelines", "models", "assets", "sources", "access", "telemetry", "top", "settings")
    folders = [REPOSITORY / place for place in (*places, *(f"server/img2img_server/{name}" for name in inside))]
    made = {"manifest.json", "model_index.json"}
    for document in ("README.md", *(f"docs/{name}.md" for name in ("architecture", "operations", "security", "reliability"))):
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        for name in set(re.findall(r"`([\w./-]+\.(?:py|json|yaml))`", text)) - made:
            assert any((folder / name).is_file() for folder in folders), f"{document} names {name}"


def test_the_contents_of_the_operations_are_its_sections_in_order() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    contents = re.findall(r"\[([^]]+)\]\(#([\w-]+)\)", text.partition("\n## ")[0])
    assert contents == [(title, re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")) for title in sections]
