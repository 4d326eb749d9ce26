"""docs/kserve.md: its programs run unchanged, and its tables match the code."""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from fuzz_parts.seeds import image_file
from img2img_server.__main__ import configure, configured
from img2img_server.api.kserve.translation import INPUTS, OUTPUTS, PROGRESS, SETTINGS, Parameters
from PIL import Image
from soak_parts.stand_in import plant

TEXT = (REPOSITORY / "docs" / "kserve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = [block for language, block in BLOCKS if language == "python"]


def rows(heading: str) -> list[list[str]]:
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the programs run: it has the demo's images, and the server has a model of its name."""
    folder = tmp_path_factory.mktemp("kserve")
    (folder / "demo").symlink_to(REPOSITORY / "demo")
    plant(folder / "models", "demo")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[str]:
    """The port of the server that the page starts, with a fake model."""
    (command,) = re.findall(r"^img2img serve (.*)$", "".join(block for _, block in BLOCKS), re.MULTILINE)
    file, scripts = folder / "port", str(REPOSITORY / "benchmarks")
    words = [sys.executable, "-m", "soak_parts.stand_in", *command.split(), "--port", "0", "--port-file", str(file)]
    process = subprocess.Popen(words, cwd=folder, env={**os.environ, "PYTHONPATH": scripts})
    try:
        while not file.exists():
            assert process.poll() is None, "it could not start"
            time.sleep(0.05)
        yield file.read_text().strip()
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_documented_programs_run(folder: Path, port: str) -> None:
    told = []
    for program in PROGRAMS:
        program = program.replace("localhost:50051", f"localhost:{port}")
        result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        told.append(result.stdout)
    assert told[0].startswith("[7] ")
    assert told[1].splitlines()[-1] == "lake: step 16 of 16"
    for name in ("winter.png", "lake.png"):
        with Image.open(folder / name) as made, Image.open(folder / "demo" / "images" / "noon-lake.png") as source:
            assert made.size == source.size


def test_tables_of_inputs_and_outputs_match_the_code() -> None:
    inputs = [[one.name, " or ".join(one.datatypes), str(list(one.dims))] for one in INPUTS]
    assert [row[:3] for row in rows("Inputs")] == inputs
    outputs = [[one.name, one.datatype, str(list(one.dims))] for one in (*OUTPUTS, *PROGRESS)]
    assert [row[:3] for row in rows("Outputs")] == outputs


async def test_parameter_table_lists_every_parameter_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from img2img_server.api.kserve import translation
    from img2img_server.support.fair_queue import FairThreads
    from tritonclient.grpc import service_pb2 as pb  # type: ignore[import-untyped]

    read: set[str] = set()

    class Watched(Parameters):
        def finish(self) -> None:
            read.update(self._known)

    monkeypatch.setattr(translation, "Parameters", Watched)
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(image_file())
    await translation.read(request, FairThreads(1, "test"))
    assert read == {name for name, *_ in rows("Parameters")} | {"image_uri", "mask_uri"} | {setting.name for setting in SETTINGS}


def test_flag_and_variable_enable_kserve() -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    assert configured(parser.parse_args(["--models", "models", "--kserve"]), {}).config.kserve
    assert configured(parser.parse_args(["--models", "models"]), {"IMG2IMG_KSERVE": "true"}).config.kserve
    assert not configured(parser.parse_args(["--models", "models"]), {}).config.kserve
