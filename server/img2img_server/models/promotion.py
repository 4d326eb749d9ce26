"""Promotion: a better engine of a model is built in the background, tested beside the serving one, and then replaces it.

Nothing here blocks a request. A candidate is built in a child process, loaded on a separate thread, and tested by requests of the
lowest priority, one call at a time. If anything fails, the serving engine is kept.
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
from img2img_server.models.memory import let_go
from img2img_server.models.registry import EngineState, EngineStatus, ModelRegistry
from img2img_server.support.cancellation import Stop, Stopped

_log = logging.getLogger(__name__)

_ROUNDS = 3
"""Number of timed draws of the first trial by each of the two engines, alternating."""
_GAIN = 0.02
"""Minimum share of a step's time that a promotion must save: less could be noise."""
_UNKNOWN_REASON = "the server's log says why"


class Candidate(Protocol):
    """A better engine for a model, such as TensorRT instead of CUDA.

    `build`, `load`, `trials` and `judge` are called once, in this order, on the promotion's thread. A BundleError or OSError ends
    the attempt. The text that `judge` returns is shown to callers.
    """

    model: str
    """The id of the model."""
    engine: str
    """The engine's name, such as "onnx:tensorrt"."""

    def build(self, tell: Callable[[str, float], None], stop: Stop) -> None:
        """Builds the engine, or finds it in a cache. Calls `tell` with the step and the progress, from 0 to 1.

        Raises Stopped soon after `stop` is requested.
        """
        ...

    def load(self) -> Pipeline:
        """Loads the pipeline. Its states must have the same type as those of the serving one."""
        ...

    def trials(self) -> Sequence[Request]:
        """Trial requests with one seed each; their `model` is ignored."""
        ...

    def judge(self, images: Sequence[Image.Image]) -> str:
        """Checks the images of the trials. Returns the problem in one line, or ""."""
        ...

    def settle(self) -> None:
        """Waits until the device has done all submitted work. Called on the engine's thread, any number of times."""
        ...


class _Timed:
    """A pipeline whose `denoise` calls are timed separately: it waits for the device before and after each call. The engine's own
    times do not include work that the device does after a call returns."""

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
    """Builds and tests candidates, one after the other, after `start`. Their states are in `models`, for GetModel."""

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
        """Starts the first build, if there are candidates."""
        for candidate in self._candidates:
            self._report(candidate, EngineState.BUILDING, "waiting for other candidates")
        if self._candidates:
            self._thread.start()

    def stop(self) -> None:
        """Cancels the current candidate and returns at once: builds are killed and trial requests cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._stop.ask()

    def withdraw(self, model: str) -> None:
        """Cancels the candidates of `model`, which is about to be unloaded, and waits until they are gone, or until `stop` is
        called: loading a pipeline cannot be interrupted.

        They are not tried again: candidates exist only for models that were loaded at start.
        """
        with self._changed:
            self._candidates = [candidate for candidate in self._candidates if candidate.model != model]
            if self._current == model:
                self._stop.ask()
            self._changed.wait_for(lambda: self._current != model or self._stopping)

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end of the current candidate. Returns False if it takes longer than `timeout` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._give_chance():
            with self._changed:
                # `withdraw` may continue: the candidate's pipeline is freed.
                self._current = ""
                self._changed.notify_all()

    def _give_chance(self) -> bool:
        """Runs the next candidate. Returns False if there is none, or `stop` was called."""
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
            self._report(candidate, EngineState.FAILED, why)
        except ServerError as error:
            self._report(candidate, EngineState.FAILED, str(error))
        except (BundleError, OSError) as error:
            _log.error("model '%s': %s: %s", candidate.model, candidate.engine, error)
            self._report(candidate, EngineState.FAILED, _UNKNOWN_REASON)
        except Exception:  # noqa: BLE001 - any library's: the serving engine is kept
            _log.exception("model '%s': %s failed", candidate.model, candidate.engine)
            self._report(candidate, EngineState.FAILED, _UNKNOWN_REASON)
        return True

    def _attempt(self, candidate: Candidate) -> None:
        candidate.build(lambda step, done: self._report(candidate, EngineState.BUILDING, step, done), self._stop)
        self._stop.check()
        self._report(candidate, EngineState.CHECKING, "loading")
        pipeline = candidate.load()
        serving = self._models.get(candidate.model).pipeline
        assert serving is not None, "candidates are made for ready models"
        loser = pipeline
        try:
            problem, report = self._try(candidate, pipeline, serving)
            if not problem:
                # The model is not unloaded meanwhile: `withdraw` waits until the attempt is over.
                self._engine.replace(candidate.model, pipeline)
                self._models.change(candidate.model, pipeline=pipeline)
                loser = serving
        finally:
            losers = [loser]
            del pipeline, serving, loser  # the list must have the last reference
            let_go(losers, lambda close: self._engine.call(candidate.model, close))
        if problem:
            return self._report(candidate, EngineState.REJECTED, problem)
        self._report(candidate, EngineState.SERVING, report, 1.0)

    def _try(self, candidate: Candidate, pipeline: Pipeline, serving: Pipeline) -> tuple[str, str]:
        """Tests `pipeline`. Returns the reason not to promote it, or "", and the measured times."""
        trials = [replace(trial, background=True, deadline=None) for trial in candidate.trials()]
        if not trials:
            return "the bundle has no reference images to compare with", ""
        # No request can have these names: a model's id is a folder's name.
        new, old = f"{candidate.model}/{candidate.engine}", f"{candidate.model}/{serving.engine}"
        timed = {name: _Timed(runs, candidate.settle, self._engine.clock) for name, runs in ((new, pipeline), (old, serving))}
        for name, runs in timed.items():
            self._engine.replace(name, cast(Pipeline, runs))
        try:
            done, count = 0, len(trials) + 2 * _ROUNDS
            images = []
            for trial in trials:
                self._report(candidate, EngineState.CHECKING, "drawing", done / count)
                images.append(self._draw(replace(trial, model=new)))
                done += 1
            if problem := candidate.judge(images):
                return problem, ""
            timed[new].seconds.clear()
            for name in (old, new) * _ROUNDS:
                self._report(candidate, EngineState.CHECKING, "timing", done / count)
                self._draw(replace(trials[0], model=name))
                done += 1
            # The median, so that slow first calls do not matter.
            took, takes = (statistics.median(timed[name].seconds) * 1e3 for name in (new, old))
        finally:
            for name in timed:
                self._engine.remove(name)
        report = f"a step takes {took:.2f} ms, on {serving.engine} {takes:.2f} ms"
        return ("" if took < takes * (1 - _GAIN) else f"not faster: {report}"), report

    def _draw(self, request: Request) -> Image.Image:
        """Draws a trial request's image. Raises Stopped, or the request's error."""
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

    def _report(self, candidate: Candidate, state: EngineState, detail: str, progress: float = 0.0) -> None:
        """Records a candidate's state, and logs it if the state or detail is new."""
        engines = self._models.get(candidate.model).engines
        before = next((status for status in engines if status.name == candidate.engine), None)
        self._models.note(candidate.model, EngineStatus(candidate.engine, state, detail, progress))
        if before is None or (before.state, before.detail) != (state, detail):
            level = logging.WARNING if state in (EngineState.REJECTED, EngineState.FAILED) else logging.INFO
            _log.log(level, "model '%s': %s: %s: %s", candidate.model, candidate.engine, state.name.lower(), detail)
