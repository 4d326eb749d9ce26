"""Truncated prompt text is reported for each tokenizer; the expectation is the text that diffusers passes to its text
encoders."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fakes import make_request
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import run_alone
from img2img_server.runtime.common.truncation import Truncation
from img2img_server.runtime.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from PIL import Image
from transformers import PreTrainedTokenizerBase

CLASSES = {
    "flux": "FluxImg2ImgPipeline",
    "kandinsky22": "KandinskyV22Img2ImgCombinedPipeline",
    "kandinsky3": "Kandinsky3Img2ImgPipeline",
    "kolors": "KolorsImg2ImgPipeline",
    "lcm": "LatentConsistencyModelImg2ImgPipeline",
    "qwenimage": "QwenImageImg2ImgPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd1": "StableDiffusionImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "zimage": "ZImageImg2ImgPipeline",
}
"""Tiny models, and the class that draws with them."""

QWEN_READS = 34 + 512
"""Tokens: it cuts its template and the excess from the embeddings."""

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def load(tiny_model: Callable[[str], Path]) -> Load:
    def get(name: str) -> Any:
        index = diffusers.DiffusionPipeline.load_config(tiny_model(name))
        left_out = {part: None for part, entry in index.items() if entry == [None, None]}
        kind = getattr(diffusers, CLASSES[name])
        return kind.from_pretrained(tiny_model(name), torch_dtype=torch.float32, local_files_only=True, **left_out)

    return get


def tokens_read(pipe: Any, prompt: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokenizers' output for the text encoders when the pipeline draws the prompt: the tokens of each call's first text."""
    read: list[list[int]] = []
    original = PreTrainedTokenizerBase.__call__

    def recorded(self: Any, *args: Any, **settings: Any) -> Any:
        given = original(self, *args, **settings)
        if settings.get("truncation"):
            most = QWEN_READS if "Qwen" in type(pipe).__name__ else None
            read.append([int(token) for token in given["input_ids"][0]][:most])
        return given

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", recorded)
        request = make_request(prompt=prompt, num_inference_steps=2, strength=1.0, image=Image.new("RGB", (64, 64), "red"))
        run_alone(OpaquePipeline(pipe, "torch:cpu", threads=1), request)
    return read


def warnings_for(pipe: Any, text: str) -> list[str]:
    return [warning.description for warning in Truncation(pipe).warnings({"prompt": text})]


def dropped_words(description: str) -> int:
    return description.partition("ignored: ")[2].count("lake")


def lakes(count: int, last: str = "lake") -> str:
    return " ".join(["lake"] * (count - 1) + [last])


LONG = 800
"""Words that no tokenizer here has room for."""


@pytest.mark.parametrize("name", CLASSES)
def test_truncation_warning_lists_the_text_that_no_encoder_reads(name: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(name)
    descriptions = warnings_for(pipe, lakes(LONG))
    names = {part for part, value in pipe.components.items() if isinstance(value, PreTrainedTokenizerBase)}
    named = [re.findall(r"\w+", description) for description in descriptions]
    assert all(sum(part in words for words in named) == 1 for part in names)
    dropped = [dropped_words(description) for description in descriptions]
    assert all(0 < words < LONG for words in dropped)
    read = LONG - min(dropped)  # words that at least one of them reads
    whole = tokens_read(pipe, lakes(LONG), monkeypatch)
    assert whole
    assert tokens_read(pipe, lakes(read) + " mountain" * min(dropped), monkeypatch) == whole
    assert tokens_read(pipe, lakes(read, "mountain") + " lake" * min(dropped), monkeypatch) != whole


@pytest.mark.parametrize("name", CLASSES)
def test_prompt_that_just_fits_has_no_warning(name: str, load: Load) -> None:
    pipe = load(name)
    fits = LONG - max(map(dropped_words, warnings_for(pipe, lakes(LONG))))  # words that all of them read
    fits -= len(warnings_for(pipe, lakes(fits)))  # one that is cut within a word reads one less
    assert warnings_for(pipe, lakes(fits)) == warnings_for(pipe, "") == []
    (only, *_) = warnings_for(pipe, lakes(fits + 1, "mountain"))
    dropped = only.partition("ignored: ")[2]
    assert dropped
    assert "mountain".endswith(dropped)


def test_warning_names_the_tokenizer_that_read_the_whole_prompt(load: Load) -> None:
    (clip,) = warnings_for(load("flux"), lakes(100))
    assert "77 tokens of the model's tokenizer" in clip
    assert "(tokenizer_2 read all of it)" in clip


def test_truncated_negative_prompt_warns_only_if_it_is_used(load: Load) -> None:
    for kind, name in ((StableDiffusion, "sd1"), (StableDiffusionXL, "sdxl")):
        pipeline = kind(load(name), "torch:cpu", 1, Cache(2**20))
        both = {"prompt": lakes(100), "negative_prompt": lakes(90)}
        image = Image.new("RGB", (64, 64))
        warnings = pipeline.plan(make_request(image=image, guidance_scale=5.0, **both)).warnings
        assert [(warning.field, warning.code) for warning in warnings] == [
            ("prompt", "PROMPT_TRUNCATED"), ("negative_prompt", "PROMPT_TRUNCATED"),
        ]  # fmt: skip
        unguided = pipeline.plan(make_request(image=image, guidance_scale=1.0, **both)).warnings
        assert [warning.field for warning in unguided] == ["prompt"]


def test_unused_negative_prompt_of_an_opaque_pipeline_has_no_warning(load: Load) -> None:
    pipeline = OpaquePipeline(load("lcm"), "torch:cpu", 1)
    request = make_request(image=Image.new("RGB", (64, 64)), prompt="lake", negative_prompt=lakes(90))
    assert pipeline.plan(request).warnings == ()
