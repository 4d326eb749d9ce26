"""The documentation's tables match bundles and code, and everything it names exists."""

import argparse
import importlib
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import architectures
import pytest
import settings_page
import yaml
from conftest import REPOSITORY
from covering import nightly_but
from img2img_cli.__main__ import COMMANDS
from img2img_export.convert.models import GRAPHS
from img2img_server import errors
from img2img_server.__main__ import CLIENT_VARIABLES, CONFIG_VARIABLE, VARIABLES
from img2img_server.bundle.manifest import LIMITS, read_manifest
from img2img_server.config import ServerConfig
from img2img_server.runtime.opaque.batching_rules import RULES
from img2img_server.settings.setting import settings_of
from tiny_models import BUILDERS

_ALWAYS = (*list(architectures.MODELS)[:11], "FLUX.2 klein", "DeepFloyd IF")
"""Architectures whose bundles other tests make, too, on every run."""

_OTHER_MODELS = {"sdxl-overflow", "qwenimage-layered"}
"""SDXL with a VAE that works in fp32 only, and a model that is refused."""

_FLAGS_OF = {
    "README.md": tuple(COMMANDS),
    "docs/architecture.md": ("serve",),
    "docs/devices.md": ("serve", "export"),
    "docs/clients.md": ("transform", "reproduce", "models", "assets", "health", "serve"),
    "docs/export.md": ("export", "inspect", "transform", "serve"),
    "docs/monitoring.md": ("serve", "top", "models"),
    "docs/playground.md": ("playground",),
    "docs/kserve.md": ("serve",),
    "docs/http.md": ("serve",),
    "docs/operations.md": ("serve", "top", "export", "models", "transform", "token"),
    "docs/reliability.md": ("serve",),
    "docs/security.md": ("serve", "token", "models"),
    "dashboards/alerts.yaml": ("serve",),
    "dashboards/img2img.json": ("serve",),
}
"""The pages for people, and the commands whose flags each page names, in commands and in its text."""

DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "demo/*.md", "clients/*.md", "clients/*/*.md", "deploy/*.md", "deploy/*/*.md")
    for path in REPOSITORY.glob(pattern)
)
"""All pages for people."""

_NAMING_FILES = ("architecture", "operations", "devices", "monitoring", "security", "reliability", "export", "extending")

CONTENTS = ("architecture", "operations", "devices", "monitoring", "extending")
"""Pages that begin with their contents."""


def rows(heading: str, document: str = "export.md") -> list[list[str]]:
    """The table of a document below `heading`, without its head."""
    text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", nightly_but(architectures.MODELS, *_ALWAYS))
def test_architecture_table_matches_the_first_model_of_each(name: str, bundle: Callable[[str], Path]) -> None:
    """`scripts/architectures` mends it."""
    assert row(name, architectures.MODELS[name][:1], bundle) in architecture_rows()


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, models in architectures.MODELS.items() if len(models) > 1])
def test_architecture_table_matches_all_models(name: str, bundle: Callable[[str], Path]) -> None:
    assert row(name, architectures.MODELS[name], bundle) in architecture_rows()


def architecture_rows() -> list[str]:
    """The lines of the page's tables, as `row` has them."""
    return [without_count(line) for line in architectures.on_page().splitlines(keepends=True)]


def without_count(line: str) -> str:
    """A row without the number of images: most bundles of the tests were verified with fewer than the page's."""
    return re.sub(r"\d+ images, within", "images, within", line)


def row(name: str, models: Sequence[str], bundle: Callable[[str], Path]) -> str:
    """The row of an architecture, by the bundles of these tiny models of it."""
    return without_count(architectures.row(name, {model: read_manifest(bundle(model)) for model in models}))


def test_tables_of_architectures_and_keys_are_complete() -> None:
    """Each architecture occurs once, in order; so do each tiny model, each known class, and each key."""
    page = architectures.on_page()
    named = re.findall(r"^\| ([^|`]+) \| `(\w+)` \| (\w+) \| \w", page, re.MULTILINE)
    assert [name for name, *_ in named] == list(architectures.MODELS)
    models = [model for models in architectures.MODELS.values() for model in models]
    assert sorted(models) == sorted(set(BUILDERS) - _OTHER_MODELS)
    becomes = {kind: backend for _, kind, backend in named}
    assert set(GRAPHS) | set(RULES) <= set(becomes)
    assert page.endswith(f"\n{architectures.keys(becomes)}")


