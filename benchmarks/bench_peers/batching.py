"""Peer (b): optimum's or diffusers' pipeline with dynamic batching of whole requests.

A pipeline call has one number of steps, one strength, one guidance and one size, so only requests with equal values are batched.
A running batch admits no further requests.
"""

import asyncio
import contextlib
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from bench_peers.common import Arguments, Device, Made, load_optimum, load_pytorch, parser, prepare_process, serve


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    arguments: Arguments
    key: Hashable
    arrived: float
    made: "asyncio.Future[Made]"


class Batching:
    """Runs the oldest request with up to `max_batch - 1` others with equal settings.

    Waits for others until the first is `max_delay` seconds old, which it usually is if the pipeline was busy.
    """

    def __init__(self, device: Device, max_batch: int, max_delay: float) -> None:
        self._device = device
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._waiting: list[_Waiting] = []
        self._arrival = asyncio.Event()

    async def run(self, arguments: Arguments) -> Made:
        """Waits for a batch and returns the result."""
        waiting = _Waiting(arguments, settings(arguments), time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrival.set()
        try:
            return await waiting.made
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def work(self) -> None:
        """Runs one batch after another, until cancelled."""
        while True:
            while not self._waiting:
                await self._next_arrival(None)
            batch = await self._gather(self._waiting[0])
            if not batch:
                continue
            begun = time.perf_counter()
            try:
                images = await self._device.make([each.arguments for each in batch])
            except Exception as error:  # noqa: BLE001  each of the batch's clients gets it
                self._settle(batch, [error] * len(batch))
                continue
            ran = time.perf_counter() - begun
            self._settle(batch, [Made(image, begun - each.arrived, ran) for each, image in zip(batch, images, strict=True)])

    async def _gather(self, first: _Waiting) -> list[_Waiting]:
        while (left := first.arrived + self._max_delay - time.perf_counter()) > 0:
            if len(self._alike(first)) >= self._max_batch:
                break
            await self._next_arrival(left)
        batch = self._alike(first)[: self._max_batch]
        self._waiting = [each for each in self._waiting if each not in batch]
        return batch

    def _alike(self, first: _Waiting) -> list[_Waiting]:
        return [each for each in self._waiting if each.key == first.key]

    async def _next_arrival(self, seconds: float | None) -> None:
        self._arrival.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), seconds)

    @staticmethod
    def _settle(batch: list[_Waiting], outcomes: Sequence[Exception | Made]) -> None:
        for each, outcome in zip(batch, outcomes, strict=True):
            if each.made.done():  # the client has left
                continue
            if isinstance(outcome, Exception):
                each.made.set_exception(outcome)
            else:
                each.made.set_result(outcome)


def settings(arguments: Arguments) -> Hashable:
    """The settings that requests of one pipeline call must share."""
    return (
        arguments.num_inference_steps,
        arguments.strength,
        arguments.guidance_scale,
        arguments.negative_prompt is not None,
        arguments.image.size,
    )


async def _main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--max-batch", type=int, default=8, metavar="N", help="images in a call (default: %(default)s)")
    flags.add_argument(
        "--max-delay", type=float, default=0.01, metavar="S", help="seconds to wait for a batch (default: %(default)s)"
    )
    flags.add_argument("--in-pytorch", action="store_true", help="run diffusers on PyTorch instead of optimum")
    arguments = flags.parse_args()
    device = Device(lambda: (load_pytorch if arguments.in_pytorch else load_optimum)(arguments.model))
    runner = Batching(device, arguments.max_batch, arguments.max_delay)
    worker = asyncio.create_task(runner.work())
    await serve(device, runner, f"{'pytorch' if arguments.in_pytorch else 'optimum'}:batching", arguments.port_file)
    worker.cancel()


if __name__ == "__main__":
    prepare_process()
    asyncio.run(_main())
