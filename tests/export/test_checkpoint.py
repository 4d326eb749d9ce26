"""Which files of a checkpoint are read, and which checkpoints are refused. Only names are looked at: no model is needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from img2img_export.checkpoint import read_layout, select_files
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.source import resolve

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
}
TEXTS = ["unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def select(names: list[str], variant: str | None = None, **patterns: tuple[str, ...]) -> list[str]:
    return select_files(["model_index.json", *TEXTS, *names], read_layout(INDEX), variant, **patterns)


def test_texts_and_safetensors_are_read_and_nothing_else() -> None:
    others = ["README.md", "v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "unet/model.onnx", "safety_checker/model.safetensors"]
    assert select([WEIGHTS, *others]) == sorted(["model_index.json", *TEXTS, WEIGHTS])


def test_a_variant_is_read_in_place_of_the_others() -> None:
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert half not in select([WEIGHTS, half])
    assert WEIGHTS not in select([WEIGHTS, half], "fp16")
    assert half in select([WEIGHTS, half], "fp16")
    assert WEIGHTS in select([WEIGHTS], "fp16"), "a component without the variant is read without, as diffusers does"
    with pytest.raises(ExportError, match="fp16: choose with --variant"):
        select([half])


def test_shards_come_with_the_index_of_their_variant() -> None:
    plain = [f"unet/diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index, half_index = (f"unet/diffusion_pytorch_model.safetensors.index{infix}.json" for infix in ("", ".fp16"))
    everything = [*plain, *half, index, half_index]
    assert set(select(everything)) == {"model_index.json", *TEXTS, *plain, index}
    assert set(select(everything, "fp16")) == {"model_index.json", *TEXTS, *half, half_index}


def test_patterns_narrow_the_choice() -> None:
    assert "tokenizer/merges.txt" not in select([WEIGHTS], ignore_patterns=("*.txt",))
    assert select([WEIGHTS], allow_patterns=("unet/",)) == ["model_index.json", "unet/config.json", WEIGHTS]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt", "diffusion_pytorch_model.ckpt"])
def test_pickled_weights_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match="pickled"):
        select([f"unet/{name}"])


def test_missing_weights_are_refused() -> None:
    with pytest.raises(ExportError, match="no safetensors weights"):
        select([])


@pytest.mark.parametrize("name", ["pipeline.py", "unet/my_unet.py"])
def test_code_in_the_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match="brings its own code"):
        select([WEIGHTS, name])


@pytest.mark.parametrize(
    "change",
    [
        {"unet": ["my_package", "MyUNet"]},
        {"unet": ["os", "system"]},
        {"../unet": ["diffusers", "UNet2DConditionModel"]},
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"_class_name": None},
    ],
)
def test_classes_of_unknown_origin_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ExportError):
        read_layout({**INDEX, **change})


def test_what_is_left_out_is_named() -> None:
    assert read_layout(INDEX).left_out == ("safety_checker",)


@pytest.mark.parametrize(
    ("source", "message"),
    [("no/such/directory", "neither"), ("file.ckpt", "is a file"), (".", "no model_index.json")],
)
def test_a_source_that_is_no_checkpoint_is_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.ckpt").touch()
    with pytest.raises(ExportError, match=message):
        resolve(ExportOptions(source=source, output=tmp_path / "out"), print)


def test_the_digest_follows_what_is_read_and_nothing_else(tiny_checkpoint: Callable[[], Path]) -> None:
    directory = tiny_checkpoint()

    def digest() -> str:
        return resolve(ExportOptions(source=str(directory), output=directory / "out"), print).source.digest

    first = digest()
    (directory / "README.md").write_text("hello")
    assert digest() == first
    (directory / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    assert digest() != first


def test_the_view_holds_what_is_read_and_nothing_else(tiny_checkpoint: Callable[[], Path], tmp_path: Path) -> None:
    directory = tiny_checkpoint()
    (directory / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    checkpoint = resolve(ExportOptions(source=str(directory), output=tmp_path / "out"), print)
    checkpoint.link_into(tmp_path / "view")
    seen = {path.relative_to(tmp_path / "view").as_posix() for path in (tmp_path / "view").rglob("*") if path.is_file()}
    assert seen == set(checkpoint.files)
    assert "unet/diffusion_pytorch_model.bin" not in seen


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[[], Path]:
    """Makes a directory with the files of a checkpoint; their contents are of no model."""

    def make() -> Path:
        root = tmp_path / "checkpoint"
        for name in [*TEXTS, WEIGHTS]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        (root / "model_index.json").write_text(json.dumps(INDEX))
        return root

    return make
