"""Parts of forecasts for long queues: sums over the active requests, and corrections by the errors of earlier forecasts."""

import math
from bisect import bisect_left
from collections.abc import Hashable
from itertools import accumulate

from img2img_server.engine.backlog import group_sums
from img2img_server.engine.policy import Job, Policy
from img2img_server.engine.request import Ticket

_LEAST_WEIGHT = 0.15
"""The minimum weight of the newest request in the running mean of forecast errors."""
_CAUTION = 4
"""Observations after which half of their mean error is applied as a correction."""


class ActiveSums:
    """The active requests at the start of call number `call`. `groups` and `seconds` are sums over all of them."""

    def __init__(self, policy: Policy, call: int) -> None:
        self.call, self.count = call, len(policy.order)
        self.groups = group_sums(policy.order)
        self._usage = dict(policy.usage)
        self._clients: dict[str, list[tuple[float, float]]] = {}  # of each request: the seconds left, and its end
        had = dict(policy.usage)  # an end is what the client has had of the device when the request is finished
        jobs = []
        for job in policy.order:
            left = job.seconds_left
            end = had.get(job.client, 0.0) + left
            jobs.append((end, left))
            if job.client:
                had[job.client] = end
                self._clients.setdefault(job.client, []).append((left, end))
        jobs.sort()
        self._ends = [end for end, _ in jobs]
        self._sums = list(accumulate((left for _, left in jobs), initial=0.0))
        self.seconds = self._sums[-1]

    def before(self, job: Job, own_seconds: float) -> float:
        """The seconds of those that are ahead of a waiting request, with `own_seconds` of its client's waiting ahead of it: those
        of its client that have less left, and those of others that are finished when their client has had less."""
        left, mine = job.seconds_left, self._clients.get(job.client, ())
        own = sum(other for other, _ in mine if other < left)
        end = self._usage.get(job.client, 0.0) + own + own_seconds + left
        return own + self._sums[bisect_left(self._ends, end)] - sum(other for other, other_end in mine if other_end < end)


class Corrections:
    """Mean errors of forecasts, by groups of similar requests."""

    def __init__(self) -> None:
        self._bias: dict[Hashable, tuple[float, int]] = {}

    def apply(self, ticket: Ticket, forecast: float, count: int) -> float:
        """The forecast, corrected by the mean error of similar forecasts, since other requests arrive. Forecasts are similar if
        their numbers of steps, and of other requests at their arrival (`count`), are similar."""
        if ticket.forecast_key is None:
            ticket.forecast_key = ticket.plan.step_count.bit_length(), count.bit_length()
        mean, observed = self._bias.get(ticket.forecast_key, (0.0, 0))
        return forecast * math.exp(mean * observed / (observed + _CAUTION))

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """Records how long a request took."""
        if not ticket.forecast or seconds <= 0:
            return
        mean, count = self._bias.get(ticket.forecast_key, (0.0, 0))
        share = max(_LEAST_WEIGHT, 1 / (count + 1))
        self._bias[ticket.forecast_key] = (mean + share * (math.log(seconds / ticket.forecast) - mean), count + 1)
