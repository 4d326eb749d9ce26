"""Timeouts, deadlines, cancellation and a full queue for KServe requests, as in img2img.v1."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton  # type: ignore[import-untyped]
from fakes import FakePipeline
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.images import ImageLimits
from kserve_calls import Gate, Loaded, client_of, ending, image_input, refused, serving
from messages import failure
from tritonclient.grpc import service_pb2, service_pb2_grpc


@pytest.mark.parametrize("limits", [{"timeout": 2_000_000}, {"client_timeout": 2.0}])
def test_timeout_cancels_the_request(limits: dict[str, Any], tmp_path: Path) -> None:
    """Triton's own, in microseconds; and the call's. Long enough for a busy machine to begin the work."""
    with serving(tmp_path) as (server, loaded), client_of(server) as client:
        pipeline = loaded["m"]
        gate = Gate(pipeline)
        with ending() as calls:
            status, told = refused(lambda: client.infer("m", [image_input()], parameters={"num_inference_steps": 100}, **limits))
            assert calls.wait("ModelInfer") == status == "DEADLINE_EXCEEDED", told
        gate.open()
        client.infer("m", [image_input()], parameters={"num_inference_steps": 2})
        assert len(pipeline.released) == 2
        assert pipeline.released[0].step < 80
        assert refused(lambda: client.infer("m", [image_input()], timeout=-1))[1].startswith("timeout: ")
        assert client.infer("m", [image_input()], timeout=0), "none"


def test_unmeetable_timeout_is_refused_at_once(tmp_path: Path) -> None:
    """By the model's measured costs, as for a deadline."""
    settings = {"num_inference_steps": 100, "strength": 1.0}
    request = triton._utils._get_inference_request("m", [image_input()], "", "", None, 0, False, False, 0, 500_000, settings)
    with (
        serving(tmp_path) as (server, loaded),
        client_of(server) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        pipeline = loaded["m"]
        pipeline.before_call = lambda: time.sleep(0.02)
        client.infer("m", [image_input()], parameters={"num_inference_steps": 10})
        pipeline.prepared.clear()
        code, details = failure(lambda: service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request))
    assert (code, details["reason"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNMEETABLE")
    assert pipeline.prepared == []


class Slow(Loaded):
    """Loads while `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def load(self, bundle: Path, manifest: object) -> FakePipeline:
        assert self.go.wait(120)
        return super().load(bundle, manifest)


def test_a_timeout_also_ends_the_wait_for_a_model(tmp_path: Path) -> None:
    slow = Slow()
    with serving(tmp_path, slow) as (server, _), client_of(server) as client:
        client.unload_model("second")
        slow.go.clear()
        status, told = refused(lambda: client.infer("second", [image_input()], timeout=200_000))
        assert (status, told) == ("DEADLINE_EXCEEDED", "the request did not finish within its timeout of 0.2 s")
        slow.go.set()
        assert client.infer("second", [image_input()]).as_numpy("images").shape == (1,)


def test_cancelling_frees_the_device(tmp_path: Path) -> None:
    told: queue.Queue[Any] = queue.Queue()
    with serving(tmp_path) as (server, loaded), client_of(server) as client, ending() as calls:
        pipeline = loaded["m"]
        gate = Gate(pipeline)
        call = client.async_infer("m", [image_input()], lambda result, error: told.put(error))
        gate.wait_for_call()
        call.cancel()
        assert calls.wait("ModelInfer") == "CANCELLED"
        gate.open()
        client.infer("m", [image_input()], parameters={"num_inference_steps": 2})
    assert pipeline.released[0].step < 20
    assert told.get(timeout=120).status() == "StatusCode.CANCELLED"


def test_queue_full_is_immediate_and_has_a_retry_delay(tmp_path: Path) -> None:
    request = triton._utils._get_inference_request("m", [image_input()], "", "", None, 0, False, False, 0, None, None)
    with (
        serving(tmp_path, limits=QueueLimits(max_active=1, max_waiting=1)) as (server, loaded),
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        infer, gate, done = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer, Gate(loaded["m"]), queue.Queue[Any]()
        first = infer.future(request)
        gate.wait_for_call()
        following = [infer.future(request) for _ in range(4)]
        for call in following:
            call.add_done_callback(done.put)
        # One of them waits, the others are refused while the model is held.
        for _ in range(3):
            code, details = failure(done.get(timeout=120).result)
            assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert float(str(details["retry"])) > 0
        nothing = service_pb2.ModelInferRequest()
        assert failure(lambda: infer(nothing))[1]["reason"] == "QUEUE_FULL", "before anybody looks at what is asked"
        gate.open()
        assert first.result(120).outputs
        assert done.get(timeout=120).result().outputs


@pytest.mark.parametrize(
    ("message", "code"),
    [(b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT), (bytes(2**21), grpc.StatusCode.RESOURCE_EXHAUSTED)],
)
def test_malformed_message_ends_the_stream_and_its_requests(message: bytes, code: grpc.StatusCode, tmp_path: Path) -> None:
    running = triton._utils._get_inference_request("m", [image_input()], "", "a", None, 0, False, False, 0, None, None)
    with (
        serving(tmp_path, image_limits=ImageLimits(max_bytes=2**18)) as (server, loaded),
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        ending() as calls,
    ):
        gate = Gate(loaded["m"])

        def messages() -> Iterator[bytes]:
            yield running.SerializeToString()
            gate.wait_for_call()
            yield message

        infer: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as caught:
            list(infer(messages()))
        assert caught.value.code() is code
        assert calls.wait("ModelInfer") == "CANCELLED"
        gate.open()
