"""Static int8: the graph computes what the calibration emulates, sensitive layers are found, and images decide."""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawing import alone, load
from fakes import make_request
from img2img_export import component
from img2img_export.build import export_model
from img2img_export.convert import calibration
from img2img_export.convert.calibration import Calibration, emulated
from img2img_export.convert.external_weights import ExternalWeightsGraph
from img2img_export.convert.graph_kinds import Called
from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.static_int8 import Int8, to_static_int8
from img2img_export.convert.tracing import trace
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.verify import images
from img2img_server.bundle.manifest import ImageParity, Manifest, read_manifest
from short_exports import cut_short

pytestmark = pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")

CHANNELS = 32


class Small(torch.nn.Module):
    """A small net with the layers of a UNet: kernels of 1 and 3, strides, padding, products with and without bias."""

    def __init__(self, outlier: float = 1.0) -> None:
        super().__init__()
        self.config = object()
        self.first = torch.nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.shortcut = torch.nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.down = torch.nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1)
        self.query = torch.nn.Linear(2 * CHANNELS, 2 * CHANNELS, bias=False)
        self.key = torch.nn.Linear(2 * CHANNELS, 2 * CHANNELS)
        self.time = torch.nn.Linear(CHANNELS, 2 * CHANNELS)
        self.last = torch.nn.Conv2d(2 * CHANNELS, 4, 3, padding=1)
        with torch.no_grad():
            self.first.weight[3] *= outlier

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        value = self.first(sample)
        value = self.conv(torch.nn.functional.silu(value)) + self.shortcut(value)
        value = self.down(value)
        embedding = torch.sin(timestep[:, None] * torch.arange(CHANNELS))
        value = value + self.time(embedding)[:, :, None, None]
        tokens = value.flatten(2).transpose(1, 2)
        tokens = tokens + torch.nn.functional.silu(self.query(tokens)) + self.key(tokens)
        output: torch.Tensor = self.last(tokens.transpose(1, 2).reshape(value.shape))
        return output


def part_of(module: Small) -> Part:
    rows = {0: "batch"}
    kind = Called(module.config, {"sample": {**rows, 2: "h", 3: "w"}, "timestep": rows}, {"out": {**rows, 2: "h", 3: "w"}})
    return Part("unet", "unet", kind.inputs, kind.outputs, lambda net, given: {"out": net(**given)}, kind)


def calls(count: int = 6, rows: int = 2) -> list[Tensors]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"sample": torch.randn(rows, 4, 8, 10, generator=generator), "timestep": torch.full((rows,), 1.0 + 150 * index)}
        for index in range(count)
    ]


def small(outlier: float = 1.0) -> tuple[Small, Part, ExternalWeightsGraph, Calibration]:
    torch.manual_seed(1)
    module = Small(outlier).eval()
    part = part_of(module)
    graph = trace(module, part, calls()[0])
    weights = {id(weight.source) for weight in graph.weights.values()}
    return module, part, graph, Calibration(module, part, calls(), weights, Progress())


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(folder: Path, call: Tensors) -> np.ndarray:
    return np.asarray(session(folder).run(None, {name: value.numpy() for name, value in call.items()})[0])


def relative_error(value: Any, reference: Any) -> float:
    return float(np.linalg.norm(value - np.asarray(reference)) / np.linalg.norm(np.asarray(reference)))


def test_first_and_last_layers_and_embeddings_are_not_quantized() -> None:
    *_, measured = small()
    assert set(measured.layers) == {"conv", "shortcut", "down", "query", "key"}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "names", [("conv",), ("shortcut",), ("down",), ("query",), ("key",), ("conv", "shortcut", "query", "key")]
)
def test_graph_matches_the_calibration_emulation(names: tuple[str, ...], per_channel: bool, tmp_path: Path) -> None:
    module, part, graph, measured = small(outlier=6.0)
    layers = {name: (measured.layers[name], per_channel) for name in names}
    to_static_int8(graph, layers).write(tmp_path, Progress(), "small")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    call = calls()[2]
    with torch.no_grad():
        exact = part.call(module, call)["out"]
        with emulated(layers):
            expected = part.call(module, call)["out"]
    value = run(tmp_path, call)
    error = relative_error(value, exact)
    assert 1e-4 < error < 0.1
    assert relative_error(value, expected) < 0.35 * error, "values at a rounding boundary may differ by a step"


