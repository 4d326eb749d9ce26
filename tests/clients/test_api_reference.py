"""docs/api.md matches the contract, and the defaults and bounds in the contract's comments match the server."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_docs
import grpc
import pytest
from conftest import REPOSITORY
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api import assets
from img2img_server.config import MAX_PROMPT, AssetSettings, ServerConfig
from img2img_server.images import ImageLimits
from messages import failure, png
from running import running, store


@pytest.fixture(scope="module")
def comments() -> dict[str, str]:
    """Each declaration's comment, without the package's name."""
    contract = api_docs.read(api_docs.build())
    return {name.removeprefix("img2img.v1."): text for name, text in contract.comments.items()}


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def stub(pipeline: FakePipeline) -> Iterator[ImageToImageServiceStub]:
    with (
        running(lambda: store(m=pipeline)) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield ImageToImageServiceStub(channel)


def default(comments: dict[str, str], name: str) -> str:
    return api_docs.split_default(comments[name])[1]


def test_the_page_has_every_declaration_and_every_reason(comments: dict[str, str]) -> None:
    contract = api_docs.read(api_docs.build())
    page = api_docs.page(contract)
    for file in contract.files:
        for service in file.service:
            assert all(f"### {service.name}.{method.name}\n" in page for method in service.method)
        for message in file.message_type:
            section = page.partition(f"\n## {message.name}\n")[2].partition("\n## ")[0]
            assert all(f"| `{field.name}` | {field.number} | " in section for field in message.field)
        for enum in file.enum_type:
            assert all(f"| `{value.name}` | {value.number} |" in page for value in enum.value)
    for text in comments.values():
        for sentence in api_docs.split_default(text)[0].split("\n\n"):
            assert sentence.replace("|", "\\|") in page
    errors = page.partition("\n## Errors\n")[2]
    assert all(f"| `{reason}` | `{status}` |" in errors for reason, status in api_docs.reasons().items())
    assert "| `INVALID_FIELD` | `INVALID_ARGUMENT` | A field of the request is wrong. | `BadRequest` |" in errors
    assert re.search(r"`QUEUE_FULL` .* `RetryInfo` \|\n", errors)
    assert re.search(r"`DEADLINE_UNMEETABLE` .* metadata `estimate_seconds` \|\n", errors)


def test_stale_page_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = api_docs.page(api_docs.read(api_docs.build()))
    monkeypatch.setattr(api_docs, "PAGE", tmp_path / "api.md")
    monkeypatch.setattr("sys.argv", ["api_docs", "--check"])
    assert api_docs.main() == 1
    api_docs.PAGE.write_text(made)
    assert api_docs.main() == 0
    api_docs.PAGE.write_text(made.replace("0.8", "0.7"))
    assert api_docs.main() == 1
    monkeypatch.setattr("sys.argv", ["api_docs"])
    assert api_docs.main() == 0
    assert api_docs.PAGE.read_text() == made


def test_a_changed_comment_changes_the_page(tmp_path: Path) -> None:
    protos = tmp_path / "protos"
    shutil.copytree(REPOSITORY / "protos", protos, ignore=shutil.ignore_patterns("__pycache__"))
    file = protos / "img2img" / "v1" / "image_to_image.proto"
    file.write_text(file.read_text().replace("Default: 7.5.", "Default: 9."))
    assert api_docs.page(api_docs.read(api_docs.build(protos))) != api_docs.page(api_docs.read(api_docs.build()))


def test_empty_request_gets_the_documented_defaults(
    comments: dict[str, str], stub: ImageToImageServiceStub, pipeline: FakePipeline
) -> None:
    answer = stub.Transform(pb.TransformRequest(image=pb.ImageSource(data=png((24, 16)))), timeout=120)
    request = pipeline.prepared[-1].request
    told = {name: default(comments, f"TransformRequest.{name}") for name in pb.TransformRequest.DESCRIPTOR.fields_by_name}
    assert json.loads(told.pop("prompt")) == request.prompt
    assert json.loads(told.pop("negative_prompt")) == (request.negative_prompt or "")
    assert float(told.pop("strength")) == request.strength
    assert int(told.pop("num_inference_steps")) == request.num_inference_steps
    assert float(told.pop("guidance_scale")) == request.guidance_scale
    assert int(told.pop("image_count")) == len(request.seeds)
    assert int(told.pop("preview_interval")) == request.preview_interval
    assert (told.pop("seed"), told.pop("scheduler")) == ("-1", "the model's own")
    assert 0 <= request.seeds[0] < 2**32
    assert request.scheduler is None
    assert told.pop("width").startswith("the source's")
    assert told.pop("height").startswith("the source's")
    assert request.image.size == (24, 16)
    assert told.pop("output") == "PNG, in the answer"
    assert answer.images[0].format == pb.OUTPUT_FORMAT_PNG
    assert answer.images[0].data.startswith(b"\x89PNG")
    # Those have none: one is required, and without the other it is the server that chooses.
    lists = ("reference_images", "loras", "controls", "image_prompts")
    none = {name: told.pop(name).partition(",")[0] for name in ("fit", "mask", *lists)}
    assert set(none.values()) == {"none"}
    assert (request.mask, request.loras, request.controls, request.image_prompts) == (None, (), (), ())
    assert told.pop("fidelity") == "exact"
    assert request.fidelity.is_exact
    assert (told.pop("mask_blur"), told.pop("mask_invert"), told.pop("mask_paste")) == ("0", "false", "true")
    assert told.pop("true_cfg_scale") == "the model's own"
    assert told == {"image": "", "model": ""}


def bounds(comments: dict[str, str]) -> dict[str, tuple[Any, Any, Any, Any]]:
    """By field: the bounds in its comment, and the nearest values outside of them."""
    found: dict[str, tuple[Any, Any, Any, Any]] = {}
    for name in ("num_inference_steps", "guidance_scale", "image_count", "preview_interval"):
        low, high = map(int, re.findall(r"(\d+) to (\d+)", comments[f"TransformRequest.{name}"])[0])
        found[name] = (low, high, low - 1, high + 1)
    assert "above 0 and up to 1;" in comments["TransformRequest.strength"]
    found["strength"] = (0.5, 1, 0, 1.0000001)
    assert "0 to 2^63 - 1;" in comments["TransformRequest.seed"]
    found["seed"] = (0, 2**63 - 1, -2, -3)
    return found


def test_documented_bounds_match_the_server(comments: dict[str, str], stub: ImageToImageServiceStub) -> None:
    def call(field: str, value: object) -> object:
        request = pb.TransformRequest(image=pb.ImageSource(data=png((8, 8))), seed=1, strength=1)
        target, _, name = f"request.{field}".rpartition(".")
        setattr(request.output if target.endswith("output") else request, name, value)
        return stub.Transform(request, timeout=60)

    checked = bounds(comments)
    low, high = map(int, re.findall(r"(\d+) to (\d+)", comments["OutputOptions.quality"])[0])
    checked["output.quality"] = (low, high, low - 1, high + 1)
    for field, (least, most, before, after) in checked.items():
        assert call(field, least)
        assert call(field, most)
        for value in (before, after):
            code, told = failure(lambda field=field, value=value: call(field, value))  # type: ignore[misc]
            assert (code, told["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field), value


def test_documented_lengths_sizes_and_times_match_the_server(comments: dict[str, str]) -> None:
    limits = ImageLimits()
    for name in ("prompt", "negative_prompt"):
        assert f"at most {MAX_PROMPT} characters" in comments[f"TransformRequest.{name}"]
    assert f"at most {limits.max_pixels} pixels" in comments["TransformRequest.width"]
    assert f"at most {limits.max_bytes} bytes" in comments["ImageSource"]
    assert f"at most {limits.max_source_pixels} pixels" in comments["ImageSource"]
    assert f"1 to {limits.max_bytes} (" in comments["UploadAssetInfo.size"]
    assert f"for {AssetSettings().max_age / 3600:g} hours" in comments["AssetService"]
    assert f"without data for {assets._IDLE:g} seconds" in comments["AssetService.UploadAsset"]
    assert f"longer than {assets._LONGEST:g} seconds," in comments["AssetService.UploadAsset"]
    assert f"at most {assets._CHUNK // 1024} KiB a chunk" in comments["AssetService.GetAsset"]
    assert ServerConfig(Path()).max_steps == int(comments["TransformRequest.preview_interval"].partition("0 to ")[2].split()[0])
