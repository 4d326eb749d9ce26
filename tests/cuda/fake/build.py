"""Builds fake CUDA libraries for the binaries of an environment: python build.py SITE_PACKAGES OUT

Reads which CUDA functions ONNX Runtime's and PyTorch's libraries import, and makes a library for each name that they link with:
the functions written by hand beside this file, and for every other function a stub that is counted and returns 0. Needs g++,
nm and readelf. OUT is reused if neither the sources nor the versions of the binaries changed.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
READY = ".ready"
TOOLS = {"g++": "g++", "nm": "binutils", "readelf": "binutils"}
"""The programs that are needed, and the Debian packages that have them."""
BY_HAND: dict[str, tuple[str, tuple[str, ...]]] = {
    "libcudart.so": ("cudart.cpp", ()),
    "libcuda.so": ("driver.cpp", ()),
    "libcudnn.so": ("cudnn.cpp", ()),
    "libcublas.so": ("cublas.cpp", ()),
    "libcublasLt.so": ("cublas.cpp", ("-DFC_CUBLASLT",)),
}
PREFIXES = (
    ("cublasLt", "libcublasLt.so.13"),
    ("cublas", "libcublas.so.13"),
    ("cudnn", "libcudnn.so.9"),
    ("cufft", "libcufft.so.12"),
    ("curand", "libcurand.so.10"),
    ("cusparseLt", "libcusparseLt.so.0"),
    ("cusparse", "libcusparse.so.12"),
    ("cusolver", "libcusolver.so.12"),
    ("cupti", "libcupti.so.13"),
    ("cuFile", "libcufile.so.0"),
    ("nccl", "libnccl.so.2"),
    ("nvrtc", "libnvrtc.so.13"),
    ("nvshmem", "libnvshmem_host.so.3"),
    ("cuda", "libcudart.so.13"),
    ("cu", "libcuda.so.1"),
)
"""The library of a function whose name has no version: that of the first matching prefix."""
ALWAYS = ("cudart.so.13", "cuda.so.1", "cublas.so.13", "cublasLt.so.13", "cudnn.so.9", "curand.so.10", "cufft.so.12")
NAME = re.compile(r"(?:__cuda|cuda|cu[A-Z]|cublas|cudnn|cufft|curand|cusparse|cusolver|cupti|nccl|nvrtc|nvshmem)\w*")
LOADED_LATER = re.compile(rb"(?<=\0)(?:cu[A-Z]|cudnn[A-Z]|cufft[A-Z]|curand[A-Z])\w{2,80}(?=\0)")
"""Functions that are looked up at run time: a binary has their names as text."""
UNVERSIONED = ("libcuda.so", "libnccl", "libcusparseLt", "libcufile")
TEXTS = re.compile(r"String|Name$")
MACROS = """
#define STUB(name) FC_API int name(void* first) { return fc::stub(#name, first); }
#define MAKER(name) \\
  FC_API int name(void** made) { if (int code = fc::enter(#name)) return code; *made = fc::make_handle(#name); return 0; }
#define TEXT(name) FC_API const char* name() { return "fake"; }
#define NUMBER(name) FC_API int name(int* number) { if (int code = fc::enter(#name)) return code; *number = 0; return 0; }
"""
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused-result", f"-I{HERE}")


def run(*command: str | Path) -> str:
    """The output of a command. Raises SystemExit with what it printed if it fails."""
    done = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def consumers(site: Path) -> list[Path]:
    """The binaries that call CUDA. Raises SystemExit if a package is missing."""
    found = []
    for package, pattern in (("onnxruntime-gpu", "onnxruntime/capi/*.so*"), ("torch", "torch/lib/lib*.so*")):
        paths = sorted(site.glob(pattern))
        if not paths:
            sys.exit(f"{site} has no {package}: scripts/cuda_setup installs it")
        found += paths
    return found


def digest(paths: Sequence[Path]) -> str:
    """The digest of the sources here, and of the names, sizes and times of the binaries."""
    found = hashlib.sha256()
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".cpp", ".h", ".py"):
            found.update(path.read_bytes())
    for path in paths:
        found.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return found.hexdigest()


def imported(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """For each library: its functions, each with its version ("" for none)."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    later: set[str] = set()
    for path in paths:
        for name, version in undefined(path):
            home = version if re.fullmatch(r"lib\w+\.so\.\d+", version) else home_of(name)
            if home:
                found[home][name] = version
        later.update(match.decode() for match in LOADED_LATER.findall(path.read_bytes()))
        for needed in re.findall(r"\(NEEDED\).*\[(\S+)\]", run("readelf", "-d", path)):
            if home_of(needed.removeprefix("lib")) or needed.startswith("libnvshmem"):
                found.setdefault(needed, {})
    for name in sorted(later):
        if home := home_of(name):
            versioned = home.startswith(("libcudnn", "libcufft", "libcurand"))
            found[home].setdefault(name, home if versioned else "")
    for library in ALWAYS:
        found.setdefault(f"lib{library}", {})
    return found


def undefined(path: Path) -> Iterator[tuple[str, str]]:
    """The CUDA functions that a binary imports, each with its version ("" for none)."""
    for line in run("nm", "-D", "--undefined-only", path).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if NAME.fullmatch(name):
            yield name, version


def home_of(name: str) -> str | None:
    """The library that has the function `name`."""
    bare = name.removeprefix("__")
    return next((library for prefix, library in PREFIXES if bare.startswith(prefix)), None)


def stub(name: str) -> str:
    """The C++ of a stub."""
    if (
        TEXTS.search(name)
        and name.startswith(("cu", "nccl", "nvrtc"))
        and "Get" in name
        and not name.startswith(("cuDevice", "cuFunc"))
    ):
        return f"TEXT({name})"
    if name == "cufftCreate" or name.endswith("GetVersion"):
        return f"NUMBER({name})"
    if "Create" in name and not name.startswith("cuFile"):
        return f"MAKER({name})"
    return f"STUB({name})"


def make(library: str, functions: dict[str, str], out: Path, work: Path) -> None:
    """Compiles one library, with `work` as its folder of intermediate files."""
    source, extra = BY_HAND.get(re.sub(r"\.\d+$", "", library), ("", ()))
    objects, written = [work / "stubs.o"], set()
    if source:
        objects.append(work / "hand.o")
        run("g++", *FLAGS, *extra, "-c", HERE / source, "-o", objects[-1])
        written = {line.split()[-1] for line in run("nm", "--defined-only", "-g", objects[-1]).splitlines()}
    stubs = "\n".join(map(stub, sorted(set(functions) - written)))
    (work / "stubs.cpp").write_text(f'#include "core.h"\n{MACROS}{stubs}\n')
    run("g++", *FLAGS, "-c", work / "stubs.cpp", "-o", objects[0])
    script = work / "versions"
    version = next((version for version in functions.values() if version), library)
    script.write_text(f"{version} {{ global: *; }};\n")
    versions = () if library.startswith(UNVERSIONED) else (f"-Wl,--version-script={script}",)
    link = (f"-L{out}", "-lfakecuda", "-Wl,-rpath,$ORIGIN", "-ldl")
    run("g++", "-shared", f"-Wl,-soname,{library}", *versions, *objects, "-o", out / library, *link)


def build(site: Path, out: Path) -> bool:
    """Makes the libraries in `out`. False if they exist already."""
    if missing := sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None}):
        sys.exit(f"the fake CUDA libraries need {', '.join(TOOLS)}: install {' and '.join(missing)} (apt-get install ...)")
    paths = consumers(site)
    want, ready = digest(paths), out / READY
    if ready.is_file() and ready.read_text() == want:
        return False
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    core = ("-shared", "-Wl,-soname,libfakecuda.so", "-fvisibility=default", "-lpthread", "-ldl")
    run("g++", *FLAGS, HERE / "core.cpp", "-o", out / "libfakecuda.so", *core)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        works = []
        for library, functions in imported(paths).items():
            work = Path(folder) / library
            work.mkdir()
            works.append(pool.submit(make, library, functions, out, work))
        for each in works:
            each.result()
    ready.write_text(want)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="the site-packages folder with onnxruntime-gpu and torch")
    parser.add_argument("out", type=Path, help="the folder for the libraries")
    arguments = parser.parse_args()
    build(arguments.site, arguments.out)
