"""KServe, given anything at all: statuses that are documented and say what is wrong, and a server that is as well as before.

The rules are those of test_fuzz.py; messages of a service whose inputs have names need a hand (`REQUESTS`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from fuzz_parts.rpcs import DOCUMENTED, MOST_TEXT, SECONDS, name_of, send
from fuzzing import calls, messages
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from img2img_server.api.kserve.translation import INPUTS
from img2img_server.config import AssetSettings
from img2img_server.images import ImageLimits
from kserve_calls import client_of, image_input, serving, text
from messages import png
from running import RunningServer
from tritonclient.grpc import service_pb2 as pb  # type: ignore[import-untyped]

METHODS: Sequence[MethodDescriptor] = list(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)
INFERENCES = [method for method in METHODS if method.input_type.name == "ModelInferRequest"]
OTHERS = [method for method in METHODS if method not in INFERENCES]
STATUSES = {*DOCUMENTED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED}  # the last by `timeout`

NAMES = st.sampled_from([one.name for one in INPUTS]) | st.sampled_from(["", "images", "nope"])
KEYS = NAMES | st.sampled_from(
    [
        *("timeout", "priority", "progress", "preview_interval", "output_format", "quality", "fit", "sequence_id", "x" * 5_000),
        *("triton_enable_empty_final_response", "shared_memory_region", "shared_memory_offset"),
    ]
)
DATATYPES = st.sampled_from(["BYTES", "INT64", "INT32", "FP32", "FP64", "UINT8", "FP16", "BF16", "", "x" * 3_000])
SHAPES = st.sampled_from(
    [[1], [1, 1], [], [0], [2], [3, 1], [8, 8, 3], [1, 8, 8, 3], [8, 8, 4], [-1], [2**62, 2**62, 3], [2**31]]
)
RAW = st.binary(max_size=40) | st.sampled_from(
    [len(png()).to_bytes(4, "little") + png(), bytes(8 * 8 * 3), bytes(8), bytes(4), b"\xff\xff\xff\xff", b"\x01\0\0\0\xff"]
)
PARAMETERS = st.dictionaries(KEYS, messages(pb.InferParameter.DESCRIPTOR), max_size=2)


def tensors() -> st.SearchStrategy[Any]:
    contents = st.none() | messages(pb.InferTensorContents.DESCRIPTOR)
    make = pb.ModelInferRequest.InferInputTensor
    none = st.just(dict[str, Any]())
    parameters = none | none | PARAMETERS
    return st.builds(make, name=NAMES, datatype=DATATYPES, shape=SHAPES, contents=contents, parameters=parameters)


def nearly_valid() -> st.SearchStrategy[Any]:
    """A request that would be served, with another input or another setting."""

    def made(others: list[tuple[Any, bytes]], parameters: dict[str, Any], outputs: list[str]) -> Any:
        request = pb.ModelInferRequest(model_name="m", parameters={"num_inference_steps": pb.InferParameter(int64_param=3)})
        for valid in (image_input(), text("prompt", "p")):
            if valid.name() not in {one.name for one, _ in others}:
                request.inputs.append(valid._get_tensor())
                request.raw_input_contents.append(valid._get_content())
        for tensor, raw in others:
            request.inputs.append(tensor)
            request.raw_input_contents.append(raw)
        for name, value in parameters.items():
            request.parameters[name].CopyFrom(value)
        for name in outputs:
            request.outputs.add(name=name)
        return request

    names = st.lists(st.sampled_from(["images", "seed", "preview"]), max_size=2)
    return st.builds(made, st.lists(st.tuples(tensors(), RAW), max_size=1), PARAMETERS, names)


def anything() -> st.SearchStrategy[Any]:
    make = pb.ModelInferRequest
    return st.builds(
        make,
        model_name=st.sampled_from(["m", "second", "", "nope", "../m"]),
        model_version=st.sampled_from(["", "1", "2", "x" * 5_000]),
        id=st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.just("i" * 5_000),
        inputs=st.lists(tensors(), max_size=3),
        raw_input_contents=st.lists(RAW, max_size=3),
        parameters=PARAMETERS,
    )


REQUESTS = (nearly_valid() | nearly_valid() | anything()).map(lambda request: request.SerializeToString())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("planted-secret")
    limits = ImageLimits(max_bytes=2**16, max_source_pixels=10_000, max_pixels=4_096)
    assets = AssetSettings(url=str(folder / "assets"), quota=2**20)
    with serving(folder / "models", image_limits=limits, assets=assets, max_steps=10) as (made, _):
        yield made


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as made:
        yield made


def check(code: grpc.StatusCode, error: Any) -> None:
    """A documented status, of a bounded text that tells nothing of the server, with the details of its reason."""
    assert code in STATUSES, f"{code.name}: {error.details() if error else ''}"
    if error is None:
        return
    assert 0 < len(error.details()) <= MOST_TEXT
    assert not any(secret in error.details() for secret in ("planted-secret", "Traceback", ".py"))
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status.details[0].Unpack(info)
    assert (info.domain, bool(info.reason)) == ("img2img", True)
    if info.reason == "INVALID_FIELD":
        status.details[1].Unpack(bad)
        assert error.details().startswith(f"{bad.field_violations[0].field}: ")


@pytest.mark.parametrize("data", [b"\xff" * 3, b"\x0a\xff\x7f"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_unparsable_kserve_message_is_an_invalid_argument(method: MethodDescriptor, data: bytes, channel: grpc.Channel) -> None:
    code, error = send(channel, method, [data])
    assert (code, error.details()[:28]) == (grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be parsed")


@pytest.mark.parametrize("method", OTHERS, ids=name_of)
def test_every_kserve_message_gets_a_documented_status(method: MethodDescriptor, channel: grpc.Channel) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(method))
    def attempt(sent: list[bytes]) -> None:
        check(*send(channel, method, sent))

    attempt()


def test_every_inference_request_gets_a_documented_status(server: RunningServer, channel: grpc.Channel) -> None:
    (method,) = (method for method in INFERENCES if not method.client_streaming)
    codes = set()

    @settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(REQUESTS)
    def attempt(sent: bytes) -> None:
        code, error = send(channel, method, [sent])
        check(code, error)
        codes.add(code)

    attempt()
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= codes, "the messages go both ways"
    with client_of(server) as client:
        assert client.infer("m", [image_input()], parameters={"num_inference_steps": 3}).as_numpy("images").shape == (1,)


def test_every_request_of_a_stream_gets_one_final_response(channel: grpc.Channel) -> None:
    (method,) = (method for method in INFERENCES if method.client_streaming)
    call: Any = channel.stream_stream(
        f"/{method.containing_service.full_name}/{method.name}", response_deserializer=pb.ModelStreamInferResponse.FromString
    )

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(REQUESTS, max_size=5))
    def attempt(sent: list[bytes]) -> None:
        answers = list(call(iter(sent), timeout=SECONDS))
        finals = [each for each in answers if each.infer_response.parameters["triton_final_response"].bool_param]
        asked = sorted(pb.ModelInferRequest.FromString(data).id for data in sent)
        assert sorted(each.infer_response.id for each in finals) == asked
        for each in answers:
            if each.error_message:
                status = each.infer_response.parameters["status"].string_param
                assert grpc.StatusCode[status] in STATUSES - {grpc.StatusCode.OK}, each.error_message
                assert each in finals

    attempt()
