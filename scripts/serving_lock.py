"""The Python part of `scripts/serving_lock`: the packages of a serving container image, pinned like in requirements.lock."""

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
COMMON = ("s3", "telemetry", "kserve", "http")
EXTRAS = {"cpu": ("server", "openvino", *COMMON), "cuda": ("server-gpu", *COMMON)}
"""The extras of pyproject.toml in each image. requirements-ray.lock has the additional packages of the extra `ray`."""
CUDA_ONLY = re.compile(r"nvidia-.+|cuda-.+|triton|onnxruntime-gpu")
"""Packages only in the cuda image. torch's metadata pins the libraries exactly."""

_EPILOG = """\
writes, in deploy/:
  requirements-cpu.lock     the cpu image, with torch's CPU build from PIP_FIND_LINKS (a folder or page) or else PyTorch's page
  requirements-cuda.lock    the cuda image, with onnxruntime-gpu instead of onnxruntime, and torch with CUDA's libraries
  requirements-ray.lock     the additional packages of the extra `ray`
  requirements-build.lock   the packages to build img2img's wheel

Every package has its version in requirements.lock (run scripts/lock first to change it) and the hashes of its files. torch's CPU
build has the hash of its x86-64 wheel, since the images are for linux/amd64. Packages that are not in requirements.lock (CUDA's
libraries) keep their versions until --upgrade.
"""
_TORCH_PAGE = "https://download.pytorch.org/whl/cpu/torch/"


def pins(text: str) -> dict[str, str]:
    """The versions in a lock by package, including "+cpu"."""
    return {match[1]: match[2] for match in re.finditer(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)}


def read(name: str) -> str:
    """One of the locks: "cpu", "cuda", "ray", "build"; "" is requirements.lock itself."""
    path = DEPLOY / f"requirements-{name}.lock" if name else ROOT / "requirements.lock"
    return path.read_text(encoding="utf-8")


@functools.cache
def closure(extras: tuple[str, ...]) -> frozenset[str]:
    """The dependencies of img2img with these extras, by pyproject.toml and the metadata of installed packages. Excludes CUDA's
    libraries, which torch from PyPI requires and which are not in requirements.lock."""
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
    """The declared dependencies of a package with these extras; empty if it is not installed."""
    try:
        pairs = {pair for extra in ("", *extras) for pair in _needs(package, extra)}
    except metadata.PackageNotFoundError:
        return set()
    own = {extra for name, extra in pairs if name == package and extra}  # such as "img2img-server[runtime]" in its other extras
    return {name for name, _ in pairs if name != package} | (needs_of(package, own) if own else set())


def _needs(package: str, extra: str) -> Iterator[tuple[str, str]]:
    """Yields the required packages, each with one of its extras or ""."""
    for requirement in map(Requirement, _own_needs(extra) if package == NAME else metadata.requires(package) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for inner in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), inner


def _own_needs(extra: str) -> list[str]:
    """img2img's dependencies by pyproject.toml, since the installed metadata may be older."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"][extra] if extra else project["dependencies"])


def faults() -> Iterator[str]:
    """Yields the differences between the committed locks and requirements.lock, pyproject.toml and installed packages. Needs no
    network."""
    all_pins, cpu, cuda, ray = (pins(read(name)) for name in ("", "cpu", "cuda", "ray"))
    expected = {name: all_pins[name] for name in closure(EXTRAS["cpu"])}
    yield from _differences("cpu", cpu, {**expected, "torch": f"{all_pins['torch']}+cpu"})
    for_ray = closure((*EXTRAS["cpu"], "ray")) - expected.keys()
    yield from _differences("ray", ray, {name: all_pins[name] for name in for_ray})
    # CUDA's libraries are not installed here and are not checked; all other packages are.
    shared = {name: all_pins[name] for name in expected.keys() - {"onnxruntime", "openvino", "openvino-telemetry"}}
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
            yield f"{lock}: {name} is {found.get(name, 'absent')}, should be {expected.get(name, 'absent')}"


def write(upgrade: bool) -> None:
    """Resolves with uv, with all packages pinned to requirements.lock. Raises CalledProcessError if that fails."""
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
    """Resolves img2img with these extras, or hatchling if the lock is "build"."""
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
    """A lock without these packages and their hashes."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    return "".join(block for block in blocks if block and block.partition("==")[0] not in set(packages))


def _save(name: str, text: str) -> None:
    path = DEPLOY / f"requirements-{name}.lock"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(pins(text))} packages")


def main() -> int:
    """Writes or checks the locks. Returns 0, or 1 if they are wrong or uv failed."""
    parser = argparse.ArgumentParser(
        prog="scripts/serving_lock",
        description="Writes the locks of the serving container images, with hashes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only check the locks; needs no network")
    parser.add_argument("--upgrade", action="store_true", help="upgrade packages that are not in requirements.lock")
    arguments = parser.parse_args()
    if not arguments.check:
        try:
            write(arguments.upgrade)
        except subprocess.CalledProcessError:
            return 1  # uv has printed the reason
    found = list(faults())
    for fault in found:
        print(f"serving_lock: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