def test_settings_reference_matches_the_configuration() -> None:
    """`scripts/settings` mends it."""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_verification_limits_table_matches_the_code() -> None:
    for precision, relative, worst, image in rows("Verification"):
        limits = LIMITS[precision]  # type: ignore[index]
        assert (float(relative), float(worst)) == (limits.relative_error, limits.worst)
        greatest = re.search(r"within (\d+)/255", image)
        assert limits.max_abs_error == (int(greatest[1]) if greatest else 255)
        assert f"{limits.psnr_db:.0f} dB, SSIM " in image
        assert float(image.rpartition(" ")[2]) == limits.ssim


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


def test_error_table_lists_exactly_the_error_reasons() -> None:
    told = [(reason.strip("`"), status.strip("`")) for reason, status, _ in rows("Errors", "operations.md")]
    own = [error for error in tree(errors.ServerError) if error.__module__ == errors.__name__]
    assert sorted(told) == sorted((error.reason, error.status) for error in own)


@pytest.mark.parametrize("document", _FLAGS_OF)
def test_every_documented_flag_and_variable_exists(document: str) -> None:
    known = {"--help"}
    for command in _FLAGS_OF[document]:
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[command][0]).configure(parser)
        known.update(flags(parser))
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    ours = "\n".join(
        line
        for line in text.splitlines()
        if not re.search(r"\b(scripts/\w|hf download|buf curl|pip install|mypy |openssl |ray get-auth-token)", line)
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ours))
    assert named <= known, f"{document} names {sorted(named - known)}"
    variables = {VARIABLES + one.name.upper() for one in settings_of(ServerConfig)}
    variables |= {CONFIG_VARIABLE, *CLIENT_VARIABLES, "IMG2IMG_MAX_WAITNG"}  # the last is an example of a typing error
    assert set(re.findall(r"\bIMG2IMG_[A-Z_]*[A-Z]", text)) <= variables


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Every `img2img COMMAND ...` in a text, in blocks and in lines: the command, and the words after it."""
    for command, words in re.findall(r"(?<![\w/.-])img2img ([a-z][a-z-]*)((?:[^`\n\\|;&#]|\\\n)*)", text):
        if command in COMMANDS:
            yield command, words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_shown_command_uses_existing_flags(document: str) -> None:
    for command, words in commands((REPOSITORY / document).read_text(encoding="utf-8")):
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[command][0]).configure(parser)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", words))
        assert named <= {"--help", *flags(parser)}, f"{document}: img2img {command}{words}"


def test_commands_are_found_in_prose_and_code_blocks() -> None:
    text = "`img2img serve --models m`, and\n    img2img top --once | less --raw\n"
    text += "$ img2img export x \\\n  --output y # --z\nimg2img is a server"
    assert list(commands(text)) == [("serve", " --models m"), ("top", " --once "), ("export", " x \\\n  --output y ")]


def anchors(path: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_has_an_existing_target(document: str) -> None:
    path = REPOSITORY / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{document} links to {target}"
        if fragment and there.suffix == ".md":
            assert fragment in anchors(there), f"{document} links to {target}"


def test_every_page_is_reachable_from_the_readme() -> None:
    found, new = set(), {REPOSITORY / "README.md"}
    while new:
        page = new.pop()
        found.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        linked = {(page.parent / link).resolve() for link in links if "://" not in link}
        new |= {path for path in linked if path.is_file()} - found
    assert {REPOSITORY / document for document in DOCUMENTS} <= found


def test_every_alert_has_a_runbook_section() -> None:
    rules = yaml.safe_load((REPOSITORY / "dashboards" / "alerts.yaml").read_text(encoding="utf-8"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    runbook = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8").partition("\n## Alerts\n")[2]
    sections = re.findall(r"^### (\w+)\n\n(.+?)(?=^#|\Z)", runbook.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == alerts
    for name, text in sections:
        assert re.search(r"^1\. ", text, re.MULTILINE), f"{name}: what to do first"


def test_every_setting_is_explained() -> None:
    """Besides the reference, which has the same text as `--help`."""
    pages = (document for document in DOCUMENTS if document.startswith("docs/") and document != "docs/settings.md")
    text = "".join((REPOSITORY / page).read_text(encoding="utf-8") for page in pages)
    for one in settings_of(ServerConfig):
        assert one.flag in text or one.flag.replace("--", "--no-", 1) in text, one.flag


def test_every_documented_file_exists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    made = {"manifest.json", "model_index.json"}
    for document in ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in _NAMING_FILES)):
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        for name in set(re.findall(r"`([\w./-]+\.(?:py|json|yaml))`", text)) - made:
            assert any(f"/{path}".endswith(f"/{name}") for path in listed), f"{document} names {name}"


@pytest.mark.parametrize("page", CONTENTS)
def test_the_contents_of_a_page_are_its_sections_in_order(page: str) -> None:
    text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    contents = re.findall(r"\[([^]]+)\]\(#([\w-]+)\)", text.partition("\n## ")[0])
    assert contents == [(title, anchor(title)) for title in sections]