def test_layers_with_different_ranges_of_one_input_keep_their_scales(tmp_path: Path) -> None:
    module, part, graph, measured = small()
    measured.layers["key"].low, measured.layers["key"].high = (
        3 * bound for bound in (measured.layers["key"].low, measured.layers["key"].high)
    )
    layers = {name: (measured.layers[name], False) for name in ("query", "key")}
    to_static_int8(graph, layers).write(tmp_path, Progress(), "small")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    with torch.no_grad(), emulated(layers):
        expected = part.call(module, calls()[2])["out"]
    assert relative_error(run(tmp_path, calls()[2]), expected) < 0.01


def test_row_does_not_depend_on_the_rest_of_its_batch(tmp_path: Path) -> None:
    *_, graph, measured = small()
    layers = {name: (layer, name == "conv") for name, layer in measured.layers.items()}
    to_static_int8(graph, layers).write(tmp_path, Progress(), "small")
    alone = {name: value[:1] for name, value in calls()[1].items()}
    extreme = {name: torch.cat([value, 50 * value]) for name, value in alone.items()}
    assert (run(tmp_path, extreme)[:1] == run(tmp_path, alone)).all()


def test_layers_with_outlier_channels_get_per_channel_factors() -> None:
    module, part, _, measured = small(outlier=30.0)
    errors = []
    with torch.no_grad():
        exact = part.call(module, calls()[3])["out"]
        for per_channel in (False, True):
            with emulated({"shortcut": (measured.layers["shortcut"], per_channel)}):
                errors.append(relative_error(part.call(module, calls()[3])["out"], exact))
    assert errors[1] < errors[0] / 2
    assert any(measured.choose(module, 0.02).layers.values())
    module, *_, measured = small()
    assert not any(measured.choose(module, 0.1).layers.values())


def test_a_smaller_budget_keeps_the_most_sensitive_layers_in_fp32() -> None:
    module, *_, measured = small()
    kept = []
    for budget in (0.1, 0.005, 0.003, 1e-6):
        choice = measured.choose(module, budget)
        assert set(choice.layers) | set(choice.kept) == set(measured.layers)
        assert not set(choice.layers) & set(choice.kept)
        assert choice.error <= budget
        kept.append(len(choice.kept))
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] == 5
    assert 0 < kept[2] < 5


def test_calibration_is_reused_for_a_reloaded_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module, part, _, measured = small()
    first = measured.choose(module, 0.01)
    measured.release()
    assert all(layer.module is None for layer in measured.layers.values())
    observed: list[str] = []
    monkeypatch.setattr(calibration.Layer, "observe", lambda layer, *arguments: observed.append(layer.name))
    torch.manual_seed(1)
    again = Small().eval()
    weights = {id(weight.source) for weight in trace(again, part, calls()[0]).weights.values()}
    assert Calibration(again, part, calls(), weights, Progress(), measured).choose(again, 0.01) == first
    assert observed == []


def test_weights_are_quantized_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, graph, measured = small()
    result = to_static_int8(graph, {name: (layer, True) for name, layer in measured.layers.items()})
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []
    read = Int8.read

    def counted(self: Int8) -> torch.Tensor:
        counts.append(sum(reference() is not None for reference in alive))
        value = read(self)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Int8, "read", counted)
    result.write(tmp_path, Progress(), "small")
    assert counts == [0] * 5
    assert result.bytes < graph.bytes / 2


