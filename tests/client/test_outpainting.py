"""Outpainting: the canvas around an image, its mask, and the command that sends both."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_image_service import FakeServer
from fakes import FakePipeline, FakeState
from hypothesis import given
from hypothesis import strategies as st
from img2img_cli.__main__ import main
from img2img_client import Client
from img2img_client.outpainting import Margins, expand
from img2img_server.support.source_rule import SourceRule
from PIL import Image
from running import running, store

SIDES = st.integers(0, 20)


def noise(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(st.tuples(SIDES, SIDES, SIDES, SIDES).filter(any), st.integers(0, 30))
def test_outpainting_canvas_repeats_edges_and_masks_the_border(sides: tuple[int, int, int, int], overlap: int) -> None:
    left, top, right, bottom = sides
    image = noise()
    canvas, mask = expand(image, Margins(*sides), overlap)
    padding = ((top, bottom), (left, right))
    assert np.array_equal(np.asarray(canvas), np.pad(np.asarray(image), (*padding, (0, 0)), "edge"))
    kept = np.zeros((16, 24), np.uint8)
    if left:
        kept[:, :overlap] = 255
    if top:
        kept[:overlap] = 255
    if right:
        kept[:, max(0, 24 - overlap) :] = 255
    if bottom:
        kept[max(0, 16 - overlap) :] = 255
    assert np.array_equal(np.asarray(mask), np.pad(kept, padding, constant_values=255))


@pytest.mark.parametrize("margins", [Margins(), Margins(left=-1, top=2)])
def test_impossible_margins_are_refused(margins: Margins) -> None:
    with pytest.raises(ValueError, match="margins must be 0 or more"):
        expand(noise(), margins)


def test_the_command_sends_the_canvas_and_its_mask(server: FakeServer, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    noise().save(photo)
    flags = ["--expand", "8,0,16,8", "--strength", "1", "--output", str(tmp_path / "wide.png")]
    assert main(["transform", str(photo), "--target", f"localhost:{server.port}", *flags]) == 0
    asked = server.service.requests[0]
    canvas, mask = expand(noise(), Margins(8, 0, 16, 8))
    assert Image.open(io.BytesIO(asked.image.data)).tobytes() == canvas.tobytes()
    assert Image.open(io.BytesIO(asked.mask.data)).tobytes() == mask.tobytes()
    assert asked.strength == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--expand", "1,2,3"], "must be four numbers of pixels"),
        (["--expand", "0,0,0,0"], "one above 0"),
        (["--expand", "1,2,3,-4"], "must be four numbers of pixels"),
        (["--expand", "8,0,0,0", "--mask", "mask.png"], "set only one of --expand and --mask"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    noise().save(photo)
    try:
        status = main(["transform", str(photo), "--output", str(tmp_path / "out.png"), *flags])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert told in capsys.readouterr().err


def test_an_address_cannot_be_expanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path / "out.png"), "--expand", "8,0,0,0"]
    assert main(["transform", "https://example.org/lake.jpg", *flags]) == 2
    assert "--expand needs a file" in capsys.readouterr().err


class Painter(FakePipeline):
    source_rule = SourceRule(mask="optional")

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        return [[Image.new("RGB", image.size, "red") for image in images] for images in super().finish(states)]


def test_outpainting_changes_only_the_added_area() -> None:
    image = noise(32, 32)
    canvas, mask = expand(image, Margins(left=16, bottom=8), overlap=0)
    with running(lambda: store(m=Painter())) as server, Client(f"localhost:{server.port}") as client:
        result = np.asarray(client.transform(canvas, mask=mask, strength=1.0).images[0].image)
    assert result.shape == (40, 48, 3)
    assert np.array_equal(result[:32, 16:], np.asarray(image))
    assert (result[:, :16] == (255, 0, 0)).all()
    assert (result[32:] == (255, 0, 0)).all()
