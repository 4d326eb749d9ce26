"""The Python half of `scripts/serving_lock`, which see: what a serving image installs, pinned as requirements.lock pins it."""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from img2img_server.support.distribution import NAME
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMMON = ("s3", "telemetry", "kserve")
EXTRAS = {"cpu": ("server", "openvino", *COMMON), "cuda": ("server-gpu", *COMMON)}
"""What each image is made of: extras of pyproject.toml. requirements-ray.lock has what the extra `ray` adds to either."""
CUDA_ONLY = re.compile(r"nvidia-.+|cuda-.+|triton|onnxruntime-gpu")
"""What the cuda image has, and no other. torch's own metadata pins the libraries, exactly."""

_EPILOG = """\
writes, in deploy/:
  requirements-cpu.lock     the cpu image; torch is the CPU build, of the folder or page PIP_FIND_LINKS, or else PyTorch's own
  requirements-cuda.lock    the cuda image: onnxruntime-gpu in place of onnxruntime, torch with CUDA's libraries
  requirements-ray.lock     what the extra `ray` adds to either
  requirements-build.lock   what builds img2img's own wheel

Every package has the version that requirements.lock has (run scripts/lock first where that is to change), and the hashes of
its files. torch's CPU build has the hash of its wheel for x86-64: the images are for linux/amd64. What requirements.lock does
not have (CUDA's libraries) keeps its version until --upgrade.
"""
_TORCH_PAGE = "https://download.pytorch.org/whl/cpu/torch/"


def pins(text: str) -> dict[str, str]:
    """The versions of a lock by package, their "+cpu" with them."""
    return {match[1]: match[2] for match in re.finditer(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)}


def read(name: str) -> str:
    """One of the locks: "cpu", "cuda", "ray", "build"; "" is requirements.lock itself."""
    path = DEPLOY / f"requirements-{name}.lock" if name else ROOT / "requirements.lock"
    return path.read_text(encoding="utf-8")


