"""`img2img inspect` prints the manifest, and its exit status is 0 only for an intact and verified bundle."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from img2img_cli.__main__ import main
from img2img_server.bundle.manifest import (
    Component,
    ComponentParity,
    ImageParity,
    Lora,
    Manifest,
    Source,
    Verification,
    digest_files,
    list_files,
    read_manifest,
    write_manifest,
)

VERIFICATION = Verification(
    passed=True,
    components=(
        ComponentParity("unet", "batch 1", 1e-5, 2e-6, True),
        ComponentParity("unet", "batch 3", 3.1e-4, 1e-6, True),
        ComponentParity("unet", "batch 1", 2.5e-2, 4.5e-3, True, graph="fused"),
        ComponentParity("vae_decoder", "batch 1", 7e-7, 8e-8, True),
    ),
    pictures=(
        ImageParity("A beautiful landscape, 64 x 64", 1, 61.25, True, ssim=0.9991),
        ImageParity("An old fisherman, 64 x 64", 0, 999.0, True),
    ),
    limits={"relative_error": 1e-4, "max_abs_error": 1, "psnr_db": 50.0, "ssim": 0.999},
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A bundle with files of a few bytes and made-up measurements."""
    bundle = tmp_path / "made"
    for name in ("model_index.json", "unet/model.onnx", "unet/fused.onnx", "verification/sheet.png"):
        path = bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"contents of {name}".encode())
    manifest = Manifest(
        source=Source(repo_id="someone/model", variant="fp16", revision="main"),
        pipeline_class="StableDiffusionImg2ImgPipeline",
        family="stable-diffusion",
        backend="hybrid",
        backend_reason="optimum cannot export the text encoder",
        components=(
            Component("unet", "fp16", 18, fused="unet/fused.onnx", bytes=1_720_000_000),
            Component("vae", "fp32", backend="torch", reason="it overflows in fp16", bytes=335_000_000),
        ),
        files=digest_files(bundle, list_files(bundle)),
        tools={"torch": "2.8.0", "onnx": "1.19"},
        verification=VERIFICATION,
        options={"backend": "auto"},
        precision="fp16",
        loras=(Lora("lcm.safetensors", 0.75, "0" * 64),),
        size_multiple=16,
    )
    write_manifest(bundle, manifest)
    return bundle


def change(bundle: Path, **changes: object) -> None:
    write_manifest(bundle, dataclasses.replace(read_manifest(bundle), **changes))  # type: ignore[arg-type]


def test_report_is_complete(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"{made}: verified, intact"
    for expected in (
        "source someone/model, main, variant fp16",
        "pipeline StableDiffusionImg2ImgPipeline (family stable-diffusion)",
        "backend hybrid: optimum cannot export the text encoder",
        "precision fp16",
        "LoRA lcm.safetensors at 0.75",
        "image sizes multiples of 16 pixels",
        "checksums all 4 files match",
        "tools torch 2.8.0, onnx 1.19",
        "unet ONNX graph fp16 18 1.72 GB unet/fused.onnx",
        "vae PyTorch fp32 335 MB it overflows in fp16",
        "unet plain 2 3.1e-04 2.0e-06 passed",
        "unet fused 1 2.5e-02 4.5e-03 passed",
        "vae_decoder plain 1 7.0e-07 8.0e-08 passed",
        "A beautiful landscape, 64 x 64 61.2 dB 0.9991 1/255 passed",
        "An old fisherman, 64 x 64 infinite 1.0000 0/255 passed",
        "limits relative_error 0.0001, max_abs_error 1, psnr_db 50, ssim 0.999",
        f"image sheet {made}/verification/sheet.png",
    ):
        assert expected in lines, expected


def test_json_report_is_one_object(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["checked"], found["damages"]) == (True, True, [])
    assert found["sheet"] == str(made / "verification" / "sheet.png")
    assert found["bytes"] == sum((made / name).stat().st_size for name in list_files(made))
    assert found["manifest"] == json.loads((made / "manifest.json").read_text())


def test_unverified_bundle_is_reported_with_its_problems(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = ComponentParity("unet", "batch 1", float("inf"), float("inf"), False)
    change(made, verification=Verification(False, (part,), problems=("unet differs by infinity",)))
    assert main(["inspect", str(made)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{made}: NOT VERIFIED, intact\n")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "unet plain 1 inf inf FAILED" in lines
    assert "FAILED unet differs by infinity" in lines
    assert main(["inspect", str(made), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["manifest"]["verification"]["components"][0]["max_abs_error"] is None


def test_changed_missing_and_extra_files_are_reported(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "unet" / "model.onnx").write_bytes(b"contents of another....")
    (made / "unet" / "fused.onnx").unlink()
    (made / "holiday.jpg").write_bytes(b"a stranger")
    change(made, files={**read_manifest(made).files, "../outside": "0" * 64})
    (made.parent / "outside").write_bytes(b"")
    assert main(["inspect", str(made), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["damages"] == [
        "unet/fused.onnx is missing",
        "../outside lies outside the bundle",
        "unet/model.onnx has changed since it was verified: its SHA-256 differs",
    ]
    assert found["strangers"] == ["holiday.jpg"]
    assert main(["inspect", str(made)]) == 1
    assert capsys.readouterr().out.startswith(f"{made}: verified, DAMAGED\n")


def test_without_checksums_files_are_not_read(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "unet" / "model.onnx").write_bytes(b"contents of another....")
    assert main(["inspect", str(made), "--no-checksums"]) == 0
    assert "checksums not verified" in capsys.readouterr().out.splitlines()[0]
    (made / "unet" / "model.onnx").unlink()
    assert main(["inspect", str(made), "--no-checksums"]) == 1


def test_sheet_option_copies_the_image_sheet(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "--sheet", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes() == (made / "verification" / "sheet.png").read_bytes()
    capsys.readouterr()
    shutil.rmtree(made / "verification")
    assert main(["inspect", str(made), "--sheet", str(tmp_path / "none.png")]) == 1
    assert "has no image sheet" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("fault", ["nothing", "no manifest", "no JSON", "another format", "a directory"])
def test_inspecting_other_directories_is_an_error_of_one_line(fault: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = made / "manifest.json"
    contents = {"no JSON": "{", "another format": '{"format_version": 1}'}
    if fault in contents:
        manifest.write_text(contents[fault])
    else:
        manifest.unlink()
    if fault == "nothing":
        shutil.rmtree(made)
    if fault == "a directory":
        manifest.mkdir()
    for flags in ([], ["--json"]):
        assert main(["inspect", str(made), *flags]) == 1
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert err.startswith("img2img inspect: ")


def test_bundle_text_cannot_control_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(made, backend_reason="\x1b[2Jgone [red]and[/red]", tools={"torch": "\r\n1.0"})
    assert main(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "gone [red]and[/red]" in out


def test_inspect_imports_nothing_heavy(made: Path) -> None:
    code = """
import sys
for name in ("torch", "onnxruntime", "diffusers", "transformers", "optimum", "onnx", "grpc", "numpy", "PIL", "huggingface_hub"):
    sys.modules[name] = None
from img2img_cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    result = subprocess.run([sys.executable, "-I", "-c", code, "inspect", str(made)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "verified, intact" in result.stdout
