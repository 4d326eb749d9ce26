"""IP-Adapters' files: read as diffusers reads them, or refused with the reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from img2img_server.bundle.adapter_files import AdapterProblem
from img2img_server.bundle.image_prompts import layer_widths
from img2img_server.runtime.image_prompts.reading import ImageAdapter, read_adapter
from safetensors.torch import load_file, save_file
from tiny_image_adapters import KINDS, cross_attentions, write
from transformers import CLIPVisionModelWithProjection

Get = Callable[[str], Path]


@pytest.fixture
def unet(tiny_model: Get) -> Any:
    return UNet2DConditionModel.from_pretrained(tiny_model("sd1") / "unet")


@pytest.fixture
def encoder(tiny_image_encoder: Get) -> Any:
    return CLIPVisionModelWithProjection.from_pretrained(tiny_image_encoder("h"))


def read(file: Path, unet: Any) -> ImageAdapter:
    return read_adapter(file, layer_widths(unet.config), unet.config.cross_attention_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_states_are_the_keys_and_values_that_diffusers_computes(
    name: str, kind: str, dtype: torch.dtype, tiny_model: Get, encoder: Any, tmp_path: Path
) -> None:
    """Of three images, which diffusers reads in one call."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model(name) / "unet")
    adapter = read(write(tmp_path / "one.safetensors", unet, kind, encoder, dtype=dtype), unet)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = encoder.config
        images = torch.randn(3, config.projection_dim) if kind == "plain" else torch.randn(3, 17, config.hidden_size)
    assert adapter.projection.layout.reads_states == (kind != "plain")
    found = torch.cat([adapter.states(image[None]) for image in images])
    unet._load_ip_adapter_weights([diffusers_weights(tmp_path / "one.safetensors")])
    with torch.no_grad():
        (tokens,) = unet.encoder_hid_proj([images[None]])
        expected = []
        for layer in cross_attentions(unet):
            expected += [layer.processor.to_k_ip[0](tokens), layer.processor.to_v_ip[0](tokens)]
    torch.testing.assert_close(found, torch.cat(expected, dim=-1).flatten(0, 2), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.5
    assert adapter.bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "one.safetensors").values())


def diffusers_weights(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """As load_ip_adapter reads them."""
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        found[part][rest] = tensor
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a LoRA": (
        lambda own: own.update({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}),
        "is not an IP-Adapter for Stable Diffusion: it contains unet.to_q.lora_A.weight",
    ),
    "FaceID": (
        lambda own: own.update({"ip_adapter.1.to_k_lora.down.weight": torch.zeros(2, 2)}),
        "is an IP-Adapter for FaceID, which does not read images as CLIP does",
    ),
    "FaceID without LoRAs": (
        lambda own: (
            own.update({f"image_proj.{name}": own.pop("image_proj.proj.weight") for name in ("proj.0.weight",)})
            or own.update({"image_proj.proj.2.weight": torch.zeros(2, 2)})
        ),
        "is an IP-Adapter for FaceID",
    ),
    "no projection": (
        lambda own: [own.pop(name) for name in list(own) if name.startswith("image_proj.")],
        "is not an IP-Adapter for Stable Diffusion: it contains no image_proj.latents",
    ),
    "integers": (
        lambda own: own.update({"image_proj.norm.bias": torch.zeros(16, dtype=torch.int64)}),
        "has image_proj.norm.bias in I64, and not in one of F16, BF16, F32: convert it",
    ),
    "axes": (lambda own: own.update({"image_proj.proj.weight": torch.zeros(64)}), r"is damaged: image_proj.proj.weight has .*64"),
    "empty": (
        lambda own: own.update({"image_proj.proj.weight": torch.zeros(0, 24)}),
        r"is damaged: image_proj.proj.bias has the shape \[128\], not \[0\]",
    ),
    "a missing norm": (
        lambda own: own.pop("image_proj.norm.bias"),
        "is damaged: it contains no image_proj.norm.bias",
    ),
    "one too much": (
        lambda own: own.update({"image_proj.more": torch.zeros(2)}),
        "is damaged: it contains image_proj.more, which such an IP-Adapter does not have",
    ),
    "a layer less": (
        lambda own: own.pop("ip_adapter.3.to_v_ip.weight"),
        "does not fit the model, and is for another size of Stable Diffusion: it contains no ip_adapter.3.to_v_ip.weight",
    ),
    "infinite": (
        lambda own: own["ip_adapter.3.to_v_ip.weight"].fill_(float("inf")),
        "is damaged: its weights contain NaN or infinite numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(damage: str, unet: Any, encoder: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "one.safetensors", unet, "plain", encoder)
    tensors = load_file(file)
    change, reason = DAMAGES[damage]
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(AdapterProblem, match=f"^{reason}"):
        read(file, unet)


def test_an_adapter_for_another_model_is_refused(tiny_model: Get, unet: Any, encoder: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "one.safetensors", UNet2DConditionModel.from_pretrained(tiny_model("sdxl") / "unet"), "plus", encoder)
    with pytest.raises(AdapterProblem, match=r"^does not fit the model, and is for another size of Stable Diffusion"):
        read(file, unet)


def test_a_file_that_claims_more_than_it_has_is_refused_before_memory_is_taken(unet: Any, tmp_path: Path) -> None:
    """A terabyte for the weight of a projection."""
    width = 1 << 19
    claims = {"image_proj.proj.weight": {"dtype": "F32", "shape": [width, width], "data_offsets": [0, 4 * width * width]}}
    header = json.dumps(claims).encode()
    (tmp_path / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(AdapterProblem, match=r"^is damaged or not a safetensors file"):
        read(tmp_path / "one.safetensors", unet)
    (tmp_path / "one.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(AdapterProblem, match=r"^is damaged or not a safetensors file"):
        read(tmp_path / "one.safetensors", unet)
    with pytest.raises(AdapterProblem, match=r"^cannot be read: No such file"):
        read(tmp_path / "none.safetensors", unet)
