"""Models that edit, with a mask: images are those of diffusers' inpainting classes for the same seed, to 1/255, alone and in a
batch with requests without a mask.

The oracle is the class in the same test. It makes one image at a time: with several, it samples the source for all by one seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers_oracle import drawn, oracle, source
from fakes import make_request
from img2img_client import Client, InvalidRequest
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Mask, Pipeline, Request
from img2img_server.images.masks import MaskRule, prepare_mask
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image, ImageDraw, ImageFilter
from running import running

CLASSES = {
    "klein": "Flux2KleinInpaintPipeline",
    "kontext": "FluxKontextInpaintPipeline",
    "qwenimage-edit": "QwenImageEditInpaintPipeline",
}
OTHERS = ("flux2", "qwenimage-edit-plus")
"""Models that edit, of which diffusers has no inpainting class."""
SIZE = (64, 96)

Load = Callable[[str], tuple[Pipeline, Any]]
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def load(bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> Load:
    """A tiny model as the server has it, and diffusers' inpainting class of it."""
    known: dict[str, tuple[Pipeline, Any]] = {}

    def loaded(name: str) -> tuple[Pipeline, Any]:
        if name not in known:
            pipeline = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"))
            known[name] = pipeline, oracle(tiny_model(name), CLASSES[name])
        return known[name]

    return loaded


