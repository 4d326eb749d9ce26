"""Requests to Flux with control images, in one batch with others: images as diffusers' pipelines draw them, to 1/255."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
)
from drawing import Counted, alone, companions, load, together
from fakes import make_request
from img2img_export.verify.images import sample_image
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.controls import SAMPLE_OF, SAMPLES, SINGLE_OF, SINGLES
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import ControlUse, LoraUse, Mask, Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.control.nets import FluxControlNet
from img2img_server.runtime.control.residuals import Called, layout, of_flux
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from lora_making import make, write_diffusers
from PIL import Image, ImageOps

Get = Callable[[str], Path]
Mix = tuple[tuple[str, float, float, float, int | None], ...]
"""The controls of a request: the ControlNet's letter, scale, start, end and mode."""
Size = tuple[int, int]

MODEL, BUNDLE = "flux-dev", "flux-dev:fp32:controls"
SETTINGS: dict[str, Any] = {"prompt": "a lake", "strength": 0.8, "num_inference_steps": 5, "guidance_scale": 5.0}
MIXES: tuple[Mix, ...] = (
    (),
    (("a", 1.0, 0.0, 1.0, None),),
    (("b", 0.6, 0.0, 0.5, None),),
    (("u", 1.0, 0.0, 1.0, 1),),
    (("x", 1.0, 0.3, 1.0, None),),
    (("u", 0.8, 0.0, 1.0, 3), ("u", -0.5, 0.4, 1.0, 0)),
    (("a", 0.8, 0.0, 1.0, None), ("u", 0.7, 0.0, 0.6, 2)),
    (),
)


def image_of(letter: str, size: Size = (64, 64)) -> Image.Image:
    """A control image of each ControlNet."""
    image = sample_image(*size)
    return ImageOps.invert(image) if letter in "ax" else image.transpose(Image.Transpose.ROTATE_180)


def controls(mix: Mix, size: Size = (64, 64)) -> tuple[ControlUse, ...]:
    return tuple(ControlUse(name, image_of(name, size), scale, start, end, mode=mode) for name, scale, start, end, mode in mix)


def requests(mixes: Sequence[Mix] = MIXES, sizes: Sequence[Size] = ((64, 64),) * len(MIXES)) -> list[Request]:
    return [
        make_request(image=sample_image(*size), seeds=(5 + i,), controls=controls(mix, size), **SETTINGS)
        for i, (mix, size) in enumerate(zip(mixes, sizes, strict=False))
    ]


@pytest.fixture
def nets(control_bundle: Get, tmp_path: Path) -> Callable[[str], Companions]:
    """ControlNets by their letters."""

    def load_nets(letters: str) -> Companions:
        return companions(tmp_path, {letter: control_bundle(f"{MODEL}-{letter}") for letter in letters})

    return load_nets


@pytest.fixture(scope="module")
def oracle(tiny_model: Get, tiny_controlnet: Get) -> Callable[..., np.ndarray]:
    """diffusers' own image, with a mask if one is given."""
    models: dict[str, Any] = {}

    def model(letter: str) -> Any:
        if letter not in models:
            models[letter] = FluxControlNetModel.from_pretrained(tiny_controlnet(f"{MODEL}-{letter}"))
        return models[letter]

    def draw(mix: Mix, seed: int, mask: Image.Image | None = None, lora: Path | None = None, size: Size = (64, 64)) -> np.ndarray:
        given: dict[str, Any] = {}
        kind: Any = FluxImg2ImgPipeline
        parts: dict[str, Any] = {}
        if mix:
            kind = FluxControlNetImg2ImgPipeline if mask is None else FluxControlNetInpaintPipeline
            nets = [model(letter) for letter, *_ in mix]
            parts = {"controlnet": nets if len(nets) > 1 else nets[0]}
            names = ("control_image", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
            values = [(image_of(letter, size), *numbers[:3], numbers[3]) for letter, *numbers in mix]
            for name, own in zip((*names, "control_mode"), zip(*values, strict=True), strict=True):
                given[name] = list(own) if len(mix) > 1 else own[0]
        if mask is not None:
            given |= {"mask_image": mask}
        pipe = kind.from_pretrained(tiny_model(MODEL), **parts)
        pipe.set_progress_bar_config(disable=True)
        if lora is not None:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        generator = torch.Generator().manual_seed(seed)
        drawn = pipe(image=sample_image(*size), width=size[0], height=size[1], generator=generator, **given, **SETTINGS)
        return np.asarray(drawn.images[0], int)

    return draw


def test_mixed_batch_matches_diffusers(bundle: Get, nets: Callable[[str], Companions], oracle: Callable[..., np.ndarray]) -> None:
    """Each request gets the bits that it gets alone. Requests without controls get the image of a pipeline without
    ControlNets."""
    pipeline, plain = load(bundle(BUNDLE), nets("abux")), load(bundle(BUNDLE), None)
    batch = requests()
    drawn = together(pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle(MIXES[index], 5 + index)).max() <= 1, MIXES[index]
        assert np.array_equal(image, alone(pipeline, request)), MIXES[index]
        without = alone(plain, dataclasses.replace(request, controls=()))
        assert np.array_equal(image, without) == (not request.controls), MIXES[index]
        silent = tuple(dataclasses.replace(use, scale=0.0) for use in request.controls)
        unmoved = alone(pipeline, dataclasses.replace(request, controls=silent))
        assert not request.controls or np.abs(image - unmoved).mean() > 1, "a control that changes nothing would prove nothing"


def test_portrait_and_landscape_images_with_controls_share_calls(
    bundle: Get, nets: Callable[[str], Companions], oracle: Callable[..., np.ndarray]
) -> None:
    """Also calls of ControlNets that read latents; one that reads pixels is called for each size. Each request gets the bits that
    it gets alone."""
    known = nets("ax")
    pipeline = load(bundle(BUNDLE), known)
    mixes, sizes = [MIXES[1], MIXES[1], MIXES[4], MIXES[4], ()], [(96, 64), (64, 96), (96, 64), (64, 96), (64, 96)]
    batch = requests(mixes, sizes)
    assert len({pipeline.plan(request).shape for request in batch}) == 1
    counted = {}
    for letter in "ax":
        graph: Any = known.get(letter, FluxControlNet)._graph
        counted[letter] = graph._runner = Counted(graph._runner, "hidden_states")
    drawn = together(pipeline, batch)
    assert counted["a"].rows == [2] * 4
    assert set(counted["x"].rows) == {1}
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle(mixes[index], 5 + index, size=sizes[index])).max() <= 1, index
        assert np.array_equal(image, alone(pipeline, request)), index


