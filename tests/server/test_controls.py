"""Requests with control images, in one batch with others: images as diffusers' ControlNet pipelines draw them, to 1/255."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
)
from drawing import Counted, alone, companions, load, together
from fakes import Clock, FakePipeline, make_request
from http_calls import EDITS, Field, ask, opened
from img2img.v1 import image_to_image_pb2 as pb
from img2img_cli.__main__ import main
from img2img_client import Client, Control, InvalidRequest, ModelNotFound, NotSupported, read_provenance, recorded_options
from img2img_export.verify.images import sample_image
from img2img_server.api.controls import check_controls, controls_from
from img2img_server.assets.store import AssetStore
from img2img_server.backends.local import local
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import ControlUse, LoraUse, Mask, Plan, Request
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from img2img_server.models.memory import unopened
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.control.nets import ControlNet
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.sources.reading import Sources
from lora_making import make, write_diffusers
from PIL import Image, ImageOps
from running import RunningServer, running_backend
from tiny_controlnets import UNION

Get = Callable[[str], Path]
Mix = tuple[tuple[str, float, float, float] | tuple[str, float, float, float, int], ...]
"""The controls of a request: the ControlNet's letter, scale, start and end, and the mode of a union."""

SETTINGS: dict[str, Any] = {"prompt": "a lake", "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 5.0}
MIXES: tuple[Mix, ...] = (
    (),
    (("a", 1.0, 0.0, 1.0),),
    (("b", 0.6, 0.0, 1.0),),
    (("a", 1.0, 0.0, 0.5),),
    (("b", -0.5, 0.3, 1.0),),
    (("a", 0.8, 0.0, 1.0), ("b", 0.7, 0.4, 1.0)),
    (("b", 0.5, 0.0, 1.0), ("a", 0.5, 0.0, 1.0), ("b", 0.3, 0.0, 1.0)),
    (),
)
UNIONS: tuple[Mix, ...] = (
    (("u", 1.0, 0.0, 1.0, 0),),
    (),
    (("u", 1.0, 0.0, 1.0, 3),),
    (("a", 1.0, 0.0, 1.0),),
    (("u", 0.7, 0.3, 1.0, 5), ("u", -0.5, 0.0, 0.6, 1)),
)
CLASSES = {
    "sd1": (StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetInpaintPipeline),
    "sdxl": (StableDiffusionXLControlNetImg2ImgPipeline, StableDiffusionXLControlNetInpaintPipeline),
}


def image_of(letter: str) -> Image.Image:
    """A control image of each ControlNet."""
    image = sample_image(64, 64)
    return ImageOps.invert(image) if letter == "a" else image.transpose(Image.Transpose.ROTATE_90)


def controls(mix: Mix) -> tuple[ControlUse, ...]:
    return tuple(
        ControlUse(letter, image_of(letter), scale, start, end, mode=mode[0] if mode else None)
        for letter, scale, start, end, *mode in mix
    )


def requests(mixes: Sequence[Mix] = MIXES, **changes: Any) -> list[Request]:
    settings = {"negative_prompt": None, "image": sample_image(64, 64), **SETTINGS, **changes}
    return [make_request(seeds=(5 + index,), controls=controls(mix), **settings) for index, mix in enumerate(mixes)]


@pytest.fixture
def nets(control_bundle: Get, tmp_path: Path) -> Callable[..., Companions]:
    """The ControlNets "a" and "b" of a tiny model, or those of other letters."""

    def load_nets(name: str, letters: str = "ab") -> Companions:
        return companions(tmp_path, {letter: control_bundle(f"{name}-{letter}") for letter in letters})

    return load_nets


@pytest.fixture(scope="module")
def oracle(tiny_model: Get, tiny_controlnet: Get) -> Callable[..., np.ndarray]:
    """diffusers' own image, with a mask if one is given."""
    models: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in models:
            kind = ControlNetUnionModel if name.endswith(UNION) else ControlNetModel
            models[name] = kind.from_pretrained(tiny_controlnet(name))
        return models[name]

    def draw(name: str, mix: Mix, seed: int, mask: Image.Image | None = None) -> np.ndarray:
        kind = CLASSES[name][mask is not None]
        # A control with scale 0 gives the image of the plain pipeline without controls.
        mix = mix or (("a", 0.0, 0.0, 1.0),)
        parts = [model(f"{name}-{letter}") for letter, *_ in mix]
        modes = {}
        if any(letter == UNION for letter, *_ in mix):
            kind, modes = (
                StableDiffusionXLControlNetUnionImg2ImgPipeline,
                {"control_mode": [use[4] for use in mix if len(use) == 5]},
            )
        pipe = kind.from_pretrained(tiny_model(name), controlnet=parts if len(parts) > 1 else parts[0], safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        images, scales, starts, ends = (
            list(values) if len(mix) > 1 else values[0]
            for values in zip(*((image_of(letter), *numbers[:3]) for letter, *numbers in mix), strict=True)
        )
        settings = SETTINGS if mask is None else {**SETTINGS, "mask_image": mask, "width": 64, "height": 64}
        drawn = pipe(
            image=sample_image(64, 64),
            control_image=images,
            controlnet_conditioning_scale=scales,
            control_guidance_start=starts,
            control_guidance_end=ends,
            generator=torch.Generator().manual_seed(seed),
            **settings,
            **modes,
        )
        return np.asarray(drawn.images[0], int)

    return draw


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_mixed_batch_matches_diffusers(
    name: str, bundle: Get, nets: Callable[[str], Companions], oracle: Callable[..., np.ndarray]
) -> None:
    """Each request gets the bits that it gets alone. Requests without controls get the image of a pipeline without
    ControlNets."""
    pipeline, plain = load(bundle(name), nets(name)), load(bundle(name), None)
    batch = requests()
    drawn = together(pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle(name, MIXES[index], 5 + index)).max() <= 1, MIXES[index]
        assert np.array_equal(image, alone(pipeline, request)), MIXES[index]
        without = alone(plain, dataclasses.replace(request, controls=()))
        assert np.array_equal(image, without) == (not request.controls), MIXES[index]
        assert not request.controls or np.abs(image - without).mean() > 3, "a control that changes nothing would prove nothing"


def test_a_union_reads_images_of_several_kinds_in_one_batch_as_diffusers_does(
    bundle: Get, nets: Callable[..., Companions], oracle: Callable[..., np.ndarray]
) -> None:
    """Several images are read one by one, as by MultiControlNetUnionModel."""
    pipeline = load(bundle("sdxl"), nets("sdxl", "au"))
    batch = requests(UNIONS)
    drawn = together(pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle("sdxl", UNIONS[index], 5 + index)).max() <= 1, UNIONS[index]
        assert np.array_equal(image, alone(pipeline, request)), UNIONS[index]
    other = dataclasses.replace(batch[0], controls=controls((("u", 1.0, 0.0, 1.0, 3),)))
    assert np.abs(alone(pipeline, other) - drawn[0]).mean() > 1, "a mode that changes nothing would prove nothing"


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("u", None, "it is missing: ControlNet 'u' is a union, which reads images of the kinds 0 to 5"),
        ("u", 6, "it is 6: ControlNet 'u' is a union"),
        ("u", -1, "it is -1: ControlNet 'u' is a union"),
        ("a", 0, "ControlNet 'a' is not a union, and reads images of one kind: leave it out"),
    ],
)
def test_a_mode_that_a_controlnet_lacks_is_refused(
    name: str, mode: int | None, reason: str, bundle: Get, nets: Callable[..., Companions]
) -> None:
    pipeline = load(bundle("sdxl"), nets("sdxl", "au"))
    (request,) = requests([((("a", 1.0, 0.0, 1.0)),)])
    uses = (*request.controls, ControlUse(name, image_of("a"), mode=mode))
    with pytest.raises(InvalidField, match=rf"^controls\[1\]\.control_mode: {reason}"):
        pipeline.plan(dataclasses.replace(request, controls=uses))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_residuals_that_a_controlnet_pools_apply_to_the_prompt_only_as_in_diffusers(
    guidance: float,
    bundle: Get,
    nets: Callable[..., Companions],
    oracle: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SETTINGS, "guidance_scale", guidance)
    pipeline = load(bundle("sd1"), nets("sd1", "ap"))
    mixes: tuple[Mix, ...] = (MIXES[1], (("p", 1.0, 0.0, 1.0),), (), (("p", 0.6, 0.3, 1.0),))
    batch = requests(mixes)
    drawn = together(pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle("sd1", mixes[index], 5 + index)).max() <= 1, mixes[index]
        assert np.array_equal(image, alone(pipeline, request)), mixes[index]
    assert np.abs(drawn[1] - alone(pipeline, dataclasses.replace(batch[1], controls=()))).mean() > 1


