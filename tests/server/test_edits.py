"""Models that edit: results match diffusers' to 1/255 for a request's images, size, true_cfg_scale and seeds."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers_oracle import drawn, oracle, source
from fakes import make_request
from img2img_server import images
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Pipeline, Request
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

EDITORS = ("klein", "flux2", "kontext", "qwenimage-edit", "qwenimage-edit-plus", "qwenimage2", "longcat-edit")
SEVERAL = ("klein", "flux2", "qwenimage-edit-plus", "qwenimage2")
"""Models that take reference images."""
TRUE_CFG = ("kontext", "qwenimage-edit", "qwenimage-edit-plus", "qwenimage2", "qwenimage")

_MISMATCH = "tokens in the prompts should be|tokens in the text but|features and image tokens do not match"
"""Errors of transformers for more tokens of images than images."""

Load = Callable[[str], tuple[Pipeline, Any]]


@pytest.fixture
def load(bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]) -> Load:
    """A tiny model as the server has it, and diffusers' own pipeline."""

    def loaded(name: str) -> tuple[Pipeline, Any]:
        manifest = read_manifest(bundle(name))
        return load_pipeline(bundle(name), manifest, Execution("cpu")), oracle(tiny_model(name), manifest.pipeline_class)

    return loaded


def asked(pipeline: Pipeline, size: SizeRule, sources: Sequence[Image.Image], **settings: Any) -> Request:
    """The request that the server makes of images, of which the first is the source."""
    rule, limits = pipeline.source_rule, ImageLimits()
    by = sources[-1].size if rule.edit_size is not None and rule.edit_size.by_last else None
    result = images.result_size(sources[0].size, size, rule, pipeline.size_multiple, limits, by)
    prepared = [images.prepare(image, image.size, rule, limits) for image in sources]
    settings = {"prompt": "a lake", "num_inference_steps": 2, "guidance_scale": 1.0, **settings}
    return make_request(image=prepared[0], references=tuple(prepared[1:]), size=result, **settings)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


def assert_same(ours: Image.Image, theirs: Image.Image) -> None:
    """`theirs` may have transparency, which results do not."""
    theirs = theirs.convert("RGB")
    assert (ours.mode, ours.size) == ("RGB", theirs.size)
    assert pixels(theirs).std() > 10, "a flat image would prove nothing"
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("name", nightly_but(SEVERAL, "klein"))
def test_reference_images_of_other_aspect_ratios_match_diffusers(name: str, load: Load) -> None:
    """Three images of their own sizes, two results, beside a request without references; a reference more is another image."""
    pipeline, pipe = load(name)
    assert "reference_images" in pipeline.fields
    sources = [source(104, 72), source(64, 96), source(80, 80).rotate(90)]
    size = SizeRule(64, 96)
    several, one = asked(pipeline, size, sources, seeds=(4, 5)), asked(pipeline, size, sources[:1], seeds=(4,))
    (first, second), (alone,) = drawn(pipeline, [several, one])
    known: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 2, "width": 64, "height": 96}
    if "guidance_scale" in pipeline.fields:
        known["guidance_scale"] = 1.0
    for seed, ours, given in ((4, first, sources), (5, second, sources), (4, alone, sources[:1])):
        theirs = pipe(image=list(given), generator=torch.Generator().manual_seed(seed), **known).images[0]
        assert_same(ours, theirs)
    least = 0 if name == "qwenimage2" else 1  # whose tiny model hardly depends on them
    assert np.abs(pixels(first) - pixels(alone)).max() > least, "the references count"
    (again,), (swapped,) = drawn(
        pipeline, [asked(pipeline, size, sources, seeds=(5,)), asked(pipeline, size, [sources[0], *sources[:0:-1]], seeds=(4,))]
    )
    assert np.abs(pixels(again) - pixels(second)).max() <= 1, "an image has its seed, however many are asked for"
    assert np.abs(pixels(swapped) - pixels(first)).max() > least, "their order counts"


@pytest.mark.parametrize("name", nightly_but(("klein", "flux2", "kontext", "qwenimage-edit", "qwenimage-edit-plus"), "klein"))
def test_default_size_is_chosen_as_in_diffusers(name: str, load: Load) -> None:
    """Diffusers chooses the same size, except that Kontext's class makes squares."""
    pipeline, pipe = load(name)
    request = asked(pipeline, SizeRule(), [source(104, 72)], seeds=(3,), num_inference_steps=1)
    ((ours,),) = drawn(pipeline, [request])
    known: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 1}
    if name == "kontext":
        known |= {"width": request.result_size[0], "height": request.result_size[1]}
    if "guidance_scale" in pipeline.fields:
        known["guidance_scale"] = 1.0
    assert_same(ours, pipe(image=source(104, 72), generator=torch.Generator().manual_seed(3), **known).images[0])


OWN = {
    "sd1": {}, "sd3": {}, "pix2pix": {"guidance_scale": 7.5}, "klein": {"num_inference_steps": 4.0},
    "flux2": {"guidance_scale": 4.0},
    "kontext": {"guidance_scale": 3.5, "true_cfg_scale": 1.0}, "qwenimage-edit": {"true_cfg_scale": 4.0},
    "longcat-edit": {"guidance_scale": 4.5},
}  # fmt: skip
"""The defaults of models that are not the server's."""


@pytest.mark.parametrize("name", nightly_but(OWN, "sd1", "klein"))
def test_editing_models_use_the_defaults_of_their_diffusers_class(name: str, load: Load) -> None:
    pipeline, _ = load(name)
    own = {field: rule.default for field, rule in pipeline.fields.items() if rule.default is not None and not rule.needs}
    assert own == OWN[name]