@functools.cache
def closure(extras: tuple[str, ...]) -> frozenset[str]:
    """The packages that img2img with these extras needs here, by pyproject.toml and the metadata of what is installed. Without
    CUDA's, which are there where torch came from PyPI and are no part of requirements.lock."""
    wanted = [(NAME, extra) for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        if one not in seen:
            seen.add(one)
            if not CUDA_ONLY.fullmatch(one[0]):
                wanted += _needs(*one)
    return frozenset(package for package, _ in seen if package != NAME and not CUDA_ONLY.fullmatch(package))


def needs_of(package: str, extras: Iterable[str]) -> set[str]:
    """What a package with these extras names as its needs; nothing, where it is not installed here."""
    try:
        pairs = {pair for extra in ("", *extras) for pair in _needs(package, extra)}
    except metadata.PackageNotFoundError:
        return set()
    own = {extra for name, extra in pairs if name == package and extra}  # "img2img-server[runtime]", of its other extras
    return {name for name, _ in pairs if name != package} | (needs_of(package, own) if own else set())


def _needs(package: str, extra: str) -> Iterator[tuple[str, str]]:
    """Packages, each with an extra of it or ""."""
    for requirement in map(Requirement, _own_needs(extra) if package == NAME else metadata.requires(package) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for inner in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), inner


def _own_needs(extra: str) -> list[str]:
    """By pyproject.toml: what is installed of img2img may be older."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][extra] if extra else project["dependencies"])


def faults() -> Iterator[str]:
    """What is wrong with the committed locks, of requirements.lock, pyproject.toml and what is installed. Needs no network."""
    all_pins, cpu, cuda, ray = (pins(read(name)) for name in ("", "cpu", "cuda", "ray"))
    expected = {name: all_pins[name] for name in closure(EXTRAS["cpu"])}
    yield from _differences("cpu", cpu, {**expected, "torch": f"{all_pins['torch']}+cpu"})
    for_ray = closure((*EXTRAS["cpu"], "ray")) - expected.keys()
    yield from _differences("ray", ray, {name: all_pins[name] for name in for_ray})
    # CUDA's libraries are not installed here: what they are is left to torch, but not what else there is.
    shared = {name: all_pins[name] for name in expected.keys() - {"onnxruntime", "onnxruntime-ep-openvino"}}
    other = {name: version for name, version in cuda.items() if not CUDA_ONLY.fullmatch(name)}
    yield from _differences("cuda", other, shared)
    if cuda.get("onnxruntime-gpu") != all_pins["onnxruntime"]:
        yield f"cuda: onnxruntime-gpu is {cuda.get('onnxruntime-gpu')}, onnxruntime {all_pins['onnxruntime']}"
    if not any(name.startswith("nvidia-") for name in cuda):
        yield "cuda: torch came without CUDA's libraries"
    for name in ("cpu", "cuda", "ray", "build"):
        without = [line for line in read(name).splitlines() if "==" in line and not line.endswith("\\")]
        yield from (f"{name}: {line} has no hash" for line in without)


def _differences(lock: str, found: dict[str, str], expected: dict[str, str]) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"{lock}: {name} is {found.get(name, 'not there')}, should be {expected.get(name, 'not there')}"


def write(upgrade: bool) -> None:
    """Resolves with uv, each package of requirements.lock held at its version. Raises CalledProcessError where that fails."""
    locked = pins(read(""))
    torch = locked.pop("torch")
    ray_free = {}
    for name, extras in EXTRAS.items():
        held = {**locked, "torch": f"{torch}+cpu" if name == "cpu" else torch}
        ray_free[name] = _compile(name, extras, held, upgrade)
        _save(name, ray_free[name])
    held = {**locked, "torch": f"{torch}+cpu"}
    everything = _compile("ray", (*EXTRAS["cpu"], "ray"), held, upgrade=False)
    _save("ray", _without(everything, pins(ray_free["cpu"])))
    _save("build", _compile("build", (), locked, upgrade))


def _compile(name: str, extras: Iterable[str], held: dict[str, str], upgrade: bool) -> str:
    """What uv resolves: img2img with these extras, or hatchling where the lock is "build"."""
    with tempfile.TemporaryDirectory() as directory:
        constraints, wanted, output = (Path(directory) / part for part in ("constraints.txt", "wanted.in", "output.lock"))
        constraints.write_text("".join(f"{package}=={version}\n" for package, version in held.items()), encoding="utf-8")
        wanted.write_text("hatchling>=1.27\n", encoding="utf-8")
        kept = DEPLOY / f"requirements-{name}.lock"
        if kept.is_file() and not upgrade:
            output.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
        source = [str(wanted)] if name == "build" else ["pyproject.toml", *(f"--extra={extra}" for extra in extras)]
        wheels = os.environ.get("PIP_FIND_LINKS", _TORCH_PAGE)
        cpu = ["--find-links", wheels] if held.get("torch", "").endswith("+cpu") else []
        options = [
            "--python-version=3.11",
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
            "--no-emit-find-links",
            "--quiet",
        ]
        command = [str(ROOT / ".venv/bin/uv"), "pip", "compile", *source, *options, *cpu, "--constraint", str(constraints)]
        subprocess.run([*command, "--output-file", str(output)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return output.read_text(encoding="utf-8")


def _without(lock: str, packages: Iterable[str]) -> str:
    """A lock less these packages and their hashes."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    return "".join(block for block in blocks if block and block.partition("==")[0] not in set(packages))


def _save(name: str, text: str) -> None:
    path = DEPLOY / f"requirements-{name}.lock"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(pins(text))} packages")


def main() -> int:
    """Writes the locks, or checks them. Returns 0, 1 where they are wrong or uv failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/serving_lock",
        description="Takes the serving images' part out of requirements.lock, with hashes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what of the locks is wrong. Needs no network")
    parser.add_argument("--upgrade", action="store_true", help="take the newest of what requirements.lock does not have")
    arguments = parser.parse_args()
    if not arguments.check:
        try:
            write(arguments.upgrade)
        except subprocess.CalledProcessError:
            return 1  # uv has said why
    found = list(faults())
    for fault in found:
        print(f"serving_lock: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