def test_controls_of_masked_requests_match_diffusers(
    bundle: Get, nets: Callable[[str], Companions], oracle: Callable[..., np.ndarray]
) -> None:
    pipeline = load(bundle("sd1"), nets("sd1"))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (20, 8, 60, 48))
    batch = [dataclasses.replace(request, mask=Mask(mask, paste=False)) for request in requests(MIXES[:4])]
    for index, image in enumerate(together(pipeline, batch)):
        assert np.abs(image - oracle("sd1", MIXES[index], 5 + index, mask)).max() <= 1, MIXES[index]


def test_requests_with_controls_loras_both_and_none_share_calls(
    bundle: Get, nets: Callable[[str], Companions], tiny_model: Get, tiny_controlnet: Get, tmp_path: Path
) -> None:
    """Each has the same bits in any batch. The image with both is diffusers'."""
    folder = tmp_path / "loras"
    folder.mkdir()
    pairs = make(tiny_model("sd1"), 1, ("to_q", "to_v", "ff.net.2"), (8,))
    write_diffusers({module: (0.3 * down, 0.3 * up) for module, (down, up) in pairs.items()}, folder / "style.safetensors")
    settings = LoraSettings(LoraFiles(folder), Cache(2**28), 8)
    pipeline = load(bundle("sd1"), nets("sd1"), loras=settings)
    style = (LoraUse("style", 1.0, LoraFiles(folder).find("style").digest),)
    plain, controlled = (dataclasses.replace(request, seeds=(5,)) for request in requests(MIXES[:2]))
    batch = [plain, controlled, dataclasses.replace(plain, loras=style), dataclasses.replace(controlled, loras=style)]
    drawn = together(pipeline, batch)
    for request, image in zip(batch, drawn, strict=True):
        assert np.array_equal(image, alone(pipeline, request))
    assert np.array_equal(drawn[0], alone(load(bundle("sd1"), None), plain))
    model = ControlNetModel.from_pretrained(tiny_controlnet("sd1-a"))
    pipe = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(tiny_model("sd1"), controlnet=model, safety_checker=None)
    pipe.load_lora_weights(folder, weight_name="style.safetensors")
    pipe.set_progress_bar_config(disable=True)
    given = {"image": sample_image(64, 64), "control_image": image_of("a"), "controlnet_conditioning_scale": 1.0}
    expected = pipe(**given, generator=torch.Generator().manual_seed(5), **SETTINGS).images[0]
    assert np.abs(drawn[3] - np.asarray(expected, int)).max() <= 1
    assert np.abs(drawn[3] - drawn[1]).mean() > 1
    assert np.abs(drawn[3] - drawn[2]).mean() > 1