def test_controls_of_masked_requests_match_diffusers(
    bundle: Get, nets: Callable[[str], Companions], oracle: Callable[..., np.ndarray]
) -> None:
    pipeline = load(bundle(BUNDLE), nets("ax"))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (20, 8, 60, 48))
    mixes = (MIXES[1], (), MIXES[4])
    batch = [dataclasses.replace(request, mask=Mask(mask, paste=False)) for request in requests(mixes)]
    drawn = together(pipeline, batch)
    for index in (0, 2):
        assert np.abs(drawn[index] - oracle(mixes[index], 5 + index, mask)).max() <= 1, mixes[index]


def test_each_image_of_a_request_draws_its_own_latents_of_the_control_image(
    bundle: Get, nets: Callable[[str], Companions]
) -> None:
    pipeline = load(bundle(BUNDLE), nets("a"))
    (request,) = requests([MIXES[1]])
    both = pipeline_images(pipeline, dataclasses.replace(request, seeds=(5, 9)))
    for seed, image in zip((5, 9), both, strict=True):
        assert np.array_equal(image, alone(pipeline, dataclasses.replace(request, seeds=(seed,))))


def pipeline_images(pipeline: SteppedPipeline, request: Request) -> list[np.ndarray]:
    states = pipeline.prepare([request])
    for _ in range(pipeline.plan(request).step_count):
        pipeline.advance(states, pipeline.denoise(states))
    return [np.asarray(image, int) for image in pipeline.finish(states)[0]]


