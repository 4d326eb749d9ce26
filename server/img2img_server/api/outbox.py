"""The events of a stream that its client has not read yet: few, however many come."""

import asyncio
from collections import deque
from dataclasses import replace

from img2img_server.engine.interface import Accepted
from img2img_server.engine.request import Completed, Event, Failed, Progress, Queued

MAX_PLACES, MAX_STEPS, MAX_PREVIEWS = 16, 128, 32
"""Unread events that are kept: of places in the queue, of steps, and of steps with their preview. The latest are kept."""


class Outbox:
    """A queue of events, in order, that keeps the latest of those not read yet. Used on the event loop only."""

    def __init__(self) -> None:
        self._events: deque[Accepted | Event] = deque()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Accepted | Event) -> None:
        """Adds an event, and drops what it makes obsolete."""
        self._events.append(event)
        if isinstance(event, Queued | Progress):
            self._bound(type(event), MAX_PLACES if isinstance(event, Queued) else MAX_STEPS)
        self._changed.set()

    async def get(self) -> Accepted | Event:
        """The next event, once there is one."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    def _bound(self, kind: type[Queued | Progress], most: int) -> None:
        places = [place for place, event in enumerate(self._events) if isinstance(event, kind)]
        if len(places) > most:
            del self._events[places[0]]
        drawn = [(place, event) for place, event in enumerate(self._events) if isinstance(event, Progress) and event.preview]
        if len(drawn) > MAX_PREVIEWS:
            place, event = drawn[0]
            self._events[place] = replace(event, preview=None)


def is_last(event: Accepted | Event) -> bool:
    """Whether no event follows."""
    return isinstance(event, Completed | Failed)
