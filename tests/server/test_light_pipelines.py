"""Pipelines without diffusers' classes do what those classes do, bit by bit, and CLIP's tokenizer what transformers' does."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from img2img_server.bundle.manifest import read_manifest
from img2img_server.runtime.common import clip_tokenizer
from img2img_server.runtime.common.clip_tokenizer import LightCLIPTokenizer
from img2img_server.runtime.common.pipe import native_sizes, size_multiple
from img2img_server.runtime.common.request_fields import request_fields
from img2img_server.runtime.common.sources import source_rule
from img2img_server.runtime.common.truncation import Truncation
from img2img_server.runtime.common.vae import output_of
from img2img_server.runtime.diffusion.light import LIGHT, LightLatentConsistency
from img2img_server.runtime.onnx.components import Components
from img2img_server.runtime.onnx.runners import HostRunner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from transformers import CLIPTokenizer

NAMES = ("sd1", "sdxl", "refiner", "lcm")
TEXTS = (
    "",
    "a lake",
    "A Lake  at\n sunset, 4k, it's Ünïcode ﬁ 湖 🏔️ 1234.5!?",
    "<|startoftext|> in <|endoftext|> the text</w>",
    "many words " * 60,
)


def components(bundle: Path, **more: Any) -> Components:
    return Components(
        bundle, read_manifest(bundle), lambda name, graph: HostRunner(open_session(graph, SessionOptions())), **more
    )


@pytest.fixture(scope="module", params=NAMES)
def pipes(request: pytest.FixtureRequest, bundle: Callable[[str], Path]) -> tuple[Any, Any]:
    """The light pipeline of a bundle, and diffusers'."""
    folder = bundle(request.param)
    light, own = components(folder, light=LIGHT).pipeline(), components(folder).pipeline()
    assert isinstance(light, LightLatentConsistency)
    assert not isinstance(own, LightLatentConsistency)
    return light, own


def test_prompt_embeddings_match_diffusers(pipes: tuple[Any, Any]) -> None:
    named = {"prompt": list(TEXTS), "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    light, own = ([part for part in pipe.encode_prompt(**named) if part is not None] for pipe in pipes)
    assert len(light) == len(own) > 0
    assert all(torch.equal(one, other) for one, other in zip(light, own, strict=True))


def test_initial_latents_match_diffusers(pipes: tuple[Any, Any]) -> None:
    drawn = []
    for pipe in pipes:
        view = copy.copy(pipe)
        view.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
        view.scheduler.set_timesteps(4, device="cpu")
        timesteps = view.scheduler.timesteps[1:2].repeat(2)
        pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 48).reshape(2, 3, 32, 48)
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        drawn.append(view.prepare_latents(pixels, timesteps, 1, 2, torch.float32, torch.device("cpu"), generators))
    assert torch.equal(*drawn)


def test_timesteps_and_first_step_match_diffusers(pipes: tuple[Any, Any]) -> None:
    for strength in (0.1, 0.55, 1.0):
        found = []
        for pipe in pipes:
            if not hasattr(pipe, "get_timesteps") or pipe.unet.config.get("time_cond_proj_dim"):
                continue
            view = copy.copy(pipe)
            view.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
            view.scheduler.set_timesteps(10, device="cpu")
            timesteps, count = view.get_timesteps(10, strength, "cpu")
            found.append((timesteps.tolist(), count, getattr(view.scheduler, "begin_index", None)))
        assert not found or found[0] == found[1]


