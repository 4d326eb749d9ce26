"""The server's images match diffusers' for the same seed within 1/255.

diffusers runs in the same test, and each case goes through client, gRPC, engine, ONNX Runtime and PNG.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from covering import covering
from diffusers import AutoPipelineForImage2Image
from img2img_client import Client
from img2img_server.bundle.manifest import MANIFEST_NAME, digest_files, list_files, read_manifest, write_manifest
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image
from running import running

FAMILIES = ("sd1", "sd2", "sdxl", "refiner", "lcm", "demo")
TRANSFORMERS = ("sd3", "flux-dev")
"""Their images have sides of multiples of 16."""
WITHOUT_NEGATIVE_PROMPT = ("lcm", "flux", "flux-dev")
"""diffusers ignores a negative prompt of these; the server refuses it."""
SCHEDULERS: dict[str, dict[str, Any]] = {
    # Stable Diffusion's pipeline corrects a DDIM that clips when it is made, but not one that is put in later.
    "DDIMScheduler": {"clip_sample": False},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
}

CASES: dict[str, dict[str, Any]] = {
    "guided": {"size": (64, 64), "strength": 0.8, "num_inference_steps": 5, "guidance_scale": 7.5},
    "wide, with a negative prompt": {
        "size": (104, 72), "strength": 0.5, "num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "fog and rain",
    },
    "tall, an empty negative prompt": {
        "size": (56, 88), "strength": 1.0, "num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": "",
    },
    "guidance 1": {"size": (64, 64), "strength": 0.7, "num_inference_steps": 10, "guidance_scale": 1.0},
    "guidance 0": {"size": (72, 64), "strength": 0.3, "num_inference_steps": 7, "guidance_scale": 0.0},
    "three images": {
        "size": (64, 72), "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 7.5, "image_count": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, bundle: Callable[[str], Path]) -> Path:
    """A folder with every family's bundle, and two families again with other schedulers."""
    folder = tmp_path_factory.mktemp("store")
    for name in (*FAMILIES, *TRANSFORMERS):
        (folder / name).symlink_to(bundle(name))
    for name in ("sd1", "sdxl"):
        for scheduler in SCHEDULERS:
            _with_scheduler(bundle(name), folder / f"{name}-{scheduler}", scheduler)
    return folder


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[Client]:
    def load() -> ModelRegistry:
        return ModelRegistry.load(models, lambda path, manifest: load_pipeline(path, manifest, Execution("cpu")))

    with running(load) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """Diffusers' own pipeline on PyTorch, of a family's name or one with a scheduler."""
    pipes: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in pipes:
            family, scheduler = (name, "") if name in TRANSFORMERS else name.partition("-")[::2]
            source = Path(__file__).parents[2] / "demo" / "model" if family == "demo" else tiny_model(family)
            pipe = AutoPipelineForImage2Image.from_pretrained(str(source), torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            if scheduler:
                pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **SCHEDULERS[scheduler])
            pipes[name] = pipe
        return pipes[name]

    return get


def _with_scheduler(bundle: Path, folder: Path, scheduler: str) -> None:
    """Copies a bundle and gives it another scheduler."""
    shutil.copytree(bundle, folder)
    path = folder / "scheduler"
    old = json.loads((path / "scheduler_config.json").read_text())
    shutil.rmtree(path)
    getattr(diffusers, scheduler).from_config(old, **SCHEDULERS[scheduler]).save_pretrained(path)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(old["_class_name"], scheduler))
    manifest = read_manifest(bundle)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, replace(manifest, files=digest_files(folder, list_files(folder))))


