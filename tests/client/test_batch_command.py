"""`img2img transform IN ... --output-dir DIR` against a real server with a fake model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_image_service import image_bytes
from fakes import FakePipeline
from img2img_cli.__main__ import main
from PIL import Image
from running import running, store


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def target(pipeline: FakePipeline) -> Iterator[str]:
    with running(lambda: store(m=pipeline)) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "in" / f"{name}.png" for name in ("a", "b", "c")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(image_bytes(size=(16, 16)))
    return list(map(str, paths))


def transform(target: str, *words: object) -> int:
    return main(["transform", *map(str, words), "--target", target, "--steps", "2"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_prompt_over_many_images(
    target: str, photos: list[str], tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert transform(target, *photos, "--output-dir", out, "--prompt", "winter", "--format", "jpeg") == 0
    assert names(out) == ["a.jpg", "b.jpg", "c.jpg"]
    for name in names(out):
        with Image.open(out / name) as image:
            assert image.format == "JPEG"
    assert {state.request.prompt for state in pipeline.prepared} == {"winter"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "3 transformed, 0 skipped, 0 failed"
    assert [line.split(":")[0] for line in lines[:-1]] == ["1 of 3", "2 of 3", "3 of 3"]


def test_many_prompts_over_one_image(target: str, photos: list[str], tmp_path: Path, pipeline: FakePipeline) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("".join(f"prompt {number}\n\n" for number in range(1, 12)), encoding="utf-8")
    assert transform(target, photos[0], "--output-dir", out, "--prompts", prompts, "--image-count", 2, "--seed", 1) == 0
    assert names(out) == sorted(f"a-{number:02}-{image}.png" for number in range(1, 12) for image in (1, 2))
    assert {state.request.prompt for state in pipeline.prepared} == {f"prompt {number}" for number in range(1, 12)}


def test_repeated_command_skips_existing_outputs(
    target: str, photos: list[str], tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert transform(target, *photos[:2], "--output-dir", out) == 0
    before = (out / "a.png").stat().st_mtime_ns
    assert transform(target, *photos, "--output-dir", out, "--json", "--quiet") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["written"], told["failed"]) == ([str(out / "c.png")], {})
    assert told["skipped"] == [str(out / "a.png"), str(out / "b.png")]
    assert ((out / "a.png").stat().st_mtime_ns, len(pipeline.prepared)) == (before, 3)
    assert transform(target, *photos, "--output-dir", out, "--overwrite") == 0
    assert len(pipeline.prepared) == 6


def test_failures_are_reported_at_the_end_and_the_rest_is_done(
    target: str, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, missing, out = tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "out"
    broken.write_bytes(b"no image")
    assert transform(target, broken, *photos, missing, "--output-dir", out) == 1
    assert names(out) == ["a.png", "b.png", "c.png"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-3] == "3 transformed, 0 skipped, 2 failed"
    assert any(line.startswith(f"{out / 'broken.png'}: image.data: ") for line in lines[-2:])
    assert any(line == f"{out / 'missing.png'}: {missing}: No such file or directory" for line in lines[-2:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png", "b.png", "--output", "c.png"], "2 images need --output-dir"),
        (["x/a.png", "y/a.jpg", "--output-dir", "out"], "x/a.png and y/a.jpg would both be written to out/a.png"),
        (["-", "--output-dir", "out"], "standard input is one image"),
        (["a.png", "--output-dir", "out", "--preview-every", "2"], "--preview-every needs --output"),
        (["a.png", "--output", "b.png", "--overwrite"], "--overwrite needs --output-dir"),
        (["a.png", "--output", "b.png", "--prompts", "p.txt"], "--prompts needs --output-dir"),
        (["a.png", "--output-dir", "out", "--prompts", "p.txt", "--prompt", "x"], "set only one of them"),
    ],
)
def test_contradicting_arguments_are_refused_before_any_call(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transform("127.0.0.1:1", *words) == 2
    assert message in capsys.readouterr().err
