"""ModelStreamInfer by Triton's own clients: many requests in a call, each with its own answers, errors, limits and end."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-untyped]
from fakes import FakePipeline
from granting import grant
from img2img_server.config import TelemetrySettings
from img2img_server.engine.scheduler import QueueLimits
from kserve_calls import Gate, Loaded, client_of, ending, image_input, number, opened, parameters, serving, text
from running import RunningServer
from scraping import settled, value


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Loaded]]:
    with serving(tmp_path_factory.mktemp("models"), telemetry=TelemetrySettings(metrics_port=0)) as made:
        yield made


@pytest.fixture
def server(served: tuple[RunningServer, Loaded]) -> RunningServer:
    return served[0]


@pytest.fixture
def pipeline(served: tuple[RunningServer, Loaded]) -> FakePipeline:
    return served[1].as_new("m")


class Stream:
    """A stream of Triton's synchronous client: what its callback was given, in order."""

    def __init__(self, client: Any, **settings: Any) -> None:
        self.client = client
        self._told: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: self._told.put((result, error)), **settings)

    def ask(self, request_id: str, *inputs: Any, **settings: Any) -> None:
        self.client.async_stream_infer("m", [image_input(), *inputs], request_id=request_id, **settings)

    def answer(self) -> Any:
        result, error = self._told.get(timeout=120)
        assert error is None, error
        return result

    def error(self) -> Any:
        result, error = self._told.get(timeout=120)
        assert result is None
        return error

    def finals(self, count: int) -> list[str]:
        """The ids of the next final answers, of so many requests."""
        found: list[str] = []
        while len(found) < count:
            response = self.answer().get_response()
            if parameters(response)["triton_final_response"]:
                found.append(response.id)
        return found


@pytest.fixture
def stream(server: RunningServer) -> Iterator[Stream]:
    with client_of(server) as client:
        yield Stream(client)


def test_plain_request_gets_one_final_response(stream: Stream) -> None:
    stream.ask("a", number("seed", 4, np.int64), enable_empty_final_response=True)
    result = stream.answer()
    response = result.get_response()
    assert (response.id, response.model_name, parameters(response)["triton_final_response"]) == ("a", "m", True)
    assert (opened(result).size, result.as_numpy("seed").tolist()) == ((24, 16), [4])
    stream.ask("b")
    assert stream.finals(1) == ["b"], "no empty response follows the one marked as final"


def test_progress_is_sent_on_request(stream: Stream) -> None:
    stream.ask("a", parameters={"progress": True, "num_inference_steps": 5, "strength": 1.0})
    for step in range(1, 6):
        result = stream.answer()
        assert (result.as_numpy("step").tolist(), result.as_numpy("step_count").tolist()) == ([step], [5])
        assert result.as_numpy("images") is None
        assert result.as_numpy("preview") is None
        assert parameters(result.get_response())["triton_final_response"] is False
        assert (result.get_response().id, result.get_response().model_name) == ("a", "m")
    assert stream.answer().as_numpy("images").shape == (1,)


def test_previews_are_sent_on_request(stream: Stream) -> None:
    stream.ask("a", parameters={"preview_interval": 2, "num_inference_steps": 5, "strength": 1.0})
    previews = [stream.answer().as_numpy("preview") for _ in range(5)]
    assert [preview is not None for preview in previews] == [False, True, False, True, False]
    assert previews[1][0].startswith(b"\xff\xd8"), "a JPEG"
    assert stream.finals(1) == ["a"]


