"""`--dry-run` predicts the bundle from the headers of the files, without loading or downloading weights."""

import dataclasses
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import pytest
from covering import nightly_but
from fake_hub import Hub, serve
from img2img_cli.__main__ import main
from img2img_export.cli import dry_run
from img2img_export.cli.dry_run import Forecast, forecast, show, survey
from img2img_export.convert import models
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_export.report import open_console

Get = Callable[[str], Path]

GRAPHS = ("text_encoder", "unet", "vae")
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "text_encoder": {"embedding": (1000, 10)},
    "unet": {"conv.weight": (8, 4, 3, 3), "linear.weight": (500, 40), "linear.bias": (500,)},
    "vae": {"conv.weight": (4, 4, 3, 3)},
}
COUNTS = {"text_encoder": 10_000, "unet": 20_788, "vae": 144}
PRODUCTS = {"text_encoder": 10_000, "unet": 20_288, "vae": 72}
"""Parameters in matrices and convolutions that int8 applies to: of the VAE, half."""


def plan(backend: str = "onnx", graphs: tuple[str, ...] = GRAPHS, reason: str | None = None) -> Any:
    return models.Plan("StableDiffusionImg2ImgPipeline", "stable-diffusion", backend, graphs, reason)  # type: ignore[arg-type]


def header(shapes: dict[str, tuple[int, ...]], kind: str = "F32") -> bytes:
    """A safetensors file whose weights are zeros."""
    width, end = {"F32": 4, "F16": 2, "BF16": 2}[kind], 0
    data: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        data[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_model(directory: Path, kind: str = "F32", upcast: bool = False) -> Path:
    """A checkpoint whose weights are zeros under names that its classes do not know: loading them fails."""
    for name, shapes in SHAPES.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text(json.dumps({"force_upcast": upcast}))
        (directory / name / "model.safetensors").write_bytes(header(shapes, kind))
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text("{}")
    (directory / "model_index.json").write_text(json.dumps(INDEX))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def make_forecast(source: Path, planned: Any = None, **changes: Any) -> Forecast:
    options = ExportOptions(source=str(source), output=source.parent / "out", **changes)
    return forecast(survey(options, Progress())[0], options, planned or plan())


def parts(told: Forecast) -> dict[str, Any]:
    return {part.name: part for part in told.components}


def test_parameters_and_precisions_are_read_from_headers(model: Path) -> None:
    told = make_forecast(model)
    assert (told.pipeline_class, told.family, told.backend) == ("StableDiffusionImg2ImgPipeline", "stable-diffusion", "onnx")
    assert set(parts(told)) == set(INDEX) - {"_class_name"}
    for name, count in COUNTS.items():
        part = parts(told)[name]
        assert (part.kind, part.parameters) == (INDEX[name][1], count)
        assert (part.backend, part.stored, part.precision, part.bytes) == ("onnx", "fp32", "fp32", 4 * count)
    assert (parts(told)["tokenizer"].backend, parts(told)["tokenizer"].bytes) == ("", 0)
    assert told.source_bytes == told.bundle_bytes == 4 * sum(COUNTS.values())


def test_the_precision_decides_the_size(model: Path) -> None:
    sizes = {precision: make_forecast(model, precision=precision).bundle_bytes for precision in ("fp32", "fp16", "bf16", "int8")}
    total, products = sum(COUNTS.values()), sum(PRODUCTS.values())
    assert sizes == {
        "fp32": 4 * total,
        "fp16": 2 * total + 2 * (COUNTS["unet"] + COUNTS["vae"]),  # fused graphs have weights of their own
        "bf16": 2 * total,
        "int8": products + 4 * (total - products),
    }
    assert make_forecast(model, precision="fp16").temporary_bytes == 0


def test_weight_format_shrinks_matrices_of_transformers_and_text_encoders(model: Path) -> None:
    """To bits, and a scale and a zero point for each block."""
    told = make_forecast(model, precision="fp16", weight_format="int4", group_size=64)
    text = parts(told)["text_encoder"]
    assert (text.precision, text.weight_format) == ("fp16", "int4")
    assert text.bytes == text.gpu_bytes == round(COUNTS["text_encoder"] * (0.5 + (2 + 0.5) / 64))
    unet = parts(told)["unet"]
    assert (unet.weight_format, unet.gpu_bytes) == ("", 2 * COUNTS["unet"])
    assert "transformers and text encoders" in unet.reason


def test_weights_on_a_gpu_are_compared_between_precisions(model: Path) -> None:
    told = make_forecast(model)
    sizes = {(one.precision, one.weight_format): one.gpu_bytes for one in told.alternatives}
    total = sum(COUNTS.values())
    assert told.gpu_bytes == sizes["fp32", ""] == 4 * total
    assert sizes["fp16", ""] == sizes["bf16", ""] == 2 * total, "one of the plain and the fused graph is loaded"
    assert sizes["fp16", "int4"] < sizes["fp16", "int8"] < sizes["fp16", ""]
    assert told.offloaded_gpu_bytes == 4 * (total - COUNTS["text_encoder"]), "what `serve --offload text-encoders` leaves there"
    assert {one.offloaded_gpu_bytes for one in told.alternatives if one.precision == "fp16"} == {
        2 * (total - COUNTS["text_encoder"])
    }, "nothing of it is quantized"
    assert make_forecast(model, plan("torch", ())).gpu_bytes == 2 * total, "PyTorch serves in half precision on a GPU"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [(10**8, "GPUs of 8 GB and more"), (4 * 10**9, "GPUs of 24 GB and more"), (10**12, "more than a GPU of 180 GB has")],
)
def test_text_says_which_gpus_the_weights_fit(parameters: int, words: str, model: Path) -> None:
    told = dataclasses.replace(make_forecast(model), gpu_bytes=4 * parameters)
    output = StringIO()
    show(told, open_console(output))
    assert f"{words}\n" in re.sub(" +\n", "\n", output.getvalue())


