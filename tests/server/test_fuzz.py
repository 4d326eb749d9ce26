"""Every RPC of every service with arbitrary messages: the status is documented, and the server stays healthy.

hypothesis makes valid, nearly valid and invalid messages from the descriptors (tests/fuzzing.py). `scripts/fuzz` does the same
for longer, guided by coverage.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from fuzz_parts.rpcs import METHODS, SECONDS, Finding, check, is_unchanged, name_of, send
from fuzz_parts.seeds import PAST
from fuzz_parts.serving import Served, served
from fuzz_parts.targets import targets
from fuzzing import calls
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, given, settings
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from messages import request
from soak_parts.process import ROOT


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """A server of two models, one of which may be unloaded, in a folder whose name must not be disclosed."""
    with served() as made:
        yield made


@pytest.fixture(scope="module")
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as made:
        yield made


def test_every_reflected_service_is_fuzzed(channel: grpc.Channel) -> None:
    """The services that reflection lists."""
    call: Any = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=SECONDS)
    reflected = {service.name for service in answer.list_services_response.service}
    assert reflected == {method.containing_service.full_name for method in METHODS}


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_message_gets_a_documented_status(method: MethodDescriptor, server: Served, channel: grpc.Channel) -> None:
    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(method))
    def attempt(messages: list[bytes]) -> None:
        check(method, *send(channel, method, messages), messages)

    attempt()
    assert is_unchanged(server.folder)
    assert_healthy(channel)


@pytest.mark.parametrize(("method", "data"), [(method, data) for method in METHODS for data in (b"\xff" * 3, b"\x0a\xff\x7f")])
def test_unparsable_message_is_an_invalid_argument(method: MethodDescriptor, data: bytes, channel: grpc.Channel) -> None:
    """gRPC's own status would be UNKNOWN, with a traceback in the log for each."""
    code, error = send(channel, method, [data])
    assert (code, error.details()[:28]) == (grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be parsed")


METADATA = st.lists(
    st.tuples(
        st.sampled_from(["x-request-id", "traceparent", "authorization", "tracestate", "grpc-timeout-x", "user-agent-x"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300)
        | st.sampled_from(["", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-" + "f" * 32 + "-" + "f" * 16 + "-ff", "Bearer x"]),
    ),
    max_size=4,
)


def test_call_with_any_metadata_is_answered(channel: grpc.Channel) -> None:
    stub = ImageToImageServiceStub(channel)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(METADATA)
    def send(metadata: list[tuple[str, str]]) -> None:
        call: Any = stub.Transform.with_call(request(num_inference_steps=2), timeout=SECONDS, metadata=tuple(metadata))
        (request_id,) = [value for key, value in call[1].initial_metadata() if key == "x-request-id"]
        assert 0 < len(request_id) <= 64

    send()


def assert_healthy(channel: grpc.Channel) -> None:
    """Health answers, and a request is served."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status == health_pb2.HealthCheckResponse.SERVING
    answer = ImageToImageServiceStub(channel).Transform(request(num_inference_steps=2), timeout=SECONDS)
    assert len(answer.images) == 1


@pytest.mark.parametrize(("name", "data"), PAST)
def test_past_fuzzing_failures_stay_fixed(name: str, data: bytes) -> None:
    with contextlib.ExitStack() as stack:
        targets()[name].make(stack)(data)


def test_every_fuzzer_accepts_its_own_corpus() -> None:
    """All except the RPCs, which have a test above."""
    with contextlib.ExitStack() as stack:
        for name, target in targets().items():
            if name not in map(name_of, METHODS):
                attempt = target.make(stack)
                for data in (*target.corpus(), b"", b"\0"):
                    attempt(data)


class Failed:
    """An error as a client sees it, without details."""

    def details(self) -> str:
        return "Traceback of /planted-secret-1/models"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_an_undocumented_status_is_a_finding(code: grpc.StatusCode) -> None:
    with pytest.raises(Finding, match=code.name):
        check(METHODS[0], code, Failed(), [b""])


def test_response_that_reveals_server_details_is_a_finding() -> None:
    with pytest.raises(Finding, match="reveals a detail of the server"):
        check(METHODS[0], grpc.StatusCode.NOT_FOUND, Failed(), [b""])


@pytest.mark.nightly
def test_fuzz_script_reports_counts_and_saves_findings(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--out", str(tmp_path)]
    result = subprocess.run(
        [*script, "--minutes", "0.05", "--target", "metadata,ModelService.GetModel"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads((tmp_path / "fuzz.json").read_text())
    assert [each["target"] for each in outcomes] == ["metadata", "ModelService.GetModel"]
    assert all(each["inputs"] > 10 and each["findings"] == [] for each in outcomes)
    unknown = subprocess.run([*script, "--target", "nothing"], capture_output=True, text=True, timeout=60, check=False)
    assert (unknown.returncode, "unknown target nothing" in unknown.stderr) == (2, True)
