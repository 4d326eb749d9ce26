"""The reference images of a request, over every API: read, bounded and recorded like the source, in order."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_codecs import FakeProcess
from fake_image_service import image_bytes
from fakes import Clock, FakePipeline
from http_calls import EDITS, ask, client_of
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_cli.__main__ import main
from img2img_client import Client, ImageInput, read_provenance
from img2img_server.api.more_images import References
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.config import AssetSettings
from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from img2img_server.support.model_fields import GUIDED, FieldRule
from img2img_server.support.source_rule import EditSize, SourceRule
from messages import failure, png
from PIL import Image
from running import RunningServer, running, store

LIMITS = ImageLimits(max_bytes=40_000, max_source_pixels=10_000, max_pixels=128 * 128)


def editor() -> FakePipeline:
    """A model that edits by several images: about 64 x 64 pixels in the last one's aspect ratio."""
    pipeline = FakePipeline()
    pipeline.fields = {"reference_images": FieldRule(), "negative_prompt": FieldRule()}
    pipeline.source_rule = SourceRule(keeps_size=True, edit_size=EditSize(area=64 * 64, by_last=True))
    return pipeline


@pytest.fixture
def pipeline() -> FakePipeline:
    return editor()


@pytest.fixture
def server(pipeline: FakePipeline, tmp_path: Path) -> Iterator[RunningServer]:
    usual = FakePipeline()
    usual.fields = GUIDED
    assets = AssetSettings(url=str(tmp_path / "assets"))
    with running(lambda: store(m=pipeline, usual=usual), image_limits=LIMITS, assets=assets, http_port=0) as made:
        yield made


@pytest.fixture
def stub(server: RunningServer) -> Iterator[ImageToImageServiceStub]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", timeout=60) as client:
        yield client


def asked(*references: pb.ImageSource, image: bytes = b"", model: str = "m", **fields: Any) -> pb.TransformRequest:
    source = pb.ImageSource(data=image or png((24, 16)))
    reference = pb.ModelReference(path=model)
    return pb.TransformRequest(model=reference, image=source, reference_images=references, **fields)


def of(size: tuple[int, int]) -> pb.ImageSource:
    return pb.ImageSource(data=png(size))


def sizes(request: Request) -> list[tuple[int, int]]:
    return [request.image.size, *(image.size for image in request.references)]