@pytest.fixture
def small(request: pytest.FixtureRequest, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext and Qwen-Image-Edit look at every image at `SIZE`, in the server and in diffusers, and not at a million pixels."""
    load(request.node.callspec.params["name"])  # which takes over the sizes
    flux, qwen = "diffusers.pipelines.flux.pipeline_flux_kontext", "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    for suffix in ("", "_inpaint"):
        monkeypatch.setattr(import_module(f"{flux}{suffix}"), "PREFERRED_KONTEXT_RESOLUTIONS", [SIZE])
        monkeypatch.setattr(import_module(f"{qwen}{suffix}"), "calculate_dimensions", lambda area, ratio: (*SIZE, None))


def ellipse(size: tuple[int, int] = SIZE) -> Image.Image:
    """The mask has soft edges, so wrong rounding has an effect."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((size[0] // 5, size[1] // 4, size[0] - 9, size[1] - 21), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(4))


def guided(name: str) -> Settings:
    """Settings with which the model calls its transformer with two rows, if it can."""
    if name == "klein":  # distilled
        return {}
    return {"true_cfg_scale": 3.0, "negative_prompt": "fog"}


def asked(image: Image.Image, mask: Image.Image | None, size: tuple[int, int] = SIZE, **settings: Any) -> Request:
    settings = {"prompt": "a lake", "guidance_scale": 1.0, "num_inference_steps": 5, **settings}
    own = None if mask is None else Mask(prepare_mask(mask, MaskRule(), size))
    return make_request(image=image, size=size, mask=own, **settings)


def expected(pipe: Any, image: Image.Image, mask: Image.Image, seed: int, **settings: Any) -> Image.Image:
    """diffusers' result; its classes take their size from the source."""
    if type(pipe).__name__ == "Flux2KleinInpaintPipeline":
        settings.pop("guidance_scale", None)
    generator = torch.Generator().manual_seed(seed)
    result = pipe(prompt="a lake", image=image, mask_image=mask, generator=generator, **settings).images[0]
    assert isinstance(result, Image.Image)
    return result.convert("RGB")


def assert_same(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.size == theirs.size
    assert np.asarray(theirs).std() > 10, "a flat image would prove nothing"
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def differ(ours: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(ours, int) - np.asarray(other, int)).max() > 1)


MODELS = nightly_but(CLASSES, "klein")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", MODELS)
def test_masked_image_matches_diffusers_alone_and_in_a_batch(name: str, load: Load) -> None:
    """Requests of several strengths, with and without guidance, share calls with requests without a mask."""
    pipeline, pipe = load(name)
    image, mask, plain = source(*SIZE), ellipse(), {"guidance_scale": 1.0}
    cases: list[tuple[Image.Image, tuple[int, ...], Settings]] = [
        (mask, (3,), {"strength": 1.0, "num_inference_steps": 3, **plain, **guided(name)}),
        (mask, (4, 5), {"strength": 0.6, "num_inference_steps": 5, **plain, **guided(name)}),
        (Image.new("L", SIZE, 255), (6,), {"strength": 0.3, "num_inference_steps": 4, **plain}),
        (mask.rotate(180), (7, 8), {"strength": 0.85, "num_inference_steps": 2, **plain}),
    ]
    requests = [asked(image, own, seeds=seeds, **settings) for own, seeds, settings in cases]
    unmasked = asked(image, None, seeds=(3,), strength=1.0, **guided(name))
    assert len({pipeline.plan(request).shape for request in (*requests, unmasked)}) == 1, "they share calls"
    *together, beside = drawn(pipeline, [*requests, unmasked])
    assert not differ(beside[0], drawn(pipeline, [unmasked])[0][0]), "masks leave the others as they are"
    for request, outputs, (own, seeds, settings) in zip(requests, together, cases, strict=True):
        alone = drawn(pipeline, [request])[0]
        for seed, shared, single in zip(seeds, outputs, alone, strict=True):
            theirs = expected(pipe, image, own, seed, **settings)
            assert_same(shared, theirs)
            assert_same(single, theirs)
    assert differ(together[0][0], beside[0]), "the mask counts"


@pytest.mark.parametrize("name", MODELS)
def test_result_has_the_size_that_diffusers_chooses(name: str, load: Load) -> None:
    """The source's size is no multiple of the model's, so it is resized; the mask has yet another size."""
    pipeline, pipe = load(name)
    image, mask = source(104, 72), ellipse((150, 200))
    rule = pipeline.source_rule.edit_size
    assert rule is not None
    multiple = pipeline.size_multiple
    width, height = (side // multiple * multiple for side in rule.of(image.size))
    settings: Settings = {"strength": 0.5, "num_inference_steps": 2, "guidance_scale": 1.0}
    ((ours,),) = drawn(pipeline, [asked(image, mask, (width, height), seeds=(3,), **settings)])
    assert_same(ours, expected(pipe, image, mask, 3, **settings))


@pytest.mark.nightly
def test_large_source_is_shrunk_as_in_diffusers(load: Load) -> None:
    """klein sees at most a million pixels."""
    pipeline, pipe = load("klein")
    image, mask = source(2080, 600), ellipse((500, 200))
    settings: Settings = {"strength": 0.5, "num_inference_steps": 2}
    ((ours,),) = drawn(pipeline, [asked(image, mask, (1904, 544), seeds=(3,), **settings)])
    assert_same(ours, expected(pipe, image, mask, 3, **settings))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", nightly_but(("klein", "kontext"), "klein"))
def test_reference_beside_a_mask_matches_diffusers(name: str, load: Load) -> None:
    """klein sees it after the source, Kontext in the source's place."""
    pipeline, pipe = load(name)
    image, mask, reference = source(*SIZE), ellipse(), source(80, 112).rotate(90, expand=True)
    settings: Settings = {"strength": 0.8, "num_inference_steps": 3, "guidance_scale": 1.0}
    request = asked(image, mask, seeds=(4, 5), references=(reference,), **settings)
    ours, (without,) = drawn(pipeline, [request, asked(image, mask, seeds=(4,), **settings)])
    for seed, one in zip((4, 5), ours, strict=True):
        assert_same(one, expected(pipe, image, mask, seed, image_reference=reference, **settings))
    assert differ(ours[0], without), "the reference counts"
    if name == "klein":
        both = replace(request, references=(reference, reference.rotate(180)), seeds=(4,))
        ((two,),) = drawn(pipeline, [both])
        assert_same(two, expected(pipe, image, mask, 4, image_reference=list(both.references), **settings))


def test_source_at_several_sizes_is_cached_apart(load: Load, bundle: Callable[[str], Path]) -> None:
    """The cache has the source as the model looks at it, and at each result's size."""
    from img2img_server.engine.cache import Cache

    _, pipe = load("klein")
    pipeline = load_pipeline(bundle("klein"), read_manifest(bundle("klein")), Execution("cpu"), Cache(2**24))
    image = source(*SIZE)
    for size in (SIZE, (96, 64), SIZE):
        mask = ellipse(size)
        request = asked(image, mask, size, seeds=(3,), strength=0.7, image_digest=b"source")
        ((ours,),) = drawn(pipeline, [request])
        sized = image.resize(size, Image.Resampling.LANCZOS)
        assert_same(ours, expected(pipe, sized, mask, 3, strength=0.7, num_inference_steps=5))
        drawn(pipeline, [asked(image, None, size, seeds=(3,), strength=1.0, image_digest=b"source")])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, bundle: Callable[[str], Path]) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("store")
    (folder / "klein").symlink_to(bundle("klein"))

    def load() -> ModelRegistry:
        return ModelRegistry.load(folder, lambda path, manifest: load_pipeline(path, manifest, Execution("cpu")))

    with running(load) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


def test_strength_of_a_model_that_edits_needs_a_mask(client: Client) -> None:
    field = client.model("klein").field("strength")
    assert field is not None
    assert (field.needs, field.default) == ("mask", 0.8)
    with pytest.raises(InvalidRequest, match="strength: this model uses it only with a mask: set mask, or leave strength unset"):
        client.transform(source(*SIZE), strength=0.5)


@pytest.mark.parametrize("pasted", [False, True])
def test_served_image_matches_diffusers(client: Client, load: Load, pasted: bool) -> None:
    """With the class's own strength, and pasted into a source of another size."""
    _, pipe = load("klein")
    image, mask = source(80, 112), ellipse((80, 112))
    sized = image.resize(SIZE, Image.Resampling.LANCZOS)
    result = client.transform(
        image, prompt="a lake", seed=3, mask=mask, mask_paste=pasted, num_inference_steps=4, width=SIZE[0], height=SIZE[1]
    )
    theirs = expected(pipe, sized, mask, 3, num_inference_steps=4)
    if pasted:
        theirs = pipe.image_processor.apply_overlay(mask.resize(SIZE, Image.Resampling.LANCZOS), sized, theirs)
    assert_same(result.images[0].image, theirs)


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_models_without_an_inpainting_class_take_no_mask(name: str, bundle: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(bundle(name), read_manifest(bundle(name)), Execution("cpu"))
    assert pipeline.source_rule.mask == "none"
    assert "strength" not in pipeline.fields