def counted(pipeline: SteppedPipeline) -> tuple[Counted, Counted]:
    """Counts the denoiser's calls of the plain graph and of the control graph."""
    denoiser = pipeline._denoiser
    pipeline.plan(requests([MIXES[1]])[0])
    denoiser._graph._runner = Counted(denoiser._graph._runner)
    denoiser.control.opened._runner = Counted(denoiser.control.opened._runner)
    return denoiser._graph._runner, denoiser.control.opened._runner


def test_one_call_serves_rows_with_and_without_controls_and_each_controlnet_is_called_once(
    bundle: Get, nets: Callable[[str], Companions]
) -> None:
    """The plain graph runs in steps in which no control applies: PNDM makes 4 calls at these settings."""
    known = nets("sd1")
    pipeline = load(bundle("sd1"), known)
    plain, control = counted(pipeline)
    called = {letter: Counted(known.get(letter, ControlNet)._graph._runner) for letter in ("a", "b")}
    for letter, runner in called.items():
        known.get(letter, ControlNet)._graph._runner = runner
    together(pipeline, requests([(), ()]))
    assert (plain.rows, control.rows) == ([4] * 4, [])
    together(pipeline, requests([(), MIXES[3], MIXES[5]]))
    assert (plain.rows, control.rows) == ([4] * 4, [6] * 4)
    # MIXES[3] has "a" in the first half; MIXES[5] has "a" always, and "b" from 0.4 on.
    assert {letter: runner.rows for letter, runner in called.items()} == {"a": [4, 4, 2, 2], "b": [2, 2]}
    alone(pipeline, requests([MIXES[3]])[0])
    assert (plain.rows[4:], control.rows[4:]) == ([2, 2], [2, 2])


