"""Masks in requests: decoding, the mask that a model gets, refusals, and pasting of results into their source."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from fakes import FakePipeline, FakeState
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.images import ImageLimits
from img2img_server.support.source_rule import SourceRule
from messages import failure, png, request
from PIL import Image, ImageOps
from running import running, store

LIMITS = ImageLimits(max_bytes=100_000, max_source_pixels=100_000, max_pixels=64 * 64)


class Painter(FakePipeline):
    """Takes masks, and paints every image red."""

    source_rule = SourceRule(mask="optional")

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        return [[Image.new("RGB", image.size, "red") for image in images] for images in super().finish(states)]


class Inpainter(Painter):
    source_rule = SourceRule(mask="required")


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="module")
def stub(painter: Painter) -> Iterator[ImageToImageServiceStub]:
    load = lambda: store(m=painter, plain=FakePipeline(), inpainting=Inpainter())  # noqa: E731
    with (
        running(load, image_limits=LIMITS) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield ImageToImageServiceStub(channel)


def mask(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """The left half black, the right half white."""
    image = Image.new("L", size, 0)
    image.paste(255, (size[0] // 2, 0, *size))
    return image


def file_of(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def same(image: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(other))


def source(data: bytes) -> pb.ImageSource:
    return pb.ImageSource(data=data)


def given(stub: ImageToImageServiceStub, painter: Painter, **fields: object) -> Image.Image:
    """The mask that the pipeline gets."""
    stub.Transform(request(**fields))
    asked = painter.prepared[-1].request.mask
    assert asked is not None
    assert asked.image.mode == "L"
    return asked.image


def result(stub: ImageToImageServiceStub, **fields: object) -> np.ndarray[Any, Any]:
    response = stub.Transform(request(**fields))
    return np.asarray(Image.open(io.BytesIO(response.images[0].data)).convert("RGB"))


GRAY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        GRAY,
        GRAY.convert("RGB"),
        GRAY.convert("RGBA"),
        ImageOps.colorize(GRAY, "navy", "yellow"),
        GRAY.convert("1"),
        GRAY.convert("P"),
        Image.fromarray(np.asarray(GRAY, np.uint16) * 257),
    ],
    ids=lambda image: str(image.mode),
)
def test_a_mask_of_any_kind_becomes_gray_as_in_diffusers(
    stub: ImageToImageServiceStub, painter: Painter, image: Image.Image
) -> None:
    expected = GRAY if image.mode == "I;16" else image.convert("L")
    assert same(given(stub, painter, mask=source(file_of(image))), expected)


@pytest.mark.parametrize("size", [(24, 16), (60, 40), (9, 7), (16, 24)])
def test_mask_is_blurred_then_resized_as_in_diffusers(
    stub: ImageToImageServiceStub, painter: Painter, size: tuple[int, int]
) -> None:
    own = mask(size)
    blurred = VaeImageProcessor.blur(own, 3)
    expected = VaeImageProcessor(resample="lanczos").resize(blurred, 16, 24) if size != (24, 16) else blurred
    assert same(given(stub, painter, mask=source(file_of(own)), mask_blur=3), expected)


def test_mask_is_resized_to_the_results_size(stub: ImageToImageServiceStub, painter: Painter) -> None:
    assert given(stub, painter, mask=source(file_of(mask())), width=48, height=32).size == (48, 32)


def test_an_inverted_mask_swaps_black_and_white_before_it_is_blurred(stub: ImageToImageServiceStub, painter: Painter) -> None:
    own = mask()
    expected = VaeImageProcessor.blur(ImageOps.invert(own), 2)
    assert same(given(stub, painter, mask=source(file_of(own)), mask_invert=True, mask_blur=2), expected)


def test_transparency_counts_as_white_and_the_orientation_is_applied(stub: ImageToImageServiceStub, painter: Painter) -> None:
    clear = Image.merge("LA", (Image.new("L", (24, 16), 0), mask()))
    assert same(given(stub, painter, mask=source(file_of(clear))), ImageOps.invert(mask()))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = mask().transpose(Image.Transpose.ROTATE_90)
    assert same(given(stub, painter, mask=source(file_of(turned, exif=exif.tobytes()))), mask())


def test_color_profile_of_a_mask_is_ignored(stub: ImageToImageServiceStub, painter: Painter) -> None:
    from icc_profiles import gray

    profiled = given(stub, painter, mask=source(file_of(GRAY, icc_profile=gray(1.0))))
    assert same(profiled, GRAY)


def test_the_result_has_the_sources_pixels_outside_the_mask(stub: ImageToImageServiceStub) -> None:
    pixels = result(stub, mask=source(file_of(mask())))
    assert (pixels[:, :12] == (0, 128, 128)).all()  # teal
    assert (pixels[:, 12:] == (255, 0, 0)).all()


def test_soft_mask_edges_blend_as_in_diffusers(stub: ImageToImageServiceStub) -> None:
    pixels = result(stub, mask=source(file_of(mask())), mask_blur=4)
    teal, red = Image.new("RGB", (24, 16), "teal"), Image.new("RGB", (24, 16), "red")
    expected = VaeImageProcessor().apply_overlay(VaeImageProcessor.blur(mask(), 4), teal, red)
    assert np.array_equal(pixels, np.asarray(expected))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4


def test_several_images_of_a_stream_and_of_a_batch_are_pasted(stub: ImageToImageServiceStub) -> None:
    asked = request(mask=source(file_of(mask())), image_count=2)
    *_, last = stub.TransformStream(pb.TransformStreamRequest(request=asked))
    (batched,) = stub.TransformBatch(iter([pb.TransformBatchRequest(request=asked)]))
    for image in (*last.completed.images, *batched.response.images):
        assert Image.open(io.BytesIO(image.data)).getpixel((0, 0)) == (0, 128, 128)


def test_without_mask_paste_the_models_image_is_returned_unchanged(stub: ImageToImageServiceStub) -> None:
    assert (result(stub, mask=source(file_of(mask())), mask_paste=False) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("mask", {"mask": pb.ImageSource()}),
        ("mask.data", {"mask": pb.ImageSource(data=b"")}),
        ("mask.data", {"mask": pb.ImageSource(data=b"no image")}),
        ("mask.data", {"mask": pb.ImageSource(data=png()[:60])}),
        ("mask.data", {"mask": pb.ImageSource(data=png((400, 400)))}),
        ("mask.data", {"mask": pb.ImageSource(data=bytes(100_001))}),
        ("mask.uri", {"mask": pb.ImageSource(uri="ftp://example.org/mask.png")}),
        ("mask.uri", {"mask": pb.ImageSource(uri="data:image/png;base64,!")}),
        ("mask.uri", {"mask": pb.ImageSource(uri="https://user@example.org/mask.png")}),
        ("mask.asset_id", {"mask": pb.ImageSource(asset_id="no id")}),
        ("mask_blur", {"mask": source(png()), "mask_blur": -1}),
        ("mask_blur", {"mask": source(png()), "mask_blur": 1001}),
        ("mask_blur", {"mask": source(png()), "mask_blur": float("nan")}),
        ("mask_blur", {"mask_blur": 1}),
        ("mask_invert", {"mask_invert": True}),
        ("mask_paste", {"mask_paste": False}),
    ],
)
def test_unusable_mask_is_refused_and_names_its_field(
    stub: ImageToImageServiceStub, painter: Painter, field: str, fields: dict[str, object]
) -> None:
    before = len(painter.prepared)
    code, details = failure(lambda: stub.Transform(request(**fields)))
    assert (code, details["reason"], details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", field)
    assert len(painter.prepared) == before


def test_default_mask_settings_are_accepted_without_a_mask(stub: ImageToImageServiceStub, painter: Painter) -> None:
    stub.Transform(request(mask_blur=0, mask_invert=False, mask_paste=True))
    assert painter.prepared[-1].request.mask is None


def test_mask_is_refused_by_plain_and_required_by_inpainting_models(stub: ImageToImageServiceStub) -> None:
    plain, inpainting = pb.ModelReference(path="plain"), pb.ModelReference(path="inpainting")
    code, details = failure(lambda: stub.Transform(request(model=plain, mask=source(png()))))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "mask")
    assert "'plain' does not take a mask" in str(details["description"])
    code, details = failure(lambda: stub.Transform(request(model=inpainting)))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "mask")
    assert "needs a mask" in str(details["description"])
    stub.Transform(request(model=inpainting, mask=source(png())))


def test_data_uri_is_accepted_as_a_mask(stub: ImageToImageServiceStub, painter: Painter) -> None:
    import base64

    uri = f"data:image/png;base64,{base64.b64encode(file_of(mask())).decode()}"
    assert same(given(stub, painter, mask=pb.ImageSource(uri=uri)), mask())


def test_provenance_record_includes_the_mask(stub: ImageToImageServiceStub, painter: Painter) -> None:
    data = stub.Transform(request(mask=source(file_of(mask())), mask_blur=2)).images[0].data
    record = json.loads(Image.open(io.BytesIO(data)).info["img2img"])
    asked = painter.prepared[-1].request.mask
    assert asked is not None
    assert record["mask"] == {
        "blur": 2.0, "invert": False, "by_alpha": False, "paste": True, "digest": asked.digest.hex(), "asset": None,
    }  # fmt: skip
    plain = json.loads(Image.open(io.BytesIO(stub.Transform(request()).images[0].data)).info["img2img"])
    assert "mask" not in plain
