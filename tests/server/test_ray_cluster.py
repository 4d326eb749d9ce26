"""Fronts over applications on one real Ray cluster: the whole contract, a killed replica, and no remaining processes.

The first front starts the cluster. Each is a process of its own, as `img2img serve --engine ray` is; the devices only sleep.
"""

import concurrent.futures
import contextlib
import io
import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_client import Client
from messages import content, failure, request
from PIL import Image
from ray_cluster import FrontProcess, front
from running import running, store
from simulated_device import SimulatedDevice

pytestmark = pytest.mark.alone

CORES = {"num_cpus": 0.25}
"""Cores of each replica: two applications of two replicas fit into any machine."""
SLOW = {"seconds": 0.1, "more": 0.1, "models": ["m", "n"]}
QUICK = {"seconds": 0.01, "models": ["m", "n"]}
SCALED = {"min_replicas": 1, "max_replicas": 2, "upscale_delay": 0.0, "target_queued_seconds": 1.0, **CORES}
PAIR = {"app": "pair", "min_replicas": 2, **CORES}
FOR_EVER = 10**6
"""Steps: with 10 ms each, longer than any test may take."""
SETTINGS = {"max_steps": FOR_EVER, "default_model": "m"}
_MARK = "IMG2IMG_TEST_RUN"