def test_rows_without_controls_stay_in_the_plain_graph_if_the_graphs_have_other_providers(
    bundle: Get, nets: Callable[[str], Companions]
) -> None:
    pipeline = load(bundle("sd1"), nets("sd1"))
    batch = requests([MIXES[1], (), MIXES[2]])
    expected = together(pipeline, batch)
    plain, control = counted(pipeline)
    pipeline._denoiser.control.mixes = False
    assert all(np.array_equal(*pair) for pair in zip(together(pipeline, batch), expected, strict=True))
    assert (plain.rows, control.rows) == ([2] * 4, [4] * 4)


def test_a_controlnet_of_another_family_is_refused(bundle: Get, nets: Callable[[str], Companions]) -> None:
    pipeline = load(bundle("sdxl"), nets("sd1"))
    with pytest.raises(
        InvalidField, match=r"^controls\[0\]\.model: ControlNet 'a' does not fit this model: it is for another size"
    ):
        pipeline.plan(requests([MIXES[1]])[0])


def test_a_controlnet_fits_the_models_whose_graphs_have_its_residuals(bundle: Get, control_bundle: Get, tmp_path: Path) -> None:
    """For every pair, the configurations give the same result as the graphs' inputs and outputs, without loading any."""
    models = ("sd1", "sd2", "sdxl", "refiner", "flux-dev:fp32:controls")
    nets = ("sd1-a", "sdxl-a", "sdxl-u", "flux-dev-a", "flux-dev-x")
    shared = {"sample", "hidden_states", "encoder_hidden_states", "text_embeds", "time_ids", "pooled_projections"}
    widths = {}
    for name in (*models, *nets):
        path = bundle(name) if name in models else control_bundle(name)
        manifest = read_manifest(path)
        part = next(part for part in manifest.components if part.control or part.name == "controlnet")
        session = ort.InferenceSession(path / (part.control or "controlnet/model.onnx"), providers=["CPUExecutionProvider"])
        ends = [*session.get_inputs(), *(session.get_outputs() if name in nets else ())]
        channels = {end.name: end.shape[3 if "block_samples" in end.name else -1 if len(end.shape) != 4 else 1] for end in ends}
        widths[name] = {key: value for key, value in channels.items() if key in shared or "residual" in key or "samples" in key}
        (tmp_path / name).symlink_to(path)
    registry = ModelRegistry.find_bundles(tmp_path, lambda bundle, manifest: FakePipeline())
    found = {name: set(registry.controlnets(registry.get(name))) for name in models}

    def fits(net: dict[str, Any], model: dict[str, Any]) -> bool:
        """Its residuals have the model's widths, and it reads all inputs of the model."""
        return net.items() <= model.items() and net.keys() & shared == model.keys() & shared

    assert found == {name: {net for net in nets if fits(widths[net], widths[name])} for name in models}
    assert found["sd1"] == {"sd1-a"}
    assert found["flux-dev:fp32:controls"] == {"flux-dev-a", "flux-dev-x"}
    assert registry.controlnets(registry.get("sdxl"), lambda name: name != "sdxl-u") == ["sdxl-a"], (
        "those that the caller may use"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lcm", "it is of the family latent-consistency, for which there are no ControlNets"),
        ("sd-inpaint", "it is of the family stable-diffusion-inpainting, for which"),
        ("sd3", "it is of the family stable-diffusion-3, for which"),
    ],
)
def test_models_without_controlnets_refuse_controls(name: str, reason: str, bundle: Get) -> None:
    with pytest.raises(InvalidField, match=f"^controls: this model takes no controls: {reason}"):
        load(bundle(name), Companions()).plan(requests([MIXES[1]])[0])