def test_references_keep_their_order_and_sizes(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    response = stub.Transform(asked(of((8, 40)), of((40, 8)), of((80, 40)), width=32, height=48))
    request = pipeline.prepared[-1].request
    assert sizes(request) == [(24, 16), (8, 40), (40, 8), (80, 40)]
    assert {image.mode for image in request.references} == {"RGB"}
    assert len({request.image_digest, *request.reference_digests}) == 4
    assert request.result_size == (32, 48)
    assert response.model_id == "m"


def test_default_size_follows_the_last_reference(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    for references, expected in (((), (96, 32)), ((of((40, 40)), of((16, 64))), (32, 128))):
        stub.Transform(asked(*references, image=png((48, 24))))
        assert pipeline.prepared[-1].request.result_size == expected
    stub.Transform(asked(of((16, 64)), image=png((48, 32)), fit=pb.Fit(longest_side=24)))
    assert pipeline.prepared[-1].request.result_size == (24, 16), "a fit keeps the source's aspect ratio"


def test_a_reference_is_any_source(client: Client, pipeline: FakePipeline, tmp_path: Path) -> None:
    path = tmp_path / "chair.png"
    path.write_bytes(png((16, 24)))
    asset = client.upload(png((32, 8)))
    images: list[ImageInput] = [str(path), png((8, 8)), Image.new("RGB", (8, 16)), asset, asset.uri]
    for some in (images[:3], images[3:]):
        result = client.transform(png((24, 16)), model="m", reference_images=some, width=8, height=8)
    assert sizes(pipeline.prepared[0].request) == [(24, 16), (16, 24), (8, 8), (8, 16)]
    assert sizes(pipeline.prepared[1].request) == [(24, 16), (32, 8), (32, 8)]
    record = read_provenance(result.images[0].data)
    assert record is not None
    assert record["reference_assets"] == [asset.id, asset.id]
    assert record["reference_digests"] == [digest.hex() for digest in pipeline.prepared[1].request.reference_digests]
    assert (record["strength"], record["guidance_scale"]) == (None, None), "the model does not take them"
    with pytest.raises(TypeError, match="reference_images must be a list of images"):
        client.transform(png(), reference_images=str(path))


BAD: dict[str, tuple[list[pb.ImageSource], str]] = {
    "too many": ([of((8, 8))] * 5, "reference_images"),
    "an empty source": ([of((8, 8)), pb.ImageSource()], "reference_images[1]"),
    "an empty file": ([pb.ImageSource(data=b"")], "reference_images[0].data"),
    "no image": ([of((8, 8)), of((8, 8)), pb.ImageSource(data=b"not an image")], "reference_images[2].data"),
    "a truncated one": ([pb.ImageSource(data=png((8, 8))[:50])], "reference_images[0].data"),
    "one of too many pixels": ([of((200, 200))], "reference_images[0].data"),
    "one of too many bytes": ([pb.ImageSource(data=bytes(40_001))], "reference_images[0].data"),
    "too many pixels together": ([of((100, 90)), of((100, 90)), of((100, 90))], "reference_images"),
    "an unknown asset": ([pb.ImageSource(asset_id="0" * 64)], "reference_images[0].asset_id"),
    "a malformed asset": ([pb.ImageSource(asset_id="x")], "reference_images[0].asset_id"),
    "an address that is not allowed": ([pb.ImageSource(uri="http://localhost/a.png")], "reference_images[0].uri"),
    "a malformed address": ([pb.ImageSource(uri="data:image/png;base64,%%%")], "reference_images[0].uri"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_reference_is_refused_and_named(case: str, stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    references, field = BAD[case]
    code, details = failure(lambda: stub.Transform(asked(*references)))
    if case == "an unknown asset":
        assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "ASSET_NOT_FOUND")
    else:
        assert (code, details.get("field")) == (grpc.StatusCode.INVALID_ARGUMENT, field), details
    assert pipeline.prepared == []
    stub.Transform(asked(of((8, 8))))


def test_total_size_of_reference_files_is_limited(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    noise = io.BytesIO()
    Image.effect_noise((90, 90), 90).convert("RGB").save(noise, "BMP")
    large = pb.ImageSource(data=noise.getvalue())
    assert 2 * LIMITS.max_bytes / 4 < len(large.data) < LIMITS.max_bytes
    code, details = failure(lambda: stub.Transform(asked(large, large, large, large)))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "reference_images")
    assert "together" in str(details["description"])
    stub.Transform(asked(large))


class SlowSources:
    """Sources that take 40 s each to read."""

    def __init__(self) -> None:
        self.clock = Clock()

    async def read(self, source: pb.ImageSource, field: str) -> tuple[str, bytes]:
        for _ in range(3):
            await asyncio.sleep(0)  # a time limit of 0 s ends here
        self.clock.now += 40
        return field, png((8, 8))


async def read_slowly(*addresses: str) -> int:
    """Reads references, the fetched ones within 60 s. Returns their number."""
    slow, codecs = SlowSources(), Codecs(1, 1, ImageMemory(2**30), FakeProcess)
    sources: Any = slow
    try:
        references = References(sources, codecs, LIMITS, 60, slow.clock)
        return len(await references.read([pb.ImageSource(uri=address) for address in addresses]))
    finally:
        await codecs.close()


async def test_all_references_share_the_time_limit_of_one_fetch() -> None:
    assert await read_slowly("https://example.org/a.png", "HTTP://example.org/b.png") == 2
    with pytest.raises(InvalidField, match="longer than 60 seconds together") as raised:
        await read_slowly(*["https://example.org/a.png"] * 3)
    assert raised.value.field == "reference_images[2].uri"


async def test_only_fetched_references_count_towards_the_fetch_timeout() -> None:
    assert await read_slowly("asset:a", "file:///b.png", "httpx:c", "https://example.org/d.png") == 4


def test_model_for_one_image_refuses_references(stub: ImageToImageServiceStub) -> None:
    code, details = failure(lambda: stub.Transform(asked(of((8, 8)), model="usual")))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "reference_images")
    assert "edits by one image" in str(details["description"])


def test_further_images_of_an_openai_edit_are_references(server: RunningServer, pipeline: FakePipeline) -> None:
    files = [("a.png", png((24, 16))), ("b.png", png((8, 24))), ("c.png", png((32, 8)))]
    with client_of(server) as openai_client:
        result = openai_client.images.edit(image=files, prompt="a lake", model="m", size="16x16")
    assert result.data
    assert sizes(pipeline.prepared[-1].request) == [(24, 16), (8, 24), (32, 8)]
    refused = ask(server, EDITS, ("prompt", "p"), ("model", "usual"), ("image[]", png((8, 8))))
    assert (refused.status, refused.error["param"]) == (400, "image")
    bad = ask(server, EDITS, ("prompt", "p"), ("model", "m"), ("image[]", b"no image"))
    assert (bad.status, bad.error["param"]) == (400, "image")


def test_the_command_sends_and_reproduces_references(
    server: RunningServer, pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", f"127.0.0.1:{server.port}"]
    for name, size in (("room", (24, 16)), ("chair", (8, 24)), ("lamp", (32, 8))):
        (tmp_path / f"{name}.png").write_bytes(image_bytes(size=size))
    room, chair, lamp, new = (str(tmp_path / f"{name}.png") for name in ("room", "chair", "lamp", "new"))
    flags = ["--reference", chair, "--reference", lamp, "--model", "m", "--quiet"]
    assert main(["transform", room, "--output", new, *flags, *target]) == 0
    first = pipeline.prepared[-1].request
    assert sizes(first) == [(24, 16), (8, 24), (32, 8)]
    again = ["reproduce", new, "--image", room, *target]
    assert main([*again, "--reference", chair, "--reference", lamp, "--max-difference", "0"]) == 0
    second = pipeline.prepared[-1].request
    assert (second.reference_digests, second.result_size, second.seeds) == (
        first.reference_digests, first.result_size, first.seeds,
    )  # fmt: skip
    assert "identical" in capsys.readouterr().out
    assert main([*again, "--reference", lamp, "--reference", chair]) == 0
    assert "the reference images are not the ones that were used" in capsys.readouterr().out
    for wrong, words in (([], "--reference FILE is needed 2 times"), (["--reference", chair], "--reference is given 1 times")):
        assert main([*again, *wrong]) != 0
        assert words in capsys.readouterr().err
