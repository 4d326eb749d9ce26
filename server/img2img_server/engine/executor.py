"""Runs stages of requests: in one call of their model if that works, and in smaller ones if it does not.

A pipeline may return as soon as the device has been given a call. Then its `mark` says when the call is done, and the call is in
flight: the next one is prepared while the device computes, and at most two steps are submitted at a time. `complete` waits,
measures and reports to the requests. The watchdog reads from `CallsInFlight` how long each call has taken.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from img2img_server.engine.costs import STAGES, Costs
from img2img_server.engine.interface import ModelCall, Span
from img2img_server.engine.request import Completed, Pipeline, Plan, Progress, Request, Started, State, StepCall, Ticket, Timings
from img2img_server.errors import ModelFailed, OutOfMemory, ServerError

_log = logging.getLogger(__name__)

Results = list[tuple[Ticket, Any]]
"""The requests for which a stage succeeded, each with its result."""


class Abandoned(Exception):
    """The engine was abandoned: no more calls are made."""


class CallsInFlight:
    """The call that each thread is in. Thread-safe without a lock, because it is used around every call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._calls: dict[int, tuple[float, str, str, int, int]] = {}
        self._abandoned = False

    @contextmanager
    def call(self, stage: str, model: str, requests: int = 1, rows: int = 1) -> Iterator[None]:
        """Marks this thread as in a call of a model within the block."""
        thread = threading.get_ident()
        self._calls[thread] = (self._clock(), stage, model, requests, rows)
        try:
            yield
        finally:
            self._calls.pop(thread, None)

    def forget(self, thread: threading.Thread) -> None:
        """Removes the call of a thread that was replaced by another, so that the watchdog ignores it."""
        if thread.ident is not None:
            self._calls.pop(thread.ident, None)

    @property
    def longest(self) -> ModelCall | None:
        """The longest call in flight, None between calls."""
        calls = list(self._calls.values())  # an atomic copy
        if not calls:
            return None
        begun, stage, model, requests, rows = min(calls)
        return ModelCall(stage, model, requests, rows, self._clock() - begun)

    def abandon(self) -> None:
        """Makes `check` raise from now on."""
        self._abandoned = True

    def check(self) -> None:
        """Raises Abandoned if the engine was abandoned, as no caller waits for a result any more."""
        if self._abandoned:
            raise Abandoned


@dataclass(slots=True, eq=False)
class _Call:
    """A submitted call. `wait` waits for the device, None if the call is complete. A denoiser's call is `open` until its requests
    were advanced; `moved` lists them with their steps. `kind` has the shape and pixels of its rows. Times are of the engine's
    clock."""

    stage: str
    tickets: Sequence[Ticket]
    kind: Plan | StepCall
    rows: int
    begun: float
    wait: Callable[[], None] | None
    open: bool
    moved: list[tuple[Ticket, int, int]] = field(default_factory=list)
    previews: Mapping[Ticket, Any] = field(default_factory=dict)


