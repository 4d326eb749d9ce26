"""Which files of a checkpoint are read, and which checkpoints are refused. Only names matter, so no model is needed."""

import json
from pathlib import Path

import pytest
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import choose, choose_texts, read_layout, refuse_unsafe, select_files
from img2img_export.read.source import resolve

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


def test_only_text_files_and_safetensors_are_read() -> None:
    others = ["README.md", "v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "unet/model.onnx", "safety_checker/model.safetensors"]
    assert select([WEIGHTS, *others]) == sorted(["model_index.json", *TEXTS, WEIGHTS])


def test_variant_weights_replace_the_default_weights() -> None:
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert half not in select([WEIGHTS, half])
    assert WEIGHTS not in select([WEIGHTS, half], "fp16")
    assert half in select([WEIGHTS, half], "fp16")
    assert WEIGHTS in select([WEIGHTS], "fp16"), "a component without the variant is read without, as diffusers does"
    with pytest.raises(ExportError, match="fp16: choose with --variant"):
        select([half])


def test_shards_are_read_with_the_index_of_their_variant() -> None:
    plain = [f"unet/diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index, half_index = (f"unet/diffusion_pytorch_model.safetensors.index{infix}.json" for infix in ("", ".fp16"))
    everything = [*plain, *half, index, half_index]
    assert set(select(everything)) == {"model_index.json", *TEXTS, *plain, index}
    assert set(select(everything, "fp16")) == {"model_index.json", *TEXTS, *half, half_index}


def test_patterns_filter_the_selected_files() -> None:
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
    with pytest.raises(ExportError, match="contains custom code"):
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


def test_omitted_parts_are_named() -> None:
    assert read_layout(INDEX).left_out == ("safety_checker",)


GRAPHS = [
    "unet/model.onnx",
    "unet/model.onnx_data",
    "vae_encoder/model.onnx",
    "vae_decoder/model.onnx",
    "vae_decoder/config.json",
]


def test_graphs_without_weights_are_an_export_of_optimum() -> None:
    options = ExportOptions(source="model", output=Path("out"))
    kind, layout, files = choose(INDEX, ["model_index.json", "README.md", *TEXTS, *GRAPHS], options)
    assert kind == "onnx"
    assert files == sorted(["model_index.json", *TEXTS, *GRAPHS])
    own = {**INDEX, "_class_name": "ORTStableDiffusionPipeline"}
    assert choose(own, ["model_index.json", *TEXTS, *GRAPHS], options)[1] == layout


def test_weights_are_preferred_over_graphs() -> None:
    kind, _, files = choose(
        INDEX, ["model_index.json", *TEXTS, *GRAPHS, WEIGHTS], ExportOptions(source="model", output=Path("out"))
    )
    assert kind == "diffusers"
    assert not [name for name in files if ".onnx" in name]


def test_variant_option_is_refused_for_graphs() -> None:
    with pytest.raises(ExportError, match="no variants"):
        choose(INDEX, [*TEXTS, *GRAPHS], ExportOptions(source="model", output=Path("out"), variant="fp16"))


def test_template_consists_of_text_files_only() -> None:
    names = ["model_index.json", *TEXTS, *GRAPHS, WEIGHTS, "unet/diffusion_pytorch_model.safetensors.index.json", "v1.ckpt"]
    assert choose_texts(INDEX, names, "model") == (read_layout(INDEX), sorted(["model_index.json", *TEXTS]))


@pytest.mark.parametrize("part", ["evil.txt", "model.bin", "../evil.safetensors", "/tmp/evil.safetensors", 3])
@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_index_that_lists_other_files_than_safetensors_is_refused(
    part: object, infix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers and transformers would open all listed files with torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "checkpoint"
    weights = f"unet/diffusion_pytorch_model{infix}-00001-of-00001.safetensors"
    index = checkpoint / f"unet/diffusion_pytorch_model.safetensors.index{infix}.json"
    for name in [*TEXTS, weights, "unet/evil.txt"]:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("\x02" + 7 * "\0" + "{}" if name == weights else "{}")
    (checkpoint / "model_index.json").write_text(json.dumps(INDEX))
    options = ExportOptions(source=str(checkpoint), output=tmp_path / "out", variant=infix.removeprefix(".") or None)
    index.write_text(json.dumps({"weight_map": {"x": Path(weights).name}}))
    assert index.relative_to(checkpoint).as_posix() in resolve(options, Progress()).files
    index.write_text(json.dumps({"weight_map": {"x": Path(weights).name, "y": part}}))
    with pytest.raises(ExportError, match="only safetensors files beside it are read"):
        resolve(options, Progress())
    index.write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        refuse_unsafe(checkpoint, [index.relative_to(checkpoint).as_posix()])


def test_indexes_of_other_weight_formats_are_not_read() -> None:
    others = ["unet/diffusion_pytorch_model.bin.index.json", "unet/a.b.safetensors.index.json", "unet/MODEL.INDEX.json"]
    assert select([WEIGHTS, *others]) == sorted(["model_index.json", *TEXTS, WEIGHTS])
