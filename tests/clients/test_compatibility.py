"""The promises of docs/compatibility.md: old clients work with new servers, and new clients with old servers."""

import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import api_docs
import grpc
import pytest
from conftest import REPOSITORY
from fake_image_service import FakeServer, events
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img_client import Client, Completed
from messages import failure, png
from other_clients import IMAGE, Run, succeeded
from running import RunningServer

RELEASED = REPOSITORY / "protos" / "released"

ADDITIONS = (
    ("int32 image_count = 9;", "int32 image_count = 9;\n  // More.\n  optional int32 more = 99;"),
    ("OUTPUT_FORMAT_WEBP = 3;", "OUTPUT_FORMAT_WEBP = 3;\n  // Small.\n  OUTPUT_FORMAT_AVIF = 4;"),
    ("  rpc Transform(", "  rpc More(TransformRequest) returns (TransformResponse);\n\n  rpc Transform("),
    ("Steps done, from 1.", "Steps that are done, from 1."),
)
BREAKS = {
    'field "4" with name "width" on message "ImageResult" was deleted': ("int32 width = 4;", "int32 width = 14;"),
    'Field "8" with name "seeds" on message "TransformRequest" changed': (
        "optional int64 seed = 8;",
        "optional int64 seeds = 8;",
    ),
    'Field "1" with name "queue_ms" on message "Timings" changed type': ("double queue_ms = 1;", "float queue_ms = 1;"),
    'field "13" with name "scheduler" on message "TransformRequest" was deleted': ("  optional string scheduler = 13;\n", ""),
    'enum value "3" on enum "OutputFormat" was deleted': ("  OUTPUT_FORMAT_WEBP = 3;\n", ""),
    'RPC "Transform" on service "ImageToImageService" was deleted': (
        "  rpc Transform(TransformRequest) returns (TransformResponse);\n",
        "",
    ),
    'Field "5" with name "strength" on message "TransformRequest" changed cardinality': (
        "optional double strength",
        "double strength",
    ),
}
"""The expected messages of scripts/breaking, by the replaced text and its replacement."""


