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
from img2img_server.bundle.image_adapters import PromptKind
from img2img_server.bundle.image_prompts import layer_widths
from img2img_server.runtime.image_prompts.reading import AdapterWeights, read_adapter
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


def read(file: Path, unet: Any) -> AdapterWeights:
    return read_adapter(file, PromptKind(layer_widths(unet.config), unet.config.cross_attention_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_states_are_the_keys_and_values_that_diffusers_computes(
    name: str, kind: str, dtype: torch.dtype, tiny_model: Get, encoder: Any, tmp_path: Path
) -> None:
    """The prompts of three images, which diffusers reads in one call."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model(name) / "unet")
    adapter = read(write(tmp_path / "one.safetensors", unet, kind, encoder, dtype=dtype), unet)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = encoder.config
        images = torch.randn(3, config.projection_dim) if kind == "plain" else torch.randn(3, 17, config.hidden_size)
    assert adapter.needs.reads_states == (kind != "plain")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    found = torch.cat([adapter.states(image[None]) for image in images])
    threads = torch.get_num_threads()
    torch.set_num_threads(before)
    assert threads == before + 1, "other calls of the pipeline have its threads"
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
    """The values that load_ip_adapter reads."""
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        found[part][rest] = tensor
    return found


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "FaceID": (
        "plain",
        lambda own: own.update({"ip_adapter.1.to_k_lora.down.weight": torch.zeros(2, 2)}),
        "is an IP-Adapter FaceID",
    ),
    "integers": (
        "plain",
        lambda own: own.update({"image_proj.norm.bias": torch.zeros(32, dtype=torch.int64)}),
        "has image_proj.norm.bias in I64, and not in one of F16, BF16, F32: convert it",
    ),
    "tokens of another width": (
        "plain",
        lambda own: own.update({"image_proj.proj.weight": torch.zeros(64, 24)}),
        r"is damaged: the shape of image_proj.proj.weight is \[64, 24\], and \[128, 24\] is expected",
    ),
    "a missing norm": (
        "plain",
        lambda own: own.pop("image_proj.norm.bias"),
        r"is damaged: the shape of image_proj.norm.bias is none, and \[32\] is expected",
    ),
    "one too much": (
        "full",
        lambda own: own.update({"image_proj.more": torch.zeros(2)}),
        r"is damaged: the shape of image_proj.more is \[2\], and none is expected",
    ),
    "a resampler's axes": (
        "plus",
        lambda own: own.update({"image_proj.latents": torch.zeros(2)}),
        r"is damaged: weights of its image projection \(image_proj.\*\) are missing or have no shape",
    ),
    "a resampler without layers": (
        "plus",
        lambda own: [own.pop(name) for name in list(own) if "layers." in name],
        r"is damaged: weights of its image projection \(image_proj.\*\) are missing or have no shape",
    ),
    "a layer less": (
        "plain",
        lambda own: [own.pop(name) for name in sorted(own, key=lambda name: int(name.split(".")[1]) if "ip" in name else 0)[-2:]],
        "does not fit the model: it is for a model of . cross-attentions",
    ),
    "infinite": (
        "plain",
        lambda own: own["ip_adapter.3.to_v_ip.weight"].fill_(float("inf")),
        "is damaged: its weights contain NaN or infinite numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(damage: str, unet: Any, encoder: Any, tmp_path: Path) -> None:
    kind, change, reason = DAMAGES[damage]
    file = write(tmp_path / "one.safetensors", unet, kind, encoder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(AdapterProblem, match=f"^{reason}"):
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
