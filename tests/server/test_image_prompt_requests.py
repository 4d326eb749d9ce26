"""Requests with image prompts, over every API: checked, read as the squares that their image encoder reads, and recorded. The
model is a fake; test_image_prompts.py has what models draw."""

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prompting
import pytest
import tritonclient.grpc as triton  # type: ignore[import-untyped]
from adapter_headers import EMBEDDING, STATE, TEXT, write_header
from fakes import FakePipeline
from granting import bearing, grant
from http_calls import EDITS, ask, get
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_client import read_provenance
from img2img_server.bundle.image_encoders import FAMILY, EncoderWidths
from img2img_server.config import AssetSettings, ImageAdapterFolder
from img2img_server.engine.request import ImagePromptUse
from img2img_server.images import ImageLimits
from img2img_server.images.sizes import centered_square
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.model_fields import IMAGE_PROMPTS
from kserve_calls import client_of as kserve_client
from messages import failure, png
from PIL import Image
from running import RunningServer, manifest, running
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

LIMITS = ImageLimits(max_bytes=60_000, max_source_pixels=20_000)
SIDES = {"vit": 16, "big": 24}
"""The sides of the squares that the image encoders read."""


WIDTHS_OF = {"vit": EncoderWidths(EMBEDDING, 1), "big": EncoderWidths(1, STATE)}


