"""Requests with equal settings share a call of diffusers: each image is the one that it would be alone, class by class."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import covering
from fakes import Caller, make_request, run_out
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Request, run_alone
from img2img_server.runtime.opaque.batching_rules import RULES
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from PIL import Image

CLASSES = {
    "flux": "FluxImg2ImgPipeline",
    "flux-dev": "FluxImg2ImgPipeline",
    "kandinsky22": "KandinskyV22Img2ImgCombinedPipeline",
    "kandinsky3": "Kandinsky3Img2ImgPipeline",
    "kolors": "KolorsImg2ImgPipeline",
    "lcm": "LatentConsistencyModelImg2ImgPipeline",
    "pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "qwenimage": "QwenImageImg2ImgPipeline",
    "sd1": "StableDiffusionImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "zimage": "ZImageImg2ImgPipeline",
}
"""Tiny models, and the class that draws with them."""

PROMPTS = ("a lake", "winter mountains, and a forest at sunset with a lake and the mountains behind it", "")
NEGATIVES = ("fog", "", "a lake with many trees")

Load = Callable[[str], OpaquePipeline]


@pytest.fixture(scope="module")
def load(tiny_model: Callable[[str], Path]) -> Load:
    pipelines: dict[str, OpaquePipeline] = {}

    def get(name: str) -> OpaquePipeline:
        if name not in pipelines:
            index = diffusers.DiffusionPipeline.load_config(tiny_model(name))
            left_out = {part: None for part, entry in index.items() if entry == [None, None]}
            kind = getattr(diffusers, CLASSES[name])
            pipe = kind.from_pretrained(tiny_model(name), torch_dtype=torch.float32, local_files_only=True, **left_out)
            pipelines[name] = OpaquePipeline(pipe, "torch:cpu", threads=1)
        return pipelines[name]

    return get


def source_image(number: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def request(number: int = 0, **settings: Any) -> Request:
    given = {"image": source_image(number), "prompt": PROMPTS[number], "seeds": (number,), "strength": 0.6, "guidance_scale": 4.0}
    return make_request(**{"num_inference_steps": 4, **given, **settings})


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def denoiser_of(pipeline: OpaquePipeline) -> Any:
    pipe: Any = pipeline._pipe
    return getattr(pipe, "unet", None) or pipe.transformer


class Counted:
    """Counts how often a pipeline's forward of the denoiser is called, and with how many rows."""

    def __init__(self, pipeline: OpaquePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        module = denoiser_of(pipeline)
        forward = module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)


def serve(pipeline: OpaquePipeline, requests: list[Request]) -> list[Caller]:
    engine = Engine({"m": pipeline})
    callers = []
    for item in requests:
        callers.append(Caller(engine))
        engine.submit(item, callers[-1].events.append)
    run_out(engine)
    assert pipeline_threads() == []
    return callers


def images_of(caller: Caller) -> tuple[Image.Image, ...]:
    (ending,) = caller.endings
    assert isinstance(ending, Completed)
    return ending.images


def pipeline_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "img2img-pipeline"]


def test_every_class_with_a_batching_rule_is_tested() -> None:
    assert set(CLASSES.values()) == set(RULES)


@covering(name=CLASSES, negative=[False, True])
def test_image_is_identical_alone_and_in_a_shared_call(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, negative: bool
) -> None:
    pipeline = load(name)
    assert pipeline.max_rows is None
    requests = [
        request(number, seeds=(number, 7)[: 2 - number], negative_prompt=NEGATIVES[number] if negative else None)
        for number in range(2)
    ]
    counted = Counted(pipeline, monkeypatch)
    alone = [run_alone(pipeline, replace(item, seeds=(seed,)))[0] for item in requests for seed in item.seeds]
    expected, counted.calls = counted.calls // len(alone), 0
    together = [image for caller in serve(pipeline, requests) for image in images_of(caller)]
    assert np.asarray(alone[0]).std() > 10, "a flat image would prove nothing"
    assert max(difference(*pair) for pair in zip(together, alone, strict=True)) <= 1
    apart = {"together": 1, "by prompt": 2, "alone": 3}[RULES[CLASSES[name]].negative] if negative else 1
    assert counted.calls == expected * apart


def test_kandinsky_negative_prompts_still_cannot_be_batched_in_diffusers(load: Load) -> None:
    """If this fails, diffusers has been fixed and the batching rule can be removed."""
    pipe: Any = load("kandinsky22")._pipe
    settings = {"strength": 0.6, "num_inference_steps": 4, "width": 64, "height": 48}
    sources, generators = [source_image(0), source_image(1)], [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with pytest.raises(IndexError):
        pipe(list(PROMPTS[:2]), negative_prompt=["fog", "fog"], image=sources, generator=generators, **settings)
    pipe = load("kandinsky3")._pipe
    negative = NEGATIVES[2]
    apart = [pipe.encode_prompt([prompt], negative_prompt=[negative])[1] for prompt in PROMPTS[:2]]
    together = pipe.encode_prompt(list(PROMPTS[:2]), negative_prompt=[negative] * 2)[1]
    assert together.shape[1] == apart[1].shape[1] > apart[0].shape[1]
    assert together[0, apart[0].shape[1] :].abs().max() > 0, (
        "more of the negative prompt is left where the other prompt is longer"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_every_attention_uses_scaled_dot_product_attention(load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """scaled_dot_product_attention, which chooses the quickest kernel for the device: at least once for each attention."""
    calls = 0
    attend, denoiser = torch.nn.functional.scaled_dot_product_attention, denoiser_of(load(name))
    forward = denoiser.forward
    seen: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return attend(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = calls
        result = forward(*args, **kwargs)
        seen.append(calls - before)
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(denoiser, "forward", watched)
    run_alone(load(name), request(num_inference_steps=2, guidance_scale=1.0))
    attentions = [part for part in denoiser.modules() if hasattr(part, "processor")]
    assert attentions, "it has attention"
    assert min(seen) >= len(attentions)