def _source(size: tuple[int, int]) -> Image.Image:
    """A smooth image with edges, of the given size."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=-1) * 200 + (y > 0.6)[..., None] * np.array([0, 55, 20])
    return Image.fromarray(pixels.astype(np.uint8))


def _expected(pipe: Any, case: dict[str, Any], seed: int, prompt: str) -> list[Image.Image]:
    settings = {name: value for name, value in case.items() if name not in ("size", "image_count")}
    count = case.get("image_count", 1)
    generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(count)]
    images: list[Image.Image] = pipe(
        prompt, image=_source(case["size"]), num_images_per_prompt=count, generator=generators, **settings
    ).images
    return images


def _transform(client: Client, model: str, case: dict[str, Any], seed: int, prompt: str) -> list[Image.Image]:
    dropped = {"size", "negative_prompt"} if model in WITHOUT_NEGATIVE_PROMPT else {"size"}
    settings = {name: value for name, value in case.items() if name not in dropped}
    result = client.transform(_source(case["size"]), model=model, prompt=prompt, seed=seed, **settings)
    assert [image.seed for image in result.images] == [seed + index for index in range(case.get("image_count", 1))]
    return [image.image for image in result.images]


def assert_same(images: list[Image.Image], expected: list[Image.Image]) -> None:
    assert len(images) == len(expected)
    for ours, theirs in zip(images, expected, strict=True):
        assert ours.size == theirs.size
        assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", FAMILIES)
def test_image_matches_diffusers(client: Client, oracle: Callable[[str], Any], model: str, case: str) -> None:
    prompt = "a lake at sunset with mountains"
    images = _transform(client, model, CASES[case], 1234, prompt)
    assert_same(images, _expected(oracle(model), CASES[case], 1234, prompt))


@covering(case=CASES, model=TRANSFORMERS)
def test_transformer_image_matches_diffusers(client: Client, oracle: Callable[[str], Any], model: str, case: str) -> None:
    width, height = (side // 16 * 16 for side in CASES[case]["size"])
    settings = {**CASES[case], "size": (width, height)}
    images = _transform(client, model, settings, 1234, "a lake at sunset with mountains")
    # Their pipelines draw several images of one source with the wrong generators, or not at all, and an image of their own size
    # unless requested.
    alone = {name: value for name, value in settings.items() if name != "image_count"} | {"width": width, "height": height}
    for number, image in enumerate(images):
        assert_same([image], _expected(oracle(model), alone, 1234 + number, "a lake at sunset with mountains"))


@pytest.mark.parametrize("case", ["guided", "three images"])
@pytest.mark.parametrize("model", [f"{name}-{scheduler}" for name in ("sd1", "sdxl") for scheduler in SCHEDULERS])
def test_image_matches_diffusers_with_other_schedulers(
    client: Client, oracle: Callable[[str], Any], model: str, case: str
) -> None:
    images = _transform(client, model, CASES[case], 7, "a forest")
    assert_same(images, _expected(oracle(model), CASES[case], 7, "a forest"))


@pytest.mark.parametrize("model", FAMILIES)
def test_prompt_changes_the_image(client: Client, model: str) -> None:
    case = CASES["guided"]
    (one,), (other,) = _transform(client, model, case, 1, "a lake"), _transform(client, model, case, 1, "winter mountains")
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 1, "else the oracle would prove little"


@pytest.mark.parametrize("model", ["demo", "sdxl", "lcm"])
def test_batching_does_not_change_outputs(client: Client, model: str) -> None:
    """Different strength, steps, seed, guidance and prompt, at one size, sent at once."""
    mixes = [
        ({**case, "size": (64, 64)}, 100 + index, prompt)
        for index, (case, prompt) in enumerate(
            zip(CASES.values(), ("a lake", "the mountains", "winter", "a forest at sunset", "", "the lake"), strict=True)
        )
    ]
    alone = [_transform(client, model, *mix) for mix in mixes]
    with ThreadPoolExecutor(len(mixes)) as pool:
        together = list(pool.map(lambda mix: _transform(client, model, *mix), mixes))
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)


def test_each_of_several_images_is_reproducible_by_its_seed(client: Client) -> None:
    several = client.transform(_source((64, 64)), model="demo", seed=5, image_count=3, num_inference_steps=4)
    assert [image.seed for image in several.images] == [5, 6, 7]
    for image in several.images:
        again = client.transform(_source((64, 64)), model="demo", seed=image.seed, num_inference_steps=4)
        assert_same([again.image], [image.image])


def test_requested_size_matches_diffusers_on_a_resized_source(client: Client, oracle: Callable[[str], Any]) -> None:
    source = _source((150, 90))
    result = client.transform(source, model="sd1", width=83, height=64, seed=3, num_inference_steps=3, prompt="a lake")
    expected = oracle("sd1")(
        "a lake", image=source.resize((80, 64), Image.Resampling.LANCZOS), strength=0.8, num_inference_steps=3,
        guidance_scale=7.5, generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert_same([result.image], expected)


def test_a_source_of_odd_size_is_rounded_as_diffusers_rounds_it(client: Client, oracle: Callable[[str], Any]) -> None:
    source = _source((77, 69))
    result = client.transform(source, model="sd2", seed=3, num_inference_steps=3, prompt="a lake")
    expected = oracle("sd2")(
        "a lake", image=source, strength=0.8, num_inference_steps=3, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert result.image.size == (72, 64)
    assert_same([result.image], expected)
