"""Masks over OpenAI's image API and KServe, by their stock clients, and in repeated requests."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fakes import FakePipeline, FakeState
from http_calls import EDITS, ask, client_of
from img2img_cli.__main__ import main
from img2img_client import Client
from img2img_server.support.source_rule import SourceRule
from kserve_calls import client_of as triton_of
from kserve_calls import image_input, number, refused, tensor, text
from messages import png
from PIL import Image
from running import RunningServer, running, store

TEAL, RED = (0, 128, 128), (255, 0, 0)
SIZE = (24, 16)


class Painter(FakePipeline):
    """Takes masks, and paints every image red."""

    source_rule = SourceRule(mask="optional")
    native_size = SIZE

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        return [[Image.new("RGB", image.size, "red") for image in images] for images in super().finish(states)]


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter()


@pytest.fixture(scope="module")
def server(painter: Painter) -> Iterator[RunningServer]:
    with running(lambda: store(m=painter), http_port=0, kserve=True) as server:
        yield server


def right_half() -> Image.Image:
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (12, 0, 24, 16))
    return mask


def file_of(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    return file.getvalue()


def with_hole() -> Image.Image:
    """The source with a transparent right half, as an editor leaves it: the colors of what is erased stay in the file."""
    image = Image.new("RGB", SIZE, "teal").convert("RGBA")
    image.putalpha(right_half().point(lambda value: 255 - value))
    return image


def half_red(data: bytes) -> bool:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.getpixel((2, 8)) == TEAL and image.getpixel((20, 8)) == RED


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparent_areas_of_an_openai_mask_are_redrawn(server: RunningServer, file_format: str) -> None:
    files: dict[str, Any] = {"image": ("image.png", png()), "mask": ("mask.png", file_of(with_hole(), file_format))}
    with client_of(server) as client:
        result = client.images.edit(**files, prompt="a hat", model="m")
        assert result.data is not None
        assert half_red(base64.b64decode(result.data[0].b64_json or ""))
        *_, last = client.images.edit(**files, prompt="a hat", model="m", stream=True)
        assert last.type == "image_edit.completed"
        assert half_red(base64.b64decode(last.b64_json))
        inverted = client.images.edit(**files, prompt="a hat", model="m", extra_body={"mask_invert": True, "mask_paste": False})
        assert inverted.data is not None
        image = Image.open(io.BytesIO(base64.b64decode(inverted.data[0].b64_json or "")))
        assert {image.getpixel((2, 8)), image.getpixel((20, 8))} == {RED}


@pytest.mark.parametrize("mask", [file_of(right_half()), png(), file_of(right_half(), "BMP")], ids=["gray", "RGB", "BMP"])
def test_an_openai_mask_without_transparency_is_refused_by_name(server: RunningServer, mask: bytes) -> None:
    with client_of(server) as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=png(), mask=mask, prompt="a hat", model="m")
    assert caught.value.param == "mask"
    assert "no transparency" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("mask", b"nothing")], "mask"),
        ([("mask", "gopher://x")], "mask"),
        ([("mask", file_of(with_hole())), ("mask", file_of(with_hole()))], "mask"),
        ([("mask", file_of(with_hole())), ("mask_blur", "2000")], "mask_blur"),
        ([("mask_blur", "2")], "mask_blur"),
        ([("mask", file_of(with_hole())), ("mask_invert", "maybe")], "mask_invert"),
    ],
)
def test_bad_masks_over_http_are_named(server: RunningServer, fields: list[tuple[str, bytes | str]], param: str) -> None:
    answer = ask(server, EDITS, ("prompt", "a hat"), *fields)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_mask_may_be_a_uri_over_http(server: RunningServer) -> None:
    uri = "data:image/png;base64," + base64.b64encode(file_of(with_hole())).decode()
    answer = ask(server, EDITS, ("prompt", "a hat"), ("mask", uri))
    assert half_red(base64.b64decode(answer.json["data"][0]["b64_json"]))


def test_kserve_accepts_a_mask_tensor(server: RunningServer, painter: Painter) -> None:
    uri = "data:image/png;base64," + base64.b64encode(file_of(right_half())).decode()
    masks = [text("mask", file_of(right_half())), tensor("mask_pixels", np.asarray(right_half())), text("mask_uri", uri)]
    with triton_of(server) as client:
        for mask in masks:
            result = client.infer("m", [image_input(), mask])
            assert half_red(result.as_numpy("images")[0])
        result = client.infer("m", [image_input()], parameters={"mask_uri": uri, "mask_invert": True, "mask_blur": 0.5})
        blurred = painter.prepared[-1].request.mask
        assert blurred is not None
        assert blurred.image.getpixel((0, 0)) == 255
        whole = client.infer("m", [image_input(), masks[0], number("mask_blur", 2, np.float32)], parameters={"mask_paste": False})
        assert Image.open(io.BytesIO(whole.as_numpy("images")[0])).getpixel((0, 0)) == RED
        masked = {"mask", "mask_uri", "mask_pixels", "mask_blur"}
        assert masked <= {one.name for one in client.get_model_metadata("m").inputs}
        for given, asked, field in (
            ([masks[0], masks[1]], {}, "mask"),
            ([text("mask", b"nothing")], {}, "mask"),
            ([text("mask_uri", "gopher://x")], {}, "mask_uri"),
            ([tensor("mask_pixels", np.zeros((4, 4, 3), np.uint8))], {}, "mask_pixels"),
            ([], {"mask_invert": True}, "mask_invert"),
            ([masks[0]], {"mask_paste": "no"}, "mask_paste"),
        ):
            status, told = refused(lambda given=given, asked=asked: client.infer("m", [image_input(), *given], parameters=asked))
            assert (status, told.partition(": ")[0]) == ("INVALID_ARGUMENT", field)


def reproduce(server: RunningServer, file: Path, *flags: str) -> int:
    return main(["reproduce", str(file), "--target", f"127.0.0.1:{server.port}", *flags])


def test_reproduce_applies_the_same_mask(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, source, mask, other = (tmp_path / name for name in ("made.png", "source.png", "mask.png", "other.png"))
    source.write_bytes(png())
    right_half().save(mask)
    Image.new("L", SIZE, 255).save(other)
    with Client(f"127.0.0.1:{server.port}") as client:
        made.write_bytes(client.transform(source, mask=mask, mask_blur=2, mask_invert=True, seed=3).images[0].data)
        plain = tmp_path / "plain.png"
        plain.write_bytes(client.transform(source, seed=3).images[0].data)
    assert reproduce(server, made, "--image", str(source), "--mask", str(mask), "--max-difference", "0") == 0
    assert capsys.readouterr().out == "identical\n"
    assert reproduce(server, made, "--image", str(source), "--mask", str(other)) == 0
    assert "the mask is not the one that was used" in capsys.readouterr().out
    assert reproduce(server, made, "--image", str(source)) == 2
    assert "--mask MASK is needed" in capsys.readouterr().err
    assert reproduce(server, plain, "--image", str(source), "--mask", str(mask)) == 2
    assert "made without a mask" in capsys.readouterr().err


def test_reproduce_accepts_a_mask_sent_over_http(server: RunningServer, tmp_path: Path) -> None:
    made, source, mask = (tmp_path / name for name in ("made.png", "source.png", "mask.png"))
    source.write_bytes(png())
    with_hole().save(mask)
    with client_of(server) as client:
        result = client.images.edit(image=source, mask=mask, prompt="a hat", model="m", extra_body={"seed": 5})
    assert result.data is not None
    made.write_bytes(base64.b64decode(result.data[0].b64_json or ""))
    assert reproduce(server, made, "--image", str(source), "--mask", str(mask), "--max-difference", "0") == 0
