"""docs/http.md: its programs run unchanged, and its tables match the code."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from http_calls import port_of, serving
from img2img_server.api.http.errors import object_of, status_of
from img2img_server.api.http.fields import FIELDS
from img2img_server.errors import ServerError
from PIL import Image
from running import RunningServer
from soak_parts.stand_in import StandInPipeline
from test_docs import tree

TEXT = (REPOSITORY / "docs" / "http.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = [block for language, block in BLOCKS if language == "python"]
CURL = next(block for language, block in BLOCKS if block.startswith("curl "))


def rows(heading: str, table: int = 0) -> list[list[str]]:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[table].splitlines()[2:]]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(pipelines={"demo": StandInPipeline(0.0)}) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the programs run: it has the demo's images."""
    folder = tmp_path_factory.mktemp("http")
    (folder / "demo").symlink_to(REPOSITORY / "demo")
    return folder


def test_documented_programs_run(server: RunningServer, folder: Path) -> None:
    told = []
    for program in PROGRAMS:
        code = program.replace("localhost:8000", f"localhost:{port_of(server)}")
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=True)
        told.append(done.stdout)
    assert re.fullmatch(r"7 stand-in:cpu [\d.]+\n", told[0])
    assert re.fullmatch(r"preview 0 \d+\npreview 1 \d+\npreview 2 \d+\ncompleted \d+\n", told[1])
    with Image.open(folder / "winter.png") as image:
        assert image.size == (64, 64)


def test_documented_command_lines_run(server: RunningServer, folder: Path) -> None:
    (folder / "winter.png").unlink(missing_ok=True)
    command = CURL.replace("localhost:8000", f"localhost:{port_of(server)}").replace("python3", sys.executable)
    subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, check=True, timeout=120, capture_output=True)
    with Image.open(folder / "winter.png") as image:
        assert image.size == (64, 64)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^curl http.*$", readme, re.MULTILINE)
    command = command.replace("localhost:8000", f"localhost:{port_of(server)}")
    done = subprocess.run(["bash", "-c", command], cwd=folder, check=True, timeout=120, capture_output=True, env=dict(os.environ))
    (one,) = json.loads(done.stdout)["data"]
    assert Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).size == (64, 64)


def test_field_table_matches_the_code() -> None:
    assert [name.strip("`") for name, *_ in rows("Fields")] == [one.name for one in FIELDS]
    extensions = [name.strip("`") for name, _, meaning in rows("Fields") if meaning.startswith("extension: ")]
    assert extensions == [one.name for one in FIELDS if one.extension]


def test_error_table_matches_the_code() -> None:
    told = {}
    for statuses, kind, codes in rows("Errors"):
        for status in statuses.split(", "):
            told[int(status)] = (kind.strip("`"), codes)
    for error in tree(ServerError):
        made = error.__new__(error)
        kind, codes = told[status_of(made)]
        assert object_of_kind(error) == kind
        assert f"`{error.status}`" in codes or f"`{error.reason}`" in codes


def object_of_kind(error: type[ServerError]) -> object:
    made = error.__new__(error)
    made.__dict__.update(field="n", description="wrong")
    return object_of(made)["type"]