def test_stream_responses_are_out_of_order_and_errors_are_isolated(stream: Stream, pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    stream.ask("long", parameters={"progress": True, "num_inference_steps": 100, "strength": 1.0})
    gate.wait_for_call()
    stream.ask("wrong", number("strength", 2, np.float32))
    error = stream.error()
    assert error.message() == "[request id: wrong] INVALID_ARGUMENT: strength: 2.0 is not in (0, 1]"
    stream.ask("short", parameters={"num_inference_steps": 2})
    # One step of the first after the other, until the second has come in and is done.
    answers = []
    for _ in range(99):
        gate.step()
        answers.append(stream.answer().get_response())
        if answers[-1].id == "short":
            break
        gate.wait_for_call()
    assert {answer.id for answer in answers[:-1]} == {"long"}
    assert answers[-1].id == "short"
    gate.open()
    assert stream.finals(1) == ["long"]


def test_stream_error_has_request_id_status_and_message(stream: Stream) -> None:
    stream.ask("", timeout=-1)
    assert stream.error().message().startswith("[request id: <id_unknown>] INVALID_ARGUMENT: timeout: ")
    stream.client.async_stream_infer("nope", [image_input()], request_id="b")
    assert stream.error().message().startswith("[request id: b] NOT_FOUND: ")
    stream.ask("c", text("prompt", "fail denoise"))
    told = stream.error().message()
    assert (told[:26], "told to fail" in told) == ("[request id: c] INTERNAL: ", False)
    stream.ask("d")
    assert stream.finals(1) == ["d"]


def test_a_timeout_ends_a_request_and_not_its_stream(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, loaded), client_of(server) as client:
        gate, stream = Gate(loaded["m"]), Stream(client)
        stream.ask("a", timeout=2_000_000, parameters={"progress": True, "num_inference_steps": 100})
        gate.wait_for_call()
        assert stream.error().message().startswith("[request id: a] DEADLINE_EXCEEDED: ")
        gate.open()
        stream.ask("b")
        assert stream.finals(1) == ["b"]
        assert loaded["m"].released[0].step < 80


def test_a_stream_of_many_requests_answers_each(stream: Stream) -> None:
    """Streams more requests than may be in progress at once."""
    for number_ in range(150):
        stream.ask(str(number_), parameters={"num_inference_steps": 2})
    assert sorted(stream.finals(150), key=int) == [str(number_) for number_ in range(150)]
    stream.client.stop_stream()


def test_cancelling_a_stream_cancels_its_requests(stream: Stream, pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    with ending() as calls:
        for request_id, progress in (("a", True), ("b", False)):
            stream.ask(request_id, parameters={"progress": progress, "num_inference_steps": 100})
        gate.wait_for_call()
        stream.ask("wrong", number("strength", 2, np.float32))
        assert calls.wait("ModelInfer") == "INVALID_ARGUMENT", "so those before it were read, too"
        stream.client.stop_stream(cancel_requests=True)
        assert [calls.wait("ModelInfer") for _ in "ab"] == ["CANCELLED", "CANCELLED"]
    gate.open()
    assert stream.client.infer("m", [image_input()], parameters={"num_inference_steps": 2})
    assert len(pipeline.released) == len(pipeline.prepared), "memory is given back"
    assert all(state.step < 80 for state in pipeline.released)


def test_stream_deadline_applies_to_its_requests(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, loaded), client_of(server) as client, ending() as calls:
        gate, stream = Gate(loaded["m"]), Stream(client, stream_timeout=8.0)
        stream.ask("a")
        gate.wait_for_call()
        assert calls.wait("ModelInfer") == "DEADLINE_EXCEEDED"
        assert "DEADLINE_EXCEEDED" in stream.error().status()
        gate.open()


def test_each_request_of_a_stream_is_counted_and_logged(server: RunningServer) -> None:
    assert server.server.metrics_port is not None
    before = settled(server.server.metrics_port)
    with ending() as calls, client_of(server) as client:
        stream = Stream(client)
        stream.ask("a")
        stream.ask("b", number("strength", 2, np.float32))
        assert sorted(calls.wait("ModelInfer") for _ in "ab") == ["INVALID_ARGUMENT", "OK"]
        stream.client.stop_stream()
        assert calls.wait("ModelStreamInfer") == "OK"
    after = settled(server.server.metrics_port)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    method = "GRPCInferenceService/ModelInfer"
    assert more("img2img_requests_total", method=method, status="OK") == 1
    assert more("img2img_requests_total", method=method, status="INVALID_ARGUMENT", reason="INVALID_FIELD") == 1
    assert more("img2img_pictures_total", model="m") == 1


def test_a_full_queue_refuses_a_request_of_a_stream(tmp_path: Path) -> None:
    with serving(tmp_path, limits=QueueLimits(max_active=1, max_waiting=1)) as (server, loaded), client_of(server) as client:
        gate, stream = Gate(loaded["m"]), Stream(client)
        stream.ask("a")
        gate.wait_for_call()
        stream.ask("b")
        stream.ask("c")
        assert " RESOURCE_EXHAUSTED: " in stream.error().message(), "while the model is held"
        gate.open()
        assert len(stream.finals(2)) == 2


def test_each_stream_request_counts_against_the_tokens_limits(tmp_path: Path) -> None:
    """Each call in a stream counts as one request. The stream does not count as another one."""
    path = tmp_path / "tokens.toml"
    secrets = {
        "one at a time": grant(path, "alice", concurrency=1),
        "six a minute": grant(path, "bob", requests_per_minute=6),
        "second only": grant(path, "carol", models=("second",)),
    }
    with serving(tmp_path / "models", tokens=path) as (server, loaded):

        def streaming(name: str) -> Any:
            return client_of(server), {"headers": {"authorization": f"Bearer {secrets[name]}"}}

        made, settings = streaming("one at a time")
        with made as client:
            gate, stream = Gate(loaded["m"]), Stream(client, **settings)
            stream.ask("a")
            gate.wait_for_call()
            stream.ask("b")
            assert "'alice' already has 1 call in progress" in stream.error().message()
            gate.open()
            assert stream.finals(1) == ["a"]
        made, settings = streaming("six a minute")
        with made as client:
            stream = Stream(client, **settings)
            stream.ask("a")
            assert stream.finals(1) == ["a"]
            stream.ask("b")
            assert "'bob' exceeded its limit of 6 calls per minute" in stream.error().message()
        made, settings = streaming("second only")
        with made as client:
            stream = Stream(client, **settings)
            stream.ask("a")
            assert " PERMISSION_DENIED: " in stream.error().message()
        with client_of(server) as client:
            assert Stream(client).error().status() == "StatusCode.UNAUTHENTICATED"


def asking(*requests: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async def iterate() -> AsyncIterator[dict[str, Any]]:
        for one in requests:
            yield {"model_name": "m", "inputs": [image_input()], **one}

    return iterate()


async def test_tritons_client_of_asyncio_streams(server: RunningServer) -> None:
    asked = asking(
        {"request_id": "a", "parameters": {"progress": True, "num_inference_steps": 3, "strength": 1.0}},
        {"request_id": "b", "inputs": []},
        {"request_id": "c", "parameters": {"seed": 8}},
    )
    steps, finals, errors = [], [], []
    async with triton_aio.InferenceServerClient(f"localhost:{server.port}") as client:
        async for result, error in client.stream_infer(asked):
            if error is not None:
                errors.append(error.message())
            elif parameters(result.get_response())["triton_final_response"]:
                finals.append(result.get_response().id)
            else:
                steps.append((result.get_response().id, int(result.as_numpy("step")[0])))
    assert steps == [("a", 1), ("a", 2), ("a", 3)]
    assert sorted(finals) == ["a", "c"]
    assert [told.partition(" exactly")[0] for told in errors] == ["[request id: b] INVALID_ARGUMENT: image:"]


async def test_tritons_client_of_asyncio_cancels_its_stream(server: RunningServer, pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    with ending() as calls:
        async with triton_aio.InferenceServerClient(f"localhost:{server.port}") as client:
            responses = client.stream_infer(asking({"parameters": {"progress": True, "num_inference_steps": 100}}))
            gate.step()
            await anext(responses)
            responses.cancel()
            assert await asyncio.to_thread(calls.wait, "ModelInfer") == "CANCELLED"
            gate.open()
            await client.infer("m", [image_input()], parameters={"num_inference_steps": 2})
    assert pipeline.released[0].step < 80
