"""The folder of image adapters: ids, what each file needs by its header, and which models and image encoders fit it."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_headers import EMBEDDING, STATE, TEXT, WIDTHS, header_of, shapes_of, write_header
from fakes import FakePipeline
from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.image_adapters import (
    AdapterNeeds,
    ImageAdapterFiles,
    ImageAdapterHeader,
    PromptKind,
    difference,
    needs_of,
    prompt_kind,
)
from img2img_server.bundle.image_encoders import FAMILY, EncoderWidths
from img2img_server.bundle.image_prompts import layer_widths
from img2img_server.bundle.manifest import Component, Manifest, read_manifest
from img2img_server.models.image_adapters import encoder_of, fitting
from img2img_server.models.registry import Model, ModelRegistry, kinds_of
from img2img_server.support.model_fields import IMAGE_PROMPTS
from running import manifest

Get = Callable[[str], Path]
KIND = PromptKind(WIDTHS, TEXT)
PLAIN = ImageAdapterHeader("plain", AdapterNeeds("plain", EMBEDDING, KIND))


@pytest.mark.parametrize(("kind", "width"), [("plain", EMBEDDING), ("full", STATE), ("plus", STATE)])
def test_header_determines_what_an_adapter_needs(kind: str, width: int, tmp_path: Path) -> None:
    write_header(tmp_path / "style" / "soft.safetensors", kind)
    adapter, file = ImageAdapterFiles(tmp_path).read("style/soft"), ImageAdapterFiles(tmp_path).find("style/soft")
    assert adapter == ImageAdapterHeader("style/soft", AdapterNeeds(kind, width, KIND))  # type: ignore[arg-type]
    assert (adapter.needs.reads_states, file.id, len(file.digest)) == (kind != "plain", "style/soft", 64)
    embedding, states = EncoderWidths(EMBEDDING, 7), EncoderWidths(7, STATE)
    assert (adapter.needs.reads(embedding), adapter.needs.reads(states)) == (kind == "plain", kind != "plain")


def changed(**changes: Any) -> dict[str, Any]:
    """Shapes of a plain adapter with some replaced; None removes one. Dots are written as double underscores."""
    made: dict[str, Any] = {**shapes_of("plain"), **{name.replace("__", "."): shape for name, shape in changes.items()}}
    return {name: shape for name, shape in made.items() if shape is not None}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (shapes_of("faceid"), "is an IP-Adapter FaceID, which reads embeddings of faces"),
        (shapes_of("faceid plus"), "is an IP-Adapter FaceID"),
        (changed(**{"ip_adapter__0__to_q_lora__down__weight": (128, 32)}), "is an IP-Adapter FaceID"),
        ({}, "is not an IP-Adapter: it has no tensors named"),
        ({"lora_unet_mid.lora_down.weight": (4, 8)}, "is not an IP-Adapter"),
        ({name: shape for name, shape in shapes_of("plain").items() if "image_proj" in name}, "is not an IP-Adapter"),
        ({name: shape for name, shape in shapes_of("plain").items() if "ip_adapter" in name}, "is not an IP-Adapter"),
        (changed(image_proj__proj__weight=None), "is an IP-Adapter of an unknown kind"),
        (changed(image_proj__proj__weight=(4 * TEXT,)), "is damaged: image_proj.proj.weight is not a matrix"),
        (changed(image_proj__proj__weight=(4 * TEXT, 0)), "is damaged: image_proj.proj.weight is not a matrix"),
        (changed(ip_adapter__1__to_k_ip__weight=(32, TEXT, 1)), "is damaged: its layers"),
        (changed(ip_adapter__1__to_k_ip__weight=(32, TEXT + 1)), "is damaged: its layers"),
        (changed(ip_adapter__1__to_k_ip__weight=(33, TEXT)), "is damaged: ip_adapter.1 has no"),
        (changed(ip_adapter__3__to_v_ip__weight=None), "is damaged: ip_adapter.3 has no"),
        (changed(ip_adapter__2__to_k_ip__weight=(32, TEXT)), "is not an IP-Adapter of Stable Diffusion 1, 2 or XL: its layers"),
        (
            changed(ip_adapter__1__to_z_ip__weight=(32, TEXT)),
            "is an IP-Adapter of an unknown kind: it contains ip_adapter.1.to_z",
        ),
        (changed(ip_adapter__01__to_k_ip__weight=(32, TEXT)), "is an IP-Adapter of an unknown kind: it contains ip_adapter.01"),
        (changed(ip_adapter__99999__to_k_ip__weight=(32, TEXT)), "is an IP-Adapter of an unknown kind: it contains ip_adapter.9"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(shapes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(header_of(shapes))
    for _ in range(2):
        with pytest.raises(AdapterProblem, match=f"^{reason}"):
            ImageAdapterFiles(tmp_path).read("a")
    assert list(ImageAdapterFiles(tmp_path).known()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 15) + b'{"a":{"b":"c"}}',
        header_of({"a": (-1,)}),
        header_of({"a": (1.5,)}),  # type: ignore[dict-item]
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 10_000) + b'{"a":' * 2_000,
    ],
)
def test_a_damaged_header_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(AdapterProblem, match=r"^is damaged or not a safetensors file"):
        ImageAdapterFiles(tmp_path).read("a")


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    files = ImageAdapterFiles(tmp_path)
    with pytest.raises(AdapterProblem, match=r"^is damaged"):
        files.read("a")
    write_header(tmp_path / "b", "plus").replace(tmp_path / "a.safetensors")
    assert files.read("a").needs.kind == "plus"


def test_ids_pickles_and_missing_folders_are_refused_as_for_loras(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    files = ImageAdapterFiles(tmp_path)
    for name, reason in (
        ("a", r"is a pickle \(\.bin\), which can run code"),
        ("b", "is not in this server's folder of image adapters, which has none"),
        ("../a", "is not a valid id"),
    ):
        with pytest.raises(AdapterProblem, match=f"^{reason}"):
            files.read(name)
    with pytest.raises(AdapterProblem, match=r"no folder of image adapters \(img2img serve --image-adapters DIR\)"):
        ImageAdapterFiles(None).read("a")


def test_the_file_beside_an_adapter_names_its_image_encoder(tmp_path: Path) -> None:
    write_header(tmp_path / "a.safetensors")
    beside, files = tmp_path / "a.json", ImageAdapterFiles(tmp_path)
    assert files.read("a").encoder == ""
    beside.write_text(json.dumps({"image_encoder": "vit-h"}))
    assert files.read("a").encoder == "vit-h"
    for wrong in ("", "[]", "{}", '{"image_encoder": 1}', '{"image_encoder": ""}', '{"image_encoder": "a", "b": 1}', " " * 2**17):
        beside.write_text(wrong)
        with pytest.raises(AdapterProblem, match=r"^has a file a\.json that is wrong: it must contain"):
            files.read("a")
    beside.unlink()
    beside.mkdir()
    with pytest.raises(AdapterProblem, match=r"^has a file a\.json that is wrong"):
        files.read("a")


def test_a_model_that_an_adapter_does_not_fit_is_refused_with_the_difference() -> None:
    assert difference(KIND, KIND) == ""
    for other, reason in (
        (None, "the model takes no image prompts"),
        (replace(KIND, text_width=1), "it is for texts of 48 numbers a token, and those of the model have 1"),
        (replace(KIND, layer_widths=WIDTHS[1:]), "it is for a model of 5 cross-attentions, and this model has 4"),
        (replace(KIND, layer_widths=WIDTHS[::-1]), "its layers have other widths"),
    ):
        assert difference(KIND, other).startswith(reason)


def models(**encoders: EncoderWidths) -> ModelRegistry:
    """A model that takes image prompts, one that takes none, and image encoders."""
    own = manifest("acme/encoder")
    found = [Model(name, replace(own, family=FAMILY), FakePipeline(), encoder_widths=widths) for name, widths in encoders.items()]
    return ModelRegistry([Model("m", own, prompt_kind=KIND), Model("other", own), *found])


def anybody(name: str) -> bool:
    return True


def test_the_only_image_encoder_that_fits_is_used_or_the_one_that_is_named() -> None:
    fits, other = EncoderWidths(EMBEDDING, 1), EncoderWidths(1, EMBEDDING)
    assert encoder_of(models(a=fits, b=other), PLAIN, anybody).id == "a"
    assert encoder_of(models(a=fits, b=fits), replace(PLAIN, encoder="b"), anybody).id == "b"
    assert encoder_of(models(a=fits, b=fits), PLAIN, lambda name: name != "b").id == "a", "those that the caller may use"
    with pytest.raises(
        AdapterProblem, match=r'^fits several .*\(a, b\): .* in plain\.json, such as \{"image_encoder": "a"\}, or'
    ):
        encoder_of(models(a=fits, b=fits), PLAIN, anybody)
    with pytest.raises(AdapterProblem, match=r"^needs an image encoder with embeddings of 24 numbers, and you may use no such"):
        encoder_of(models(b=other), PLAIN, anybody)
    for name in ("b", "none", "m"):
        with pytest.raises(
            AdapterProblem, match=rf"^needs '{name}', which plain\.json names, as an image encoder with embeddings"
        ):
            encoder_of(models(a=fits, b=other), replace(PLAIN, encoder=name), anybody)


def test_a_model_lists_the_adapters_that_fit_it_and_have_an_image_encoder() -> None:
    wide = replace(PLAIN, id="wide", needs=replace(PLAIN.needs, fits=replace(KIND, text_width=1)))
    plus = ImageAdapterHeader("plus", AdapterNeeds("plus", STATE, KIND))
    adapters = (PLAIN, plus, wide)
    registry = models(a=EncoderWidths(EMBEDDING, 1), h=EncoderWidths(1, STATE))
    assert fitting(registry, registry.get("m"), adapters, anybody) == ["plain", "plus"]
    assert fitting(registry, registry.get("m"), adapters, lambda name: name != "h") == ["plain"]
    assert fitting(registry, registry.get("other"), adapters, anybody) == []
    pipeline = FakePipeline()
    for fields, expected in ((pipeline.fields, []), (IMAGE_PROMPTS, ["plain", "plus"])):
        pipeline.fields = fields
        assert fitting(registry, replace(registry.get("m"), pipeline=pipeline), adapters, anybody) == expected
    assert fitting(registry, registry.get("h"), adapters, anybody) == []
    twice = models(a=EncoderWidths(EMBEDDING, 1), b=EncoderWidths(EMBEDDING, 1))
    assert fitting(twice, twice.get("m"), adapters, anybody) == []


@pytest.mark.parametrize(("name", "takes"), [("sd1", True), ("sdxl", True), ("sd3", False)])
def test_configuration_of_a_bundle_determines_fitting_adapters(name: str, takes: bool, bundle: Get) -> None:
    kind = prompt_kind(bundle(name), read_manifest(bundle(name)))
    assert (kind is not None) == takes
    assert kind is None or (len(kind.layer_widths) > 1 and kind.text_width > 1)
    parts = tuple(replace(part, image_prompts=False) for part in read_manifest(bundle(name)).components)
    assert prompt_kind(bundle(name), replace(read_manifest(bundle(name)), components=parts)) is None, "it must be exported again"


UNET = {
    **{"_class_name": "UNet2DConditionModel", "block_out_channels": [8], "layers_per_block": 1, "cross_attention_dim": 8},
    **{"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]},
}


def with_config(folder: Path, text: str) -> Manifest:
    """The manifest of a bundle in `folder`, whose UNet has this config.json."""
    for name, content in (("unet", text), ("vae", '{"block_out_channels": [8]}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    part = Component("unet", "fp32", control="unet/control.onnx", image_prompts=True)
    return replace(manifest("acme/m"), components=(part,))


@pytest.mark.parametrize("name", ["layers_per_block", "transformer_layers_per_block"])
@pytest.mark.parametrize("value", [10**12, [10**12]])
def test_a_configuration_of_more_layers_than_any_model_has_is_refused(name: str, value: object, tmp_path: Path) -> None:
    """No list of them is made, since bundles are listed before their digests are checked."""
    found = kinds_of(tmp_path, with_config(tmp_path, json.dumps(UNET | {name: value})))
    assert found["prompt_kind"] is None
    assert (found["control_kind"] == ()) == (name == "layers_per_block")
    assert layer_widths(UNET) == (8,) * 4


def test_infinite_numbers_in_a_configuration_are_damage(tmp_path: Path) -> None:
    (tmp_path / "image-encoder").mkdir()
    (tmp_path / "image-encoder" / "config.json").write_text('{"projection_dim": 1e999, "hidden_size": 32}')
    assert kinds_of(tmp_path, replace(manifest("acme/m"), family=FAMILY))["encoder_widths"] is None
    flux = {"num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 1e999, "in_channels": 1}
    text = json.dumps(flux | {"joint_attention_dim": 1, "pooled_projection_dim": 1}).replace("Infinity", "1e999")
    assert kinds_of(tmp_path, with_config(tmp_path, text))["control_kind"] == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"_class_name": "UNet2DConditionModel", "block_out_channels": []}'])
def test_a_damaged_configuration_takes_no_image_prompts(text: str, tmp_path: Path) -> None:
    """The bundle is listed, and loading it reports the problem."""
    assert kinds_of(tmp_path, with_config(tmp_path, text)) == {"control_kind": (), "encoder_widths": None, "prompt_kind": None}


def test_an_adapter_of_diffusers_unet_fits_its_bundle(bundle: Get, tiny_model: Get) -> None:
    """The widths are those of the layers to which diffusers adds an adapter."""
    from diffusers import UNet2DConditionModel

    for name in ("sd1", "sdxl"):
        unet: Any = UNet2DConditionModel.from_pretrained(tiny_model(name), subfolder="unet")
        layers = [
            unet.get_submodule(own.removesuffix(".processor")) for own in unet.attn_processors if own.endswith("attn2.processor")
        ]
        widths = [layer.inner_dim for layer in layers]
        needs = needs_of(shapes_of("plain", widths, unet.config.cross_attention_dim))
        assert needs.fits == prompt_kind(bundle(name), read_manifest(bundle(name)))
