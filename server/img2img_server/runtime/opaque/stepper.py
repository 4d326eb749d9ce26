"""A call of diffusers that is run in pieces, on a thread that never runs by itself.

Threads are used again, the last one first: what torch.compile records for a GPU belongs to a thread.
"""

import queue
import threading
from collections.abc import Callable

from PIL import Image

from img2img_server.runtime.common.device_copy import enter_stream


class _Abandoned(BaseException):
    """Unwinds a pipeline's call that nobody waits for any more. A BaseException, so that no pipeline catches it."""


class _Thread:
    """A thread that runs one piece of work after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], None], threading.Semaphore]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=_IDLE, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None], done: threading.Semaphore) -> None:
        """Lets it run `work`, after which it releases `done`: nothing of the work is left on the thread then."""
        self._work.put((work, done))

    def _main(self) -> None:
        while True:
            work, done = self._work.get()
            self._thread.name = _BUSY
            enter_stream()  # before anything is allocated: what one stream frees, the other may still use
            work()
            del work
            self._thread.name = _IDLE
            done.release()
            del done


_BUSY, _IDLE = "img2img-pipeline", "img2img-pipeline-idle"
_idle: list[_Thread] = []


class Stepper:
    """A call that is run in pieces: `resume` lets it go on until it calls `pause` or returns.

    The thread that resumes waits meanwhile, so that one thread at a time owns the device. Once it is `done`, `images` are what
    the call returned, or `error` what it raised.
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
        """Runs the next piece. Afterwards the call waits in `pause`, or is done."""
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
        """Called by the call itself at the end of a piece: hands the baton back."""
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwinds the call where it stands. Harmless on one that is done; one that never began is done with this."""
        if self._thread is not None and not self.done:
            self._abandoned = True
            self._go.release()
            self._wait()
        self._end()

    def _wait(self) -> None:
        """Waits for the end of a piece. The thread of a call that is done may run others."""
        self._back.acquire()
        if self.done and self._thread is not None:
            _idle.append(self._thread)
            self._thread = None

    def _main(self) -> None:
        try:
            self.images = self._call(self)
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001 - handed to the engine's thread, which owns what to make of it
            self.error = error
        except BaseException as error:  # noqa: BLE001 - such as a panic of a library in Rust: the thread goes on
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
        finally:
            self._end()

    def _end(self) -> None:
        """Lets go of the call, which holds on to images, the model and who owns this: no collector is to be needed for that."""
        self.done, self._call = True, _nothing


def _nothing(run: Stepper) -> list[Image.Image]:
    raise AssertionError("a finished run cannot be resumed")