def test_a_vae_that_overflows_stays_in_fp32(tmp_path: Path) -> None:
    vae = parts(make_forecast(write_model(tmp_path / "model", "F16", upcast=True), precision="fp16"))["vae"]
    assert (vae.stored, vae.precision, vae.bytes) == ("fp16", "fp32", 4 * COUNTS["vae"])
    assert vae.reason


def test_components_without_a_graph_run_in_pytorch(model: Path) -> None:
    told = make_forecast(model, plan("hybrid", ("unet",), "no graph of the text encoder"), precision="int8")
    assert {name: part.backend for name, part in parts(told).items()} == {
        "text_encoder": "torch",
        "tokenizer": "",
        "unet": "onnx",
        "vae": "torch",
    }
    assert {name: part.precision for name, part in parts(told).items() if part.backend == "torch"} == {
        "text_encoder": "fp32",
        "vae": "fp32",
    }
    assert (told.backend, told.backend_reason) == ("hybrid", "no graph of the text encoder")


def test_memory_estimate_follows_the_largest_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_forecast(write_model(tmp_path / "small", "F16")).memory_bytes == 2e9, "what the libraries take"
    monkeypatch.setattr(dry_run, "_LEAST_MEMORY", 0)
    half, full = write_model(tmp_path / "half", "F16"), write_model(tmp_path / "full", "F32")
    memory = {
        (path, asked): make_forecast(path, precision=asked).memory_bytes for path in (half, full) for asked in ("fp16", "fp32")
    }
    assert memory[half, "fp16"] == 1.5 * 2 * COUNTS["unet"]
    assert memory[half, "fp32"] == memory[full, "fp16"] == memory[full, "fp32"] == 1.5 * 4 * COUNTS["unet"]