def test_guidance_and_size_inputs_match_diffusers(pipes: tuple[Any, Any]) -> None:
    light, own = pipes
    scales = torch.tensor([0.0, 6.5])
    for width in (7, 8):
        made = (pipe.get_guidance_scale_embedding(scales, embedding_dim=width) for pipe in pipes)
        assert torch.equal(*made)
    if hasattr(own, "_get_add_time_ids"):
        sizes: Any = ((64, 72), (0, 0), (64, 72), 6.0, 2.5, (64, 72), (0, 0), (64, 72))
        width = own.text_encoder_2.config.projection_dim
        for one, other in zip(*(pipe._get_add_time_ids(*sizes, torch.float32, width) for pipe in pipes), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(ValueError, match="added embeddings"):
            light._get_add_time_ids(*sizes, torch.float32, width + 1)


def test_attributes_read_by_the_server_match_diffusers(pipes: tuple[Any, Any]) -> None:
    light, own = pipes
    assert request_fields(light) == request_fields(own)
    assert source_rule(light) == source_rule(own)
    assert (size_multiple(light), native_sizes(light)) == (size_multiple(own), native_sizes(own))
    assert light.scheduler.config == own.scheduler.config
    assert set(light.components) == set(own.components)
    assert all(getattr(light, name) is light.components[name] for name in own.components), "LoRAs look for text encoders"
    texts = {"prompt": TEXTS[-1], "negative_prompt": "fog"}
    assert Truncation(light).warnings(texts) == Truncation(own).warnings(texts) != ()
    for setting in type(light).settings:
        assert light.config[setting] == own.config[setting]


def test_old_scheduler_settings_are_corrected(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(bundle("sd1"), tmp_path, "scheduler/scheduler_config.json", {"steps_offset": 0, "clip_sample": True})
    light, own = components(folder, light=LIGHT).pipeline(), components(folder).pipeline()
    assert isinstance(light, LightLatentConsistency)
    assert light.scheduler.config == own.scheduler.config


@pytest.mark.parametrize("text", TEXTS)
def test_clip_tokens_match_transformers(bundle: Callable[[str], Path], text: str) -> None:
    folder = bundle("sd1") / "tokenizer"
    light, own = clip_tokenizer.read(folder), CLIPTokenizer.from_pretrained(folder)
    assert isinstance(light, LightCLIPTokenizer)
    assert light(text).input_ids == own(text).input_ids
    ids, mask = light.padded([text, "short"])
    most = own.model_max_length
    wanted = own([text, "short"], padding="max_length", max_length=most, truncation=True, return_tensors="pt")
    assert torch.equal(ids, wanted.input_ids)
    assert torch.equal(mask, wanted.attention_mask)
    assert (light.eos_token_id, light.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    assert copy.deepcopy(light) is light


def test_settings_of_a_call_that_tokenizers_were_saved_after_are_ignored(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    saved = CLIPTokenizer.from_pretrained(bundle("sd1") / "tokenizer")
    saved(["a lake"], padding="max_length", truncation=True, max_length=8)
    saved.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert None not in (written["truncation"], written["padding"])  # else this test shows nothing
    theirs, ours = CLIPTokenizer.from_pretrained(tmp_path), clip_tokenizer.read(tmp_path)
    assert ours is not None
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        filled = theirs(text, padding="max_length", truncation=True, return_tensors="pt")
        assert all(
            torch.equal(*pair) for pair in zip(ours.padded([text]), (filled.input_ids, filled.attention_mask), strict=True)
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", {"normalizer": None}),
        ("tokenizer.json", {"added_tokens": [{"id": 3, "content": "<cat>_1"}]}),
        ("tokenizer_config.json", {"pad_token": "!"}),
        ("tokenizer_config.json", {"padding_side": "left"}),
        ("tokenizer_config.json", {"model_max_length": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<dog>"}}}),
        ("added_tokens.json", {"<dog>": 9}),
    ],
)
def test_unsupported_tokenizers_fall_back_to_transformers(
    bundle: Callable[[str], Path], tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    folder = changed(bundle("sd1"), tmp_path, f"tokenizer/{name}", change)
    assert clip_tokenizer.read(folder / "tokenizer") is None


def test_unsupported_tokenizer_falls_back_to_the_diffusers_class(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(bundle("sd1"), tmp_path, "tokenizer/tokenizer_config.json", {"padding_side": "left"})
    assert not isinstance(components(folder, light=LIGHT).pipeline(), LightLatentConsistency)


def test_demo_model_needs_no_class_of_diffusers(bundle: Callable[[str], Path]) -> None:
    assert isinstance(components(bundle("demo"), light=LIGHT).pipeline(), LightLatentConsistency)


def test_latent_distribution_matches_diffusers() -> None:
    parameters = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 20
    light: Any = output_of(parameters, {"latent_channels": 4}).latent_dist
    own = DiagonalGaussianDistribution(parameters)
    assert torch.equal(light.mode(), own.mode())
    drawn = (one.sample(torch.Generator().manual_seed(3)) for one in (light, own))
    assert torch.equal(*drawn)


def changed(bundle: Path, folder: Path, name: str, change: dict[str, Any]) -> Path:
    """A copy of a bundle, of links, with a JSON file that is changed or added."""
    for path in bundle.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(bundle)).symlink_to(path)
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps({**content, **change}))
    return folder