def registry(pipeline: FakePipeline) -> ModelRegistry:
    """The model "m", one that takes no image prompts, and two image encoders."""
    own = manifest("acme/m")
    found = [prompting.model("m", pipeline), Model("plain", own, FakePipeline())]
    for name, side in SIDES.items():
        encoder = FakePipeline()
        encoder.native_size = (side, side)
        kind = replace(own, family=FAMILY, files={"model.onnx": name})
        found.append(Model(name, kind, encoder, encoder_widths=WIDTHS_OF[name]))
    return ModelRegistry(found, "m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a plus adapter for the model "m", and others."""
    made = tmp_path_factory.mktemp("adapters")
    write_header(made / "plain.safetensors")
    write_header(made / "face" / "plus.safetensors", "plus")
    write_header(made / "faceid.safetensors", "faceid")
    write_header(made / "sdxl.safetensors", text=2 * TEXT)
    write_header(made / "lost.safetensors").with_suffix(".json").write_text('{"image_encoder": "none"}')
    write_header(made / "wrong.safetensors").with_suffix(".json").write_text('{"encoder": "vit"}')
    (made / "old.bin").write_bytes(b"")
    return made


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def server(pipeline: FakePipeline, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings: dict[str, Any] = {"http_port": 0, "kserve": True, "image_limits": LIMITS}
    assets = AssetSettings(url=str(tmp_path_factory.mktemp("assets")))
    with running(lambda: registry(pipeline), image_adapters=ImageAdapterFolder(folder), assets=assets, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> ImageToImageServiceStub:
    return ImageToImageServiceStub(channel)


def noise(size: tuple[int, int]) -> Image.Image:
    """Every pixel counts."""
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def file_of(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


WIDE, TALL = noise((50, 20)), noise((18, 90))
A, B = pb.ImageSource(data=file_of(WIDE)), pb.ImageSource(data=file_of(TALL))


def prompt(adapter: str = "plain", *images: pb.ImageSource, **fields: Any) -> pb.ImagePrompt:
    return pb.ImagePrompt(adapter=adapter, images=images or [A], **fields)


def asked(*prompts: pb.ImagePrompt, **fields: Any) -> pb.TransformRequest:
    return pb.TransformRequest(image=pb.ImageSource(data=png()), image_prompts=prompts, seed=5, **fields)


def shown(uses: tuple[ImagePromptUse, ...]) -> list[tuple[str, str, float, list[bytes]]]:
    return [(use.adapter, use.encoder, use.scale, [image.tobytes() for image in use.images]) for use in uses]


def squares(side: int, *images: Image.Image) -> list[bytes]:
    """The same squares that the image encoder itself would make."""
    return [centered_square(image, side).tobytes() for image in images]


def test_images_reach_the_model_as_the_squares_that_the_image_encoder_reads(
    stub: ImageToImageServiceStub, pipeline: FakePipeline, folder: Path
) -> None:
    stub.Transform(asked(prompt("plain", A, B, scale=0.5), prompt("face/plus", B), prompt("plain", scale=-1)))
    uses = pipeline.prepared[-1].request.image_prompts
    assert shown(uses) == [
        ("plain", "vit", 0.5, squares(16, WIDE, TALL)),
        ("face/plus", "big", 1.0, squares(24, TALL)),
        ("plain", "vit", -1.0, squares(16, WIDE)),
    ]
    assert uses[0].image_digests[0] == uses[2].image_digests[0] != uses[0].image_digests[1]
    assert (uses[0].digest, len(uses[0].digest)) == (uses[2].digest, 64)
    assert uses[0].encoder_digest != uses[1].encoder_digest != ""
    stub.Transform(asked())
    assert pipeline.prepared[-1].request.image_prompts == ()


def test_image_prompts_are_recorded_in_the_image(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    kept = stub.Transform(asked(output=pb.OutputOptions(as_asset=True))).images[0].asset_id
    result = stub.Transform(asked(prompt("plain", A, pb.ImageSource(asset_id=kept), scale=0.5))).images[0]
    (use,) = pipeline.prepared[-1].request.image_prompts
    record = read_provenance(result.data) or {}
    assert record["image_prompts"] == [
        {
            "adapter": "plain",
            "scale": 0.5,
            "digest": use.digest,
            "encoder": "vit",
            "encoder_digest": use.encoder_digest,
            "images": [
                {"digest": use.image_digests[0].hex(), "asset": None},
                {"digest": use.image_digests[1].hex(), "asset": kept},
            ],
        }
    ]
    assert "image_prompts" not in (read_provenance(stub.Transform(asked()).images[0].data) or {})


LARGE = pb.ImageSource(data=file_of(Image.new("RGB", (140, 140)), "PNG"))
HEAVY = pb.ImageSource(data=file_of(noise((125, 125)), "BMP"))

BAD: dict[str, tuple[list[pb.ImagePrompt], str, str]] = {
    "no adapter": ([prompt(""), prompt()], "image_prompts[0].adapter", "no image adapter is named"),
    "an unknown adapter": (
        [prompt(), prompt("none")],
        "image_prompts[1].adapter",
        "'none' is not in this server's folder of image",
    ),
    "another folder": ([prompt("../plain")], "image_prompts[0].adapter", "is not a valid id"),
    "a long id": ([prompt("a" * 5000)], "image_prompts[0].adapter", f"image adapter '{'a' * 100}' is not in"),
    "a pickle": ([prompt("old")], "image_prompts[0].adapter", "is a pickle (.bin), which can run code"),
    "FaceID": ([prompt("faceid")], "image_prompts[0].adapter", "'faceid' is an IP-Adapter FaceID"),
    "another model's adapter": (
        [prompt("sdxl")],
        "image_prompts[0].adapter",
        "'sdxl' does not fit this model: it is for texts of 96",
    ),
    "a lost image encoder": (
        [prompt("lost")],
        "image_prompts[0].adapter",
        "'lost' needs 'none', which lost.json names, as an image",
    ),
    "a wrong NAME.json": ([prompt("wrong")], "image_prompts[0].adapter", "'wrong' has a file wrong.json that is wrong"),
    "no image": ([pb.ImagePrompt(adapter="plain")], "image_prompts[0].images", "there is no image"),
    "nine images": ([prompt("plain", *[A] * 9)], "image_prompts[0].images", "there are 9: the maximum is 8 in a request"),
    "nine images of two prompts": (
        [prompt("plain", *[A] * 5), prompt("plain", *[A] * 4)],
        "image_prompts[1].images",
        "there are 9, with those of the image prompts before it: the maximum is 8",
    ),
    "an empty source": ([prompt("plain", A, pb.ImageSource())], "image_prompts[0].images[1]", "the image is missing"),
    "no image file": ([prompt("plain", pb.ImageSource(data=b"text"))], "image_prompts[0].images[0].data", "is not an image"),
    "an address": ([prompt("plain", pb.ImageSource(uri="canny.png"))], "image_prompts[0].images[0].uri", ""),
    "a large image": (
        [prompt("plain", pb.ImageSource(data=png((201, 100))))],
        "image_prompts[0].images[0].data",
        "20100|201 x 100",
    ),
    "many pixels": ([prompt("plain", LARGE), prompt("plain", LARGE, LARGE)], "image_prompts", "together too many pixels"),
    "many bytes": ([prompt("plain", *[HEAVY] * 3)], "image_prompts", "together more than 120000 bytes"),
    "a large scale": ([prompt(scale=10.5)], "image_prompts[0].scale", "10.5 is not in -10 to 10"),
    "no number": ([prompt(scale=math.nan)], "image_prompts[0].scale", "nan is not in -10 to 10"),
    "an infinite scale": ([prompt(scale=-math.inf)], "image_prompts[0].scale", "-inf is not in -10 to 10"),
    "five prompts": ([prompt()] * 5, "image_prompts", "there are 5, the maximum of this server is 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_image_prompt_is_refused_and_named(case: str, stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    prompts, field, reason = BAD[case]
    before = len(pipeline.prepared)
    code, details = failure(lambda: stub.Transform(asked(*prompts)))
    assert (code, details.get("field")) == (grpc.StatusCode.INVALID_ARGUMENT, field), details
    assert any(part in str(details["description"]) for part in reason.split("|")), details
    assert len(pipeline.prepared) == before


def test_a_missing_asset_is_not_found(stub: ImageToImageServiceStub) -> None:
    lost = pb.ImageSource(asset_id="a" * 32)
    code, details = failure(lambda: stub.Transform(asked(prompt("plain", lost))))
    assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), details


def test_a_model_that_takes_no_image_prompts_refuses_them(stub: ImageToImageServiceStub) -> None:
    request = asked(prompt(), model=pb.ModelReference(path="plain"))
    code, details = failure(lambda: stub.Transform(request))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "image_prompts")
    assert "this model takes no image prompts" in str(details["description"])
    encoder = asked(model=pb.ModelReference(path="vit"))
    assert failure(lambda: stub.Transform(encoder))[1]["field"] == "model"


def test_models_list_their_image_adapters_and_fields(channel: grpc.Channel, server: RunningServer) -> None:
    models = {model.id: model for model in ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models}
    assert list(models["m"].image_adapters) == ["face/plus", "plain"]
    assert [list(models[name].image_adapters) for name in ("plain", "vit", "big")] == [[], [], []]
    assert get(server, "/v1/models/m").json["image_adapters"] == ["face/plus", "plain"]
    fields = {field.name: field for field in models["m"].fields}
    assert fields["image_prompts"].max_count == 4
    assert fields["image_prompts.images"].max_count == 8
    assert [name for name, field in fields.items() if field.required] == ["image"], "no request needs an image prompt"
    scale = fields["image_prompts.scale"]
    assert (scale.default_number, scale.minimum, scale.maximum) == (1, -10, 10)
    assert not {field.name for field in models["plain"].fields} & IMAGE_PROMPTS.keys()


def test_an_image_encoder_stays_in_memory_while_the_request_runs(
    server: RunningServer, stub: ImageToImageServiceStub, channel: grpc.Channel, pipeline: FakePipeline
) -> None:
    backend: Any = vars(server.server)["_backend"]
    leases = []
    pipeline.before["prepare"] = lambda: leases.append({name: backend.residency._places[name].leases for name in SIDES})
    try:
        stub.Transform(asked(prompt("face/plus"), prompt("plain")))
        stub.Transform(asked(prompt("plain"), prompt("plain")))
    finally:
        pipeline.before.clear()
    assert leases == [{"vit": 1, "big": 1}, {"vit": 2, "big": 0}]


def test_the_first_request_with_an_image_prompt_opens_the_control_graph(
    stub: ImageToImageServiceStub, pipeline: FakePipeline
) -> None:
    opened: list[None] = []
    own = vars(pipeline)
    own["unopened_bytes"], own["open_control"] = 1000, lambda: opened.append(own.update(unopened_bytes=0))
    stub.Transform(asked())
    assert opened == []
    stub.Transform(asked(prompt()))
    stub.Transform(asked(prompt()))
    assert len(opened) == 1


def test_a_token_needs_the_image_encoder_among_its_models(folder: Path, pipeline: FakePipeline, tmp_path: Path) -> None:
    """In the same way as it needs a ControlNet."""
    tokens = tmp_path / "tokens.json"
    few, enough = grant(tokens, "few", models=("m",)), grant(tokens, "enough", models=("m", "vit"))
    with (
        running(lambda: registry(pipeline), image_adapters=ImageAdapterFolder(folder), tokens=tokens) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        stub, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        for secret, expected in ((few, []), (enough, ["plain"])):
            found = models.GetModel(model_pb2.GetModelRequest(id="m"), metadata=bearing(secret)).model
            assert list(found.image_adapters) == expected
        code, details = failure(lambda: stub.Transform(asked(prompt()), metadata=bearing(few)))
        assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "image_prompts[0].adapter")
        assert "you may use no such model" in str(details["description"])
        assert stub.Transform(asked(prompt()), metadata=bearing(enough)).images


def address(image: pb.ImageSource) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.data).decode()}"


def test_forms_have_image_prompts_as_text_or_json(server: RunningServer, pipeline: FakePipeline) -> None:
    both = [("plain", "vit", 0.5, squares(16, WIDE)), ("face/plus", "big", 1.0, squares(24, TALL))]
    one = [("plain", "vit", 1.0, squares(16, WIDE, TALL))]
    listed: list[dict[str, Any]] = [{"adapter": "plain", "scale": 0.5}, {"adapter": "face/plus"}]
    full = [{**listed[0], "images": [address(A)]}, {**listed[1], "images": [address(B)]}]
    a, b = ("prompt_image", A.data), ("prompt_image[]", B.data)
    for fields, expected in (
        ([("image_prompts", "plain:0.5, face/plus"), a, b], both),
        ([a, ("image_prompts", json.dumps(listed)), b], both),
        ([("image_prompts", json.dumps(full))], both),
        ([("image_prompts", json.dumps([full[0], listed[1]])), b], both),
        ([a, b, ("image_prompts", "plain")], one),
        ([("image_prompts", json.dumps([{"adapter": "plain", "images": [address(A), address(B)]}]))], one),
        ([("prompt_image", address(A)), b, ("image_prompts", "plain")], one),
    ):
        answer = ask(server, EDITS, ("prompt", "p"), *fields)
        assert answer.status == 200, answer.body
        assert shown(pipeline.prepared[-1].request.image_prompts) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("image_prompts", "plain")], "prompt_image"),
        ([("prompt_image", A.data)], "prompt_image"),
        ([("image_prompts", "plain,plain,plain"), ("prompt_image", A.data), ("prompt_image", A.data)], "prompt_image"),
        ([("image_prompts", "plain,"), ("prompt_image", A.data)], "image_prompts"),
        ([("image_prompts", ":0.5"), ("prompt_image", A.data)], "image_prompts"),
        ([("image_prompts", "[1")], "image_prompts"),
        ([("image_prompts", '{"adapter": "plain"}')], "image_prompts"),
        ([("image_prompts", "[1]")], "image_prompts[0]"),
        ([("image_prompts", '[{"model": "plain"}]')], "image_prompts[0].model"),
        ([("image_prompts", '[{"adapter": 1}]')], "image_prompts[0].adapter"),
        ([("image_prompts", '[{"adapter": "plain", "images": "asset:1"}]')], "image_prompts[0].images"),
        ([("image_prompts", '[{"adapter": "plain", "images": [1]}]')], "image_prompts[0].images"),
        ([("image_prompts", '[{"adapter": "plain", "scale": "much"}]')], "image_prompts[0].scale"),
        ([("image_prompts", '[{"adapter": "plain", "scale": true}]')], "image_prompts[0].scale"),
        ([("image_prompts", "plain:11"), ("prompt_image", A.data)], "image_prompts[0].scale"),
        ([("image_prompts", "faceid"), ("prompt_image", A.data)], "image_prompts[0].adapter"),
        ([("image_prompts", "plain"), ("prompt_image", b"text")], "image_prompts[0].images[0].data"),
    ],
)
def test_a_form_with_a_wrong_image_prompt_is_refused_and_named(
    fields: list[tuple[str, str | bytes]], param: str, server: RunningServer
) -> None:
    answer = ask(server, EDITS, ("prompt", "p"), *fields)
    assert (answer.status, answer.error["param"]) == (400, param), answer.body


