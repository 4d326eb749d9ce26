"""The quality of the committed demo model, measured against the generator's own posters of the same layouts. With `-s` each
measure prints its count: the figures of the model's card.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from autoencoder import edge_energy, encode, reconstruction_psnr
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
from judge import PHRASES, Case, Floats, keeps_ridge, make_cases, transform
from posterset import unseen_posters
from safetensors.torch import load_file
from scenes import DEFAULT_PROMPT, EXTRA_WORDS
from transformers import CLIPTokenizer

DEMO = Path(__file__).parents[2] / "demo"
MODEL = DEMO / "model"
LAYOUTS = 20
ENOUGH = 19
"""The required number of the 20 layouts."""


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return make_cases(LAYOUTS)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionImg2ImgPipeline:
    pipeline = AutoPipelineForImage2Image.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def images(pipeline: StableDiffusionImg2ImgPipeline, cases: list[Case]) -> Callable[[str], list[Floats]]:
    """Gives, for a mood, the images of all layouts under their captions at strength 0.8, made the first time."""
    return functools.cache(lambda mood: transform(pipeline, cases, [case.caption(mood) for case in cases], strength=0.8))


def check(images: list[Floats], cases: list[Case], mood: str) -> None:
    follows = [case.follows(image, mood) for case, image in zip(cases, images, strict=True)]
    nearest = [case.nearest_mood(image) == mood for case, image in zip(cases, images, strict=True)]
    print(f"\n{PHRASES[mood]}: {sum(follows)} of {len(cases)} follow, {sum(nearest)} nearest to it")
    enough = len(cases) * ENOUGH / LAYOUTS
    assert sum(follows) >= enough, follows
    assert sum(nearest) >= enough, nearest


def test_a_few_layouts_turn_to_sunset(pipeline: StableDiffusionImg2ImgPipeline) -> None:
    few = make_cases(5)
    check(transform(pipeline, few, [case.caption("sunset") for case in few], strength=0.8), few, "sunset")


@pytest.mark.nightly
@pytest.mark.parametrize("mood", PHRASES)
def test_sky_and_land_change_as_the_caption_says(mood: str, images: Callable[[str], list[Floats]], cases: list[Case]) -> None:
    check(images(mood), cases, mood)


@pytest.mark.nightly
@pytest.mark.parametrize("mood", PHRASES)
def test_prompt_with_only_a_mood_gives_that_mood(mood: str, pipeline: StableDiffusionImg2ImgPipeline, cases: list[Case]) -> None:
    check(transform(pipeline, cases, [PHRASES[mood]] * len(cases), strength=0.8), cases, mood)


@pytest.mark.nightly
@pytest.mark.parametrize("mood", PHRASES)
def test_judge_refuses_images_of_another_caption(mood: str, images: Callable[[str], list[Floats]], cases: list[Case]) -> None:
    for other in PHRASES:
        if other != mood:
            taken = [case.nearest_mood(image) == mood for case, image in zip(cases, images(other), strict=True)]
            print(f"\n{PHRASES[other]}: {sum(taken)} of {len(taken)} taken for {PHRASES[mood]}")
            assert sum(taken) <= len(cases) - ENOUGH, (other, taken)


@pytest.mark.nightly
def test_ridge_line_of_the_source_is_recognizable_at_strength_065(
    pipeline: StableDiffusionImg2ImgPipeline, cases: list[Case]
) -> None:
    outputs = transform(pipeline, cases, [case.caption("sunset") for case in cases], strength=0.65)
    kept = [keeps_ridge(output, cases, index) for index, output in enumerate(outputs)]
    print(f"\nridge line at strength 0.65: {sum(kept)} of {len(kept)} nearest to their own source")
    assert sum(kept) >= ENOUGH, kept


def test_autoencoder_reconstructs_unseen_posters(pipeline: StableDiffusionImg2ImgPipeline) -> None:
    unseen = unseen_posters(8)
    quality, energy = reconstruction_psnr(pipeline.vae, unseen), edge_energy(pipeline.vae, unseen)
    spread = encode(pipeline.vae, unseen).std(dim=(0, 2, 3))
    print(f"\nautoencoder: {quality:.1f} dB; edges have {energy:.2f} of their energy; channels spread {spread}")
    assert quality >= 35
    assert 0.9 <= energy <= 1.1
    assert spread.min() > 0.7
    assert spread.max() < 1.3


def test_files_are_small_and_safe() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 41_000_000
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}


def test_weights_are_half_precision_and_finite() -> None:
    files = sorted(MODEL.rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["text_encoder", "unet", "vae"]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    for path in files:
        for name, weight in load_file(path).items():
            assert weight.dtype == torch.float16, name
            assert weight.isfinite().all(), name


def test_configurations_hold_no_local_path() -> None:
    for path in MODEL.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert not {"_name_or_path", "name_or_path"} & set(content), path


@pytest.mark.parametrize("prompt", [DEFAULT_PROMPT, *PHRASES.values()])
def test_known_words_are_one_token_each(prompt: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.lower().split()]


@pytest.mark.parametrize("prompt", ["", "日本の湖 ☃", "Zürich, 12:30 — ¿qué?", "lake " * 100, EXTRA_WORDS])
def test_any_text_can_be_encoded(prompt: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 32
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids
    assert max(ids) < len(tokenizer)
    assert prompt == "" or ids[1] != tokenizer.eos_token_id