class Doubling(FakePipeline):
    """Its steps take twice as long for requests with controls, as planned."""

    def plan(self, request: Request) -> Plan:
        return dataclasses.replace(super().plan(request), work=2.0 if request.controls else 1.0)


def test_the_time_of_controls_counts_for_the_requests_that_have_them() -> None:
    """It counts in their forecasts, and not in those of others."""
    clock, seconds = Clock(), [2.0]
    engine = Engine({"m": Doubling(clock, lambda rows: seconds[0])}, clock=clock)
    plain = make_request(model="m", num_inference_steps=4, strength=1.0, seeds=(1,))
    controlled = dataclasses.replace(plain, controls=controls(MIXES[1]))
    engine.submit(controlled, lambda event: None)
    while engine.step():
        pass
    etas = []
    for request in (plain, controlled):
        accepted = engine.submit(request, lambda event: None)
        etas.append(accepted.eta)
        accepted.ticket.cancel()
        while engine.step():
            pass
    assert etas == pytest.approx([4.0, 8.0], rel=0.05)


def test_a_plan_counts_the_work_of_its_controls(bundle: Get, nets: Callable[[str], Companions]) -> None:
    pipeline = load(bundle("sd1"), nets("sd1"))
    none, one, half = (pipeline.plan(request).work for request in (*requests(MIXES[:2]), *requests(MIXES[3:4])))
    assert none == 1
    assert 1.3 < one < 1.7  # the weights of an encoder, in proportion to the UNet's
    assert half - 1 == pytest.approx((one - 1) / 2)


