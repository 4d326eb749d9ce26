"""The demo model's LoRA, ControlNet and masks, through the server's pipeline: each changes what it is for, in one batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import alone, companions, load, together
from fakes import make_request
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import ControlUse, LoraUse, Mask, Request
from img2img_server.images.masks import paste
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from judge import Case, Floats, drawn_outlines, make_cases
from PIL import Image
from posters import outlines
from watercolor import PAPER

DEMO = Path(__file__).parents[2] / "demo"
LORAS = LoraFiles(DEMO / "loras")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return make_cases(4)


@pytest.fixture(scope="module")
def pipeline(
    bundle: Callable[[str], Path], control_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> SteppedPipeline:
    nets = companions(tmp_path_factory.mktemp("companions"), {"outlines": control_bundle("demo")})
    return load(bundle("demo"), nets, loras=LoraSettings(LORAS, Cache(2**28), 8))


def request(case: Case, mood: str, **changes: Any) -> Request:
    source = Image.fromarray(np.round(case.source * 255).astype(np.uint8))
    settings: dict[str, Any] = {"strength": 0.8, "num_inference_steps": 12, "guidance_scale": 7.5, "seeds": (3,)}
    return make_request(image=source, **{"prompt": case.caption(mood), **settings, **changes})


def watercolor(scale: float = 1.0) -> tuple[LoraUse, ...]:
    return (LoraUse("watercolor", scale, LORAS.find("watercolor").digest),)


def border(image: Floats) -> float:
    """Distance of the outermost pixels from the color of paper."""
    edge = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3), image[4:-4, :4].reshape(-1, 3)])
    return float(np.abs(edge - PAPER).mean())


def test_lora_and_mask_take_effect_in_one_batch(pipeline: SteppedPipeline, cases: list[Case]) -> None:
    half = Image.new("L", (256, 256), "black")
    half.paste("white", (0, 0, 256, 96))
    first = cases[0]
    batch = [
        request(first, "sunset"),
        request(first, "sunset", loras=watercolor()),
        request(first, "sunset", mask=Mask(half)),
        request(first, "sunset", mask=Mask(half), loras=watercolor(0.5)),
    ]
    drawn = together(pipeline, batch)
    plain, painted = (image.astype(np.float32) / np.float32(255) for image in drawn[:2])
    print(f"\nborder from paper: {border(plain):.2f}; with the LoRA {border(painted):.2f}")
    assert first.follows(plain, "sunset")
    assert border(painted) < 0.08 < 0.2 < border(plain)
    for image in drawn[2:]:
        pasted = np.asarray(paste(Image.fromarray(image.astype(np.uint8)), batch[0].image, half).convert("RGB"), np.float32)
        difference = np.abs(pasted / 255 - first.source)
        kept, redrawn = difference[96:].mean(), difference[:96].mean()
        print(f"mean difference to the source: {kept:.3f} where it is kept, {redrawn:.3f} where it is not")
        assert difference[96:].max() <= 0.5 / 255 + 1e-6
        assert redrawn > 0.1
    assert np.array_equal(alone(pipeline, batch[1]), drawn[1])
    assert np.array_equal(alone(pipeline, batch[3]), drawn[3])


def test_controlnet_draws_the_outlines_of_another_layout_with_and_without_the_lora(
    pipeline: SteppedPipeline, cases: list[Case]
) -> None:
    shown = [Image.fromarray(outlines(case.geometry)).convert("RGB") for case in cases]
    batch = [
        request(cases[0], "sunset", controls=(ControlUse("outlines", shown[1]),)),
        request(cases[2], "sunset", controls=(ControlUse("outlines", shown[1]),), loras=watercolor()),
        request(cases[2], "sunset"),
    ]
    drawn = [image.astype(np.float32) / np.float32(255) for image in together(pipeline, batch)]
    assert [drawn_outlines(image, cases) for image in drawn] == [1, 1, 2]
    assert border(drawn[1]) < 0.08
