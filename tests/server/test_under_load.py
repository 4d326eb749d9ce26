"""A real server at full load: health and reflection respond, and excess requests are refused at once."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from fake_codecs import FakeProcess
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api import server as serving
from img2img_server.codecs.jobs import Encode, Job, LoadImage
from img2img_server.codecs.pool import Codecs
from img2img_server.config import CodecSettings
from img2img_server.engine.scheduler import QueueLimits
from messages import failure, png, request
from running import RunningServer, running, store

SERVING = health_pb2.HealthCheckResponse.SERVING


class Gate:
    """A gate for threads, which counts the waiting ones."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self._came = threading.Condition()
        self.inside = self.most = self.passed = 0

    def __call__(self) -> None:
        with self._came:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._came.notify_all()
        assert self.opened.wait(60)
        with self._came:
            self.inside -= 1
            self.passed += 1

    def wait_for(self, count: int) -> None:
        """Waits until so many wait at the gate."""
        with self._came:
            assert self._came.wait_for(lambda: self.inside >= count, 120)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open in the end, so that nothing hangs."""
    made = Gate()
    yield made
    made.opened.set()


def gated_codecs(gate: Gate, monkeypatch: pytest.MonkeyPatch, kind: type[Job]) -> None:
    """Makes servers' codecs wait with jobs of this kind until the gate is open."""

    def pass_gate(job: Job) -> None:
        if isinstance(job, kind):
            gate()

    monkeypatch.setattr(serving, "Codecs", partial(Codecs, make=lambda: FakeProcess(pass_gate)))


def assert_answers(server: RunningServer, channel: grpc.Channel) -> None:
    """Health (Check and Watch) and reflection answer."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=120).status == SERVING
    assert health.Check(health_pb2.HealthCheckRequest(service="models/m"), timeout=120).status == SERVING
    watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=120)
    assert next(watching).status == SERVING
    watching.cancel()
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = reflection.ServerReflectionInfo(asked, timeout=120)
    assert "img2img.v1.ImageToImageService" in {item.name for item in answer.list_services_response.service}


def test_with_a_full_queue_and_a_busy_device_health_and_reflection_answer(gate: Gate) -> None:
    pipeline = FakePipeline()
    pipeline.before_call = gate
    with (
        running(lambda: store(m=pipeline), limits=QueueLimits(max_active=1, max_waiting=3, max_client_waiting=100)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        running_call = stub.Transform.future(request())
        gate.wait_for(1)
        waiting = [stub.TransformStream(pb.TransformStreamRequest(request=request())) for _ in range(3)]
        assert sorted(next(stream).queued.position for stream in waiting) == [0, 1, 2]
        for _ in range(20):
            code, details = failure(lambda: stub.Transform(request(), timeout=120))
            assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert float(str(details["retry"])) >= 0.1
        assert_answers(server, channel)
        assert not running_call.done()
        gate.opened.set()
        assert running_call.result(120).images
        assert [list(stream)[-1].WhichOneof("event") for stream in waiting] == ["completed"] * 3


def test_flood_of_one_client_is_refused_before_decoding(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait as bytes for the existing processes, and no more of them than fit."""
    gated_codecs(gate, monkeypatch, LoadImage)
    limits, codecs = QueueLimits(max_waiting=100, max_client_waiting=10), CodecSettings(decoders=3)
    with (
        running(lambda: store(m=FakePipeline()), limits=limits, codecs=codecs) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        ended: list[Any] = []
        refused = threading.Semaphore(0)

        def end(call: Any) -> None:
            ended.append(call)
            refused.release()

        calls = [stub.Transform.future(request(image={"data": png((2000, 1500))})) for _ in range(50)]
        for call in calls:
            call.add_done_callback(end)
        for _ in range(40):
            assert refused.acquire(timeout=120)
        gate.wait_for(2)
        assert gate.passed == 0, "forty were refused while not one image had been decoded"
        for refusal in ended:
            code, details = failure(refusal.result)
            assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_QUEUE_FULL")
            assert float(str(details["retry"])) >= 0.1
        assert_answers(server, channel)
        gate.opened.set()
        assert sum(call.exception(60) is None for call in calls) == 10
    assert gate.most == 2, "one of the processes is left for others"
    assert gate.passed == 10


def test_while_the_codecs_are_busy_health_and_reflection_answer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gated_codecs(gate, monkeypatch, Encode)
    with (
        running(lambda: store(m=FakePipeline()), codecs=CodecSettings(encoders=3)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        calls = [stub.Transform.future(request(image={"data": png((2000, 1500))})) for _ in range(8)]
        gate.wait_for(2)
        assert_answers(server, channel)
        assert not any(call.done() for call in calls)
        gate.opened.set()
        assert all(call.result(60).images for call in calls)
    assert gate.most == 2


def test_big_images_do_not_hold_up_health() -> None:
    """Real decoding and encoding of many images: health answers in their midst, again and again."""
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        image = png((2048, 2048))
        calls = [stub.Transform.future(request(image={"data": image})) for _ in range(12)]
        answered_before = 0
        while not all(call.done() for call in calls):
            assert_answers(server, channel)
            answered_before += not all(call.done() for call in calls)
        assert all(call.result(0).images for call in calls)
        assert answered_before >= 1
