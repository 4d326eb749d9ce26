"""Admission control: how many requests are accepted, and when a refused one should be retried."""

from collections import Counter
from dataclasses import dataclass

from img2img_server.engine.request import Ticket
from img2img_server.engine.scheduler import Scheduler
from img2img_server.errors import ClientBusy, QueueFull

_SOONEST = 0.1
"""The shortest retry delay in seconds."""
_UNKNOWN = 1.0
"""The retry delay in seconds if the costs of the accepted requests are unknown."""


@dataclass(slots=True, eq=False)
class Slot:
    """Held by a request of `client` from its arrival until its caller has the response.

    Before it is submitted, while its image is fetched and decoded, the request counts as waiting. It counts against its client's
    limit until the response was read, so a client that reads slowly cannot have unlimited responses pending.
    """

    client: str
    ticket: Ticket | None = None


class Admission:
    """Decides whether one more request is accepted. Not thread-safe: guarded by the engine's lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._slots: set[Slot] = set()
        self._clients: Counter[str] = Counter()
        self.arriving = 0
        """The number of slots held by requests that were not submitted yet."""

    def take(self, slot: Slot) -> None:
        """Reserves a slot for an arriving request, or for one that was submitted."""
        self._slots.add(slot)
        self._clients[slot.client] += 1
        if slot.ticket is None:
            self.arriving += 1
        else:
            self._scheduler.set_slotted(slot.ticket, True)

    def leave(self, slot: Slot) -> None:
        """Returns a slot. Idempotent."""
        if slot not in self._slots:
            return
        self._slots.remove(slot)
        self._clients[slot.client] -= 1
        if not self._clients[slot.client]:
            del self._clients[slot.client]
        if slot.ticket is None:
            self.arriving -= 1
        else:
            self._scheduler.set_slotted(slot.ticket, False)

    def check(self, client: str, now: float, background: bool = False) -> None:
        """Raises QueueFull or ClientBusy if one more request of `client` would exceed a limit. Requests without a client have no
        per-client limit; background requests are limited by their number only."""
        scheduler, limits = self._scheduler, self._scheduler.limits
        waiting, held = len(scheduler.waiting) + self.arriving, self._count(client) if client else 0
        if waiting >= limits.waiting_slots(held):
            raise QueueFull(f"the queue is full: {waiting} requests are waiting", _later(scheduler.seconds_to_admission(now)))
        if background:
            return
        if limits.max_waiting_seconds is not None:
            work = scheduler.work()
            if work is not None and work > limits.max_waiting_seconds:
                message = f"the accepted work takes about {work:.1f} s, the maximum is {limits.max_waiting_seconds:g} s"
                raise QueueFull(message, _later(work - limits.max_waiting_seconds))
        if held >= limits.max_client_waiting:
            message = f"this client has {held} unfinished requests, the maximum is {limits.max_client_waiting}"
            raise ClientBusy(message, _later(scheduler.next_end(client, now)))

    def _count(self, client: str) -> int:
        """Requests of a client that have not ended, and those that are not in the engine but still hold a slot."""
        return self._scheduler.count(client) + self._clients[client]


def _later(seconds: float | None) -> float:
    return _UNKNOWN if seconds is None else max(_SOONEST, seconds)