@pytest.mark.parametrize("name", nightly_but(TRUE_CFG, "qwenimage"))
def test_true_cfg_scale_matches_diffusers(name: str, load: Load) -> None:
    pipeline, pipe = load(name)
    own = pipeline.fields["true_cfg_scale"].default
    assert own == {"kontext": 1.0, "qwenimage2": 1.0}.get(name, 4.0)
    size = SizeRule(64, 64)
    values = (1.0, 2.0, 6.0)
    requests = [
        asked(pipeline, size, [source(64, 64)], seeds=(3,), strength=1.0, negative_prompt="fog", true_cfg_scale=value)
        for value in values
    ]
    ours = [one for (one,) in drawn(pipeline, requests)]
    known: dict[str, Any] = {"prompt": "a lake", "negative_prompt": "fog", "num_inference_steps": 2, "width": 64, "height": 64}
    if "guidance_scale" in pipeline.fields:
        known["guidance_scale"] = 1.0
    if "strength" in pipeline.fields and not pipeline.fields["strength"].needs:
        known["strength"] = 1.0
    if name == "kontext":
        known["max_area"] = 64 * 64
    for value, one in zip(values, ours, strict=True):
        generator = torch.Generator().manual_seed(3)
        assert_same(one, pipe(image=source(64, 64), generator=generator, true_cfg_scale=value, **known).images[0])
    assert np.abs(pixels(ours[1]) - pixels(ours[2])).max() > 1, "the scale counts"


PROBES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strength": ({"strength": 0.5}, {"strength": 1.0}),
    "guidance_scale": ({"guidance_scale": 2.0}, {"guidance_scale": 6.0}),
    "negative_prompt": ({"negative_prompt": "fog"}, {"negative_prompt": "a forest of trees"}),
    "true_cfg_scale": ({"true_cfg_scale": 2.0}, {"true_cfg_scale": 6.0}),
}
"""Two values of each argument that a pipeline may have."""
PROBED = (
    *EDITORS,
    "sd1",
    "sdxl",
    "lcm",
    "pix2pix",
    "sd3",
    "flux",
    "flux-dev",
    "zimage",
    "qwenimage",
    "chroma",
    "sana-sprint",
    "kolors",
)


@pytest.mark.parametrize("name", nightly_but(PROBED, "sd1", "lcm", "flux", "flux-dev", "klein", "zimage"))
def test_model_fields_are_the_ones_that_affect_the_diffusers_image(name: str, load: Load) -> None:
    """Arguments of the class without an effect are not fields. Flux has no negative prompts here: its family does not call the
    transformer twice."""
    pipeline, pipe = load(name)
    known = inspect.signature(pipe.__call__).parameters
    usual = {
        "prompt": "a lake", "image": source(64, 64), "width": 64, "height": 64, "num_inference_steps": 4, "strength": 0.75,
        "guidance_scale": 4.0, "negative_prompt": "fog", "true_cfg_scale": 4.0, "max_area": 64 * 64,
        "intermediate_timesteps": None,
    }  # fmt: skip
    changing = set()
    for field, probes in PROBES.items():
        if field not in known:
            continue
        made = []
        for probe in probes:
            arguments = {key: value for key, value in (usual | probe).items() if key in known}
            made.append(pixels(pipe(generator=torch.Generator().manual_seed(1), **arguments).images[0]))
        if made[0].shape != made[1].shape or np.abs(made[0] - made[1]).max() > 0:
            changing.add(field)
    if name in ("flux", "flux-dev"):
        changing -= {"negative_prompt", "true_cfg_scale"}
    always = {field for field, rule in pipeline.fields.items() if not rule.needs}
    assert always & set(PROBES) == changing


def test_unsupported_reference_is_refused_and_named_by_its_index(load: Load) -> None:
    pipeline, _ = load("klein")
    with pytest.raises(InvalidField, match="this model does not take the image: Image too small") as raised:
        pipeline.plan(asked(pipeline, SizeRule(64, 64), [source(64, 64), source(72, 72), source(40, 64)]))
    assert raised.value.field == "reference_images[1]"


def test_a_plan_opens_graphs_for_the_result_and_all_images_that_the_model_sees(load: Load) -> None:
    """They are not opened during a step of other requests (OpenVINO opens graphs when they are needed)."""
    pipeline: Any
    pipeline, _ = load("klein")
    opened = set()
    pipeline._opening = [SimpleNamespace(open_for=lambda *size: opened.add(size))]
    pipeline.plan(asked(pipeline, SizeRule(64, 96), [source(96, 64), source(80, 112)]))
    assert opened == {(64, 96), (96, 64), (80, 112)}


@pytest.mark.parametrize("name", nightly_but(("qwenimage-edit", "qwenimage-edit-plus", "qwenimage2", "longcat-edit")))
def test_a_text_with_the_token_of_an_image_is_refused_by_its_field(name: str, load: Load) -> None:
    pipeline, theirs = load(name)
    settings: dict[str, Any] = {"true_cfg_scale": 2.0, "guidance_scale": 2.0, "negative_prompt": "fog"}
    for token in ("<|image_pad|>", "<|video_pad|>"):
        for field in ("prompt", "negative_prompt"):
            request = asked(pipeline, SizeRule(), [source(64, 64)], **{**settings, field: f"a {token} lake"})
            with pytest.raises(InvalidField, match="stands for an image") as raised:
                pipeline.plan(request)
            assert raised.value.field == field
    with pytest.raises(ValueError, match=_MISMATCH):
        theirs(image=source(64, 64), prompt="a <|image_pad|> lake", num_inference_steps=1)
    assert pipeline.plan(asked(pipeline, SizeRule(), [source(64, 64)], **settings)).step_count == 2
