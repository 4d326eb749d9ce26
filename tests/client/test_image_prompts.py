"""Image prompts of the Python client and of the commands, with a server of a fake model."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_image_service import FakeService, image_bytes
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img_cli.__main__ import main
from img2img_client import (
    Asset,
    AsyncClient,
    Client,
    ImageInput,
    ImagePrompt,
    TransformOptions,
    read_provenance,
    recorded_options,
)
from img2img_server.config import AssetSettings, ImageAdapterFolder
from img2img_server.models.registry import ModelRegistry
from PIL import Image
from prompting import ADAPTERS, SIDE, image_encoder, model, write_adapters
from running import RunningServer, running

COLORS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def running_server(pipeline: FakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    def models() -> ModelRegistry:
        return ModelRegistry([model("m", pipeline), image_encoder()], default="m")

    folder, assets = (tmp_path_factory.mktemp(name) for name in ("adapters", "assets"))
    with running(
        models, image_adapters=ImageAdapterFolder(write_adapters(folder)), assets=AssetSettings(url=str(assets))
    ) as server:
        yield server


@pytest.fixture
def target(running_server: RunningServer) -> str:
    return f"127.0.0.1:{running_server.port}"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three images in the order of COLORS; a name has a comma."""
    made = [tmp_path / name for name in ("r,ed.png", "green.png", "blue.png")]
    for path, color in zip(made, COLORS, strict=True):
        path.write_bytes(image_bytes(color, (8, 24)))
    return list(map(str, made))


def used(pipeline: FakePipeline, at: int = -1) -> list[tuple[str, float, list[str]]]:
    """The image prompts of a request that reached the model: their adapters, scales, and their images' colors."""
    names = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}
    uses = pipeline.prepared[at].request.image_prompts
    assert all(image.size == (SIDE, SIDE) for use in uses for image in use.images)
    return [(use.adapter, use.scale, [names[image.getpixel((8, 8))] for image in use.images]) for use in uses]  # type: ignore[index]


def test_images_are_sent_in_any_form_of_a_source(client: Client, service: FakeService, tmp_path: Path) -> None:
    path, picture = tmp_path / "a.png", Image.new("RGB", (3, 2), "red")
    path.write_bytes(b"file")
    images: list[ImageInput] = [path, str(path), b"bytes", picture, Asset("1f", "image/png", 5, "ab"), "https://host/a.png"]
    client.transform(b"source", image_prompts=[ImagePrompt("plus", images, 0.0), ImagePrompt("plain", (b"one",))])
    first, second = service.requests[0].image_prompts
    sent = [source.WhichOneof("source") for source in first.images]
    assert sent == ["data", "data", "data", "data", "asset_id", "uri"]
    assert [source.data for source in first.images[:3]] == [b"file", b"file", b"bytes"]
    assert (first.adapter, first.HasField("scale"), first.scale) == ("plus", True, 0.0)
    assert second == pb.ImagePrompt(adapter="plain", images=[pb.ImageSource(data=b"one")])


@pytest.mark.parametrize("image", [b"file", "a.png", Path("a.png"), Image.new("RGB", (1, 1)), Asset("1f", "image/png", 5, "ab")])
def test_a_single_image_in_place_of_a_list_is_refused(client: Client, service: FakeService, image: Any) -> None:
    prompts = [ImagePrompt("plain", [b"one"]), ImagePrompt("plain", image)]
    with pytest.raises(TypeError, match=r"image_prompts\[1\]\.images must be a list of images, not a single image"):
        client.transform(b"file", image_prompts=prompts)
    with pytest.raises(TypeError, match="reference_images must be a list of images"):
        client.transform(b"file", reference_images=image)
    with pytest.raises(TypeError, match=r"image_prompts\[0\]\.images must be a path"):
        client.transform(b"file", image_prompts=[ImagePrompt("plain", [3])])  # type: ignore[list-item]
    assert service.requests == []


def test_both_clients_and_batches_send_image_prompts(target: str, pipeline: FakePipeline, files: list[str]) -> None:
    options: TransformOptions = {"image_prompts": [ImagePrompt("style", files[:2], 0.5), ImagePrompt("plain", [files[2]])]}
    expected = [("style", 0.5, ["red", "green"]), ("plain", 1.0, ["blue"])]
    source = image_bytes(size=(8, 8))

    async def transform() -> None:
        async with AsyncClient(target, timeout=60) as client:
            await client.transform(source, **options)
            assert used(pipeline) == expected
            outcomes = [outcome async for outcome in client.transform_batch([(source, options), (source, {})])]
            assert all(outcome.error is None for outcome in outcomes)

    asyncio.run(transform())
    assert sorted([used(pipeline, -1), used(pipeline, -2)]) == [[], expected]
    with Client(target, timeout=60) as client:
        client.transform(source, **options)
        assert used(pipeline) == expected
        listed = {info.id: info.image_adapters for info in client.models()}
        assert listed == {"m": ADAPTERS, "vit": ()}
        assert client.model("m").takes("image_prompts")