@dataclass(frozen=True, slots=True)
class Contract:
    """The contract of an image, as messages that know nothing of today's."""

    pool: Any

    def make(self, name: str, /, **fields: Any) -> Message:
        return self.type(name)(**fields)

    def type(self, name: str) -> type[Message]:
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"img2img.v1.{name}"))

    def call(self, channel: grpc.Channel, service: str, method: str, requests: Iterable[Message]) -> list[Any]:
        """All responses to a call. On the wire every kind of call looks like a streaming one."""
        found = self.pool.FindServiceByName(f"img2img.v1.{service}").methods_by_name[method]
        call: Any = channel.stream_stream(
            f"/img2img.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )
        return list(call(iter(requests), timeout=120))


def contract(image: FileDescriptorSet) -> Contract:
    pool = descriptor_pool.DescriptorPool()
    for file in image.file:
        pool.Add(file)  # type: ignore[no-untyped-call]
    return Contract(pool)


@pytest.fixture(scope="module")
def released() -> FileDescriptorSet:
    return FileDescriptorSet.FromString((RELEASED / "img2img.v1.binpb").read_bytes())


@pytest.fixture(scope="module")
def newer() -> Contract:
    """The contract with unknown additions: a field in every message, an event, a value of every enum, methods."""
    image = api_docs.build()
    for file in image.file:
        if file.package == "img2img.v1":
            for message in file.message_type:
                message.field.add(name="future", number=1999, type=FieldDescriptorProto.TYPE_STRING, label=1)
                if message.name == "TransformStreamResponse":
                    message.field[-1].oneof_index = 0
            for service in file.service:
                own = f".img2img.v1.{file.message_type[0].name}"
                service.method.add(name="Future", input_type=own, output_type=own)
            for enum in file.enum_type:
                enum.value.add(name=f"{enum.name.upper()}_FUTURE", number=99)
    return contract(image)


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield channel


def breaking(folder: Path, changes: Iterable[tuple[str, str]]) -> "subprocess.CompletedProcess[str]":
    """Runs scripts/breaking for the contract with texts of its files replaced."""
    protos = folder / "protos"
    shutil.copytree(REPOSITORY / "protos", protos, ignore=shutil.ignore_patterns("__pycache__", "released"))
    file = protos / "img2img" / "v1" / "image_to_image.proto"
    text = file.read_text()
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file.write_text(text)
    command = [REPOSITORY / "scripts" / "breaking", protos]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_a_change_that_breaks_clients_fails(tmp_path: Path) -> None:
    result = breaking(tmp_path, BREAKS.values())
    assert result.returncode == 100, result.stderr
    for said in BREAKS:
        assert said in result.stdout


def test_an_addition_passes(tmp_path: Path) -> None:
    result = breaking(tmp_path, ADDITIONS)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_released_reasons_and_codes_are_unchanged() -> None:
    assert "QUEUE_FULL" in json.loads((RELEASED / "img2img.v1.reasons.json").read_text())
    assert api_docs.broken_reasons() == []


@pytest.mark.parametrize("broken", [{"GONE": "NOT_FOUND"}, {"QUEUE_FULL": "UNAVAILABLE"}])
def test_release_refuses_removed_error_reasons(
    broken: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api_docs, "RELEASED_REASONS", tmp_path / "reasons.json")
    monkeypatch.setattr("sys.argv", ["api_docs", "--reasons"])
    (tmp_path / "reasons.json").write_text(json.dumps(api_docs.reasons() | broken))
    assert api_docs.main() == 1
    out, err = capsys.readouterr()
    assert (out, next(iter(broken)) in err) == ("", True)
    (tmp_path / "reasons.json").unlink()
    assert api_docs.main() == 0
    assert json.loads(capsys.readouterr().out) == api_docs.reasons()


def test_released_defaults_are_unchanged(released: FileDescriptorSet) -> None:
    before, today = api_docs.read(released).comments, api_docs.read(api_docs.build()).comments
    defaults = {name: api_docs.split_default(comment)[1] for name, comment in before.items()}
    promised = {name: default for name, default in defaults.items() if default}
    assert len(promised) >= 15
    assert promised == {name: api_docs.split_default(today[name])[1] for name in promised}


def test_a_client_of_the_released_contract_is_served(released: FileDescriptorSet, channel: grpc.Channel) -> None:
    old = contract(released)
    (listed,) = old.call(channel, "ModelService", "ListModels", [old.make("ListModelsRequest")])
    assert [model.id for model in listed.models] == ["m"]
    wanted = old.make("TransformRequest", image=old.make("ImageSource", data=png()), seed=5, num_inference_steps=4)
    (answer,) = old.call(channel, "ImageToImageService", "Transform", [wanted])
    assert [(image.seed, image.width, image.height) for image in answer.images] == [(5, 24, 16)]
    told = old.call(channel, "ImageToImageService", "TransformStream", [old.make("TransformStreamRequest", request=wanted)])
    assert {event.WhichOneof("event") for event in told} == {"queued", "started", "progress", "completed"}
    info = old.make("UploadAssetInfo", size=len(png()))
    upload = [old.make("UploadAssetRequest", info=info), old.make("UploadAssetRequest", chunk=png())]
    (kept,) = old.call(channel, "AssetService", "UploadAsset", upload)
    got = old.call(channel, "AssetService", "GetAsset", [old.make("GetAssetRequest", id=kept.asset.id)])
    assert b"".join(message.chunk for message in got) == png()


def test_server_ignores_unknown_fields_of_a_newer_client(newer: Contract, channel: grpc.Channel) -> None:
    image = newer.make("ImageSource", data=png(), future="?")
    wanted = newer.make("TransformRequest", image=image, seed=5, num_inference_steps=4, future="?")
    (answer,) = newer.call(channel, "ImageToImageService", "Transform", [wanted])
    assert [image.seed for image in answer.images] == [5]
    (listed,) = newer.call(channel, "ModelService", "ListModels", [newer.make("ListModelsRequest", future="?")])
    assert [model.id for model in listed.models] == ["m"]


def test_server_refuses_unknown_enum_values_and_methods(newer: Contract, channel: grpc.Channel) -> None:
    output = newer.make("OutputOptions", format=99)
    wanted = newer.make("TransformRequest", image=newer.make("ImageSource", data=png()), output=output)
    code, told = failure(lambda: newer.call(channel, "ImageToImageService", "Transform", [wanted]))
    assert (code, told["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "output.format")
    with pytest.raises(grpc.RpcError) as caught:
        newer.call(channel, "ImageToImageService", "Future", [newer.make("TransformRequest")])
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def script_newer_responses(newer: Contract, fake: FakeServer) -> None:
    """Makes `fake` answer like a newer server: with a field, an event and values unknown to its clients."""
    future = newer.make("TransformStreamResponse", future="?").SerializeToString()
    made = newer.type("TransformResponse")()
    made.ParseFromString(events()[-1].completed.SerializeToString())
    made.future = "?"  # type: ignore[attr-defined]
    fake.service.script = [
        *events()[:-1],
        pb.TransformStreamResponse.FromString(future),
        pb.TransformStreamResponse(completed=pb.TransformResponse.FromString(made.SerializeToString())),
    ]
    model = newer.make("Model", id="m", state=99, future="?", engines=[newer.make("EngineStatus", name="x", state=99)])
    fake.service.models = [model_pb2.Model.FromString(model.SerializeToString())]


def test_python_client_ignores_unknown_fields_and_events(newer: Contract, fake: FakeServer) -> None:
    script_newer_responses(newer, fake)
    with Client(fake.target, timeout=120, retries=None) as client:
        told = list(client.transform_stream(IMAGE))
        assert isinstance(told[-1], Completed)
        assert len(told) == len(events())
        (model,) = client.models()
    assert (model.id, model.state, model.engines[0].state) == ("m", "unspecified", "unspecified")


def test_node_client_ignores_unknown_fields_and_events(newer: Contract, fake: FakeServer, run: Run) -> None:
    script_newer_responses(newer, fake)
    assert succeeded(run("stream.js", IMAGE, "out.png", target=fake.target))[-1] == "out.png after 11 ms"
    assert succeeded(run("models.js", target=fake.target)) == ["m  99  -"]