def _until(what: str, done: Callable[[], bool], seconds: float = 120.0, left: Callable[[], object] = str) -> None:
    """Waits for a state of other processes. A failure shows `left`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"never happened: {what} {left()}"
        time.sleep(0.05)


def _processes(mark: str) -> list[psutil.Process]:
    """All processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _replicas(mark: str, app: str) -> list[psutil.Process]:
    """The processes of an application's replicas."""
    found = []
    for process in _processes(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:{app}:"):
                found.append(process)
    return found


@dataclass(frozen=True, slots=True)
class Ground:
    """The cluster's first front, and what marks all of the cluster's processes."""

    first: FrontProcess
    address: str
    mark: str


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    mark = uuid.uuid4().hex
    # Not in this process's environment: the tests' own children, such as codec processes, do not belong to the cluster.
    with front(SCALED, SLOW, variables={_MARK: mark}) as first:
        (line,) = (line for line in first.log.read_text().splitlines() if "Ray cluster at " in line)
        yield Ground(first, line.split("Ray cluster at ")[1].split(";")[0], mark)


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[FrontProcess]:
    """A front of an application of its own, with two replicas."""
    with front({"address": ground.address, **PAIR}, QUICK, SETTINGS) as process:
        yield process


@pytest.fixture(scope="module")
def channel(served: FrontProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> ImageToImageServiceStub:
    return ImageToImageServiceStub(channel)


@pytest.fixture(scope="module")
def local() -> Iterator[ImageToImageServiceStub]:
    """The same device behind an engine in this process."""
    pipelines = {"m": SimulatedDevice(0.0)}
    with (
        running(lambda: store(**pipelines), max_steps=FOR_EVER) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield ImageToImageServiceStub(channel)


def asked(number: int, **fields: Any) -> pb.TransformRequest:
    return request(seed=number, prompt=f"image {number}", image_count=1 + number % 2, **fields)


def follow(stub: ImageToImageServiceStub, message: pb.TransformRequest) -> pb.TransformResponse:
    """Streams a request, and checks that its events are one complete sequence."""
    events = list(stub.TransformStream(pb.TransformStreamRequest(request=message)))
    kinds = [event.WhichOneof("event") for event in events]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["queued", "started", "progress", "completed"]
    assert kinds.count("started") == kinds.count("completed") == 1
    steps = [event.progress.step for event in events if event.HasField("progress")]
    assert steps == list(range(1, events[-2].progress.step_count + 1))
    return events[-1].completed


def _image_bytes(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _models(target: str) -> list[str]:
    with Client(target, timeout=60) as client:
        return sorted(model.id for model in client.models())


def _ask(client: Client, data: bytes, steps: int = 1) -> bytes:
    return client.transform(data, prompt="x", model="m", seed=3, num_inference_steps=steps, strength=1.0).images[0].data


def test_queued_work_starts_a_second_replica(ground: Ground) -> None:
    assert len(_replicas(ground.mark, "img2img")) == 1
    data = _image_bytes()
    with Client(ground.first.target, timeout=120) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        # 12 at a time of half a second each on a device that takes one after the other: six seconds of work, not one.
        done = [pool.submit(_ask, client, data, 5)]
        _until("a second replica", lambda: _busy(pool, client, data, done) and len(_replicas(ground.mark, "img2img")) == 2)
        assert len({future.result() for future in done}) == 1, "an image is the same on any replica"


def _busy(
    pool: concurrent.futures.ThreadPoolExecutor, client: Client, data: bytes, done: "list[concurrent.futures.Future[bytes]]"
) -> bool:
    """Keeps 12 requests under way."""
    while sum(not future.done() for future in done) < 12:
        done.append(pool.submit(_ask, client, data, 5))
    return True


def test_images_above_rays_default_message_limit_pass(ground: Ground) -> None:
    with Client(ground.first.target, timeout=60) as client:
        drawn = Image.open(io.BytesIO(_ask(client, _image_bytes(1600, 1200))))  # 5.8 MB of pixels
    assert drawn.size == (1600, 1200)


@pytest.mark.parametrize("ask", [lambda stub, message: stub.Transform(message), follow], ids=["unary", "streamed"])
def test_images_match_an_in_process_engine(
    stub: ImageToImageServiceStub, local: ImageToImageServiceStub, ask: Callable[..., pb.TransformResponse]
) -> None:
    for number in range(3):
        answer = ask(stub, asked(number))
        assert content(answer) == content(local.Transform(asked(number)))
        assert (answer.model_id, answer.model_revision, answer.engine) == ("m", "r1", "simulated:sleep")


def test_a_wrong_field_is_named(stub: ImageToImageServiceStub) -> None:
    code, details = failure(lambda: stub.Transform(request(strength=2.0)))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "strength")


def test_replica_refuses_an_unmeetable_deadline_with_the_estimate(stub: ImageToImageServiceStub) -> None:
    for number in range(8):  # until both have measured a step
        stub.Transform(asked(number, num_inference_steps=20, strength=1.0))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Transform(request(num_inference_steps=FOR_EVER, strength=1.0), timeout=60)
    error: Any = caught.value
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert status.details[0].Unpack(info)
    assert info.reason == "DEADLINE_UNMEETABLE"
    assert float(info.metadata["estimate_seconds"]) > 60


def test_cancelling_frees_the_replica_and_unload_reaches_all_replicas(
    stub: ImageToImageServiceStub, channel: grpc.Channel
) -> None:
    """A model is unloaded once no request is in it: each of these would stay for hours."""
    models = ModelServiceStub(channel)
    states = {model.id: model.state for model in models.ListModels(model_pb2.ListModelsRequest()).models}
    assert states == {"m": model_pb2.MODEL_STATE_READY, "n": model_pb2.MODEL_STATE_READY}
    message = request(model=pb.ModelReference(path="n"), num_inference_steps=FOR_EVER, strength=1.0)
    calls = [stub.Transform.future(message) for _ in range(2)]
    streams = [stub.TransformStream(pb.TransformStreamRequest(request=message)) for _ in range(4)]
    for stream in streams:
        while next(stream).WhichOneof("event") != "progress":
            pass
    for call in [*streams, *calls]:
        call.cancel()
    models.UnloadModel(model_pb2.UnloadModelRequest(id="n"), timeout=120)
    states = {model.id: model.state for model in models.ListModels(model_pb2.ListModelsRequest()).models}
    assert states == {"m": model_pb2.MODEL_STATE_READY, "n": model_pb2.MODEL_STATE_UNLOADED}


def test_killing_a_replica_under_load_loses_no_request(
    ground: Ground, served: FrontProcess, stub: ImageToImageServiceStub, local: ImageToImageServiceStub
) -> None:
    count, in_flight = 48, threading.Semaphore(0)
    steps = [random.Random(number).randint(20, 120) for number in range(count)]

    def message(number: int) -> pb.TransformRequest:
        return asked(number, num_inference_steps=steps[number], strength=1.0)

    def ask(number: int) -> pb.TransformResponse:
        in_flight.release()
        if number % 2:
            return follow(stub, message(number))
        return stub.Transform(message(number))

    before = _replicas(ground.mark, "pair")
    assert len(before) == 2
    with ThreadPoolExecutor(24) as callers:
        answers = [callers.submit(ask, number) for number in range(count)]
        for _ in range(30):  # so that some have been answered, and others wait or run on either replica
            in_flight.acquire()
        before[0].kill()
        got = [content(answer.result()) for answer in answers]
    assert got == [content(local.Transform(message(number))) for number in range(count)]
    _until("the loss is in the log", lambda: "lost a replica" in served.log.read_text(encoding="utf-8"))


def test_front_process_loads_neither_torch_nor_onnxruntime(served: FrontProcess) -> None:
    maps = psutil.Process(served.process.pid).memory_maps()
    assert not [entry.path for entry in maps if "libtorch" in entry.path or "onnxruntime" in entry.path]


def test_shared_application_outlives_the_front_that_deployed_it(ground: Ground, served: FrontProcess) -> None:
    ray = {**PAIR, "address": ground.address, "spread_after": 7.0}
    with front(ray, QUICK, SETTINGS) as other:
        # The later one uses the application unchanged, and logs the differing settings.
        assert "ray_spread_after is 30.0 there, not 7.0" in other.log.read_text()
        assert _models(served.target) == _models(other.target) == _models(ground.first.target) == ["m", "n"]
        data = _image_bytes()
        with Client(served.target, timeout=60) as one, Client(other.target, timeout=60) as two:
            before = _replicas(ground.mark, "pair")
            assert _ask(one, data) == _ask(two, data)
            assert served.stop() == 0
            assert _ask(two, data) == _ask(two, data)
        assert {process.pid for process in before} <= {process.pid for process in _replicas(ground.mark, "pair")}


def test_front_that_started_the_cluster_stops_every_ray_process(ground: Ground) -> None:
    """The last test, since it ends the cluster of the others."""
    assert len(_processes(ground.mark)) > 4
    assert ground.first.stop() == 0
    _until("all processes of the cluster end", lambda: not _processes(ground.mark), left=lambda: _processes(ground.mark))
    assert "Traceback" not in ground.first.log.read_text()
    assert "*** SIGTERM" not in ground.first.log.read_text()