def test_calibration_cases_differ_from_the_verification_cases(tiny_model: Callable[[str], Path]) -> None:
    from diffusers import AutoPipelineForImage2Image
    from img2img_export.verify.images import calibration_cases, image_cases

    pipe = AutoPipelineForImage2Image.from_pretrained(tiny_model("sd1"), use_safetensors=True)
    cases, more = image_cases(pipe, "stable-diffusion"), calibration_cases(pipe, "stable-diffusion")
    assert not {case.request.prompt for case in cases} & {case.request.prompt for case in more}
    assert len({case.request.image.tobytes() for case in (cases[0], *more)}) == len(more) + 1
    assert {case.request.strength for case in more} == {0.5, 1.0}
    assert len({case.request.guidance_scale for case in more}) == len(more)


def export(tiny_model: Callable[[str], Path], output: Path) -> Manifest:
    with cut_short(1, further=True, controls=False):
        return export_model(ExportOptions(source=str(tiny_model("sd1")), output=output, precision="int8")).manifest


def precisions(manifest: Manifest) -> dict[str, str]:
    return {part.name: part.precision for part in manifest.components}


def test_unet_and_decoder_are_static_int8_except_for_listed_layers(
    tiny_model: Callable[[str], Path], bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = export(tiny_model, tmp_path / "out")
    assert precisions(manifest) == {"text_encoder": "int8", "unet": "int8", "vae_encoder": "fp32", "vae_decoder": "int8"}
    parts = {part.name: part for part in manifest.components}
    for name in ("unet", "vae_decoder"):
        graph = onnx.load(str(tmp_path / "out" / name / "model.onnx"), load_external_data=False).graph
        kinds = {node.op_type for node in graph.node}
        assert "QLinearConv" in kinds
        assert ("MatMulIntegerToFloat" in kinds) == (name == "unet"), "the attention of the tiny decoder is too narrow"
        assert not kinds & {"DynamicQuantizeLinear", "MatMulInteger"}
        exact = {
            name.split(".transpose")[0] for node in graph.node if node.op_type in ("Conv", "MatMul") for name in node.input[1:2]
        }
        assert {f"module.{layer}.weight" for layer in parts[name].kept_in_fp32} <= exact
        assert any("conv_in" in weight for weight in exact)
        assert any("conv_out" in weight for weight in exact)
    assert sum(len(part.kept_in_fp32) for part in parts.values()) > 0
    assert parts["vae_encoder"].reason == "the source image is encoded once, and in full precision"
    assert not any(part.lora for part in parts.values() if part.precision == "int8"), "LoRA graphs are in floating point"
    assert manifest.verification.passed
    assert min(part.psnr_db for part in manifest.verification.pictures) >= 25
    assert read_manifest(tmp_path / "out") == manifest
    request = make_request(image=images.sample_image(64, 64), prompt="a lake", seeds=(1,))
    one, other = (alone(load(path), request) for path in (tmp_path / "out", bundle("sd1")))
    assert np.abs(one - other).mean() <= 6, "the server draws by what is in int8 and what is not"


@pytest.mark.nightly  # test_a_smaller_budget_keeps_the_most_sensitive_layers_in_fp32 always runs
def test_failing_images_reduce_the_quantization_budget(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt has fewer layers in int8 until one passes; the last one is in fp32, with the reason."""
    budgets: list[float] = []
    choose = Calibration.choose

    def noted(self: Calibration, module: Any, budget: float) -> calibration.Choice:
        budgets.append(budget)
        return choose(self, module, budget)

    compare = images.compare_images

    def unhappy(*arguments: Any) -> tuple[tuple[ImageParity, ...], Any]:
        compared, drawn = compare(*arguments)
        if "int8" in {part.precision for part in arguments[1].components if part.name == "unet"}:
            compared = tuple(dataclasses.replace(part, psnr_db=20.0, passed=False) for part in compared)
        return compared, drawn

    monkeypatch.setattr(Calibration, "choose", noted)
    monkeypatch.setattr(images, "compare_images", unhappy)
    manifest = export(tiny_model, tmp_path / "out")
    assert budgets == [budget for budget in component._BUDGETS if budget for _ in range(2)]
    assert precisions(manifest) == {"text_encoder": "int8", "unet": "fp32", "vae_encoder": "fp32", "vae_decoder": "fp32"}
    assert "images" in next(part.reason for part in manifest.components if part.name == "unet")
    assert manifest.verification.passed
