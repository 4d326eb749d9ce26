"""KServe v2 with Triton's own client: descriptions, inputs, outputs and parameters, with the same results as img2img.v1."""

import base64
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton  # type: ignore[import-untyped]
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-untyped]
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.engine.request import RequestWarning
from img2img_server.support.model_fields import FieldRule
from kserve_calls import Loaded, client_of, image_input, number, opened, parameters, refused, serving, tensor, text
from messages import failure, png
from PIL import Image
from running import RunningServer
from soak_parts.stand_in import StandInPipeline, expected
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Loaded]]:
    with serving(tmp_path_factory.mktemp("models")) as made:
        yield made


@pytest.fixture
def server(served: tuple[RunningServer, Loaded]) -> RunningServer:
    return served[0]


@pytest.fixture
def pipeline(served: tuple[RunningServer, Loaded]) -> FakePipeline:
    return served[1].as_new("m")


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with client_of(server) as made:
        yield made


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Any]:
    """A stub, for messages that Triton's client would not send."""
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def native(server: RunningServer) -> Iterator[ImageToImageServiceStub]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


def test_server_and_models_are_live_and_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1")
    assert not client.is_model_ready("nope"), "as Triton has it"
    assert not client.is_model_ready("m", "2")
    metadata = client.get_server_metadata()
    assert (metadata.name, "model_repository" in metadata.extensions) == ("img2img", True)
    assert metadata.version


def test_described_inputs_and_outputs_are_accepted_and_returned(client: Any, pipeline: FakePipeline) -> None:
    """Every input, with the datatype and the shape that metadata and configuration tell, and every output."""
    metadata, config = client.get_model_metadata("m"), client.get_model_config("m").config
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("m", ["1"], "img2img_onnx")
    assert [one.name for one in config.input] == [one.name for one in metadata.inputs]
    assert [list(one.dims) for one in config.input] == [list(one.shape) for one in metadata.inputs]
    assert all(one.optional for one in config.input)
    assert (config.max_batch_size, config.model_transaction_policy.decoupled) == (0, False)
    assert config.parameters["schedulers"].string_value == "EulerDiscreteScheduler, DDIMScheduler"
    values = {
        "image": png(), "image_uri": b"data:image/png;base64," + base64.b64encode(png()), "prompt": b"a lake",
        "image_pixels": np.zeros((8, 16, 3), np.uint8), "negative_prompt": b"fog", "strength": 0.5, "guidance_scale": 2.0,
        "num_inference_steps": 10, "seed": 7, "image_count": 2, "width": 16, "height": 8, "scheduler": b"ddimscheduler",
    }  # fmt: skip
    described = {one.name: one for one in metadata.inputs}
    assert described.keys() == values.keys(), "and not masks, which the model does not take"

    def made(name: str) -> Any:
        one, value = described[name], values[name]
        if isinstance(value, np.ndarray):
            return tensor(name, value)
        kinds = {"BYTES": object, "FP32": np.float32, "INT64": np.int64}
        return tensor(name, np.array(value, kinds[one.datatype]).reshape(one.shape))

    settings = [made(name) for name in values if not name.startswith("image_") or name == "image_count"]
    for source in ("image", "image_uri", "image_pixels"):
        inputs = [made(source), *(one for one in settings if one.name() != "image")]
        result = client.infer("m", inputs, outputs=[triton.InferRequestedOutput(one.name) for one in metadata.outputs])
        for output in metadata.outputs:
            found = result.get_output(output.name)
            assert (found.datatype, list(found.shape), list(output.shape)) == (output.datatype, [2], [-1])
        assert result.as_numpy("seed").tolist() == [7, 8]
    asked = pipeline.prepared[-1].request
    assert (asked.prompt, asked.negative_prompt, asked.scheduler, asked.image.size) == ("a lake", "fog", "DDIMScheduler", (16, 8))
    assert (asked.strength, asked.guidance_scale, asked.num_inference_steps, asked.seeds) == (0.5, 2.0, 10, (7, 8))


