"""Start and memory: seconds until the server is SERVING, and the memory of its processes then and after a request.

Folders with more models have copies of the bundle. Memory is PSS: pages that processes share count once.
"""

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from img2img_client import Client
from PIL import Image
from rich.console import Console
from rich.table import Table

BUNDLE = Path(__file__).resolve().parent.parent / ".demo" / "models" / "demo"
_MIB = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="DIR", help="a bundle (default: the demo model's)")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 4], metavar="N", help="copies of it (default: 1 4)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds; the median is reported (default: 3)")


def run(arguments: argparse.Namespace) -> int:
    """Starts servers in turns and prints a table. The first start of each number, which measures the models, is apart."""
    table = Table(
        "models", "first start, s", "SERVING, s", "CPU, s", "processes", "MiB at SERVING", "MiB after a request", "engine MiB",
        title=f"medians of {arguments.rounds} starts, in turns",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        stores = {count: _store(Path(folder) / str(count), arguments.bundle, count) for count in arguments.models}
        first = {count: _start(store) for count, store in stores.items()}
        later: dict[int, list[_Start]] = {count: [] for count in stores}
        for _ in range(arguments.rounds):
            for count, store in stores.items():
                later[count].append(_start(store))
    for count, starts in later.items():
        seconds, cpu = (statistics.median(values) for values in ([s.seconds for s in starts], [s.cpu for s in starts]))
        memory = [statistics.median(values) for values in ([s.serving for s in starts], [s.used for s in starts])]
        engine = statistics.median(s.engine for s in starts)
        numbers = (f"{seconds:.1f}", f"{cpu:.1f}", str(starts[0].processes), *(f"{value:.0f}" for value in (*memory, engine)))
        table.add_row(str(count), f"{first[count].seconds:.1f}", *numbers)
    Console(width=120).print(table)
    return 0


@dataclass(frozen=True, slots=True)
class _Start:
    """A server's start: `seconds` until SERVING, `cpu` seconds of all its processes until then, and their memory in MiB: then,
    after a request, and of the engine's process alone."""

    seconds: float
    cpu: float
    processes: int
    serving: float
    used: float
    engine: float


def _store(root: Path, bundle: Path, count: int) -> Path:
    """A folder `root`/models with `count` copies of the bundle, whose folders have equal names in no other store."""
    for number in range(count):
        shutil.copytree(bundle, root / "models" / f"copy-{number}")
    return root


def _start(root: Path) -> _Start:
    """Starts a server of the models in a store, and sends it a request."""
    port_file = root / "port"
    command = [sys.executable, "-m", "img2img_cli", "serve", "--models", str(root / "models"), "--preload", "all"]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [
            *command,
            "--default-model",
            "copy-0",
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--engine-cache",
            str(root / "cache"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not port_file.exists():
            if process.poll() is not None:
                raise SystemExit("bench: the server did not start")
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        own = psutil.Process(process.pid)
        family = [own, *own.children(recursive=True)]
        cpu = sum(sum(one.cpu_times()[:2]) for one in family)
        serving = _mebibytes(family)
        with Client(f"127.0.0.1:{port_file.read_text().strip()}", timeout=60) as client:
            client.transform(_image(), prompt="A lake", seed=1)
        return _Start(seconds, cpu, len(family), serving, _mebibytes(family), _mebibytes([own]))
    finally:
        process.terminate()
        process.wait(60)
        port_file.unlink(missing_ok=True)


def _image() -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _mebibytes(processes: Sequence[psutil.Process]) -> float:
    return float(sum(process.memory_full_info().pss for process in processes) / _MIB)
