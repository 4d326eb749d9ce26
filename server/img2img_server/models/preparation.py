"""Warms up the models that were loaded at start. A model that fails is removed; the others are served."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from img2img_server.engine.costs import Measured
from img2img_server.engine.engine import Engine
from img2img_server.engine.executor import CallsInFlight
from img2img_server.engine.request import Pipeline
from img2img_server.engine.warmup import Size, WarmUp
from img2img_server.models.cost_store import CostStore
from img2img_server.models.failures import Hung, Stage
from img2img_server.models.memory import Closable, let_go
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.threads import in_thread

_log = logging.getLogger(__name__)

_LOOK = 1.0
"""Maximum seconds between two checks whether a call hangs."""


class Preparation:
    """Measures the models of `models` for `engine`, which has not started yet.

    `budget` is the time for each model; a call that takes longer than `longest` counts as hung (0: never). Both, and `clock`, are
    in seconds. Batches have at most `max_batch_size` rows. Models with measurements in `costs` are not measured again. Calls of
    `sizes` are recorded, too.
    """

    def __init__(
        self,
        models: ModelRegistry,
        engine: Engine,
        max_batch_size: int,
        budget: float,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
        costs: CostStore | None = None,
        sizes: Sequence[Size] = (),
    ) -> None:
        self._models = models
        self._engine = engine
        self._max_batch_size = max_batch_size
        self._budget = budget
        self._longest = longest
        self._clock = clock
        self._costs = costs
        self._sizes = sizes

    async def run(self) -> None:
        """Warms up one model after the other. A model that fails becomes FAILED and is removed from the engine."""
        pipelines = self._models.pipelines()
        for number, (name, pipeline) in enumerate(pipelines.items(), start=1):
            _log.info("model '%s' (%d of %d): warming up", name, number, len(pipelines))
            try:
                with self._models.growing(name):
                    measured = await self._measure(name, pipeline)
            except Exception as error:  # noqa: BLE001 - any library's: the other models are served
                await self._leave_out(name, pipeline, error)
                continue
            self._engine.adopt(name, measured)
            for line in self._engine.costs.describe(name, self._max_batch_size):
                _log.info("model '%s': %s", name, line)

    async def _measure(self, name: str, pipeline: Pipeline) -> Measured:
        """Measures a model, on the engine's thread if its calls are recorded, else on another thread. Raises the model's errors,
        and Hung."""
        in_flight = CallsInFlight(self._clock)
        warm_up = WarmUp(self._max_batch_size, self._budget, self._clock, in_flight, self._sizes)
        work = asyncio.ensure_future(in_thread(lambda: self._warmed_up(name, pipeline, warm_up)))
        while not work.done():
            await asyncio.wait({work}, timeout=min(_LOOK, self._longest / 10) if self._longest > 0 else None)
            call = in_flight.longest
            if call is not None and 0 < self._longest < call.seconds and not work.done():
                work.cancel()
                if pipeline.row_buckets:
                    self._engine.restart_thread()
                raise Hung(f"{call.stage} of {call.rows} rows did not return within {self._longest:g} s")
        return work.result()

    def _warmed_up(self, name: str, pipeline: Pipeline, warm_up: WarmUp) -> Measured:
        """The model's costs. Recordings belong to the thread that made them, so recorded models are measured on the engine's."""
        if pipeline.row_buckets:
            return self._engine.call(name, lambda: self._known_or_measured(name, pipeline, warm_up))
        return self._known_or_measured(name, pipeline, warm_up)

    def _known_or_measured(self, name: str, pipeline: Pipeline, warm_up: WarmUp) -> Measured:
        bundle = self._models.get(name).bundle
        if self._costs is None:
            return warm_up.measure(name, pipeline)
        if (known := self._costs.find(bundle, pipeline)) is not None:
            warm_up.check(name, pipeline)
            _log.info("model '%s': its costs were measured before", name)
            return known
        measured = warm_up.measure(name, pipeline)
        self._costs.keep(bundle, pipeline, measured)
        return measured

    async def _leave_out(self, name: str, pipeline: Pipeline, error: Exception) -> None:
        self._models.fail(name, Stage.WARM_UP, error)
        self._engine.remove(name)
        if not isinstance(error, Hung):  # a hung call still uses it
            last: list[Closable] = [pipeline]
            await in_thread(lambda: let_go(last, lambda close: self._engine.call(name, close)))