def test_weights_of_an_unopened_control_graph_are_known(bundle: Get, nets: Callable[[str], Companions]) -> None:
    pipeline, none = load(bundle("sd1"), nets("sd1")), load(bundle("lcm"), None)
    assert unopened(none) == 0
    (unet,) = (part for part in read_manifest(bundle("sd1")).components if part.name == "unet")
    assert unopened(pipeline) == unet.bytes > 0
    pipeline.open_control()
    assert unopened(pipeline) == 0
    pipeline.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Get, control_bundle: Get) -> Iterator[RunningServer]:
    """A server of two models and their ControlNets, of which only the default model is loaded at start."""
    models = tmp_path_factory.mktemp("models")
    for name in ("sd1", "sdxl", "lcm"):
        (models / name).symlink_to(bundle(name))
    for name, found in (("a", "sd1-a"), ("b", "sd1-b"), ("a-xl", "sdxl-a"), ("u-xl", "sdxl-u")):
        (models / name).symlink_to(control_bundle(found))
    settings = {"models": models, "default_model": "sd1", "execution": Execution("cpu"), "http_port": 0}
    with running_backend(local, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


def test_requests_with_other_controls_share_a_server(client: Client, oracle: Callable[..., np.ndarray]) -> None:
    def ask(index: int) -> np.ndarray:
        wanted = [Control(use[0], image_of(use[0]), use[1], use[2], use[3]) for use in MIXES[index]]
        result = client.transform(sample_image(64, 64), seed=5 + index, controls=wanted, **SETTINGS)
        record = read_provenance(result.images[0].data) or {}
        kept = [(use["model"], use["scale"], use["start"], use["end"]) for use in record.get("controls", [])]
        assert kept == list(MIXES[index])
        return np.asarray(result.images[0].image, int)

    with ThreadPoolExecutor(len(MIXES)) as pool:
        for index, image in enumerate(pool.map(ask, range(len(MIXES)))):
            assert np.abs(image - oracle("sd1", MIXES[index], 5 + index)).max() <= 1, MIXES[index]


def test_controls_over_http_match_grpc(server: RunningServer, client: Client) -> None:
    """As a short text with files, and as JSON with addresses, files or both."""
    mix = MIXES[5]
    wanted = [Control(use[0], image_of(use[0]), use[1], use[2], use[3]) for use in mix]
    expected = client.transform(sample_image(64, 64), seed=5, controls=wanted, **SETTINGS).images[0].image
    files = [png_of(image_of(letter)) for letter, *_ in mix]
    addresses = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
    listed: list[dict[str, Any]] = [dict(zip(("model", "scale", "start", "end"), one, strict=True)) for one in mix]
    mixed = [{**listed[0], "image": addresses[0]}, listed[1]]
    both = [{**one, "image": address} for one, address in zip(listed, addresses, strict=True)]
    short = ",".join(":".join(map(str, one)) for one in mix)
    sent: list[tuple[Field, ...]] = [
        (("control_image[]", files[0]), ("controls", short), ("control_image[]", files[1])),
        (("controls", short), *(("control_image", address) for address in addresses)),
        (("controls", json.dumps(mixed)), ("control_image", files[1])),
        (("controls", json.dumps(both)),),
    ]
    settings = [(name, str(value)) for name, value in {**SETTINGS, "seed": 5, "size": "source"}.items()]
    for fields in sent:
        answer = ask(server, EDITS, *settings, *fields, image=png_of(sample_image(64, 64)))
        assert answer.status == 200, answer.body
        assert np.array_equal(np.asarray(opened(answer.json["data"][0]["b64_json"])), np.asarray(expected))


@pytest.mark.parametrize(
    ("control", "field"),
    [
        ({"start": 1}, "controls[0].start"),
        ({"scale": 11}, "controls[0].scale"),
        ({"image": "asset:none"}, "controls[0].image.uri"),
        ({"image": "canny.png"}, "controls[0].image.uri"),
        ({"model": "sdxl"}, "controls[0].model"),
        ({"model": ""}, "controls[0].model"),
    ],
)
def test_http_names_an_invalid_field_of_a_control(control: dict[str, Any], field: str, server: RunningServer) -> None:
    file = base64.b64encode(png_of(image_of("a"))).decode()
    sent = json.dumps([{"model": "a", "image": f"data:image/png;base64,{file}", **control}])
    answer = ask(server, EDITS, ("prompt", "a lake"), ("controls", sent))
    assert (answer.status, answer.error["param"]) == (400, field)


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_recorded_controls_reproduce_the_image(client: Client) -> None:
    """With the recorded options, which contain no images."""
    mix = MIXES[5]
    wanted = [Control(use[0], image_of(use[0]), use[1], use[2], use[3]) for use in mix]
    first = client.transform(sample_image(64, 64), seed=5, controls=wanted, **SETTINGS).images[0]
    record = read_provenance(first.data) or {}
    options = recorded_options(record)
    assert "controls" not in options
    again = [Control(use["model"], image_of(use["model"]), use["scale"], use["start"], use["end"]) for use in record["controls"]]
    without = client.transform(sample_image(64, 64), **options).images[0]
    assert without.image.tobytes() != first.image.tobytes()
    options["controls"] = again
    assert client.transform(sample_image(64, 64), **options).images[0].image.tobytes() == first.image.tobytes()


def test_the_command_sends_and_reproduces_controls(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", f"127.0.0.1:{server.port}"]
    for name, image in (("house", sample_image(64, 64)), ("a", image_of("a")), ("b", image_of("b"))):
        image.save(tmp_path / f"{name}.png")
    house, a, b, new = (str(tmp_path / f"{name}.png") for name in ("house", "a", "b", "new"))
    flags = ["--control", f"a={a},scale=0.8,end=0.5", "--control", f"b={b},start=0.4", "--steps", "4", "--quiet"]
    assert main(["transform", house, "--output", new, *flags, *target]) == 0
    kept = [
        (use["model"], use["scale"], use["start"], use["end"])
        for use in (read_provenance(Path(new).read_bytes()) or {})["controls"]
    ]
    assert kept == [("a", 0.8, 0.0, 0.5), ("b", 1.0, 0.4, 1.0)]
    again = ["reproduce", new, "--image", house, *target]
    assert main([*again, "--control", a, "--control", b, "--max-difference", "0"]) == 0
    assert "identical" in capsys.readouterr().out
    assert main([*again, "--control", b, "--control", a]) == 0
    assert "a ControlNet or a control image is not the one that was used" in capsys.readouterr().out
    for wrong, words in (([], "--control FILE is needed 2 times"), (["--control", a], "--control is given 1 times")):
        assert main([*again, *wrong]) != 0
        assert words in capsys.readouterr().err


def test_a_control_image_is_resized_to_the_result(client: Client) -> None:
    """Resized as diffusers does it, independent of how it is sent."""
    large = image_of("a").resize((100, 150), Image.Resampling.NEAREST)
    by_server, by_client = (
        client.transform(sample_image(64, 64), seed=1, width=64, height=96, controls=[Control("a", image)], **SETTINGS).images[0]
        for image in (large, large.resize((64, 96), Image.Resampling.LANCZOS))
    )
    assert by_server.image.size == (64, 96)
    assert np.array_equal(np.asarray(by_server.image), np.asarray(by_client.image))


def test_models_list_which_take_controls(client: Client) -> None:
    models = {model.id: model for model in client.models()}
    assert {name for name, model in models.items() if model.family == "controlnet"} == {"a", "b", "a-xl", "u-xl"}
    client.transform(sample_image(64, 64), controls=[Control("a", image_of("a"))], **SETTINGS)
    models = {model.id: model for model in client.models()}
    assert models["sd1"].takes("controls")
    assert (models["sd1"].controlnets, models["sdxl"].controlnets) == (("a", "b"), ("a-xl", "u-xl"))
    assert (models["lcm"].controlnets, models["a"].controlnets) == ((), ())
    field = models["sd1"].field("controls")
    assert field is not None
    assert field.max_count == 4
    assert models["a"].state == "ready"
    assert models["a"].fields == ()
    assert models["a"].memory_bytes


@pytest.mark.parametrize(
    ("control", "field", "reason"),
    [
        ({"scale": 11.0}, r"controls\[0\]\.scale", "11 is not in -10 to 10"),
        ({"scale": math.nan}, r"controls\[0\]\.scale", "nan is not in"),
        ({"start": 1.0}, r"controls\[0\]\.start", "1 is not in 0 to 1, below 1"),
        ({"start": -0.1}, r"controls\[0\]\.start", "-0.1 is not in 0 to 1"),
        ({"end": 1.1}, r"controls\[0\]\.end", r"1.1 is not above start \(0\) and up to 1"),
        ({"start": 0.5, "end": 0.5}, r"controls\[0\]\.end", r"0.5 is not above start \(0.5\)"),
        ({"model": "sdxl"}, r"controls\[0\]\.model", "model 'sdxl' is not a ControlNet, but of the family stable-diffusion-xl"),
        ({"model": "a-xl"}, r"controls\[0\]\.model", "ControlNet 'a-xl' does not fit this model: it is for another size"),
        ({"model": ""}, r"controls\[0\]\.model", "no model is named: set one of the family controlnet"),
        ({"image": b"no image"}, r"controls\[0\]\.image\.data", ""),
        ({"image": "https://example.org/a.png"}, r"controls\[0\]\.image", ""),
    ],
)
def test_an_invalid_field_of_a_control_is_named(control: dict[str, Any], field: str, reason: str, client: Client) -> None:
    with pytest.raises((InvalidRequest, NotSupported), match=f"{field}.*{reason}"):
        client.transform(
            sample_image(64, 64), controls=[Control(**{"model": "a", "image": image_of("a"), **control})], **SETTINGS
        )


def test_the_mode_of_a_union_is_read_and_recorded(client: Client) -> None:
    """A wrong one is named in the error."""

    def ask(mode: int | None) -> Any:
        control = Control("u-xl", image_of("u"), control_mode=mode)
        return client.transform(sample_image(64, 64), model="sdxl", seed=1, controls=[control], **SETTINGS).images[0]

    first, other = ask(0), ask(3)
    assert [(read_provenance(one.data) or {})["controls"][0]["control_mode"] for one in (first, other)] == [0, 3]
    assert first.data != other.data
    with pytest.raises(InvalidRequest, match=r"^controls\[0\]\.control_mode: it is missing: ControlNet 'u-xl' is a union"):
        ask(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u", pb.Control()),
        ("u:0.5:0:1:3", pb.Control(scale=0.5, start=0, end=1, control_mode=3)),
        ("u:0.5", pb.Control(scale=0.5)),
    ],
)
def test_controls_as_text_have_numbers_after_colons(text: str, expected: pb.Control) -> None:
    """Without an id they are for the model itself."""
    (without,) = controls_from(text[1:] if len(text) > 1 else ":1")
    assert (without.HasField("model"), without.scale) == (False, expected.scale or 1)
    expected.model.path = "u"
    assert controls_from(text) == [expected]


@pytest.mark.parametrize("mode", ["0.5", "-1", "1e10", "nan", "inf"])
def test_a_mode_as_text_is_an_integer(mode: str) -> None:
    with pytest.raises(InvalidField, match=r"^controls: the mode of u is .*, not an integer from 0"):
        controls_from(f"u:1:0:1:{mode}")


def test_incompatible_settings_are_refused_by_name(client: Client) -> None:
    control = Control("a", image_of("a"))
    with pytest.raises(InvalidRequest, match=r"^controls: this model takes no controls: it needs a control graph"):
        client.transform(sample_image(64, 64), model="lcm", controls=[control], **SETTINGS)
    with pytest.raises(InvalidRequest, match=r"^controls: there are 5, the maximum of this server is 4"):
        client.transform(sample_image(64, 64), controls=[control] * 5, **SETTINGS)
    with pytest.raises(InvalidRequest, match=r"^model: 'a' is a ControlNet, which other models' requests name in controls"):
        client.transform(sample_image(64, 64), model="a", **SETTINGS)
    with pytest.raises(ModelNotFound, match=r"controls\[1\]\.model: no model matches path 'none'"):
        client.transform(sample_image(64, 64), controls=[control, Control("none", image_of("a"))], **SETTINGS)
    missing = pb.TransformRequest(controls=[pb.Control(model=pb.ModelReference(path="a"))])
    with pytest.raises(InvalidField, match=r"^controls\[0\]\.image: "):
        check_controls(
            missing, Sources(ServerConfig(Path()).sources, AssetStore(ServerConfig(Path()).assets), ImageLimits()), True
        )


def test_a_request_loads_its_controlnet_again(client: Client) -> None:
    control = Control("b", image_of("b"))
    first = client.transform(sample_image(64, 64), seed=3, controls=[control], **SETTINGS).images[0]
    client.unload_model("b")
    assert next(model for model in client.models() if model.id == "b").state == "unloaded"
    again = client.transform(sample_image(64, 64), seed=3, controls=[control], **SETTINGS).images[0]
    assert first.data == again.data
