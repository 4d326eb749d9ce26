"""Packs the files that `scripts/gpu_check` needs on a machine with PyTorch for CUDA but without network, and unpacks them there.

Packed are graphs without weights, diffusers, and ONNX Runtime's CUDA build with the code for one GPU architecture. The machine
needs the checkout, CUDA, cuDNN, transformers, onnx, numpy and Pillow. The archive is split, for machines that limit the size of a
copy.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_UNUSED = (
    *("onnxruntime/transformers/", "onnxruntime/tools/", "onnxruntime/quantization/", "onnxruntime/capi/libonnxruntime.so"),
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
)
"""Parts of ONNX Runtime's wheel that a session in Python does not need."""


def main(words: Sequence[str] | None = None) -> int:
    """Packs or unpacks. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder for the pieces (FOLDER/1, FOLDER/2 ...); with --unpack, the folder of one piece")
    add("target", type=Path, nargs="?", help="with --unpack: folder to unpack to; pieces are kept there until all are present")
    add("--unpack", action="store_true", help="unpack a piece on the other machine (standard library only)")
    add("--graphs", type=Path, metavar="DIR", help="folder of graphs; missing ones are made (default: FOLDER/graphs)")
    add("--piece", type=int, default=32, metavar="MIB", help="maximum MiB of a piece (default: %(default)s)")
    add("--python", default="3.12", metavar="X.Y", help="Python version of the other machine (default: %(default)s)")
    add(
        "--arch",
        type=int,
        default=90,
        metavar="N",
        help="GPU: 80 A100, 89 L4, 90 H100 and H200 (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    if arguments.unpack:
        if arguments.target is None:
            parser.error("--unpack needs a folder to unpack into: scripts/gpu_check_pack --unpack .gpu/1 /tmp/gpu")
        return unpack(arguments.folder, arguments.target)
    graphs = arguments.graphs or arguments.folder / "graphs"
    make_graphs(graphs)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        _packages(tree / "site", arguments.python, arguments.arch)
        shutil.copytree(graphs, tree / "graphs")
        print("compressing ...", flush=True)
        packed = Path(scratch) / "packed.tar.xz"
        with tarfile.open(packed, "w:xz", preset=9) as made:
            for item in sorted(tree.iterdir()):
                made.add(item, item.name)
        for piece in cut(packed, arguments.folder, arguments.piece * 2**20):
            print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")
    return 0


def make_graphs(folder: Path) -> None:
    """Makes the fp16 graphs of all models that are not in `folder`."""
    from gpu_check import models, weightless
    from gpu_check.settings import READY_NAME

    for name in models.NAMES:
        if not (folder / name / READY_NAME).is_file():
            print(f"making the graphs of {name} ...", flush=True)
            weightless.make(name, folder / name, "fp16")


def cut(packed: Path, out: Path, most: int) -> list[Path]:
    """Splits a file into the fewest pieces of at most `most` bytes, of about equal size, each in its own folder."""
    size = packed.stat().st_size
    count = -(-size // most)
    pieces = []
    with packed.open("rb") as file:
        for number in range(1, count + 1):
            folder = out / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            pieces.append(folder / f"piece-{number}-of-{count}")
            pieces[-1].write_bytes(file.read(-(-size // count)))
    return pieces


def unpack(folder: Path, target: Path) -> int:
    """Keeps the piece in `folder` and unpacks all pieces once they are complete. Returns the exit status."""
    found = [path for path in folder.glob("piece-*-of-*") if re.fullmatch(r"piece-\d+-of-\d+", path.name)]
    if not found:
        print(f"{folder} has no file piece-N-of-M: give the folder of one piece, such as .gpu/1", file=sys.stderr)
        return 1
    kept = target / "pieces"
    kept.mkdir(parents=True, exist_ok=True)
    for path in found:
        shutil.copyfile(path, kept / path.name)
    count = int(found[0].name.rpartition("-")[2])
    pieces = [kept / f"piece-{number}-of-{count}" for number in range(1, count + 1)]
    if missing := [piece.name for piece in pieces if not piece.is_file()]:
        print(f"kept {', '.join(path.name for path in found)}; missing: {', '.join(missing)}")
        return 0
    whole = target / "packed.tar.xz"
    with whole.open("wb") as file:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)
    with tarfile.open(whole) as archive:
        archive.extractall(target, filter="data")
    whole.unlink()
    _link_nvidia(target / "site")
    print(f"unpacked; now: scripts/gpu_check --packed {target} --out FILE")
    return 0


def keep_architecture(library: bytes, architecture: int) -> bytes:
    """A CUDA library with zeros instead of the machine code of all other architectures, so that it compresses well.

    Offsets do not change. Fat binaries are found by their magic number: a header of 16 bytes with the size of the entries.
    An entry has a kind (2 is machine code, 1 is PTX), the sizes of its header and its payload, and an architecture.
    """
    result = bytearray(library)
    start = 0
    while (at := library.find(b"\x50\xed\x55\xba", start)) >= 0:
        version, header = (int.from_bytes(library[at + place : at + place + 2], "little") for place in (4, 6))
        end = at + header + int.from_bytes(library[at + 8 : at + 16], "little")
        if version != 1 or header != 16 or end > len(library):
            start = at + 4
            continue
        entry = at + header
        while entry < end:
            kind = int.from_bytes(library[entry : entry + 2], "little")
            payload = entry + int.from_bytes(library[entry + 4 : entry + 8], "little")
            following = payload + int.from_bytes(library[entry + 8 : entry + 16], "little")
            if kind == 2 and int.from_bytes(library[entry + 28 : entry + 32], "little") != architecture:
                result[payload:following] = bytes(following - payload)
            entry = following
        start = end
    return bytes(result)


def _packages(site: Path, python: str, architecture: int) -> None:
    """Unpacks ONNX Runtime's CUDA build and diffusers, of the versions in requirements.lock, into `site`."""
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", (_ROOT / "requirements.lock").read_text(), re.MULTILINE))
    requirements = [f"onnxruntime-gpu=={locked['onnxruntime']}", f"diffusers=={locked['diffusers']}"]
    with ExitStack() as stack:
        wheels = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"downloading {' and '.join(requirements)} ...", flush=True)
        platforms = [word for number in (28, 27, 17) for word in ("--platform", f"manylinux_2_{number}_x86_64")]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
        target = ["--python-version", python, "--implementation", "cp", *platforms]
        subprocess.run([*command, *target, *requirements], check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            archive = stack.enter_context(zipfile.ZipFile(wheel))
            archive.extractall(site, [name for name in archive.namelist() if not name.startswith(_UNUSED)])
    library = site / _LIBRARY
    library.write_bytes(keep_architecture(library.read_bytes(), architecture))


def _link_nvidia(site: Path) -> None:
    """Links NVIDIA's wheels into `site`, where ONNX Runtime looks for them."""
    found = importlib.util.find_spec("nvidia")
    link = site / "nvidia"
    if found is not None and found.submodule_search_locations and not link.exists():
        link.symlink_to(next(iter(found.submodule_search_locations)), target_is_directory=True)


if __name__ == "__main__":
    sys.exit(main())