def test_loras_are_listed_and_counted(model: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    with pytest.raises(ExportError, match="no LoRA file at"):
        make_forecast(model, loras=(LoraFile(lora),))
    lora.write_bytes(b"")
    told = make_forecast(model, loras=(LoraFile(lora, 0.5),))
    assert told.loras == ((str(lora), 0.5),)
    assert told.temporary_bytes > make_forecast(model).temporary_bytes


def test_single_files_are_identified_by_tensor_names(model: Path, tmp_path: Path) -> None:
    prefixes = {"text_encoder": "cond_stage_model.transformer.", "unet": "model.diffusion_model.", "vae": "first_stage_model."}
    tensors = {f"{prefixes[name]}{key}": shape for name, shapes in SHAPES.items() for key, shape in shapes.items()}
    tensors |= {"alphas_cumprod": (1000,), "model_ema.conv": (999, 999)}
    path = tmp_path / "single.safetensors"
    path.write_bytes(header(tensors, "F16"))
    told = make_forecast(path, config=str(model))
    found = {name: part.parameters for name, part in parts(told).items() if part.parameters}
    assert found == COUNTS
    assert {part.stored for part in told.components if part.parameters} == {"fp16"}


def test_optimum_graphs_are_listed_with_sizes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    sizes = {"text_encoder": 4000, "unet": 8000, "vae_encoder": 400, "vae_decoder": 800}
    for name, size in sizes.items():
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text("{}")
        (model / name / "model.onnx").write_bytes(bytes(size))
    (model / "unet" / "model.onnx_data").write_bytes(bytes(80_000))
    (model / "tokenizer").mkdir(exist_ok=True)
    (model / "tokenizer" / "vocab.json").write_text("{}")
    (model / "model_index.json").write_text(json.dumps(INDEX))
    told = make_forecast(model)
    found = parts(told)
    assert {name: found[name].bytes for name in sizes} == {**sizes, "unet": 88_000}
    assert {found[name].backend for name in sizes} == {"onnx"}
    assert told.source_bytes == sum(sizes.values()) + 80_000


@pytest.mark.parametrize("contents", [b"", b"short", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_file_is_refused(contents: bytes, model: Path) -> None:
    (model / "unet" / "model.safetensors").write_bytes(contents)
    with pytest.raises(ExportError, match=re.escape("unet/model.safetensors")):
        make_forecast(model)


def test_parameter_counts_of_tiny_models_match_torch(tiny_model: Get) -> None:
    """Against what torch counts."""
    from diffusers import AutoPipelineForImage2Image

    source = tiny_model("sd1")
    pipeline = AutoPipelineForImage2Image.from_pretrained(source, use_safetensors=True, local_files_only=True)
    found = parts(make_forecast(source))
    for name in GRAPHS:
        assert found[name].parameters == sum(part.numel() for part in getattr(pipeline, name).parameters())


def _weights_in(graph: Path) -> int:
    """The bytes of a graph's matrices: constants and numbers of the graph itself are small."""
    stored = onnx.load(graph, load_external_data=False).graph.initializer
    return sum(4 * math.prod(item.dims) for item in stored if len(item.dims) > 1)


@pytest.mark.parametrize("name", nightly_but(["klein", "zimage", "qwenimage", "qwenimage-edit"], "zimage", "qwenimage-edit"))
def test_language_model_is_counted_up_to_the_state_that_is_read(name: str, tiny_model: Get, bundle: Get) -> None:
    """As the export made it: without the layers after that state, without logits, and with the vision tower if it sees images."""
    options = ExportOptions(source=str(tiny_model(name)), output=Path("out"))
    checkpoint, contents = survey(options, Progress())
    expected = parts(forecast(checkpoint, options, models.plan(checkpoint.layout, "auto"), contents))["text_encoder"]
    made = sum(_weights_in(path) for path in bundle(name).glob("text_encoder*/model.onnx"))
    assert made == pytest.approx(expected.bytes, rel=0.03)
    whole = sum(math.prod(item.shape) for path, header in contents.headers.items() if path.startswith("text_encoder/")
                for item in header.values())  # fmt: skip
    assert expected.bytes < 4 * whole


def test_plain_report_is_readable_lines(model: Path) -> None:
    stream = StringIO()
    show(
        make_forecast(model, plan("hybrid", ("unet",), "because [of] it"), precision="fp16", scheduler="LCM"),
        open_console(stream),
    )
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "backend hybrid: because [of] it" in lines
    assert "scheduler LCM" in lines
    assert "unet UNet2DConditionModel ONNX graph 0.0 M fp32 fp16 83.2 kB" in lines
    assert "tokenizer CLIPTokenizer copied" in lines


def test_low_disk_space_is_reported(model: Path) -> None:
    stream = StringIO()
    show(dataclasses.replace(make_forecast(model), free_disk_bytes=1000), open_console(stream))
    assert "only 1.00 kB are free" in stream.getvalue()


def test_dry_run_writes_no_files_and_json_is_one_object(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "plan", lambda layout, backend: plan())
    before = sorted(tmp_path.rglob("*"))
    command = ["export", str(model), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert main([*command, "--json", "--precision", "int8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {item.name for item in dataclasses.fields(Forecast)}
    assert (told["precision"], len(told["components"])) == ("int8", 4)
    assert sorted(tmp_path.rglob("*")) == before
    (model / "model_index.json").unlink()
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["event"] == "error"


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    paths = [path for path in model.rglob("*") if path.is_file()]
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in paths}
    files["unet/model.safetensors"] += bytes(1_000_000)
    with serve(Hub(files)) as served:
        yield served


_SURVEY = """
import json, sys
from pathlib import Path
from img2img_export.cli.dry_run import survey
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.weights import weigh
for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime"):
    assert name not in sys.modules, name
try:
    checkpoint, contents = survey(ExportOptions(source="someone/model", output=Path("unused")), Progress())
except ExportError as error:
    print(json.dumps({"error": str(error)}))
else:
    weights = weigh(contents, tuple(checkpoint.layout.components))
    print(json.dumps({name: part.parameters for name, part in weights.items()}))
"""


def survey_hub(hub: Hub, home: Path) -> Any:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(home / "cache")}
    result = subprocess.run([sys.executable, "-c", _SURVEY], env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_hub_repository_is_surveyed_by_headers_without_weights(hub: Hub, tmp_path: Path) -> None:
    assert survey_hub(hub, tmp_path / "home") == COUNTS
    assert hub.sent["unet/model.safetensors"] <= 100_001
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_hub_with_a_damaged_file_is_an_error_of_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.files["vae/model.safetensors"] = struct.pack("<Q", 20) + b"this is not JSON at all"
    error = survey_hub(hub, tmp_path / "home")["error"]
    assert error.startswith("cannot read the sizes of someone/model from the hub")
    assert len(error.splitlines()) == 1
