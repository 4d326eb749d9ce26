"""Bundles of CLIP's image encoder, which reads the images of image prompts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from covering import nightly_but
from img2img_export.build import export_model
from img2img_export.cli.dry_run import forecast, survey
from img2img_export.companion import plan
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_server.bundle.image_encoders import CLASS, FAMILY, EncoderWidths, encoder_widths
from img2img_server.bundle.manifest import Precision, check_bundle, read_manifest
from safetensors.torch import load_file, save_file
from short_exports import brief
from transformers import CLIPVisionModelWithProjection

Get = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def source(tiny_image_encoder: Get, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_image_encoder("h"), tmp_path / "source"))


def change(config: Path, **values: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


@pytest.mark.parametrize(("letter", "widths"), [("h", EncoderWidths(24, 32)), ("g", EncoderWidths(40, 48))])
def test_an_image_encoder_becomes_a_verified_bundle(letter: str, widths: EncoderWidths, image_encoder_bundle: Get) -> None:
    bundle = image_encoder_bundle(letter)
    manifest = read_manifest(bundle)
    check_bundle(bundle, manifest)
    assert (manifest.family, manifest.backend, manifest.pipeline_class) == (FAMILY, "onnx", CLASS)
    (component,) = manifest.components
    assert [(item.name, item.shape[1:]) for item in component.inputs] == [("pixel_values", (3, 28, 28))]
    assert [item.name for item in component.outputs] == ["image_embeds", "hidden_states"]
    assert encoder_widths(bundle, manifest) == widths
    cases = [part.case for part in manifest.verification.components]
    assert cases == ["random, batch 1, 28 x 28", "random, smooth and empty, batch 3, 28 x 28"]
    assert manifest.verification.reference == "PyTorch in fp32"


def test_graph_outputs_match_diffusers(tiny_image_encoder: Get, image_encoder_bundle: Get) -> None:
    """The projected embedding, and the hidden states before the last layer, for any number of images."""
    model = CLIPVisionModelWithProjection.from_pretrained(tiny_image_encoder("h"))
    pixels = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    session = onnxruntime.InferenceSession(image_encoder_bundle("h") / FAMILY / "model.onnx")
    embeds, states = session.run(None, {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(embeds, expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(states, expected.hidden_states[-2].numpy(), atol=1e-5)
    assert np.abs(states - expected.hidden_states[-1].numpy()).max() > 1e-2


@pytest.mark.parametrize("precision", ["fp16", *nightly_but(["bf16", "int8"])])
def test_precisions_of_an_image_encoder(precision: str, tiny_image_encoder: Get, tmp_path: Path) -> None:
    with brief():
        made = export_model(ExportOptions(str(tiny_image_encoder("h")), tmp_path / "clip", precision=cast(Precision, precision)))
    (component,) = made.manifest.components
    assert (component.precision, component.reason, component.fused) == (precision, "", "")
    assert f"image-encoder on onnx in {precision}" in made.summary()


def test_a_folder_as_published_is_read(source: Path, tmp_path: Path) -> None:
    """h94/IP-Adapter's have the same weights as a pickle beside them, and the numbers of positions, which transformers makes."""
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "vision_model.embeddings.position_ids": torch.arange(17)[None]}, source / "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    with brief():
        made = export_model(ExportOptions(str(source), tmp_path / "clip"))
    assert made.manifest.family == FAMILY


def test_dry_run_describes_the_export_of_an_image_encoder(tiny_image_encoder: Get, tmp_path: Path) -> None:
    options = ExportOptions(str(tiny_image_encoder("h")), tmp_path / "clip", precision="fp16")
    checkpoint, contents = survey(options, Progress())
    found = forecast(checkpoint, options, plan(checkpoint.layout), contents)
    assert (found.family, found.backend) == (FAMILY, "onnx")
    ((name, kind, backend, parameters),) = [(part.name, part.kind, part.backend, part.parameters) for part in found.components]
    assert (name, kind, backend) == (FAMILY, CLASS, "onnx")
    assert parameters > 10_000
    assert found.bundle_bytes == 2 * parameters


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"loras": (LoraFile(Path("a.safetensors")),)}, "--lora"),
        ({"control_graphs": True}, "--control-graphs"),
        ({"speedups": True}, "--speedups"),
        ({"backend": "torch"}, "--backend"),
    ],
)
def test_options_that_do_not_apply_are_refused(changes: Any, flag: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"is an image encoder, which becomes one graph: {flag} does not apply"):
        export_model(ExportOptions(str(source), tmp_path / "clip", **changes))


def test_quantized_weights_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--weight-format applies to transformers and text encoders, and .* single component"):
        export_model(ExportOptions(str(source), tmp_path / "clip", weight_format="int8"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["CLIPTextModel"]}, "is a CLIPTextModel, a component and not a model: it has no model_index.json"),
        ({"architectures": ["CLIPModel"]}, "is a CLIPModel, a component and not a model"),
        ({"architectures": None}, "is a component and not a model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized"),
    ],
)
def test_other_models_of_transformers_are_refused_by_name(
    changes: dict[str, Any], reason: str, source: Path, tmp_path: Path
) -> None:
    change(source / "config.json", **changes)
    with pytest.raises(ExportError, match=reason):
        export_model(ExportOptions(str(source), tmp_path / "clip"))


def test_pickled_weights_code_and_other_weights_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "modeling.py").write_text("")
    with pytest.raises(ExportError, match=r"contains custom code \(modeling\.py\)"):
        export_model(ExportOptions(str(source), tmp_path / "clip"))
    (source / "modeling.py").unlink()
    change(source / "config.json", num_hidden_layers=4)
    with pytest.raises(ExportError, match=r"image-encoder is incomplete: .* missing \(.*layers\.3\."):
        export_model(ExportOptions(str(source), tmp_path / "clip"))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ExportError, match="has pickled weights only"):
        export_model(ExportOptions(str(source), tmp_path / "clip"))
