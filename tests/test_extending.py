"""The code blocks of docs/extending.md work as described there."""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime import loader
from img2img_server.runtime.execution import Execution
from img2img_server.settings.setting import settings_of
from img2img_server.settings.sources import Environment, declare, given, resolve
from PIL import Image

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")


def defined(heading: str) -> dict[str, Any]:
    """The definitions of the Python block below a heading."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0], re.M | re.S)
    names: dict[str, Any] = {"__name__": "extending"}
    exec(compile(block, f"docs/extending.md, {heading}", "exec", dont_inherit=True), names)
    return names


def asked(seed: int, guidance: float) -> Request:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))
    return make_request(image=image, prompt="a lake", seeds=(seed,), num_inference_steps=3, guidance_scale=guidance)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in images])


def test_a_family_that_is_batched(bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle("sd1")
    monkeypatch.setitem(loader.FAMILIES, "turbo", defined("A family that is batched")["Turbo"])
    manifest = read_manifest(folder)
    turbo, usual = (
        loader.load_pipeline(folder, replace(manifest, family=family), Execution("cpu")) for family in ("turbo", manifest.family)
    )
    assert turbo.plan(asked(1, 7.5)).rows == 1
    assert usual.plan(asked(1, 7.5)).rows == 2
    drawn = [pixels(list(run_alone(turbo, asked(seed, 7.5)))) for seed in (1, 2)]
    assert np.array_equal(drawn[0], pixels(list(run_alone(usual, asked(1, 1.0))))), "as without guidance"
    assert np.abs(drawn[0] - pixels(list(run_alone(usual, asked(1, 7.5))))).max() > 1, "guidance would have shown"
    states: Any = turbo.prepare([asked(1, 7.5), asked(2, 3.0)])
    while states[0].step < states[0].step_count:
        turbo.advance(states, turbo.denoise(states))
    for alone, together in zip(drawn, turbo.finish(states), strict=True):
        assert np.abs(alone - pixels(list(together))).max() <= 1, "the same image alone and in a batch"


def test_a_setting() -> None:
    kind = defined("A setting")["DownloadSettings"]
    (one,) = settings_of(kind)
    assert one.flag == "--download-tries"
    assert one.flag in PAGE
    parser = argparse.ArgumentParser(exit_on_error=False)
    declare(parser, settings_of(kind))
    assert one.about.help in parser.format_help()

    def read(words: list[str], **variables: str) -> Any:
        flags = given(settings_of(kind), parser.parse_args(words))
        return resolve(kind, flags, Environment(variables, "IMG2IMG_")).config

    assert read([]).tries == 3
    assert read([], IMG2IMG_DOWNLOAD_TRIES="4").tries == 4
    assert read(["--download-tries", "5"], IMG2IMG_DOWNLOAD_TRIES="4").tries == 5
    with pytest.raises(ValueError, match="the maximum is 10"):
        read([], IMG2IMG_DOWNLOAD_TRIES="11")