def test_the_command_has_images_and_a_scale_after_the_adapter(target: str, pipeline: FakePipeline, files: list[str]) -> None:
    red, green, blue = files
    into = ["--output-dir", str(Path(red).parent / "out"), "--target", target, "--quiet"]
    flags = ["--image-prompt", f"style={red},image={green},scale=0.5", "--image-prompt", f"plain={blue}"]
    assert main(["transform", green, *flags, *into]) == 0
    assert used(pipeline) == [("style", 0.5, ["red", "green"]), ("plain", 1.0, ["blue"])]
    flags = ["--image-prompt", f"style={green},scale=-1,image={red}"]
    assert main(["transform", blue, *flags, *into]) == 0
    assert used(pipeline) == [("style", -1.0, ["green", "red"])]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.png", "must be ADAPTER=FILE or ADAPTER=FILE,image=FILE, not 'a.png'"),
        ("=a.png", "must be ADAPTER=FILE"),
        ("style=", "must be ADAPTER=FILE"),
        ("style=a.png,image=", "must be ADAPTER=FILE"),
        ("style=a.png,scale=much", "scale must be a number, not 'much'"),
        ("style=a.png,scale=1,b.png", "unknown setting 'b.png': use image, scale"),
    ],
)
def test_a_wrong_flag_is_named(text: str, problem: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["transform", files[0], "--output", "out.png", "--image-prompt", text])
    assert f"argument --image-prompt: {problem}" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_named(target: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--image-prompt", f"plain={files[1]}", "--image-prompt", f"other={files[1]}"]
    assert main(["transform", files[0], "--output", f"{files[0]}.png", *flags, "--target", target]) == 1
    assert "image_prompts[1].adapter: image adapter 'other' does not fit this model" in capsys.readouterr().err


def test_models_are_listed_with_their_image_adapters(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--image-adapters", "--target", target]) == 0
    table = capsys.readouterr().out
    assert "image adapters" in table
    assert all(name in table for name in ADAPTERS)
    assert main(["models", "--target", target]) == 0
    assert ADAPTERS[0] not in capsys.readouterr().out
    assert main(["models", "--json", "--target", target]) == 0
    assert [info["image_adapters"] for info in json.loads(capsys.readouterr().out)] == [list(ADAPTERS), []]


def test_image_prompts_are_reproduced(
    target: str, pipeline: FakePipeline, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    red, green, blue = files
    new = str(Path(red).with_name("new.png"))
    flags = ["--image-prompt", f"style={red},image={green},scale=0.5", "--image-prompt", f"plain={blue}"]
    assert main(["transform", red, "--output", new, *flags, "--target", target]) == 0
    assert "image_prompts" not in recorded_options(read_provenance(Path(new).read_bytes()) or {})
    again = ["reproduce", new, "--image", red, "--target", target]

    def given(*names: str) -> list[str]:
        return [word for name in names for word in ("--image-prompt", name)]

    assert main([*again, *given(red, green, blue), "--max-difference", "0"]) == 0
    assert used(pipeline) == [("style", 0.5, ["red", "green"]), ("plain", 1.0, ["blue"])]
    assert capsys.readouterr().out.splitlines()[-1] == "identical"
    assert main([*again, *given(red, blue, green)]) == 0
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert note.startswith(
        "note: an image adapter, its image encoder or an image of an image prompt is not the one that was used"
    )
    assert re.findall(r"\S+(?=: \w+, now )", note) == ["(image_prompts[0].images[1].digest", "image_prompts[1].images[0].digest"]
    assert main(again) != 0
    assert "--image-prompt FILE is needed 3 times" in capsys.readouterr().err
    assert main([*again, *given(red)]) != 0
    assert "--image-prompt is given 1 times, but the request had 3 images in image prompts" in capsys.readouterr().err


def test_image_prompts_that_were_assets_are_reproduced_without_files(
    target: str, pipeline: FakePipeline, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.png"
    with Client(target, timeout=60) as client:
        assets = [client.upload(file) for file in files]
        options: TransformOptions = {"image_prompts": [ImagePrompt("plain", assets[:1]), ImagePrompt("style", assets[1:], 2)]}
        client.transform(assets[0], **options).save(new)
    assert main(["reproduce", str(new), "--target", target]) == 0
    assert used(pipeline) == [("plain", 1.0, ["red"]), ("style", 2.0, ["green", "blue"])]
    assert capsys.readouterr().out.splitlines() == ["identical"]
