"""The archives that a release publishes, built as a release builds them: contents, size, metadata, types."""

import email
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = [Path(package) for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
_MEGABYTE = 10**6

_USER = """
from img2img.v1.image_to_image_pb2 import TransformRequest
from img2img_cli.__main__ import main
from img2img_client import Client
from img2img_export.options import ExportOptions
from img2img_playground.snippet import literal
from img2img_server.errors import InvalidField

status: int = main(["--version"])
seed: int = TransformRequest(prompt="a lake").seed
client: Client = Client("localhost:50051")
code: str = literal(1)


def source(options: ExportOptions) -> str:
    return options.source


field: InvalidField = InvalidField("prompt", "is empty")
"""


@dataclass(frozen=True)
class Built:
    """The two archives of one version, the wheel built from the unpacked sdist."""

    sdist: Path
    wheel: Path

    def sources(self) -> dict[str, int]:
        """The sdist's files without its top folder, and their sizes in bytes."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2]: member.size for member in archive.getmembers() if member.isfile()}

    def modules(self) -> set[str]:
        """The wheel's files without its metadata."""
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if ".dist-info/" not in name}

    def metadata(self) -> Message:
        """The wheel's METADATA."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            return email.message_from_bytes(archive.read(name))


def hatchling(target: str, source: Path, output: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (archive,) = output.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    sdist = hatchling("sdist", REPOSITORY, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return Built(sdist, hatchling("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder))


def test_sdist_is_small_and_contains_docs_and_build_files(built: Built) -> None:
    files = built.sources()
    assert built.sdist.stat().st_size < 8 * _MEGABYTE
    assert built.sdist.name == f"img2img_server-{PROJECT['project']['version']}.tar.gz"
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "docs/api.md", "PKG-INFO"} <= files.keys()
    tops = {name.partition("/")[0] for name in files}
    unexpected = tops - {package.parts[0] for package in PACKAGES} - {"docs", "LICENSE", "README.md", "CHANGELOG.md"}
    assert unexpected == {"pyproject.toml", "PKG-INFO", ".gitignore"}
    assert max(files.values()) < _MEGABYTE, "no weights and no images"


def test_the_wheel_has_every_module_of_every_package_and_nothing_else(built: Built) -> None:
    expected = {
        path.relative_to(REPOSITORY / package.parent).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert built.modules() == expected
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= expected
    assert built.wheel.stat().st_size < 8 * _MEGABYTE


def test_twine_accepts_both(built: Built) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(built.sdist), str(built.wheel)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2


def test_the_metadata_names_license_authors_and_pythons(built: Built) -> None:
    metadata = built.metadata()
    assert (metadata["Name"], metadata["License-Expression"], metadata["License-File"]) == (
        "img2img-server",
        "Apache-2.0",
        "LICENSE",
    )
    assert metadata["Author"] == "the img2img developers"
    assert metadata["Requires-Python"] == ">=3.11"
    pythons = [part.rpartition(" ")[2] for part in metadata.get_all("Classifier", []) if ":: Python :: 3." in part]
    assert pythons[0] == "3.11"
    assert "License ::" not in str(metadata.get_all("Classifier")), "PEP 639 allows the expression alone"
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n")
    assert text.count("\n") == 202, "the whole text"
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(name).decode() == text


@pytest.mark.nightly
def test_a_program_that_uses_the_installed_wheel_is_type_checked(built: Built, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)
    here = Path(sys.executable).parents[1] / site.relative_to(tmp_path / "venv")
    (site / "needs.pth").write_text(f"{here}\n")  # its dependencies; .pth files in there are not followed
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(_USER)
    wrong.write_text(
        _USER.replace("status: int", "status: str").replace("code: str", "code: int").replace("seed: int", "seed: str")
    )
    options = ["--strict", "--no-incremental", "--config-file=", "--python-executable", str(tmp_path / "venv" / "bin" / "python")]
    for program, errors in ((right, 0), (wrong, 3)):
        command = [sys.executable, "-m", "mypy", *options, str(program)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.stdout.count(" error: Incompatible types") == result.stdout.count(" error: ") == errors, result.stdout
