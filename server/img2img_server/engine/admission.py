"""Room for one more request: the bounds of what is accepted, and when those who are refused should come back."""

from dataclasses import dataclass

from img2img_server.engine.request import Ticket
from img2img_server.engine.scheduler import Scheduler
from img2img_server.errors import ClientBusy, QueueFull

_SOONEST = 0.1
"""Seconds after which a refused request may come back, at the least."""
_UNKNOWN = 1.0
"""And where nothing is known of how long the others take."""


@dataclass(slots=True, eq=False)
class Slot:
    """What a request of `client` holds from its arrival until its caller has the answer.

    Until it is submitted, while its image is fetched and decoded, it counts among those who wait; as its client's it counts
    to the end, so that answers which are read slowly do.
    """

    client: str
    ticket: Ticket | None = None


class Admission:
    """Says whether the engine takes one more request. Not thread-safe: the engine guards it with its lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._places: set[Slot] = set()

    @property
    def arriving(self) -> int:
        """How many hold a place and were not submitted yet."""
        return sum(place.ticket is None for place in self._places)

    def take(self, place: Slot) -> None:
        """Holds a place for a request that is on its way."""
        self._places.add(place)

    def leave(self, place: Slot) -> None:
        """Gives a place back. Harmless where that was done before."""
        self._places.discard(place)

    def check(self, client: str, now: float, background: bool = False) -> None:
        """Raises QueueFull or ClientBusy where one more request of `client` would be too many. An empty name is nobody's, and
        what runs in the background is bounded by its number only."""
        scheduler, limits = self._scheduler, self._scheduler.limits
        waiting, held = len(scheduler.waiting) + self.arriving, self._count(client) if client else 0
        if waiting >= limits.waiting_places(held):
            raise QueueFull(f"{waiting} requests are waiting already", _later(scheduler.next_place(now)))
        if background:
            return
        if limits.max_waiting_seconds is not None:
            work = scheduler.work()
            if work is not None and work > limits.max_waiting_seconds:
                message = f"there are about {work:.1f} s of work already, the most is {limits.max_waiting_seconds:g} s"
                raise QueueFull(message, _later(work - limits.max_waiting_seconds))
        if held >= limits.max_client_waiting:
            message = f"{held} requests of yours have not ended, the most is {limits.max_client_waiting}"
            raise ClientBusy(message, _later(scheduler.next_end(client, now)))

    def _count(self, client: str) -> int:
        """Requests of a client's that have not ended, and those that are not in the engine but still hold a place."""
        elsewhere = (place for place in self._places if place.ticket is None or place.ticket.ended)
        return self._scheduler.count(client) + sum(place.client == client for place in elsewhere)


def _later(seconds: float | None) -> float:
    return _UNKNOWN if seconds is None else max(_SOONEST, seconds)
