"""A call of a diffusers pipeline for the images of several requests, run step by step.

The call runs on its own thread, which runs only while the engine's thread waits for it. Threads are reused, the last used one
first, because CUDA graphs of torch.compile belong to a thread.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from img2img_server.engine.request import Request
from img2img_server.runtime.common.device_copy import enter_stream


class _Abandoned(BaseException):
    """Unwinds a pipeline's call that no request needs. A BaseException, so that no pipeline catches it."""


class _Thread:
    """A thread that runs functions one after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], None], threading.Semaphore]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=_IDLE, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None], done: threading.Semaphore) -> None:
        """Runs `work` on the thread, drops all references to it, and then releases `done`."""
        self._work.put((work, done))

    def _main(self) -> None:
        while True:
            work, done = self._work.get()
            self._thread.name = _BUSY
            enter_stream()  # before any allocation: memory that one stream frees may still be in use on another
            work()
            del work
            self._thread.name = _IDLE
            done.release()
            del done


_BUSY, _IDLE = "img2img-pipeline", "img2img-pipeline-idle"
_idle: list[_Thread] = []


class Stepper:
    """A call that runs in pieces: `resume` runs it until it calls `pause` or returns.

    The resuming thread waits meanwhile, so that only one thread at a time uses the device. Once `done`, `images` are the call's
    result, or `error` is its exception.
    """

    def __init__(self, call: Callable[["Stepper"], list[Image.Image]]) -> None:
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.error: Exception | None = None
        self.images: list[Image.Image] = []
        self.done = False
        self._thread: _Thread | None = None

    def resume(self) -> None:
        """Runs the next piece. Returns when the call waits in `pause` or is done."""
        assert not self.done, "a finished run cannot be resumed"
        if self._thread is None:
            try:
                self._thread = _idle.pop()
            except IndexError:
                self._thread = _Thread()
            self._thread.begin(self._main, self._back)
        else:
            self._go.release()
        self._wait()

    def pause(self) -> None:
        """Called by the call itself at the end of a piece: returns control to the engine's thread."""
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwinds the call. Has no effect if it is done; if it has not started, it is done afterwards."""
        if self._thread is not None and not self.done:
            self._abandoned = True
            self._go.release()
            self._wait()
        self._end()

    def _wait(self) -> None:
        """Waits for the end of a piece. If the call is done, its thread can be reused."""
        self._back.acquire()
        if self.done and self._thread is not None:
            _idle.append(self._thread)
            self._thread = None

    def _main(self) -> None:
        try:
            self.images = self._call(self)
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001 - passed to the engine's thread, which handles it
            self.error = error
        except BaseException as error:  # noqa: BLE001 - such as a panic of a Rust library; the thread continues
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
        finally:
            self._end()

    def _end(self) -> None:
        """Drops the reference to the call, which holds images and the model, so that they are freed without garbage
        collection."""
        self.done, self._call = True, _nothing


def _nothing(run: Stepper) -> list[Image.Image]:
    raise AssertionError("a finished run cannot be resumed")


class SharedCall:
    """A shared call for all images of `requests`, `at_once` of them in each `__call__` of diffusers, run piece by piece.

    `draw` makes the images, in the order of the requests and their seeds, and calls `report_step` after each step. Until the
    first such report, `step_count` is an estimate.
    """

    def __init__(
        self, requests: Sequence[Request], at_once: int, steps: int, draw: Callable[["SharedCall"], list[Image.Image]]
    ) -> None:
        self.requests = tuple(requests)
        self.outputs = [(request, seed) for request in requests for seed in request.seeds]
        self.at_once = min(at_once, len(self.outputs))
        self.chunks = [self.outputs[start : start + at_once] for start in range(0, len(self.outputs), at_once)]
        self.step_count = steps * len(self.chunks)
        self.step = 0
        self.pieces = 0
        self.failed = False
        self._run = Stepper(lambda run: draw(self))
        self._left = len(self.requests)

    @property
    def done(self) -> bool:
        """Whether the call has ended, with images or an error."""
        return self._run.done

    def resume(self) -> Exception | None:
        """Runs the next piece. Returns the pipeline's exception, or None."""
        self._run.resume()
        self.pieces += 1
        # Not kept here: the error's traceback keeps the pipeline's frames alive.
        error, self._run.error = self._run.error, None
        self.failed = error is not None
        return error

    def pause(self) -> None:
        """Called by `draw` between two steps: lets other requests run."""
        self._run.pause()

    def report_step(self, chunk: int, step: int, steps: int) -> None:
        """Called by `draw` after step `step` (from 1) of the `steps` of chunk number `chunk` (from 0)."""
        self.step_count = steps * len(self.chunks)
        # The last step is reported as done only after decoding.
        self.step = min(chunk * steps + step, self.step_count - 1)

    def images(self, number: int) -> list[Image.Image]:
        """The images of request `number` (from 0)."""
        begin = sum(len(request.seeds) for request in self.requests[:number])
        return self._run.images[begin : begin + len(self.requests[number].seeds)]

    def leave(self) -> None:
        """Records that one of the requests has ended. After the last one, a call in progress is unwound."""
        self._left -= 1
        if not self._left:
            self._run.abandon()


@dataclass(slots=True, eq=False)
class OpaqueState:
    """The state of request `number` of a shared call, and how many of the call's pieces it has counted."""

    request: Request
    call: SharedCall
    number: int
    step_count: int
    step: int = 0
    pieces: int = 0

    def join(self, call: SharedCall, number: int) -> None:
        """Joins a new call after the previous one failed. `step` does not change until the new call has reached it."""
        self.call, self.number, self.pieces = call, number, 0

    def catch_up(self) -> None:
        """Updates `step` from the call; a prior's steps do not count."""
        self.pieces = self.call.pieces
        self.step_count = max(self.call.step_count, 1)
        self.step = max(min(self.step, self.step_count - 1), self.call.step)
        if self.call.done:
            self.step = self.step_count
