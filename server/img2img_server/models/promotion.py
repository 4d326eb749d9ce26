"""Promotion: a better engine of a model is built in the background, tried beside the one that serves, and only then takes over.

Nothing here blocks a request. Building is somebody else's process; loading is on a thread of its own; trying is done by ordinary
requests of the lowest rank through the engine, which takes turns with everybody's, a call at a time. Whatever goes wrong, the
engine that serves goes on serving.
"""

import logging
import queue
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from PIL import Image

from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Ending, Event, Failed, Pipeline, Request
from img2img_server.errors import BundleError, QueueFull, ServerError
from img2img_server.models.memory import Closable, let_go
from img2img_server.models.registry import EngineState, EngineStatus, ModelRegistry
from img2img_server.support.cancellation import Stop, Stopped

_log = logging.getLogger(__name__)

_ROUNDS = 3
"""Times that each of the two engines draws the first trial, in turns, to be timed."""
_GAIN = 0.02
"""The share of a step's time that a promotion must save: less could be chance."""
_UNKNOWN_REASON = "the server's log says why"


class Candidate(Protocol):
    """A better engine for a model, such as TensorRT where CUDA serves: how it is built, loaded and judged.

    `build`, `load`, `trials` and `judge` are called once, in this order, on a thread of the promotion's. A BundleError or OSError
    that one raises ends the attempt. What `judge` says is told to callers.
    """

    model: str
    """The id of the model."""
    engine: str
    """What it will run on, such as "onnx:tensorrt"."""

    def build(self, tell: Callable[[str, float], None], stop: Stop) -> None:
        """Builds what is to be loaded, or finds it built. Tells what it does and the share that is done, from 0 to 1.

        Raises Stopped soon after `stop` is asked.
        """
        ...

    def load(self) -> Pipeline:
        """The pipeline, ready to run, whose states are of the same kind as those of the one that serves."""
        ...

    def trials(self) -> Sequence[Request]:
        """Requests whose images are to be judged, of one seed each; their `model` is not looked at."""
        ...

    def judge(self, pictures: Sequence[Image.Image]) -> str:
        """What is wrong with the images of the trials, in a line; "" where they are right."""
        ...

    def settle(self) -> None:
        """Waits until the device has done all that it was asked. Called on the engine's thread, as often as need be."""
        ...


class _Timed:
    """A pipeline whose calls of the model are timed, each by itself: what was asked of the device before is waited for, and what
    is asked is, too. The engine's own times leave that out, where a device works on after a call."""

    def __init__(self, pipeline: Pipeline, settle: Callable[[], object], clock: Callable[[], float]) -> None:
        self._pipeline = pipeline
        self._settle = settle
        self._clock = clock
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def denoise(self, states: Sequence[Any]) -> Sequence[Any]:
        self._settle()
        begun = self._clock()
        noises = self._pipeline.denoise(states)
        self._settle()
        self.seconds.append(self._clock() - begun)
        return noises


