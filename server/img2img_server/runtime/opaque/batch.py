"""One call of diffusers' pipeline for the images of several requests, and how far it and each of them is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from img2img_server.engine.request import Request
from img2img_server.runtime.opaque.stepper import Stepper


class SharedCall:
    """All images of `requests`, `at_once` of them in each `__call__` of diffusers, run piece by piece.

    `draw` makes the images, in the order of the requests and their seeds, and calls `told` after each step. `step_count` is an
    estimate until it first does.
    """

    def __init__(
        self, requests: Sequence[Request], at_once: int, steps: int, draw: Callable[["SharedCall"], list[Image.Image]]
    ) -> None:
        self.requests = tuple(requests)
        self.pictures = [(request, seed) for request in requests for seed in request.seeds]
        self.at_once = min(at_once, len(self.pictures))
        self.chunks = [self.pictures[start : start + at_once] for start in range(0, len(self.pictures), at_once)]
        self.step_count = steps * len(self.chunks)
        self.step = 0
        self.pieces = 0
        self.failed = False
        self._run = Stepper(lambda run: draw(self))
        self._left = len(self.requests)

    @property
    def done(self) -> bool:
        """Whether the images are there, or never will be."""
        return self._run.done

    def resume(self) -> Exception | None:
        """Runs the next piece. Returns what the pipeline raised, None where it went well."""
        self._run.resume()
        self.pieces += 1
        # It holds on to what the pipeline's frames held: not to be kept with a call that is over.
        error, self._run.error = self._run.error, None
        self.failed = error is not None
        return error

    def pause(self) -> None:
        """Called by `draw` between two pieces: the other requests' turn."""
        self._run.pause()

    def told(self, chunk: int, step: int, steps: int) -> None:
        """Called by `draw` after step `step`, from 1 on, of the `steps` of its chunk number `chunk`."""
        self.step_count = steps * len(self.chunks)
        # The last step still has decoding behind it: it is told with the images.
        self.step = min(chunk * steps + step, self.step_count - 1)

    def images(self, number: int) -> list[Image.Image]:
        """The images of its request `number`, from 0 on."""
        begin = sum(len(request.seeds) for request in self.requests[:number])
        return self._run.images[begin : begin + len(self.requests[number].seeds)]

    def leave(self) -> None:
        """One of the requests has ended, well or not. What the last one leaves is unwound where it stands."""
        self._left -= 1
        if not self._left:
            self._run.abandon()


@dataclass(slots=True, eq=False)
class OpaqueState:
    """A request whose images are request `number` of a call, and how much of the call it has taken notice of."""

    request: Request
    call: SharedCall
    number: int
    step_count: int
    step: int = 0
    pieces: int = 0

    def join(self, call: SharedCall, number: int) -> None:
        """Goes over to a call that has not begun, since its own failed. Its step waits until that call is as far."""
        self.call, self.number, self.pieces = call, number, 0

    def catch_up(self) -> None:
        """Takes notice of how far its call is; a step of a prior is no step of the image's."""
        self.pieces = self.call.pieces
        self.step_count = max(self.call.step_count, 1)
        self.step = max(min(self.step, self.step_count - 1), self.call.step)
        if self.call.done:
            self.step = self.step_count
