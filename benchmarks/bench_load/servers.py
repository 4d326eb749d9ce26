"""The compared servers, each in its own process. All except the measured one are stopped (SIGSTOP)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / ".demo" / "models" / "demo"
MODEL = ROOT / "demo" / "model"
START_SECONDS = 300
SERVERS = {
    "ours": "img2img serve",
    "lock": "optimum's pipeline behind a lock",
    "batching": "optimum's pipeline, whole requests batched",
    "pytorch": "diffusers on PyTorch behind a lock",
    "litserve": "LitServe around diffusers in bf16, whole requests batched",
    "bentoml": "BentoML around diffusers in bf16, whole requests batched",
}
"""Name -> description. In fp32 on a CPU without instructions for bf16."""
FIRST_SERVERS = ("ours", "lock", "batching", "pytorch")
"""The servers that are compared by default."""
OPTIMUM = ROOT / ".venv-oracle" / "bin" / "python"
"""The Python with optimum-onnx, which conflicts with the versions of requirements.lock."""
_WITH_OPTIMUM = ("lock", "batching")
PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The Python with LitServe and BentoML."""
_OVER_HTTP = ("litserve", "bentoml")


class ServerFailed(Exception):
    """The server did not start."""


def command(name: str, bundle: Path = BUNDLE, model: Path = MODEL, in_pytorch: bool = False) -> list[str]:
    """The command line of one of SERVERS, without --port-file. With `in_pytorch`, peers "lock" and "batching" run diffusers on
    PyTorch instead of optimum. Raises SystemExit if its environment is missing."""
    if name == "ours":
        return [sys.executable, "-m", "img2img_cli", "serve", "--models", str(bundle), "--port", "0"]
    if in_pytorch:
        module, *flags = ("pytorch",) if name == "lock" else (name, "--in-pytorch")
        return [sys.executable, "-m", f"bench_peers.{module}", *flags, "--model", str(model)]
    python = optimum_python() if name in _WITH_OPTIMUM else _peers_python() if name in _OVER_HTTP else sys.executable
    return [python, "-m", f"bench_peers.{name}", "--model", str(bundle if name in _WITH_OPTIMUM else model)]


def _peers_python() -> str:
    if not PEERS.is_file():
        raise SystemExit("bench: LitServe and BentoML need a separate environment; make it with scripts/peers_setup")
    return str(PEERS)


def optimum_python() -> str:
    """OPTIMUM. Raises SystemExit if it is missing."""
    if not OPTIMUM.is_file():
        raise SystemExit("bench: optimum's pipeline needs a separate environment; make it with scripts/oracle_setup")
    return str(OPTIMUM)


def knows_trace() -> bool:
    """Whether `img2img serve` has --trace."""
    words = [sys.executable, "-m", "img2img_cli", "serve", "--help"]
    return "--trace" in subprocess.run(words, check=True, capture_output=True, text=True).stdout


class ServerProcess:
    """One server process."""

    def __init__(self, name: str, words: Sequence[str], folder: Path) -> None:
        """Does not start it. Its log and port file are in `folder`."""
        self.name = name
        self.log = folder / f"{name}.log"
        self.target = ""
        self._words = words
        self._port_file = folder / f"{name}.port"
        self._process: subprocess.Popen[bytes] | None = None
        self._started: list[psutil.Process] = []  # its processes when it was stopped

    @property
    def pid(self) -> int:
        """The process id, after spawn()."""
        assert self._process is not None, "spawn() comes first"
        return self._process.pid

    def spawn(self) -> None:
        """Starts the process and returns at once."""
        self._port_file.unlink(missing_ok=True)
        scripts = str(ROOT / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH"))))}
        with self.log.open("wb") as log:
            words = [*self._words, "--port-file", str(self._port_file)]
            self._process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)

    def wait(self) -> None:
        """Returns when the server is ready. Raises ServerFailed, with the end of its log."""
        assert self._process is not None, "spawn() comes first"
        end = time.monotonic() + START_SECONDS
        while not self._port_file.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise ServerFailed(f"{self.name} did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
        scheme = "http://" if self.name in _OVER_HTTP else ""
        self.target = f"{scheme}127.0.0.1:{self._port_file.read_text().strip()}"

    @property
    def cpu_seconds(self) -> float:
        """The processor time of all its running processes."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self._family()))

    def _family(self) -> list[psutil.Process]:
        """Its process and all descendants, in any session."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]

    def pause(self) -> None:
        """Stops all its processes (SIGSTOP)."""
        for process in self._family():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continues all its processes (SIGCONT). Does nothing if it has ended."""
        if self._runs():
            for process in self._family():
                process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Sends SIGTERM to its first process, and continues them if they were paused."""
        if self._runs():
            self._started = self._family()
            os.kill(self.pid, signal.SIGTERM)
        self.resume()

    def join(self) -> None:
        """Waits for its end; kills it after a minute. Does nothing if it was not spawned."""
        if self._process is None:
            return
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process = None

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None


@contextlib.contextmanager
def started(commands: Mapping[str, Sequence[str]], folder: Path) -> Iterator[dict[str, ServerProcess]]:
    """Starts servers side by side, with their logs in `folder`, and gives them by name when all are ready. Ends them after the
    block."""
    servers = {name: ServerProcess(name, words, folder) for name, words in commands.items()}
    with ending(servers.values()):
        for server in servers.values():
            server.spawn()
        for server in servers.values():
            server.wait()
        yield servers


@contextlib.contextmanager
def ending(servers: Collection[ServerProcess]) -> Iterator[None]:
    """Ends all servers after the block."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
        for server in servers:
            server.join()
