"""A gRPC front over replicas in this process, real but for Ray: the contract is that of an engine of its own."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_calls import client_of, opened
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_cli.__main__ import main
from img2img_server.backends.local import LocalBackend
from img2img_server.backends.ray import backend
from img2img_server.backends.ray.backend import ClusterBackend, cluster
from img2img_server.backends.ray.messages import (
    Card,
    ModelQuery,
    RemoteRequest,
    ReplicaLost,
    Replicas,
)
from img2img_server.backends.ray.replica import Replica
from img2img_server.config import ServerConfig
from img2img_server.engine.request import Completed, Ending, Event, Failed
from messages import content, failure, png, request
from running import RunningServer, running, running_backend, store
from simulated_device import SimulatedDevice

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Here:
    """Replicas on the front's own event loop, and the connection to them. The replica with the least work gets the next request;
    `lost` ones are gone with their requests."""

    def __init__(self, *pipelines: Any, **settings: object) -> None:
        self._pipelines, self._settings = pipelines, settings
        self.replicas: list[Replica] = []
        self.lost: set[int] = set()
        self.busy: dict[int, int] = {}

    async def open(self) -> Replicas:
        config = ServerConfig(**{"models": Path(), "warm_up": 0.0, **self._settings})  # type: ignore[arg-type]
        for pipeline in self._pipelines:
            replica = Replica(config, lambda config, pipeline=pipeline: LocalBackend(config, lambda: store(m=pipeline)))  # type: ignore[misc]
            await replica.open()
            self.replicas.append(replica)
        self.busy = dict.fromkeys(range(len(self.replicas)), 0)
        return self

    async def close(self) -> None:
        for replica in self.replicas:
            await replica.close()

    async def transform(self, job: RemoteRequest) -> Ending:
        async with aclosing(self.stream(job)) as events:
            async for told in events:
                if isinstance(told, Completed | Failed):
                    return told
        raise AssertionError("a replica ends every request")

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Event, None]:
        number = self._choose()
        self.busy[number] += 1
        try:
            async with aclosing(self.replicas[number].stream(job)) as events:
                async for told in events:
                    if number in self.lost:
                        raise ReplicaLost("it was lost")
                    yield told
        finally:
            self.busy[number] -= 1

    async def ask(self, method: str, asked: ModelQuery) -> Card | Failed:
        answer: Card | Failed = await getattr(self.replicas[self._choose()], method)(asked)
        return answer

    async def everywhere(self, method: str, *arguments: Any) -> Sequence[Any]:
        if not (there := [replica for number, replica in enumerate(self.replicas) if number not in self.lost]):
            raise ReplicaLost("none is left")
        return await asyncio.gather(*(getattr(replica, method)(*arguments) for replica in there))

    def _choose(self) -> int:
        there = [
            number for number in self.busy if number not in self.lost and self.replicas[number].load_now().seconds != float("inf")
        ]
        if not there:
            raise ReplicaLost("none is left")
        return min(there, key=self.busy.__getitem__)


@contextmanager
def front(here: Here, **settings: object) -> Iterator[tuple[RunningServer, grpc.Channel]]:
    with (
        running_backend(lambda config: ClusterBackend(config, here), **settings) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield server, channel


def health_of(channel: grpc.Channel, name: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs for mypy know no methods
    return stub.Watch(health_pb2.HealthCheckRequest(service=name))


def test_responses_match_an_in_process_engine() -> None:
    asked = [request(seed=seed, image_count=1 + seed % 3, num_inference_steps=4 + seed) for seed in range(6)]
    with running(lambda: store(m=SimulatedDevice(0.0))) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        expected = [stub.Transform(message) for message in asked]
    with front(Here(SimulatedDevice(0.0), SimulatedDevice(0.0))) as (_, channel):
        stub = ImageToImageServiceStub(channel)
        got = [stub.Transform(message) for message in asked]
        streamed = [list(stub.TransformStream(pb.TransformStreamRequest(request=message)))[-1].completed for message in asked]
        assert stub.Transform(request(seed=-1)).images[0].seed >= 0
    for mine, other, theirs in zip(got, streamed, expected, strict=True):
        assert content(mine) == content(other) == content(theirs)
        assert (mine.model_id, mine.model_revision, mine.engine) == (theirs.model_id, theirs.model_revision, theirs.engine)


def test_hanging_device_fails_its_replica_but_no_request() -> None:
    stuck, never = FakePipeline(), threading.Event()
    stuck.before_call = lambda: never.wait(60)
    here = Here(stuck, FakePipeline(), watchdog=1.0)  # for the other one, too, on a machine that is busy
    with front(here) as (_, channel):
        stub = ImageToImageServiceStub(channel)
        calls = [stub.Transform.future(request(seed=seed)) for seed in range(6)]
        streams = [stub.TransformStream(pb.TransformStreamRequest(request=request(seed=seed))) for seed in range(6)]
        assert [call.result().images[0].seed for call in calls] == list(range(6))
        assert [list(stream)[-1].completed.images[0].seed for stream in streams] == list(range(6))
        assert len(stuck.prepared) > 0, "some of them had begun on the other"
        never.set()


def test_loss_and_return_of_all_replicas_are_reported() -> None:
    here = Here(FakePipeline(), FakePipeline())
    with front(here) as (_, channel):
        stub, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        watch = health_of(channel, "models/m")
        assert next(watch).status == SERVING
        here.lost |= {0, 1}
        assert next(watch).status == NOT_SERVING
        code, details = failure(lambda: stub.Transform(request()))
        assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "NO_REPLICA")
        retry = details["retry"]
        assert isinstance(retry, float)
        assert retry > 0
        (model,) = models.ListModels(model_pb2.ListModelsRequest()).models
        assert (model.state, model.detail) == (model_pb2.MODEL_STATE_UNLOADED, "no replica can be reached")
        here.lost.remove(1)
        assert next(watch).status == SERVING
        assert stub.Transform(request()).model_id == "m"


def test_unload_reaches_all_replicas_and_the_model_list() -> None:
    pipelines = FakePipeline(), FakePipeline()
    with front(Here(*pipelines)) as (_, channel):
        models = ModelServiceStub(channel)
        (model,) = models.ListModels(model_pb2.ListModelsRequest()).models
        assert (model.id, model.state, model.is_default) == ("m", model_pb2.MODEL_STATE_READY, True)
        assert (model.engine, model.size_multiple, list(model.schedulers)) == ("fake:cpu", 8, list(FakePipeline.schedulers))
        assert (model.family, model.source.repo_id) == ("stable-diffusion", "acme/m")
        answer = models.UnloadModel(model_pb2.UnloadModelRequest(id="m"))
        assert answer.model.state == model_pb2.MODEL_STATE_UNLOADED
        assert [pipeline.closed for pipeline in pipelines] == [True, True]


def test_draining_finishes_running_requests_and_refuses_new_ones() -> None:
    pipeline, go, called = FakePipeline(), threading.Event(), threading.Event()

    def wait() -> None:
        called.set()
        assert go.wait(60)

    pipeline.before_call = wait
    with front(Here(pipeline)) as (server, channel):
        stub = ImageToImageServiceStub(channel)
        watch = health_of(channel)
        assert next(watch).status == SERVING
        call = stub.Transform.future(request(seed=7))
        assert called.wait(60)
        stopped = server.stop()
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        code, details = failure(lambda: stub.Transform(request()))
        assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        go.set()
        assert call.result().images[0].seed == 7
        stopped.result(60)


def test_missing_ray_is_reported_with_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert main(["serve", "--models", str(tmp_path), "--engine", "ray"]) == 2
    assert "pip install 'img2img-server[ray]'" in capsys.readouterr().err


def test_timeline_setting_is_refused_with_ray() -> None:
    with pytest.raises(ValueError, match="trace"):
        cluster(ServerConfig(Path(), engine="ray", trace=Path("trace.json")))


def test_openais_api_over_http_is_served_by_replicas_too() -> None:
    with front(Here(FakePipeline()), http_port=0) as (server, _), client_of(server) as client:
        assert [one.id for one in client.models.list()] == ["m"]
        result = client.images.edit(image=png(), prompt="a lake", model="m", n=2)
        assert result.data is not None
        assert [opened(one.b64_json).size for one in result.data] == [(16, 8)] * 2
        with client.images.edit(image=png(), prompt="a lake", model="m", stream=True, partial_images=2) as stream:
            kinds = [str(event.type) for event in stream]
        assert kinds[-1] == "image_edit.completed"
        assert kinds.count("image_edit.partial_image") == 2
        with pytest.raises(openai.BadRequestError, match="strength"):
            client.images.edit(image=png(), prompt="a lake", model="m", extra_body={"strength": 2})
