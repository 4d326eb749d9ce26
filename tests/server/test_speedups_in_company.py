"""Speedups, LoRAs, controls and image prompts in one batch: a request's speedup does not change the others, and incompatible ones
are refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawing import alone, companions, load
from fakes import Caller, make_request
from img2img_export.verify.images import sample_image
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Completed, ControlUse, LoraUse
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.support.fidelity import EXACT, Fidelity
from lora_making import make, write_diffusers
from tiny_image_adapters import ENCODER, prompt, write_all

Get = Callable[[str], Path]

GUIDANCE = Speedup("guidance kept", 0.2, 2, keeps_guidance=True, keeps_features=False, psnr_db=40.0, ssim=0.99)
FEATURES = Speedup("features kept", 0.2, 2, keeps_guidance=True, keeps_features=True, psnr_db=40.0, ssim=0.99)
FEWER = Speedup(
    "fewer calls", 1.0, 1, keeps_guidance=False, keeps_features=False, called_share=0.2, skip_period=2, psnr_db=31.0, ssim=0.9
)


@pytest.mark.parametrize(
    ("name", "kept"), [("sd1", GUIDANCE), pytest.param("sd1:fp32:speedups+loras", FEATURES, marks=pytest.mark.nightly)]
)
def test_requests_with_a_bound_share_calls_with_loras_controls_and_image_prompts(
    bundle: Get,
    tiny_model: Get,
    control_bundle: Get,
    tiny_image_encoder: Get,
    image_encoder_bundle: Get,
    tmp_path: Path,
    name: str,
    kept: Speedup,
) -> None:
    known = companions(tmp_path, {"a": control_bundle("sd1-a"), ENCODER: image_encoder_bundle(ENCODER)})
    adapters, folder = write_all(tmp_path / "adapters", tiny_model("sd1"), tiny_image_encoder(ENCODER)), tmp_path / "loras"
    folder.mkdir()
    pairs = make(tiny_model("sd1"), 1, ("to_q", "to_v", "ff.net.2"), (8,))
    write_diffusers({module: (0.3 * down, 0.3 * up) for module, (down, up) in pairs.items()}, folder / "style.safetensors")
    settings = LoraSettings(LoraFiles(folder), Cache(2**28), 8)
    pipeline = load(bundle(name), known, loras=settings, image_adapters=ImageAdapterSettings(adapters, Cache(2**24)))
    pipeline.speedups.speedups = Speedups((FEWER, kept), 1, 4, 7.5, 0.25)

    loras = (LoraUse("style", 1.0, LoraFiles(folder).find("style").digest),)
    prompts = (prompt(adapters, "plain", "a", 1.0),)
    controls = (ControlUse("a", sample_image(64, 64), 1.0, 0.0, 1.0),)
    plain = make_request(image=sample_image(64, 64), prompt="a lake", strength=0.8, num_inference_steps=8, guidance_scale=5.0)
    fast, high = (dataclasses.replace(plain, fidelity=Fidelity(level), seeds=(2,)) for level in ("fast", "high"))
    asked = {
        "exact": (plain, None, ""),
        "fast": (fast, FEWER.name, ""),
        "high": (high, kept.name, ""),
        "high with LoRA": (dataclasses.replace(high, loras=loras), None, "measured without LoRAs"),
        "fast with control": (dataclasses.replace(fast, controls=controls), None, "measured without controls"),
        "fast with image prompt": (dataclasses.replace(fast, image_prompts=prompts), None, "measured without image prompts"),
        "image prompt": (dataclasses.replace(plain, image_prompts=prompts), None, ""),
        "LoRA and control": (dataclasses.replace(plain, loras=loras, controls=controls), None, ""),
        "both with a bound": (dataclasses.replace(fast, loras=loras, controls=controls), None, "measured without LoRAs"),
    }
    spans: list[Span] = []
    engine = Engine({"m": pipeline}, QueueLimits(max_batch_size=32, max_admitted=16), observe=spans.append)
    callers = {case: Caller(engine) for case in asked}
    for case, (request, _, _) in asked.items():
        engine.submit(request, callers[case].events.append)
    while engine.step():
        pass
    for case, (request, used, reason) in asked.items():
        (ending,) = callers[case].endings
        assert isinstance(ending, Completed), case
        assert (ending.speedup.name if ending.speedup else None) == used, case
        assert [warning.field for warning in ending.warnings] == (["fidelity"] if reason else []), case
        assert all(reason in warning.description for warning in ending.warnings), case
        image = np.asarray(ending.images[0], int)
        assert np.abs(image - alone(pipeline, request)).max() <= 1, case
        exact = np.abs(image - alone(pipeline, dataclasses.replace(request, fidelity=EXACT))).max()
        assert (exact > 1) == (used is not None), case
    assert max(span.requests for span in spans if span.stage == "denoise") >= 4
