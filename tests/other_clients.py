"""Shared by tests of clients in other languages: their location, running their programs, and authorized servers."""

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from fakes import FakePipeline, FakeState
from kserve_calls import Calls, ending
from running import running, store

CLIENTS = REPOSITORY / "clients"
IMAGE = REPOSITORY / "demo" / "images" / "noon-lake.png"

PATIENCE = 60.0
"""Seconds after which a test that waits for an event has failed."""

Finished = subprocess.CompletedProcess[str]

Run = Callable[..., Finished]
"""Runs a program of clients/node/examples, or one that is given as text, with arguments. `target` is the server that it calls by
default."""


@dataclass(frozen=True, slots=True)
class Secured:
    """A server with TLS and tokens, and the files of a client that may call it."""

    port: int
    ca: Path
    token: Path


STEPS = 12
"""The steps of a request that is cancelled; at the default strength the model runs nine of them."""


class HeldPipeline(FakePipeline):
    """Computes the first step of a request at once and each other when `may_step` allows it. `calls` are its server's."""

    calls: Calls

    def __init__(self) -> None:
        super().__init__()
        self.may_step = threading.Semaphore(1)
        self.over = threading.Event()
        self.before["denoise"] = self._wait

    def _wait(self) -> None:
        assert self.may_step.acquire(timeout=PATIENCE)

    def release(self, state: FakeState) -> None:
        super().release(state)
        self.over.set()

    def end_of_call(self, method: str) -> str:
        """The status of the next call of this method that ends at the server. After that, its request only finishes the current
        step."""
        status = self.calls.wait(method)
        self.may_step.release(STEPS)
        assert self.over.wait(PATIENCE)
        assert len(self.batches) <= 2, "the first step, and one that had begun"
        return status


@contextlib.contextmanager
def holding() -> Iterator[tuple[HeldPipeline, str]]:
    """A pipeline that waits, and its server's address."""
    pipeline = HeldPipeline()
    with ending() as pipeline.calls, running(lambda: store(m=pipeline)) as server:
        yield pipeline, f"localhost:{server.port}"
        pipeline.may_step.release(STEPS)


def environment(target: str = "") -> dict[str, str]:
    """This process's environment without the client's variables; `target` sets the server's address."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("IMG2IMG_")}
    return own | ({"IMG2IMG_TARGET": target} if target else {})


@contextlib.contextmanager
def started(node: Path, program: str, *arguments: object, target: str = "") -> Iterator[Any]:
    """A program that runs beside the test; its standard input and output are pipes."""
    program = program.replace("img2img-client", (CLIENTS / "node" / "src" / "index.js").as_uri())
    command = [str(node), "--input-type=module", "--eval", program, "--", *map(str, arguments)]
    with subprocess.Popen(command, env=environment(target), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def blocks(document: Path, language: str) -> list[str]:
    """The blocks of a document that are in a language, in order. ValueError if it has none: then nothing would be tested."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"{document} has no block of {language}")
    return found


def succeeded(result: Finished) -> list[str]:
    """The output lines of a program that exited with 0."""
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def failed(result: Finished) -> list[str]:
    """The lines in which a program reported its failed call."""
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr.splitlines()