def tensor(name: str, *values: bytes) -> Any:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, np.object_))
    return made


def test_kserve_has_image_prompts_as_a_tensor_and_a_parameter(server: RunningServer, pipeline: FakePipeline) -> None:
    inputs = [tensor("image", png()), tensor("prompt_images", A.data, address(B).encode())]
    with kserve_client(server) as client:
        client.infer("m", inputs, parameters={"image_prompts": "plain:0.5,face/plus"})
        expected = [("plain", "vit", 0.5, squares(16, WIDE)), ("face/plus", "big", 1.0, squares(24, TALL))]
        assert shown(pipeline.prepared[-1].request.image_prompts) == expected
        client.infer("m", inputs, parameters={"image_prompts": "plain"})
        assert shown(pipeline.prepared[-1].request.image_prompts) == [("plain", "vit", 1.0, squares(16, WIDE, TALL))]
        for given, parameters, field in (
            (inputs, {}, "prompt_images"),
            (inputs[:1], {"image_prompts": "plain"}, "prompt_images"),
            (inputs, {"image_prompts": "plain:11"}, "image_prompts"),
            (inputs, {"image_prompts": "none"}, "image_prompts"),
            ([inputs[0], tensor("prompt_images", b"text")], {"image_prompts": "plain"}, "prompt_images"),
        ):
            with pytest.raises(InferenceServerException, match=rf"{field}: "):
                client.infer("m", given, parameters=parameters)
        names = {
            name: {one["name"] for one in client.get_model_metadata(name, as_json=True)["inputs"]} for name in ("m", "plain")
        }
    assert "prompt_images" in names["m"]
    assert "prompt_images" not in names["plain"]
