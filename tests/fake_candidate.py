"""A candidate whose engine is built by a real process at a test's pace, and a store that notifies of engine states."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fakes import make_request
from img2img_server.engine.request import Pipeline, Request
from img2img_server.models.registry import EngineState, EngineStatus, Model, ModelRegistry
from img2img_server.runtime.tensorrt.build import run_build
from img2img_server.runtime.tensorrt.cache import EngineCache
from img2img_server.support.cancellation import Stop
from PIL import Image
from running import manifest

ENGINE = "fake:better"

_BUILDER = """
import os, pathlib, signal, sys
from img2img_server.runtime.tensorrt.build import read_job, report_to_parent
job = read_job()
print("a library prints what it likes")
report_to_parent(step="half of it", progress=0.5)
with open(job["gate"]) as gate:
    word = gate.read()
if word == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "fail":
    report_to_parent(problem="told to")
    sys.exit(1)
pathlib.Path(job["folder"], "engine").write_text(word)
"""


class WatchedStore(ModelRegistry):
    """A store with one model, "m", that records the states of engines."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__([Model("m", manifest("acme/m"), pipeline)], default="m")
        self.story: list[EngineStatus] = []
        self._noted = threading.Condition()

    def note(self, name: str, status: EngineStatus) -> None:
        super().note(name, status)
        with self._noted:
            self.story.append(status)
            self._noted.notify_all()

    def wait_for(self, *states: EngineState, detail: str = "") -> EngineStatus:
        """The first status of one of these states, and with that in its detail."""

        def found() -> list[EngineStatus]:
            return [status for status in self.story if status.state in states and detail in status.detail]

        with self._noted:
            assert self._noted.wait_for(found, 60), self.story
            return found()[0]

    def end(self) -> EngineStatus:
        """How the attempt ended, once it has."""
        return self.wait_for(EngineState.SERVING, EngineState.REJECTED, EngineState.FAILED)


class FakeCandidate:
    """Its build waits for `let`. It loads `pipeline`; `problem` is the result of its accuracy check."""

    model = "m"
    engine = ENGINE

    def __init__(self, folder: Path, pipeline: Pipeline, problem: str = "", trials: int = 2, version: int = 1) -> None:
        self.pipeline, self.problem, self.version = pipeline, problem, version
        self.before_load: Callable[[], object] = lambda: None
        self.cache = EngineCache(folder / "cache")
        self.entry = folder
        self.built = self.settled = 0
        self.stop = Stop()
        self._trials = trials
        self._gate = folder / "gate"
        if not self._gate.exists():
            os.mkfifo(self._gate)

    def let(self, word: str = "right") -> None:
        """Lets the build continue once it has begun."""
        self._gate.write_text(word)

    def build(self, tell: Callable[[str, float], None], stop: Stop) -> None:
        self.stop = stop

        def build(folder: Path) -> None:
            self.built += 1
            job = {"folder": str(folder), "gate": str(self._gate)}
            run_build([sys.executable, "-c", _BUILDER], job, tell, stop)

        self.entry = self.cache.obtain({"version": self.version}, build, stop)

    def load(self) -> Pipeline:
        self.before_load()
        assert (self.entry / "engine").read_text() == "right"
        return self.pipeline

    def trials(self) -> Sequence[Request]:
        return [make_request(prompt=f"trial {number}") for number in range(self._trials)]

    def settle(self) -> None:
        self.settled += 1

    def judge(self, images: Sequence[Image.Image]) -> str:
        assert len(images) == self._trials
        return self.problem