def test_editing_model_describes_and_accepts_its_own_inputs(client: Any, pipeline: FakePipeline) -> None:
    pipeline.fields = {name: FieldRule(4.0) for name in ("negative_prompt", "true_cfg_scale")} | {"reference_images": FieldRule()}
    try:
        described = {one.name: list(one.shape) for one in client.get_model_metadata("m").inputs}
        assert described["reference_images"] == [-1]
        assert "true_cfg_scale" in described
        assert not {"strength", "guidance_scale"} & described.keys()
        address = b"data:image/png;base64," + base64.b64encode(png((8, 16)))
        for shape in ([3], [1, 3]):
            files = np.array([png((16, 8)), address, png((8, 8))], object).reshape(shape)
            settings = [number("true_cfg_scale", 2.5, np.float32), text("negative_prompt", "fog")]
            client.infer("m", [image_input(), tensor("reference_images", files), *settings])
            asked = pipeline.prepared[-1].request
            assert [image.size for image in asked.references] == [(16, 8), (8, 16), (8, 8)]
            assert (asked.true_cfg_scale, asked.negative_prompt) == (2.5, "fog")
        bad = tensor("reference_images", np.array([png(), b"no image"], object))
        assert refused(lambda: client.infer("m", [image_input(), bad]))[1].startswith("reference_images[1]")
    finally:
        pipeline.fields = FakePipeline.fields
    assert refused(lambda: client.infer("m", [image_input(), tensor("reference_images", files[0])]))[1].startswith(
        "reference_images"
    )


SETTINGS: dict[str, Any] = {
    "prompt": "a lake", "negative_prompt": "fog", "strength": 0.7, "guidance_scale": 0.0, "num_inference_steps": 10, "seed": 3,
    "image_count": 2, "width": 16, "height": 8, "scheduler": "DDIMScheduler",
}  # fmt: skip


def as_tensors(float_kind: Any, int_kind: Any) -> list[Any]:
    kinds: dict[type, Any] = {float: float_kind, int: int_kind}
    return [
        text(name, value) if isinstance(value, str) else number(name, value, kinds[type(value)])
        for name, value in SETTINGS.items()
    ]


def asked_of(pipeline: FakePipeline) -> object:
    """The engine's last request, without its name."""
    return dataclasses.replace(pipeline.prepared[-1].request, id="")


@pytest.mark.parametrize("kinds", [(np.float32, np.int64), (np.float64, np.int32)])
def test_tensors_and_parameters_map_to_request_fields(
    kinds: tuple[Any, Any], client: Any, native: ImageToImageServiceStub, pipeline: FakePipeline
) -> None:
    """Also a strength of 0.7: seven steps of ten, and six for the FP32 that is closest to it."""
    answer = native.Transform(
        pb.TransformRequest(model=pb.ModelReference(path="m"), image=pb.ImageSource(data=png()), **SETTINGS)
    )
    wanted = asked_of(pipeline)
    by_tensors = client.infer("m", [image_input(), *as_tensors(*kinds)])
    assert (asked_of(pipeline), pipeline.prepared[-1].step_count) == (wanted, 7)
    by_parameters = client.infer("m", [image_input()], parameters=SETTINGS)
    assert asked_of(pipeline) == wanted
    for result in (by_tensors, by_parameters):
        assert result.as_numpy("images").tolist() == [image.data for image in answer.images]
        assert result.as_numpy("seed").tolist() == [image.seed for image in answer.images]


def test_tensors_override_parameters(client: Any, pipeline: FakePipeline) -> None:
    client.infer("m", [image_input(), number("seed", 5, np.int64)], parameters={"seed": 6, "prompt": "p"})
    asked = pipeline.prepared[-1].request
    assert (asked.seeds, asked.prompt) == ((5,), "p")


class StandIns(Loaded):
    """Loads what draws images."""

    def load(self, bundle: Path, manifest: object) -> Any:
        return StandInPipeline(0.0)