def test_requests_with_controls_loras_both_and_none_share_calls(
    bundle: Get, nets: Callable[[str], Companions], tiny_model: Get, oracle: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """Each has the same bits in any batch. The image with both is diffusers'."""
    folder = tmp_path / "loras"
    folder.mkdir()
    pairs = make(tiny_model(MODEL), 1, ("to_q", "to_v", "ff.net.2"), (8,))
    write_diffusers({module: (0.3 * down, 0.3 * up) for module, (down, up) in pairs.items()}, folder / "style.safetensors")
    pipeline = load(bundle(BUNDLE), nets("a"), loras=LoraSettings(LoraFiles(folder), Cache(2**28), 8))
    style = (LoraUse("style", 1.0, LoraFiles(folder).find("style").digest),)
    plain, controlled = (dataclasses.replace(request, seeds=(5,)) for request in requests(MIXES[:2]))
    batch = [plain, controlled, dataclasses.replace(plain, loras=style), dataclasses.replace(controlled, loras=style)]
    drawn = together(pipeline, batch)
    for request, image in zip(batch, drawn, strict=True):
        assert np.array_equal(image, alone(pipeline, request))
    assert np.array_equal(drawn[0], alone(load(bundle(BUNDLE), None), plain))
    assert np.abs(drawn[3] - oracle(MIXES[1], 5, lora=folder / "style.safetensors")).max() <= 1
    assert np.abs(drawn[3] - drawn[1]).mean() > 1


@pytest.mark.parametrize(
    ("use", "field", "reason"),
    [
        (
            ControlUse("u", image_of("u")),
            "control_mode",
            "it is missing: ControlNet 'u' is a union, which reads images of the kinds 0",
        ),
        (ControlUse("u", image_of("u"), mode=4), "control_mode", "it is 4: ControlNet 'u' is a union"),
        (ControlUse("a", image_of("a"), mode=0), "control_mode", "ControlNet 'a' is not a union"),
    ],
)
def test_a_mode_that_a_controlnet_lacks_is_refused(
    use: ControlUse, field: str, reason: str, bundle: Get, nets: Callable[[str], Companions]
) -> None:
    (request,) = requests([()])
    with pytest.raises(InvalidField, match=rf"^controls\[0\]\.{field}: {reason}"):
        load(bundle(BUNDLE), nets("au")).plan(dataclasses.replace(request, controls=(use,)))


def test_a_controlnet_of_another_family_is_refused(bundle: Get, control_bundle: Get, tmp_path: Path) -> None:
    known = Companions()
    for letter, name in (("a", "sd1-a"), ("f", f"{MODEL}-a")):
        link = tmp_path / letter
        link.symlink_to(control_bundle(name))
        load_pipeline(link, read_manifest(link), Execution("cpu"), companions=known)
    (request,) = requests([()])
    for model, letter, reason in ((BUNDLE, "a", "it is for Stable Diffusion"), ("sd1", "f", "it is for Flux")):
        with pytest.raises(
            InvalidField, match=rf"^controls\[0\]\.model: ControlNet '{letter}' does not fit this model: {reason}"
        ):
            load(bundle(model), known).plan(dataclasses.replace(request, controls=(ControlUse(letter, image_of("a")),)))


def test_missing_control_graph_error_explains_how_to_make_one(bundle: Get) -> None:
    with pytest.raises(
        InvalidField, match=r"^controls: this model takes no controls: it has no control graph: .*--control-graphs"
    ):
        load(bundle(MODEL), Companions()).plan(requests([MIXES[1]])[0])


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("repeats", [False, True])
def test_blocks_get_the_samples_that_diffusers_gives_them(samples: int, repeats: bool) -> None:
    """In a transformer of 6 blocks and 5 single blocks; also for two ControlNets together, of which one has two samples."""
    torch.manual_seed(0)
    small = {"patch_size": 1, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 1, "joint_attention_dim": 8}
    transformer = FluxTransformer2DModel(
        **small, num_layers=6, num_single_layers=5, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
    ).eval()
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(3, 4, 4), "encoder_hidden_states": torch.randn(3, 2, 8), "timestep": torch.ones(3),
        "pooled_projections": torch.randn(3, 8), "txt_ids": torch.zeros(2, 3), "img_ids": torch.zeros(4, 3),
    }  # fmt: skip
    singles = min(samples, 5)
    first = {SAMPLES: torch.randn(2, samples, 4, 8), SINGLES: torch.randn(2, singles, 4, 8)}
    other = {SAMPLES: torch.randn(1, 2, 4, 8), SINGLES: torch.randn(1, 2, 4, 8)}
    calls = [Called(0, [2, 0], first, repeats), Called(1, [2], other)]
    found = of_flux(calls, 3, 6, 5)
    mapped = {
        name: [found[name][torch.arange(3), found[index][:, block]] for block in range(found[index].shape[1])]
        for name, index in ((SAMPLES, SAMPLE_OF), (SINGLES, SINGLE_OF))
    }
    used = len(set(layout(samples, 6, repeats)))
    assert of_flux(calls[:1], 3, 6, 5)[SAMPLES].shape[1] == used, "blocks share samples"
    with torch.no_grad():
        together_ = transformer(**inputs, **mapped).sample
        for row, own in ((0, [(first, 1, repeats)]), (1, []), (2, [(first, 0, repeats), (other, 0, False)])):
            expected = [torch.zeros(1, 4, 8)] * 6, [torch.zeros(1, 4, 8)] * 5
            for values, at, turns in own:
                for sums, name in zip(expected, (SAMPLES, SINGLES), strict=True):
                    picked = layout(values[name].shape[1], len(sums), turns and name == SAMPLES)
                    sums[:] = [have + values[name][at : at + 1, one] for have, one in zip(sums, picked, strict=True)]
            alone_ = {name: value if name.endswith("_ids") else value[row : row + 1] for name, value in inputs.items()}
            given = dict(zip((SAMPLES, SINGLES), expected, strict=True))
            if len(own) == 1:  # as diffusers itself gives them
                ((values, at, turns),) = own
                given = {name: list(values[name][at : at + 1].unbind(1)) for name in (SAMPLES, SINGLES)}
                found_alone = transformer(**alone_, **given, controlnet_blocks_repeat=turns).sample
            else:
                found_alone = transformer(**alone_, **given).sample
            assert torch.allclose(together_[row : row + 1], found_alone, atol=1e-5)
