"""A call of diffusers that is run in pieces, on a thread of its own that never runs by itself."""

import threading
from collections.abc import Callable

from PIL import Image

from img2img_server.pipelines.transfers import enter_stream


class _Abandoned(BaseException):
    """Unwinds a pipeline's call that nobody waits for any more. A BaseException, so that no pipeline catches it."""


class Run:
    """A call that is run in pieces: `resume` lets it go on until it calls `pause` or returns.

    The thread that resumes waits meanwhile, so that one thread at a time owns the device. Once it is `done`, `images` are what
    the call returned, or `error` what it raised.
    """

    def __init__(self, call: Callable[["Run"], list[Image.Image]]) -> None:
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.error: Exception | None = None
        self.images: list[Image.Image] = []
        self.done = False
        self._thread = threading.Thread(target=self._main, name="img2img-pipeline", daemon=True)

    def resume(self) -> None:
        """Runs the next piece. Afterwards the call waits in `pause`, or is done."""
        assert not self.done, "a finished run cannot be resumed"
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self.done:
            self._thread.join()

    def pause(self) -> None:
        """Called by the call itself at the end of a piece: hands the baton back."""
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwinds the call where it stands. Harmless on one that is done; one that never began is done with this."""
        if self._thread.ident is not None and not self.done:
            self._abandoned = True
            self._go.release()
            self._thread.join()
        self._end()

    def _main(self) -> None:
        self._go.acquire()
        enter_stream()  # before anything is allocated: what one stream frees, the other may still use
        try:
            self.images = self._call(self)
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001 - handed to the engine's thread, which owns what to make of it
            self.error = error
        finally:
            self._end()
            self._back.release()

    def _end(self) -> None:
        """Lets go of the call, which holds on to pictures, the model and who owns this: no collector is to be needed for that."""
        self.done, self._call = True, _nothing


def _nothing(run: Run) -> list[Image.Image]:
    raise AssertionError("a finished run cannot be resumed")