class Executor:
    """Calls models, measures the calls, learns how many rows fit into memory, and reports progress to the requests.

    `pipelines` may change between two calls. `lock` guards `costs`; `clock` is the engine's. `observe` is called with every call
    that succeeded, `failed` with each request whose stage failed. After the engine was abandoned, Abandoned is raised instead of
    making a call.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        costs: Costs,
        lock: AbstractContextManager[Any],
        clock: Callable[[], float],
        observe: Callable[[Span], None],
        in_flight: CallsInFlight,
        failed: Callable[[Ticket, ServerError], None],
    ) -> None:
        self._pipelines = pipelines
        self._costs = costs
        self._lock = lock
        self._clock = clock
        self._observe = observe
        self._in_flight = in_flight
        self._failed = failed
        self._submitted: deque[_Call] = deque()
        self._waited = 0.0  # when the last wait for a call ended
        self._predicted: dict[
            Ticket, tuple[int, Any]
        ] = {}  # of the step being advanced: each request's step before it, and its noise

    def prepare(self, tickets: Sequence[Ticket]) -> None:
        """Encodes the prompts and images of admitted requests."""
        for ticket in tickets:
            ticket.started = self._clock()
        for ticket, state in self.run("prepare", tickets):
            ticket.state = state
        self._report()

    def advance(self, predicted: Results) -> None:
        """Advances each request one step by its predicted noise. Reports the step before while the device computes this one."""
        self.complete()
        self._predicted = {ticket: (_step(ticket), noise) for ticket, noise in predicted if ticket.state is not None}
        before = {ticket: step for ticket, (step, _) in self._predicted.items()}
        # An opaque pipeline also makes calls that advance no request, such as the steps of a prior.
        steps = {ticket: _step(ticket) for ticket, _ in self.run("advance", list(before))}
        moved = {ticket: step for ticket, step in steps.items() if step != before[ticket]}
        self._predicted = {}
        for call in list(self._submitted):  # as `forget` may clear it on another thread
            call.open = False
            mine = [ticket for ticket in call.tickets if ticket in moved]
            call.moved = [(ticket, moved[ticket], moved[ticket] + ticket.steps_left) for ticket in mine]
        self._preview([ticket for ticket in before if ticket in moved and _wants_preview(ticket)])
        self._report()

    def finish(self, batch: Sequence[Ticket]) -> list[tuple[Ticket, Completed]]:
        """Decodes the images of the requests whose steps are all done."""
        if any(ticket.state is not None and ticket.steps_left <= 0 for ticket in batch):
            self.complete()
        denoised, completed = self._clock(), []
        done = [ticket for ticket in batch if ticket.state is not None and ticket.steps_left <= 0]
        for ticket, images in self.run("finish", done):
            timings = Timings(
                queue=ticket.started - ticket.arrival,
                encode=ticket.prepared - ticket.started,
                denoise=denoised - ticket.prepared,
                decode=self._clock() - denoised,
            )
            completed.append((ticket, Completed(tuple(images), timings, ticket.plan.warnings, ticket.plan.speedup)))
        return completed

    def complete(self) -> None:
        """Waits until the device has finished all submitted calls whose requests were advanced, and reports them."""
        while self._submitted and not self._submitted[0].open:
            self._wait(self._submitted[0])
            self._report()

    def forget(self) -> None:
        """Drops the calls in flight without reporting them, because their requests have ended."""
        self._submitted.clear()

    def run(self, stage: str, tickets: Sequence[Ticket]) -> Results:
        """Runs one stage for all `tickets`, in one call if possible. Returns the results of those that succeeded.

        If memory runs out, the requests are split into halves, and later calls stay smaller; a single request is retried as long
        as memory is freed for it. After any other failure each request is tried alone, so only the faulty ones end.
        """
        done: Results = []
        failed: list[tuple[Ticket, ServerError]] = []
        left = self._parts(stage, tickets)
        while left:
            some = left.pop(0)
            results, error = self._call(stage, some)
            if error is None:
                done += zip(some, results, strict=True)
                continue
            full = isinstance(error, OutOfMemory)
            if isinstance(error, OutOfMemory) and error.again and len(some) == 1:
                left.insert(0, some)
                continue
            if full:
                self._forbid(stage, some)
            if len(some) == 1:
                failed.append((some[0], _client_error(error, some[0])))
            elif full:
                left[:0] = [some[: len(some) // 2], some[len(some) // 2 :]]
            else:
                left[:0] = [[ticket] for ticket in some]
            # The error's traceback keeps the memory of the failed call alive, which the next call may need.
            del error
        for ticket, reason in failed:
            self._failed(ticket, reason)
        return done

    def _call(self, stage: str, tickets: Sequence[Ticket]) -> tuple[Sequence[Any], Exception | None]:
        """One call for all `tickets`. Returns a result for each, or the error."""
        model, kind, rows, begun = tickets[0].request.model, _kind(stage, tickets), _rows(stage, tickets), self._clock()
        pipeline, wait = self._pipelines[model], None
        self._in_flight.check()
        with self._in_flight.call(stage, model, len(tickets), rows):
            try:
                if stage == "advance":
                    results = self._advance(pipeline, tickets)
                else:
                    results = getattr(pipeline, stage)(_requests(tickets) if stage == "prepare" else _states(tickets))
                    wait = pipeline.mark()
            except Exception as error:  # noqa: BLE001 - any error of a model ends its requests, not the engine
                return (), error
            except BaseException as error:  # noqa: BLE001 - such as a panic of a Rust library; it must not end the engine's thread
                return (), RuntimeError(f"{type(error).__name__}: {error}")
        call = _Call(stage, tickets, kind, rows, begun, wait, stage == "denoise")
        if wait is None or stage not in ("prepare", "denoise"):  # the other stages are synchronous
            call.wait = None
            self._note(call, begun)
        if stage in ("prepare", "denoise"):
            self._submitted.append(call)
        return results, None

    def _advance(self, pipeline: Pipeline, tickets: Sequence[Ticket]) -> Sequence[None]:
        # After a failure, requests that were advanced already are not advanced twice.
        still = [ticket for ticket in tickets if _step(ticket) == self._predicted[ticket][0]]
        if still:
            pipeline.advance(_states(still), [self._predicted[ticket][1] for ticket in still])
        return [None] * len(tickets)

    def _wait(self, call: _Call) -> None:
        """Waits until the device has finished a call, and measures it. If the device failed, the call's requests fail."""
        wait, call.wait = call.wait, None
        if wait is None:
            return
        self._in_flight.check()
        try:
            with self._in_flight.call(call.stage, call.tickets[0].request.model, len(call.tickets), call.rows):
                wait()
        except Exception as error:  # noqa: BLE001 - any failure of the device
            for ticket in [ticket for ticket in call.tickets if ticket.state is not None]:
                self._failed(ticket, _client_error(error, ticket))
            return
        # The device starts a call when it has finished the previous one.
        self._note(call, max(call.begun, self._waited))
        self._waited = self._clock()

    def _report(self) -> None:
        """Notifies requests of completed calls, in the order of submission."""
        now = None
        while self._submitted and not self._submitted[0].open and self._submitted[0].wait is None:
            call = self._submitted.popleft()
            now = self._clock() if now is None else now
            for ticket in call.tickets if call.stage == "prepare" else ():
                if ticket.state is not None:
                    ticket.prepared = now
                    ticket.notify(Started(ticket.state.step_count))
            for ticket, step, count in call.moved:
                eta = None if ticket.expected is None else max(0.0, ticket.expected - now)
                ticket.notify(Progress(step, count, eta, call.previews.get(ticket)))

    def _preview(self, tickets: Sequence[Ticket]) -> None:
        """Draws previews and attaches them to the reports of the calls in flight."""
        if not tickets:
            return
        for call in list(self._submitted):
            self._wait(call)
        tickets = [ticket for ticket in tickets if ticket.state is not None]
        previews, error = self._call("preview", tickets) if tickets else ((), None)
        if error is not None:  # a failing preview must not fail the request
            _log.error("model '%s' failed to draw a preview", tickets[0].request.model, exc_info=error)
            return
        for call in list(self._submitted):
            call.previews = dict(zip(tickets, previews, strict=True))

    def _note(self, call: _Call, begun: float) -> None:
        """Observes a successful call, and records its cost."""
        seconds, model = self._clock() - begun, call.tickets[0].request.model
        if call.stage in STAGES and not _reads_image_prompts(call.stage, call.tickets):  # others would be forecast as long
            plain = seconds / _work(call.tickets) if call.stage == "denoise" else seconds
            with self._lock:
                self._costs.record(call.stage, (model, call.kind.shape), call.kind.pixels, call.rows, plain)
        members = tuple(ticket.request for ticket in call.tickets)
        self._observe(Span(call.stage, model, len(call.tickets), call.rows, begun, seconds, members))

    def _parts(self, stage: str, tickets: Sequence[Ticket]) -> list[Sequence[Ticket]]:
        """Divides `tickets` into calls of no more rows than fit into memory. A request with more rows is alone, and so are those
        whose images of image prompts are encoded: the watchdog bounds one call."""
        if not tickets or stage not in STAGES:
            return [tickets] if tickets else []
        if _reads_image_prompts(stage, tickets):
            return [[ticket] for ticket in tickets]
        with self._lock:
            fitting = self._costs.fitting_rows(stage, tickets[0].request.model, _kind(stage, tickets).pixels)
        if fitting is None:
            return [tickets]
        parts: list[list[Ticket]] = []
        for ticket in tickets:
            if parts and _rows(stage, [*parts[-1], ticket]) <= fitting:
                parts[-1].append(ticket)
            else:
                parts.append([ticket])
        return list(parts)

    def _forbid(self, stage: str, tickets: Sequence[Ticket]) -> None:
        """Records that such a call did not fit into memory."""
        model, pixels, rows = tickets[0].request.model, _kind(stage, tickets).pixels, _rows(stage, tickets)
        _log.warning("model '%s' ran out of memory: %s, %d rows of %d pixels", model, stage, rows, pixels)
        if stage in STAGES:
            with self._lock:
                self._costs.forbid(model, pixels, rows, stage, largest=max(1, rows // 2))


def _work(tickets: Sequence[Ticket]) -> float:
    """How many times longer a step of these requests takes than one of as many plain rows."""
    return sum(ticket.plan.work * ticket.plan.rows for ticket in tickets) / sum(ticket.plan.rows for ticket in tickets)


def _rows(stage: str, tickets: Sequence[Ticket]) -> int:
    """The rows of a call of `stage`: samples of the denoiser, or images."""
    if stage == "prepare":
        return len(tickets)  # a source image is encoded once for all of its results
    return sum(ticket.next_call.rows if stage == "denoise" else len(ticket.request.seeds) for ticket in tickets)


def _reads_image_prompts(stage: str, tickets: Sequence[Ticket]) -> bool:
    """Whether a call of `stage` may encode images of image prompts, which can take many times as long as all else in it."""
    return stage == "prepare" and any(ticket.request.image_prompts for ticket in tickets)


def _kind(stage: str, tickets: Sequence[Ticket]) -> Plan | StepCall:
    """The shape and the pixels of the rows of a call of `stage`."""
    return tickets[0].next_call if stage == "denoise" else tickets[0].plan


def _requests(tickets: Sequence[Ticket]) -> list[Request]:
    return [ticket.request for ticket in tickets]


def _states(tickets: Sequence[Ticket]) -> list[State]:
    return [ticket.state for ticket in tickets if ticket.state is not None]


def _step(ticket: Ticket) -> int:
    assert ticket.state is not None, "a batch holds prepared requests only"
    return ticket.state.step


def _wants_preview(ticket: Ticket) -> bool:
    interval = ticket.request.preview_interval
    return interval > 0 and ticket.steps_left > 0 and _step(ticket) % interval == 0


def _client_error(error: Exception, ticket: Ticket) -> ServerError:
    """The error that the caller gets."""
    if isinstance(error, OutOfMemory):
        (width, height), count = ticket.request.result_size, len(ticket.request.seeds)
        images = "image" if count == 1 else "images"
        return OutOfMemory(
            f"not enough memory for {count} {images} of {width} x {height} pixels: request fewer or smaller images"
        )
    if isinstance(error, ServerError):
        return error
    extra = {"request_id": ticket.request.id}
    _log.error("model '%s' failed", ticket.request.model, exc_info=error, extra=extra)
    return ModelFailed("the model failed on this request")