class Promotion:
    """Gives each candidate its chance, one after the other, once `start` is called.

    How each is doing is in `models`, for GetModel to tell.
    """

    def __init__(self, engine: Engine, models: ModelRegistry, candidates: Sequence[Candidate]) -> None:
        self._engine = engine
        self._models = models
        self._candidates = list(candidates)
        self._stopping = False
        self._changed = threading.Condition()
        self._current = ""
        self._stop = Stop()
        self._thread = threading.Thread(target=self._run, name="img2img-promotion", daemon=True)

    def start(self) -> None:
        """Starts the first build. Does nothing where nobody contends."""
        for candidate in self._candidates:
            self._tell(candidate, EngineState.BUILDING, "waits for its turn")
        if self._candidates:
            self._thread.start()

    def stop(self) -> None:
        """Gives up what is under way, and returns at once: builds are killed, requests of ours are cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._stop.ask()

    def withdraw(self, model: str) -> None:
        """Gives up what contends for `model`, and returns once nothing of it is left: the model is about to be unloaded. Does not
        wait any more once all is to end: a pipeline that is being loaded cannot be stopped.

        It gets no other chance: candidates are made for the models that were loaded at start.
        """
        with self._changed:
            self._candidates = [candidate for candidate in self._candidates if candidate.model != model]
            if self._current == model:
                self._stop.ask()
            self._changed.wait_for(lambda: self._current != model or self._stopping)

    def join(self, timeout: float | None = None) -> bool:
        """Waits until nothing is under way. False where `timeout` seconds were too few, as they may be for a pipeline to load."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._give_chance():
            with self._changed:
                # Of a candidate that had its chance, nothing is left now.
                self._current = ""
                self._changed.notify_all()

    def _give_chance(self) -> bool:
        """Lets the next one try. False where there is none, or all is to end."""
        with self._changed:
            if self._stopping or not self._candidates:
                self._current = ""
                self._changed.notify_all()
                return False
            candidate = self._candidates.pop(0)
            self._current, self._stop = candidate.model, Stop()
        try:
            self._attempt(candidate)
        except Stopped:
            why = "the server is shutting down" if self._stopping else "the model was unloaded"
            self._tell(candidate, EngineState.FAILED, why)
        except ServerError as error:
            self._tell(candidate, EngineState.FAILED, str(error))
        except (BundleError, OSError) as error:
            _log.error("model '%s': %s: %s", candidate.model, candidate.engine, error)
            self._tell(candidate, EngineState.FAILED, _UNKNOWN_REASON)
        except Exception:  # noqa: BLE001 - whatever a build or a library raises: the engine that serves goes on
            _log.exception("model '%s': %s failed", candidate.model, candidate.engine)
            self._tell(candidate, EngineState.FAILED, _UNKNOWN_REASON)
        return True

    def _attempt(self, candidate: Candidate) -> None:
        candidate.build(lambda step, done: self._tell(candidate, EngineState.BUILDING, step, done), self._stop)
        self._stop.check()
        self._tell(candidate, EngineState.CHECKING, "loading")
        pipeline = candidate.load()
        serving = self._models.get(candidate.model).pipeline
        assert serving is not None, "only what is served can be taken over"
        loser = pipeline
        try:
            problem, report = self._try(candidate, pipeline, serving)
            if not problem:
                # It is not unloaded meanwhile: that waits until the attempt is over.
                self._engine.replace(candidate.model, pipeline)
                self._models.change(candidate.model, pipeline=pipeline)
                loser = serving
        finally:
            losers: list[Closable] = [loser]
            del pipeline, serving, loser  # the list's is to be the last
            let_go(losers, lambda close: self._engine.call(candidate.model, close))
        if problem:
            return self._tell(candidate, EngineState.REJECTED, problem)
        self._tell(candidate, EngineState.SERVING, report, 1.0)

    def _try(self, candidate: Candidate, pipeline: Pipeline, serving: Pipeline) -> tuple[str, str]:
        """Why `pipeline` must not take over, "" where it may; and how it did."""
        trials = [replace(trial, background=True, deadline=None) for trial in candidate.trials()]
        if not trials:
            return "the bundle has no reference images to compare with", ""
        # Names that no request can have: a model's id is that of a folder.
        new, old = f"{candidate.model}/{candidate.engine}", f"{candidate.model}/{serving.engine}"
        timed = {name: _Timed(runs, candidate.settle, self._engine.clock) for name, runs in ((new, pipeline), (old, serving))}
        for name, runs in timed.items():
            self._engine.replace(name, cast(Pipeline, runs))
        try:
            done, count = 0, len(trials) + 2 * _ROUNDS
            pictures = []
            for trial in trials:
                self._tell(candidate, EngineState.CHECKING, "drawing", done / count)
                pictures.append(self._draw(replace(trial, model=new)))
                done += 1
            if problem := candidate.judge(pictures):
                return problem, ""
            timed[new].seconds.clear()
            for name in (old, new) * _ROUNDS:
                self._tell(candidate, EngineState.CHECKING, "timing", done / count)
                self._draw(replace(trials[0], model=name))
                done += 1
            # The middle one: what a first call takes counts for little.
            took, takes = (statistics.median(timed[name].seconds) * 1e3 for name in (new, old))
        finally:
            for name in timed:
                self._engine.remove(name)
        report = f"a step takes {took:.2f} ms, on {serving.engine} {takes:.2f} ms"
        return ("" if took < takes * (1 - _GAIN) else f"not faster: {report}"), report

    def _draw(self, request: Request) -> Image.Image:
        """The image of a request of ours. Raises Stopped, or what the request ended with."""
        endings: queue.SimpleQueue[Ending] = queue.SimpleQueue()

        def listen(event: Event) -> None:
            if isinstance(event, Completed | Failed):
                endings.put(event)

        while True:
            self._stop.check()
            try:
                ticket = self._engine.submit(request, listen).ticket
                break
            except QueueFull as error:
                self._stop.wait(error.retry_after)
        with self._stop.ending(ticket.cancel):
            ending = endings.get()
        self._stop.check()
        if isinstance(ending, Failed):
            raise ending.error
        return ending.images[0]

    def _tell(self, candidate: Candidate, state: EngineState, detail: str, progress: float = 0.0) -> None:
        """Notes how a candidate is doing. The log hears of it where it is something new."""
        engines = self._models.get(candidate.model).engines
        before = next((status for status in engines if status.name == candidate.engine), None)
        self._models.note(candidate.model, EngineStatus(candidate.engine, state, detail, progress))
        if before is None or (before.state, before.detail) != (state, detail):
            level = logging.WARNING if state in (EngineState.REJECTED, EngineState.FAILED) else logging.INFO
            _log.log(level, "model '%s': %s: %s: %s", candidate.model, candidate.engine, state.name.lower(), detail)