def test_image_is_the_same_as_through_img2img_v1(tmp_path: Path) -> None:
    """With a fake model whose images depend on every setting."""
    source = Image.effect_noise((32, 24), 80).convert("RGB")
    source.save(tmp_path / "source.png")
    data, wanted = (tmp_path / "source.png").read_bytes(), expected(source, "a lake", 11, 6)
    pixels = np.asarray(source)
    settings = {"prompt": "a lake", "seed": 11, "num_inference_steps": 6}
    with (
        serving(tmp_path / "models", StandIns()) as (server, _),
        client_of(server) as client,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        request = pb.TransformRequest(model=pb.ModelReference(path="m"), image=pb.ImageSource(data=data), **settings)  # type: ignore[arg-type]
        native = ImageToImageServiceStub(channel).Transform(request).images[0].data
        for given in (image_input(data), tensor("image_pixels", pixels), tensor("image_pixels", pixels[np.newaxis])):
            result = client.infer("m", [given], parameters=settings)
            assert result.as_numpy("images").flatten()[0] == native
            assert opened(result).convert("RGB").tobytes() == wanted.tobytes()


@pytest.mark.parametrize("asked", [["seed", "images"], ["images"], ["seed"], []])
def test_only_requested_outputs_are_returned(client: Any, asked: list[str]) -> None:
    result = client.infer("m", [image_input()], outputs=[triton.InferRequestedOutput(name) for name in asked])
    response = result.get_response()
    assert [output.name for output in response.outputs] == (asked or ["images", "seed"])
    assert len(response.raw_output_contents) == len(response.outputs)
    assert (response.model_name, response.model_version) == ("m", "1")


def test_responses_have_request_id_timings_and_engine(client: Any) -> None:
    response = client.infer("m", [image_input()], request_id="my-own").get_response()
    assert response.id == "my-own"
    told = parameters(response)
    assert (told["engine"], told["model_revision"]) == ("fake:cpu", "r1")
    assert {"queue_ms", "encode_ms", "denoise_ms", "decode_ms"} < told.keys()
    assert told["total_ms"] > 0


@pytest.mark.parametrize(("fit", "size"), [("native", (16, 8)), ("Native", (16, 8)), (48, (48, 32)), ("48", (48, 32))])
def test_a_source_is_fitted_by_a_parameter(client: Any, fit: str | int, size: tuple[int, int]) -> None:
    assert opened(client.infer("m", [image_input(png((300, 200)))], parameters={"fit": fit})).size == size


def test_warnings_are_returned_as_a_response_parameter(client: Any, pipeline: FakePipeline) -> None:
    assert "warnings" not in parameters(client.infer("m", [image_input()]).get_response())
    pipeline.warnings = (RequestWarning("prompt", "it was too long", "PROMPT_TRUNCATED"),)
    (told,) = json.loads(parameters(client.infer("m", [image_input()]).get_response())["warnings"])
    assert told == {"field": "prompt", "description": "it was too long", "code": "PROMPT_TRUNCATED"}


@pytest.mark.parametrize(("word", "format_"), [("png", "PNG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_results_are_in_the_requested_format(client: Any, word: str, format_: str) -> None:
    result = client.infer("m", [image_input()], parameters={"output_format": word, "quality": 50})
    assert opened(result).format == format_


def test_batch_dimension_of_one_is_kept_and_larger_ones_are_refused(client: Any) -> None:
    result = client.infer("m", [text("image", png(), (1, 1)), text("prompt", "p", (1, 1))], parameters={"image_count": 3})
    assert result.as_numpy("images").shape == result.as_numpy("seed").shape == (1, 3)
    status, told = refused(lambda: client.infer("m", [text("image", png(), (3, 1))]))
    assert (status, told[:21]) == ("INVALID_ARGUMENT", "image: batch size 3 i")


BAD: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no image": ([], {}, "image"),
    "two sources": ([image_input(), text("image_uri", "data:,")], {}, "image"),
    "a source twice, by tensor and parameter": ([image_input()], {"image_uri": "data:,"}, "image"),
    "no image in a file": ([image_input(b"nothing")], {}, "image"),
    "no image in an address": ([text("image_uri", "data:,hello")], {}, "image_uri"),
    "an address of no kind": ([text("image_uri", "gopher://x")], {}, "image_uri"),
    "pixels of less than the model takes": ([tensor("image_pixels", np.zeros((4, 4, 3), np.uint8))], {}, "image_pixels"),
    "an unknown input": ([image_input(), text("promt", "p")], {}, "inputs"),
    "an input twice": ([image_input(), text("prompt", "p"), text("prompt", "p")], {}, "prompt"),
    "a wrong datatype": ([image_input(), number("seed", 1, np.float32)], {}, "seed"),
    "a wrong shape": ([image_input(), tensor("seed", np.array([1, 2], np.int64))], {}, "seed"),
    "no elements": ([image_input(), tensor("seed", np.array([], np.int64))], {}, "seed"),
    "no UTF-8": ([image_input(), text("prompt", b"\xff\xfe")], {}, "prompt"),
    "a value out of bounds": ([image_input(), number("strength", 1.5, np.float32)], {}, "strength"),
    "not a number": ([image_input(), number("guidance_scale", np.nan, np.float32)], {}, "guidance_scale"),
    "an integer that is too long": ([image_input(), number("width", 2**40, np.int64)], {}, "width"),
    "an unknown parameter": ([image_input()], {"promt": "p"}, "parameters"),
    "a parameter of a wrong type": ([image_input()], {"seed": "5"}, "seed"),
    "a number for an integer": ([image_input()], {"num_inference_steps": 5.5}, "num_inference_steps"),
    "a parameter that is too long": ([image_input()], {"height": 2**40}, "height"),
    "an unknown format": ([image_input()], {"output_format": "gif"}, "output_format"),
    "an unknown fit": ([image_input()], {"fit": "wide"}, "fit"),
    "a fit below the model's multiple": ([image_input()], {"fit": 7}, "fit"),
    "a fit that is too long": ([image_input()], {"fit": 2**40}, "fit"),
    "a fit of a wrong type": ([image_input()], {"fit": True}, "fit"),
    "a fit beside a width": ([image_input()], {"fit": "native", "width": 16}, "fit"),
    "a quality out of bounds": ([image_input()], {"quality": 101}, "quality"),
    "an unknown scheduler": ([image_input()], {"scheduler": "nope"}, "scheduler"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_its_tensor_or_parameter(name: str, client: Any, stub: Any, pipeline: FakePipeline) -> None:
    """In the text, the only part that Triton's client passes on, and in the details."""
    inputs, asked, field = BAD[name]
    status, told = refused(lambda: client.infer("m", inputs, parameters=asked))
    assert (status, told.partition(": ")[0]) == ("INVALID_ARGUMENT", field)
    request = triton._utils._get_inference_request("m", inputs, "", "", None, 0, False, False, 0, None, asked)
    code, details = failure(lambda: stub.ModelInfer(request))
    assert (code, details["field"], details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, field, "INVALID_FIELD")
    assert pipeline.prepared == [], "nothing computes for a wrong request"


def test_requested_outputs_are_checked(client: Any) -> None:
    for names in (["image"], ["seed", "seed"]):
        status, told = refused(lambda: client.infer("m", [image_input()], outputs=list(map(triton.InferRequestedOutput, names))))  # noqa: B023
        assert (status, told.partition(": ")[0]) == ("INVALID_ARGUMENT", "outputs")
    classes = triton.InferRequestedOutput("images", class_count=2)
    assert refused(lambda: client.infer("m", [image_input()], outputs=[classes]))[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize(("model", "version"), [("nope", ""), ("m", "2"), ("../m", "")])
def test_an_unknown_model_or_version_is_not_found(model: str, version: str, client: Any) -> None:
    for call in (
        lambda: client.infer(model, [image_input()], version),
        lambda: client.get_model_metadata(model, version),
        lambda: client.get_model_config(model, version),
    ):
        assert refused(call)[0] == "NOT_FOUND"


def test_a_request_without_a_model_is_refused(stub: Any) -> None:
    code, details = failure(lambda: stub.ModelInfer(service_pb2.ModelInferRequest()))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "model_name")


def test_priority_is_ignored_and_sequences_are_refused(client: Any) -> None:
    """There is no state between requests, and clients are queued fairly regardless of priority."""
    for priority in (3, 2**64 - 1):
        assert client.infer("m", [image_input()], priority=priority).as_numpy("seed").shape == (1,)
    status, told = refused(lambda: client.infer("m", [image_input()], sequence_id=1, sequence_start=True))
    assert (status, told.partition(": ")[0]) == ("INVALID_ARGUMENT", "parameters")


def test_repository_index_follows_load_and_unload(client: Any) -> None:
    def states(ready: bool = False) -> dict[str, tuple[str, str]]:
        index = client.get_model_repository_index()
        if ready:
            index = client._client_stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True))
        return {model.name: (model.state, model.reason) for model in index.models}

    assert states() == {"m": ("READY", ""), "second": ("READY", "")}
    client.unload_model("second")
    assert states() == {"m": ("READY", ""), "second": ("UNAVAILABLE", "unloaded")}
    assert states(ready=True) == {"m": ("READY", "")}
    assert not client.is_model_ready("second")
    assert client.get_model_metadata("second").inputs, "it can be asked about all the same"
    client.load_model("second")
    assert client.is_model_ready("second")
    client.unload_model("second")
    assert client.infer("second", [image_input()]).as_numpy("seed").shape == (1,), "a request loads what is not ready"
    assert client.is_model_ready("second")


def test_invalid_model_management_calls_are_refused(client: Any, stub: Any) -> None:
    assert refused(lambda: client.load_model("nope"))[0] == "NOT_FOUND"
    assert refused(lambda: client.unload_model("nope"))[0] == "NOT_FOUND"
    assert refused(lambda: client.load_model(""))[1].startswith("model_name: model_name is empty")
    assert refused(lambda: client.load_model("m", config="{}"))[0] == "UNIMPLEMENTED"
    code, _ = failure(lambda: stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="other")))
    assert code == grpc.StatusCode.UNIMPLEMENTED


def test_features_of_triton_only_are_refused_with_a_message(client: Any) -> None:
    for call in (
        client.get_inference_statistics,
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
        client.unregister_cuda_shared_memory,
        lambda: client.register_system_shared_memory("a", "/a", 8),
        lambda: client.register_cuda_shared_memory("a", b"", 0, 8),
    ):
        status, told = refused(call)
        assert status == "UNIMPLEMENTED"
        assert "Method not" not in told, "not gRPC's own words"
    region = triton.InferInput("image", [1], "BYTES").set_shared_memory("a", 8)
    assert refused(lambda: client.infer("m", [region]))[0] == "UNIMPLEMENTED"


def test_model_failure_reveals_no_internal_message(client: Any) -> None:
    status, told = refused(lambda: client.infer("m", [image_input(), text("prompt", "fail denoise")]))
    assert status == "INTERNAL"
    assert "told to fail" not in told


@pytest.fixture
async def aio(server: RunningServer) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(f"localhost:{server.port}") as client:
        yield client


async def test_tritons_client_of_asyncio(aio: Any, pipeline: FakePipeline) -> None:
    """Every RPC that it has, but streams (test_kserve_streams.py)."""
    assert await aio.is_server_live()
    assert await aio.is_server_ready()
    assert await aio.is_model_ready("m")
    assert (await aio.get_server_metadata()).name == "img2img"
    assert (await aio.get_model_metadata("m")).name == "m"
    assert (await aio.get_model_config("m")).config.name == "m"
    await aio.unload_model("second")
    assert [model.state for model in (await aio.get_model_repository_index()).models] == ["READY", "UNAVAILABLE"]
    await aio.load_model("second")
    result = await aio.infer("m", [image_input(), number("seed", 9, np.int64)], request_id="a")
    assert (result.as_numpy("seed").tolist(), result.get_response().id) == ([9], "a")
    assert opened(result).size == (24, 16)
    with pytest.raises(InferenceServerException, match="strength: ") as caught:
        await aio.infer("m", [image_input(), number("strength", 2, np.float32)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as caught:
        await aio.get_inference_statistics()
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
