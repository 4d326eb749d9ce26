"""A message's bytes are bounded before it is parsed, in every service and for every kind of field."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from asset_calls import noise
from fakes import FakePipeline
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from img2img.v1 import asset_pb2, model_pb2
from img2img.v1 import image_to_image_pb2 as pb
from img2img_server.api import transport, wire
from img2img_server.errors import InvalidField, MalformedMessage
from img2img_server.images import ImageLimits
from messages import failure, request
from running import running, store
from tritonclient.grpc import service_pb2 as kserve_pb  # type: ignore[import-untyped]

MANY = 100_000
LIMITS = ImageLimits(max_bytes=2**20)


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        running(lambda: store(m=FakePipeline()), kserve=True, image_limits=LIMITS) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_send_message_length", -1)]) as opened,
    ):
        yield opened


def send(channel: grpc.Channel, method: str, *bodies: bytes, **options: Any) -> list[bytes]:
    """Sends raw messages to a method, and returns the raw answers."""
    call: Any = channel.stream_stream(method)
    return list(call(iter(bodies), timeout=60, **options))


IMAGES, MODELS, ASSETS = "/img2img.v1.ImageToImageService/", "/img2img.v1.ModelService/", "/img2img.v1.AssetService/"
KSERVE, HEALTH = "/inference.GRPCInferenceService/", "/grpc.health.v1.Health/"


def field(number: int, body: bytes = b"") -> bytes:
    """A field of so many bytes, fewer than 128."""
    return bytes([number << 3 | 2, len(body)]) + body


def nested(*numbers: int, body: bytes) -> bytes:
    """`body` as a field within a field."""
    for number in reversed(numbers):
        length, prefix = len(body), bytearray([number << 3 | 2])
        while length >= 128:
            prefix.append(length & 127 | 128)
            length >>= 7
        body = bytes(prefix) + bytes([length]) + body
    return body


PATTERNS = pb.ModelReference.ALLOW_PATTERNS_FIELD_NUMBER
IGNORED = pb.ModelReference.IGNORE_PATTERNS_FIELD_NUMBER
MODEL = pb.TransformRequest.MODEL_FIELD_NUMBER
INPUTS = kserve_pb.ModelInferRequest.INPUTS_FIELD_NUMBER
OUTPUTS = kserve_pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER
PARAMETERS = kserve_pb.ModelInferRequest.PARAMETERS_FIELD_NUMBER
RAW = kserve_pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
SHAPE = kserve_pb.ModelInferRequest.InferInputTensor.SHAPE_FIELD_NUMBER
CONTENTS = kserve_pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER
FLOODS = {
    "patterns": (IMAGES + "Transform", nested(MODEL, body=field(PATTERNS) * MANY), "model.allow_patterns"),
    "patterns of a stream": (IMAGES + "TransformStream", nested(1, MODEL, body=field(IGNORED) * MANY), "model.ignore_patterns"),
    "inputs": (KSERVE + "ModelInfer", field(INPUTS) * MANY, "inputs"),
    "outputs of a stream": (KSERVE + "ModelStreamInfer", field(OUTPUTS) * MANY, "outputs"),
    "parameters": (KSERVE + "ModelInfer", field(PARAMETERS) * MANY, "parameters"),
    "raw contents": (KSERVE + "ModelInfer", field(RAW) * MANY, "raw_input_contents"),
    "a tensor's shape": (KSERVE + "ModelInfer", nested(INPUTS, SHAPE, body=b"\1" * MANY), "inputs.shape"),
    "bools": (KSERVE + "ModelInfer", nested(INPUTS, CONTENTS, 1, body=b"\1" * MANY), "inputs.contents.bool_contents"),
    "integers": (KSERVE + "ModelInfer", nested(INPUTS, CONTENTS, 3, body=b"\1" * MANY), "inputs.contents.int64_contents"),
    "numbers": (KSERVE + "ModelInfer", nested(INPUTS, CONTENTS, 6, body=bytes(4 * MANY)), "inputs.contents.fp32_contents"),
    "texts": (KSERVE + "ModelInfer", nested(INPUTS, CONTENTS, body=field(8) * MANY), "inputs.contents.bytes_contents"),
}


@pytest.mark.parametrize("case", FLOODS)
def test_elements_of_a_repeated_field_are_counted_before_they_are_parsed(channel: grpc.Channel, case: str) -> None:
    method, body, name = FLOODS[case]
    code, details = failure(lambda: send(channel, method, body))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, name)
    assert details["description"] == f"the field has more than {wire.MAX_ELEMENTS} elements"


@pytest.mark.parametrize("method", [IMAGES + "Transform", ASSETS + "UploadAsset", KSERVE + "ModelInfer"])
@pytest.mark.parametrize(
    "body", [b"\xf8\x3f\1" * MANY, b"\xfa\x3f\0" * MANY, b"\x0a\0" * MANY], ids=["numbers", "bytes", "singular"]
)
def test_unknown_and_repeated_fields_are_limited(channel: grpc.Channel, method: str, body: bytes) -> None:
    code, details = failure(lambda: send(channel, method, body))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details["reason"] in ("MALFORMED_MESSAGE", "INVALID_FIELD")
    assert "more than" in str(details["message"])


@pytest.mark.parametrize(
    "method",
    [
        *(MODELS + name for name in ("ListModels", "GetModel", "LoadModel", "UnloadModel")),
        *(ASSETS + name for name in ("GetAsset", "DeleteAsset")),
        *(HEALTH + name for name in ("Check", "Watch")),
        *(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")),
        *(KSERVE + name for name in ("ServerLive", "ModelReady", "ModelMetadata", "RepositoryIndex", "RepositoryModelLoad")),
    ],
)
def test_methods_without_images_accept_at_most_64_kib(channel: grpc.Channel, method: str) -> None:
    code, details = failure(lambda: send(channel, method, bytes(transport.MAX_MESSAGE_BYTES + 1)))
    assert (code, details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE")
    assert str(transport.MAX_MESSAGE_BYTES) in str(details["message"])


def test_upload_accepts_messages_up_to_the_maximum_file_size(channel: grpc.Channel) -> None:
    data = noise((400, 400))
    info = asset_pb2.UploadAssetRequest(info=asset_pb2.UploadAssetInfo(size=len(data)))
    chunk = asset_pb2.UploadAssetRequest(chunk=data)
    large = asset_pb2.UploadAssetRequest(chunk=bytes(LIMITS.max_bytes + transport.MAX_MESSAGE_BYTES))
    code, details = failure(lambda: send(channel, ASSETS + "UploadAsset", large.SerializeToString()))
    assert (code, details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE")
    (answer,) = send(channel, ASSETS + "UploadAsset", info.SerializeToString(), chunk.SerializeToString())
    uploaded = asset_pb2.UploadAssetResponse.FromString(answer).asset
    assert uploaded.size == len(data)
    send(channel, ASSETS + "DeleteAsset", asset_pb2.DeleteAssetRequest(id=uploaded.id).SerializeToString())


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (request(model=pb.ModelReference(repo_id="a" * MANY)), "model.repo_id"),
        (request(prompt="a" * MANY), "prompt"),
        (request(image=pb.ImageSource(asset_id="a" * MANY)), "image.asset_id"),
    ],
)
def test_only_image_fields_may_be_large(channel: grpc.Channel, message: pb.TransformRequest, name: str) -> None:
    code, details = failure(lambda: send(channel, IMAGES + "Transform", message.SerializeToString()))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, name)
    assert f"the maximum is {wire.MAX_VALUE_BYTES}" in str(details["description"])


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("method", [IMAGES + "Transform", IMAGES + "TransformStream", MODELS + "ListModels", HEALTH + "Check"])
def test_compressed_messages_are_refused(channel: grpc.Channel, method: str, compression: grpc.Compression) -> None:
    flood = nested(MODEL, body=field(PATTERNS) * MANY)
    with pytest.raises(grpc.RpcError) as caught:
        send(channel, method, flood, compression=compression)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert send(channel, IMAGES + "Transform", request().SerializeToString())


def test_size_limits_apply_to_decompressed_messages() -> None:
    with (
        running(lambda: store(m=FakePipeline()), accept_compression=True, image_limits=LIMITS) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_send_message_length", -1)]) as channel,
    ):
        zipped: dict[str, Any] = {"compression": grpc.Compression.Gzip}
        assert send(channel, IMAGES + "Transform", request().SerializeToString(), **zipped)
        method, body, _ = FLOODS["patterns"]
        code, details = failure(lambda: send(channel, method, body, **zipped))
        assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "model.allow_patterns")
        code, _ = failure(lambda: send(channel, IMAGES + "Transform", bytes(2**24), **zipped))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_message_within_the_limits_is_parsed() -> None:
    tensor = kserve_pb.ModelInferRequest.InferInputTensor(name="image_pixels", datatype="UINT8", shape=[300, 400, 3])
    tensor.contents.uint_contents.extend([200] * 360_000)
    message = kserve_pb.ModelInferRequest(model_name="m", inputs=[tensor])
    data = message.SerializeToString()
    assert wire.check(data, message.DESCRIPTOR) >= len(data) + 8 * 360_000, "elements of a byte or two take up to eight"
    most = pb.ModelReference(allow_patterns=[""] * wire.MAX_ELEMENTS)
    assert wire.check(most.SerializeToString(), most.DESCRIPTOR) == most.ByteSize()


def truncated(message: Message) -> Iterator[bytes]:
    data = message.SerializeToString()
    for length in range(1, len(data)):
        yield data[:length]


def test_wire_check_refuses_every_message_that_the_parser_refuses() -> None:
    """For every truncation of messages of all kinds: accepted ones can be parsed, refused ones cannot."""
    messages: list[Message] = [
        request(
            model=pb.ModelReference(repo_id="a", allow_patterns=["b", "c"]), strength=0.5, width=128, num_inference_steps=300
        ),
        kserve_pb.ModelInferRequest(inputs=[kserve_pb.ModelInferRequest.InferInputTensor(name="a", shape=[1, 300])]),
        model_pb2.LoadModelRequest(id="m"),
        health_pb2.HealthCheckRequest(service="a"),
        reflection_pb2.ServerReflectionRequest(host="a", list_services="b"),
    ]
    for message in messages:
        for data in truncated(message):
            assert _passes(lambda data=data, of=message: wire.check(data, of.DESCRIPTOR)) == _passes(  # type: ignore[misc]
                lambda data=data, of=message: type(of).FromString(data)  # type: ignore[misc]
            )


def test_deeply_nested_messages_are_refused() -> None:
    data = nested(*[3] * 100, body=b"")  # FileDescriptorProto.nested_type within itself
    with pytest.raises(MalformedMessage, match="deep"):
        wire.check(data, descriptor_pb2.DescriptorProto.DESCRIPTOR)
    with pytest.raises(MalformedMessage, match="cannot be parsed"):
        wire.check(b"\x0b\x0c" * 10, pb.TransformRequest.DESCRIPTOR)


def test_wire_check_stops_at_the_first_exceeded_limit() -> None:
    with pytest.raises(InvalidField):
        wire.check(field(PATTERNS) * 10**7, pb.ModelReference.DESCRIPTOR)


def _passes(read: Callable[[], object]) -> bool:
    try:
        read()
    except Exception:  # noqa: BLE001 - upb's and ours
        return False
    return True
