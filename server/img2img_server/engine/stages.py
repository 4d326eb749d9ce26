"""The stages of a round for many requests: one step of each, previews that are due, and the pictures of those that are done."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from img2img_server.engine.calls import Calls
from img2img_server.engine.request import Completed, Pipeline, Progress, Request, Started, State, Ticket, Timings
from img2img_server.errors import ServerError

_log = logging.getLogger(__name__)


class Stages:
    """Has `calls` make the calls of a stage, and tells the requests how far they are.

    Each stage gives what it made of those that it worked for. `failed` is told of each other, with its error.
    """

    def __init__(self, calls: Calls, clock: Callable[[], float], failed: Callable[[Ticket, ServerError], None]) -> None:
        self._calls = calls
        self._clock = clock
        self._failed = failed

    def prepare(self, tickets: Sequence[Ticket]) -> None:
        """Encodes prompts and pictures of requests that begin, and tells them so."""
        for ticket in tickets:
            ticket.started = self._clock()
        for ticket, state in self._run("prepare", tickets, lambda pipeline, some: pipeline.prepare(_requests(some))):
            ticket.state, ticket.prepared = state, self._clock()
            ticket.tell(Started(state.step_count))

    def denoise(self, batch: Sequence[Ticket]) -> list[tuple[Ticket, Any]]:
        """Predicts the noise of each."""
        return self._run("denoise", batch, lambda pipeline, some: pipeline.denoise(_states(some)))

    def advance(self, predicted: Sequence[tuple[Ticket, Any]]) -> None:
        """Takes each request one step on by its predicted noise, and tells it so."""
        noises, before = dict(predicted), {ticket: _step(ticket) for ticket, _ in predicted}

        def advance(pipeline: Pipeline, tickets: Sequence[Ticket]) -> Sequence[None]:
            # Asked again after a failure, those that have moved already are not moved twice.
            still = [ticket for ticket in tickets if _step(ticket) == before[ticket]]
            if still:
                pipeline.advance(_states(still), [noises[ticket] for ticket in still])
            return [None] * len(tickets)

        # A pipeline that runs whole also works on what is no step of the picture.
        moved = [ticket for ticket, _ in self._run("advance", list(noises), advance) if _step(ticket) != before[ticket]]
        previews = self._preview([ticket for ticket in moved if _wants_preview(ticket)])
        now = self._clock()
        for ticket in moved:
            eta = None if ticket.expected is None else max(0.0, ticket.expected - now)
            step = _step(ticket)
            ticket.tell(Progress(step, step + ticket.steps_left, eta, previews.get(ticket)))

    def finish(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Completed]]:
        """Decodes the pictures of those whose steps are done."""
        denoised, completed = self._clock(), []
        for ticket, images in self._run("finish", tickets, lambda pipeline, some: pipeline.finish(_states(some))):
            timings = Timings(
                queue=ticket.started - ticket.arrival,
                encode=ticket.prepared - ticket.started,
                denoise=denoised - ticket.prepared,
                decode=self._clock() - denoised,
            )
            completed.append((ticket, Completed(tuple(images), timings, ticket.plan.warnings)))
        return completed

    def _preview(self, tickets: Sequence[Ticket]) -> dict[Ticket, Any]:
        if not tickets:
            return {}
        previews, error = self._calls.once("preview", tickets, lambda pipeline, some: pipeline.preview(_states(some)))
        if error is not None:  # the picture itself counts more
            _log.error("model '%s' failed to draw a preview", tickets[0].request.model, exc_info=error)
            return {}
        return dict(zip(tickets, previews, strict=True))

    def _run(
        self, stage: str, tickets: Sequence[Ticket], work: Callable[[Pipeline, Sequence[Ticket]], Sequence[Any]]
    ) -> list[tuple[Ticket, Any]]:
        done, failed = self._calls.run(stage, tickets, work)
        for ticket, error in failed:
            self._failed(ticket, error)
        return done


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
