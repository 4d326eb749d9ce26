"""Components other than the usual ones: a tiny autoencoder, sizes as lists, failures of the libraries that make graphs."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from img2img_export import component
from img2img_export.build import export_model
from img2img_export.errors import ExportError, may_fall_back
from img2img_export.options import ExportOptions
from img2img_export.verify.recorded_inputs import Calls
from img2img_server.bundle.manifest import read_manifest
from img2img_server.runtime.common.pipe import latent_size, native_size
from img2img_server.runtime.loader import load_pipeline
from short_exports import cut_short

Get = Callable[[str], Path]


@pytest.fixture
def model(tiny_model: Get, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("sd1"), tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_tiny_vae(model: Path) -> Path:
    """The model with TAESD's architecture for its VAE, and its latent size as a list."""
    shutil.rmtree(model / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
        vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, **blocks)
    vae.decoder.layers[-1].weight.data.mul_(20)  # else its images are grey
    vae.save_pretrained(model / "vae")
    change(model / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    change(model / "unet" / "config.json", sample_size=[8, 8])
    return model


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tiny_autoencoder_matches_diffusers(backend: Any, model: Path, tmp_path: Path) -> None:
    with cut_short(2):
        outcome = export_model(ExportOptions(source=str(with_tiny_vae(model)), output=tmp_path / "out", backend=backend))
    manifest = read_manifest(outcome.path)
    assert manifest.backend == {"auto": "onnx"}.get(backend, backend)
    assert manifest.family == "stable-diffusion"
    assert [part.passed for part in manifest.verification.pictures] == [True, True]
    assert max(part.max_abs_error for part in manifest.verification.pictures) <= 1


@pytest.mark.parametrize("sides", [pytest.param([8, 8], marks=pytest.mark.nightly), [8, 12]], ids=str)
def test_unet_sample_size_may_be_a_list(sides: list[int], tiny_model: Get, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("sdxl"), tmp_path / "model"))
    change(model / "unet" / "config.json", sample_size=sides)
    with cut_short(1):
        outcome = export_model(ExportOptions(source=str(model), output=tmp_path / "out", backend="torch"))
    pipeline = load_pipeline(outcome.path, outcome.manifest)
    assert pipeline.native_size == (8 * sides[1], 8 * sides[0])


@pytest.mark.parametrize(
    ("sample_size", "expected"),
    [
        (64, (64, 64)), ([8, 8], (8, 8)), ((96, 128), (128, 96)), ([64], (64, 64)), ("64", (64, 64)), (64.0, (64, 64)),
        (None, None), ([], None), ([1, 2, 3], None), ("large", None), (0, None), ([8, None], None), ({}, None),
    ],
)  # fmt: skip
def test_a_sample_size_is_a_number_or_a_list(sample_size: Any, expected: tuple[int, int] | None) -> None:
    assert latent_size(sample_size) == expected
    assert native_size(sample_size, 8) == ((expected[0] * 8, expected[1] * 8) if expected else (512, 512))


class StrangeError(Exception):
    """An error that no library is expected to raise."""


@pytest.mark.parametrize(
    "error", [StrangeError("what is\nthis?"), pytest.param(OSError("no such model"), marks=pytest.mark.nightly)]
)
def test_failing_backend_falls_back_to_the_next_with_the_reason(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(component, "part_of", fail)
    first = str(error).splitlines()[0]
    with cut_short(1):
        outcome = export_model(ExportOptions(source=str(model), output=tmp_path / "out"))
        assert outcome.manifest.backend == "torch"
        assert outcome.manifest.backend_reason == f"{type(error).__name__}: {first}"
        with pytest.raises(ExportError, match=f"onnx: {type(error).__name__}: {first}"):
            export_model(ExportOptions(source=str(model), output=tmp_path / "other", backend="onnx"))
    assert not (tmp_path / "other").exists()


def test_full_disk_does_not_count_as_a_backend_failure(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(component, "part_of", fail)
    with cut_short(1), pytest.raises(OSError, match="No space left"):
        export_model(ExportOptions(source=str(model), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert may_fall_back(OSError("no such model"))
    assert not may_fall_back(PermissionError(errno.EACCES, "Permission denied"))


def test_an_argument_varies_by_its_value_and_not_by_its_address() -> None:
    """Qwen-Image 2.1 makes a cache for each image: the reason in the manifest depended on whether one had another's address."""

    class Cache:
        pass

    calls = Calls({})
    kept = [Cache(), Cache()]
    for mode, cache in zip(("write", "read"), kept, strict=True):
        calls.note({"kv_cache": cache, "kv_cache_mode": mode, "scale": 1.0})
    assert calls.varying == ["kv_cache_mode"]


def test_denoiser_with_a_text_mask_is_exported_as_a_graph(bundle: Get) -> None:
    """Such as Chroma's transformer."""
    manifest = read_manifest(bundle("chroma"))
    assert manifest.backend == "onnx", manifest.backend_reason
    (transformer,) = [part for part in manifest.components if part.name == "transformer"]
    assert "prompt_mask" in {item.name for item in transformer.inputs}
