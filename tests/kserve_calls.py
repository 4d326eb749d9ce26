"""Shared by tests of KServe: a server with KServe enabled, tensors from Triton's client, and decoded images."""

import contextlib
import io
import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton  # type: ignore[import-untyped]
from fakes import FakePipeline
from img2img_server.models.registry import ModelRegistry
from img2img_server.telemetry.logs import ACCESS
from messages import png
from PIL import Image
from running import RunningServer, running
from soak_parts.stand_in import plant
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # type: ignore[import-untyped]


class Loaded(dict[str, FakePipeline]):
    """The pipelines that a server has loaded, by their model's id; the last one of each."""

    def load(self, bundle: Path, manifest: object) -> FakePipeline:
        made = self[bundle.name] = FakePipeline()
        return made

    def as_new(self, name: str) -> FakePipeline:
        """The one of `name`, as if it had done nothing yet."""
        pipeline = self[name]
        pipeline.prepared.clear()
        pipeline.released.clear()
        pipeline.before_call = lambda: None
        return pipeline


@contextlib.contextmanager
def serving(folder: Path, loaded: Loaded | None = None, **settings: Any) -> Iterator[tuple[RunningServer, Loaded]]:
    """A server of the models "m" and "second" that answers KServe, and their pipelines."""
    loaded = Loaded() if loaded is None else loaded
    for name in ("m", "second"):
        if not (folder / name).exists():
            plant(folder, name)
    with running(lambda: ModelRegistry.load(folder, loaded.load, "m"), **{"kserve": True, **settings}) as server:
        yield server, loaded


@contextlib.contextmanager
def client_of(server: RunningServer, **settings: Any) -> Iterator[Any]:
    """Triton's client, unchanged."""
    client = triton.InferenceServerClient(f"localhost:{server.port}", **settings)
    try:
        yield client
    finally:
        client.close()


def tensor(name: str, array: Any) -> Any:
    """An input from any NumPy array."""
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def text(name: str, value: bytes | str, shape: Sequence[int] = (1,)) -> Any:
    """A BYTES input of one element."""
    array = np.empty(shape, dtype=object)
    array[...] = value
    return tensor(name, array)


def image_input(data: bytes | None = None) -> Any:
    """The input `image`: a plain image's file unless another is given."""
    return text("image", png() if data is None else data)


def number(name: str, value: float, kind: Any) -> Any:
    """An input of one number of a NumPy type."""
    return tensor(name, np.array([value], kind))


def opened(result: Any, index: int = 0) -> Image.Image:
    """One of the images of a result."""
    return Image.open(io.BytesIO(result.as_numpy("images").flatten()[index]))


def parameters(response: Any) -> Mapping[str, Any]:
    """The parameters of a response, as Python has them."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}


class Calls(logging.Handler):
    """The ended calls in the server's log, as (method, status), the method without its service."""

    def __init__(self) -> None:
        super().__init__()
        self._ended: queue.Queue[tuple[str, str]] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._ended.put((str(vars(record)["method"]).rpartition("/")[2], str(vars(record)["status"])))

    def wait(self, method: str) -> str:
        """The status of the next call of this method that ends."""
        while True:
            ended = self._ended.get(timeout=120)
            if ended[0] == method:
                return ended[1]


@contextlib.contextmanager
def ending() -> Iterator[Calls]:
    """Within the block the log of calls can be waited for."""
    logger, calls = logging.getLogger(ACCESS), Calls()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(calls)
    try:
        yield calls
    finally:
        logger.removeHandler(calls)
        logger.setLevel(before)


class Gate:
    """Holds a pipeline's calls until they are released."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self.called = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._open = threading.Event()
        pipeline.before_call = self._wait

    def _wait(self) -> None:
        if not self._open.is_set():
            self.called.release()
            assert self._go.acquire(timeout=120)

    def wait_for_call(self) -> None:
        """Waits until a call has begun and is held."""
        assert self.called.acquire(timeout=120)

    def step(self) -> None:
        """Releases one call."""
        self._go.release()

    def open(self) -> None:
        """Releases all calls from now on."""
        self._open.set()
        self._go.release(1000)


def refused(call: Any) -> tuple[str, str]:
    """The status and the text of what Triton's client raises."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()
