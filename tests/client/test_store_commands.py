"""`img2img models` and `img2img assets`: their requests, output, files and exit status."""

import io
import json
import sys
from pathlib import Path

import pytest
from fake_image_service import FakeServer, FakeService, image_bytes
from fake_statuses import error_info, rich_status
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import image_to_image_pb2 as messages
from img2img.v1 import model_pb2
from img2img_cli.__main__ import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image_bytes("blue"))
    return path


def test_models_are_listed(service: FakeService, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    service.models = [
        model_pb2.Model(
            id="a-model-with-quite-a-long-name[red]",
            family="stable-diffusion-xl-of-some-length",
            backend="onnx",
            engine="onnx:cpu",
            state=model_pb2.MODEL_STATE_READY,
            is_default=True,
            schedulers=["DDIM[red]", "DPM++ 2M"],
            fields=[
                model_pb2.RequestField(name="image", required=True),
                model_pb2.RequestField(name="prompt", default_text="a lake", maximum=4096),
                model_pb2.RequestField(name="strength", default_number=0.8, minimum=0, maximum=1, exclusive_minimum=True),
                model_pb2.RequestField(name="reference_images", max_count=4),
                model_pb2.RequestField(name="mask_blur", default_number=0, needs="mask"),
            ],
        ),
        model_pb2.Model(
            id="third",
            engines=[
                model_pb2.EngineStatus(name="onnx:x", state=model_pb2.ENGINE_STATE_BUILDING, detail="unet", progress=0.4),
                model_pb2.EngineStatus(name="onnx:y", state=model_pb2.ENGINE_STATE_REJECTED, detail="not faster"),
            ],
        ),
        model_pb2.Model(id="other", backend="torch", state=model_pb2.MODEL_STATE_UNLOADED),
    ]
    assert main(["models", "--server", server.target]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (next(line for line in lines if name in line) for name in ("a-model-with-quite-a-long-name[red]", "other"))
    assert all(word in first for word in ("stable-diffusion-xl-of-some-length", "onnx:cpu", "ready", "yes"))
    assert "unloaded" in second
    assert "yes" not in second
    assert "onnx:x building 40%: unet" in "".join(lines)
    assert "onnx:y rejected: not faster" in "".join(lines)
    assert main(["models", "--server", server.target, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(model["state"], model["schedulers"]) for model in printed] == [
        ("ready", ["DDIM[red]", "DPM++ 2M"]),
        ("unspecified", []),
        ("unloaded", []),
    ]
    assert printed[1]["engines"][0] == {
        "name": "onnx:x", "state": "building", "detail": "unet", "progress": pytest.approx(0.4)
    }  # fmt: skip
    assert "DPM++" not in "".join(lines)
    assert main(["models", "--server", server.target, "--schedulers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("schedulers", "DDIM[red]", "DPM++ 2M"))
    assert main(["models", "--server", server.target, "--fields"]) == 0
    out = capsys.readouterr().out
    shown = (
        "image: required",
        'prompt: "a lake", to 4096',
        "strength: 0.8, above 0 to 1",
        "reference_images: at most 4",
        "mask_blur: 0, only with mask",
    )
    assert all(line in out for line in shown)


def test_a_model_list_that_fails_is_one_line(
    service: FakeService, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    service.failure = rich_status(code_pb2.UNAVAILABLE, "shutting down", error_info("SHUTTING_DOWN"))
    assert main(["models", "--server", server.target, "--retries=0"]) == 1
    assert capsys.readouterr() == ("", "img2img models: shutting down\n")


def test_models_are_loaded_and_unloaded(service: FakeService, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    service.models = [
        model_pb2.Model(id="demo", state=model_pb2.MODEL_STATE_UNLOADED, detail="[red] not used"),
        model_pb2.Model(id="owner/name"),
    ]
    assert main(["models", "--target", server.target, "--load", "demo"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "demo" in line)
    assert all(words in line for words in ("ready", "3 MiB", "[red] not used"))
    service.models[0].state = model_pb2.MODEL_STATE_FAILED
    assert main(["models", "--target", server.target]) == 0
    assert "MiB" not in capsys.readouterr().out
    assert main(["models", "--target", server.target, "--unload", "demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)[0]["state"], json.loads(out)[0]["memory_bytes"]) == ("unloaded", None)
    assert err == "demo: 3 MiB freed\n"
    flags = ["--load-repo=owner/name", "--variant=fp16", "--revision=main"]
    assert main(["models", "--target", server.target, *flags]) == 0
    assert service.loads == [
        model_pb2.LoadModelRequest(id="demo"),
        model_pb2.LoadModelRequest(source=messages.ModelReference(repo_id="owner/name", variant="fp16", revision="main")),
    ]
    assert service.unloads == ["demo"]
    assert main(["models", "--target", server.target, "--load=nothing"]) == 1
    assert main(["models", "--target", server.target, "--variant=fp16"]) == 2
    assert "require --load-repo" in capsys.readouterr().err


def test_loading_may_take_longer_than_listing(service: FakeService, server: FakeServer) -> None:
    service.models = [model_pb2.Model(id="demo")]
    for flags in ([], ["--load=demo"], ["--load=demo", "--timeout=50"]):
        assert main(["models", "--target", server.target, *flags]) == 0
    listing, loading, bound = service.seconds_left
    assert listing is not None
    assert listing < 11
    assert loading is None or loading > 1e6
    assert bound is not None
    assert 11 < bound < 51


def test_assets_are_uploaded_and_downloaded(
    server: FakeServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", server.target]
    assert main(["assets", "upload", str(source), *target]) == 0
    out, err = capsys.readouterr()
    (name,) = server.assets.files
    assert out == f"asset:{name}\n"
    assert err == f"image/png, {source.stat().st_size} bytes, expires 2027-01-15 08:00 UTC unless used before\n"
    assert main(["assets", "upload", str(source), "--json", *target]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == name
    assert main(["assets", "download", out.strip(), "--output", str(tmp_path / "back.png"), *target]) == 0
    assert (tmp_path / "back.png").read_bytes() == source.read_bytes()
    assert main(["assets", "delete", name, *target]) == 0
    assert server.assets.files == {}
    assert main(["assets", "delete", name, *target]) == 1
    assert capsys.readouterr() == ("", f"img2img assets: no asset {name}\n")
    assert main(["assets", "upload", str(tmp_path / "missing.png"), *target]) == 1
    assert capsys.readouterr().err == f"img2img assets: {tmp_path / 'missing.png'}: No such file or directory\n"


def test_assets_pass_through_pipes(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(image_bytes("green"))))
    assert main(["assets", "upload", "-", "--target", server.target]) == 0
    address = capsysbinary.readouterr().out.decode().strip()
    assert main(["assets", "download", address, "--output=-", "--target", server.target]) == 0
    assert capsysbinary.readouterr().out == image_bytes("green")
