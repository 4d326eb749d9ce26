"""The servers that are compared, each in a process of its own. All but the one that is measured stand still (SIGSTOP)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / ".demo" / "models" / "demo"
MODEL = ROOT / "demo" / "model"
START_SECONDS = 300
SERVERS = {
    "ours": "img2img serve",
    "lock": "optimum's pipeline behind a lock",
    "batching": "optimum's pipeline, whole requests batched",
    "pytorch": "diffusers on PyTorch behind a lock",
}
"""Name -> what it is."""
OPTIMUM = ROOT / ".venv-oracle" / "bin" / "python"
"""Runs what needs optimum-onnx: that package does not install beside the versions of requirements.lock."""
_WITH_OPTIMUM = ("lock", "batching")


class ServerFailed(Exception):
    """A server that did not start."""


def command(name: str, bundle: Path = BUNDLE, model: Path = MODEL) -> list[str]:
    """The command line of one of SERVERS, but for its --port-file. Raises SystemExit if its environment is missing."""
    if name == "ours":
        return [sys.executable, "-m", "img2img_cli", "serve", "--models", str(bundle), "--port", "0"]
    python = optimum_python() if name in _WITH_OPTIMUM else sys.executable
    return [python, "-m", f"bench_peers.{name}", "--model", str(model if name == "pytorch" else bundle)]


def optimum_python() -> str:
    """OPTIMUM. Raises SystemExit if it is missing."""
    if not OPTIMUM.is_file():
        raise SystemExit("bench: optimum's pipeline needs an environment of its own; make it by scripts/oracle_setup")
    return str(OPTIMUM)


def knows_trace() -> bool:
    """Whether `img2img serve` can write what its engine did."""
    words = [sys.executable, "-m", "img2img_cli", "serve", "--help"]
    return "--trace" in subprocess.run(words, check=True, capture_output=True, text=True).stdout


class ServerProcess:
    """One server: started, stopped for a while, continued, ended."""

    def __init__(self, name: str, words: Sequence[str], folder: Path) -> None:
        """Nothing runs yet. Its log and its port file go into `folder`."""
        self.name = name
        self.log = folder / f"{name}.log"
        self.target = ""
        self._words = words
        self._port_file = folder / f"{name}.port"
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Starts the process and returns at once."""
        self._port_file.unlink(missing_ok=True)
        scripts = str(ROOT / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH"))))}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._words, "--port-file", str(self._port_file)], env=environment, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Returns when the server is ready. Raises ServerFailed, with the end of its log."""
        assert self._process is not None, "spawn() comes first"
        end = time.monotonic() + START_SECONDS
        while not self._port_file.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise ServerFailed(f"{self.name} did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
        self.target = f"127.0.0.1:{self._port_file.read_text().strip()}"

    def pause(self) -> None:
        """Lets it use nothing but memory."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Asks it to end, lets it go on where it was paused, and returns at once."""
        self._signal(signal.SIGTERM)
        self.resume()

    def join(self) -> None:
        """Returns when it has ended; kills it after a minute. Does nothing for one that was not spawned."""
        if self._process is None:
            return
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


@contextlib.contextmanager
def ending(servers: Collection[ServerProcess]) -> Iterator[None]:
    """Whatever happens in the block, none of the servers outlives it."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
        for server in servers:
            server.join()
