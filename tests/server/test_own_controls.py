"""Models with a built-in control input: Flux Depth and Canny, and SDXL with PAG and a ControlNet of its own. Images are
those of diffusers' classes in the same test, to 1/255, alone and in mixed batches; requests without the image name the field.
"""

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_oracle import oracle, source
from drawing import alone, load, together
from fakes import make_request
from http_calls import EDITS, ask, get
from img2img_cli.__main__ import main
from img2img_client import Client, Control, DeadlineExceeded, InvalidRequest, Progress, read_provenance
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_server.backends.local import local
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import ControlUse, LoraUse, Mask, Request
from img2img_server.runtime.diffusion.flux import FluxControl
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from img2img_server.support.fidelity import Fidelity
from kserve_calls import client_of, image_input, text
from lora_making import make, write_diffusers
from PIL import Image, ImageDraw, ImageOps
from running import RunningServer, running_backend
from short_exports import cut_short

Get = Callable[[str], Path]
FLUX, PAG = "flux-control", "sdxl-control-pag"
SIZE = (64, 64)


def lines(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A control image: lines, of another angle for each number."""
    image = Image.new("RGB", size)
    for offset in range(-128, 256, 24):
        ImageDraw.Draw(image).line((offset, 0, offset + 31 * number - 40, size[1]), fill="white", width=3)
    return image


def ellipse(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((8, 12, size[0] - 20, size[1] - 6), fill=255)
    return mask


def asked(number: int, size: tuple[int, int] = SIZE, mask: Image.Image | None = None, **values: Any) -> Request:
    """A request with a control image; each number has another one, and other settings."""
    settings: dict[str, Any] = {
        "prompt": ("a lake", "a town in the fog", "")[number % 3],
        "strength": (0.8, 0.5, 1.0)[number % 3],
        "num_inference_steps": (5, 8, 4)[number % 3],
        "guidance_scale": (3.5, 7.0, 1.0)[number % 3],
        "seeds": (11 + number,),
        "negative_prompt": None,
        **values,
    }
    masks = None if mask is None else Mask(mask, paste=False)
    return make_request(image=source(*size), controls=(ControlUse("", lines(number, size)),), mask=masks, **settings)


def drawn_by(pipe: Any, request: Request, **more: Any) -> np.ndarray[Any, Any]:
    """diffusers' image of a request."""
    given: dict[str, Any] = {"mask_image": request.mask.image} if request.mask is not None else {}
    width, height = request.image.size
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    images = pipe(
        prompt=request.prompt,
        image=request.image,
        control_image=request.controls[0].image,
        width=width,
        height=height,
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=len(request.seeds),
        generator=generators if len(generators) > 1 else generators[0],
        **given,
        **more,
    ).images
    return np.asarray([np.asarray(image, int) for image in images])


@pytest.fixture(scope="module")
def flux(tiny_model: Get) -> Callable[[Request], np.ndarray[Any, Any]]:
    """The image of a request, by diffusers' class for it."""
    pipes: dict[str, Any] = {}

    def draw(request: Request) -> np.ndarray[Any, Any]:
        name = "FluxControlImg2ImgPipeline" if request.mask is None else "FluxControlInpaintPipeline"
        if name not in pipes:
            pipes[name] = oracle(tiny_model(FLUX), name)
        image: np.ndarray[Any, Any] = drawn_by(pipes[name], request)[0]
        return image

    return draw


def test_flux_control_matches_diffusers_alone_and_in_a_mixed_batch(
    bundle: Get, flux: Callable[[Request], np.ndarray[Any, Any]]
) -> None:
    """Requests differ in control image, prompt, strength, steps, guidance, seed and mask. Each draws the same bits in any
    company."""
    pipeline = load(bundle(FLUX))
    assert isinstance(pipeline, FluxControl)
    batch = [asked(0), asked(1), asked(2), asked(3, mask=ellipse()), asked(5, mask=ellipse()), asked(0, seeds=(3,))]
    states = list(pipeline.prepare(batch))
    finished: dict[int, np.ndarray[Any, Any]] = {}
    while len(finished) < len(batch):
        running_ = [state for state in states if state.step < state.step_count]
        pipeline.advance(running_, pipeline.denoise(running_))
        done = [index for index, state in enumerate(states) if state.step == state.step_count and index not in finished]
        for index in done:
            finished[index] = np.asarray(pipeline.finish([states[index]])[0][0], int)
    for index, request in enumerate(batch):
        assert np.abs(finished[index] - flux(request)).max() <= 1, index
        assert np.abs(finished[index] - alone(pipeline, request)).max() == 0, index
    inverted = tuple(dataclasses.replace(use, image=ImageOps.invert(use.image)) for use in batch[0].controls)
    assert np.abs(finished[0] - alone(pipeline, dataclasses.replace(batch[0], controls=inverted))).mean() > 1


@pytest.mark.parametrize("size", [(48, 80), (112, 64)])
def test_flux_control_matches_diffusers_at_other_sizes(
    size: tuple[int, int], bundle: Get, flux: Callable[[Request], np.ndarray[Any, Any]]
) -> None:
    pipeline = load(bundle(FLUX))
    for request in (asked(1, size), asked(0, size, ellipse(size))):
        assert np.abs(alone(pipeline, request) - flux(request)).max() <= 1


@pytest.mark.parametrize("masked", [False, True])
def test_each_image_of_a_request_draws_its_own_latents(masked: bool, bundle: Get) -> None:
    """An image is the same as that of a request for it alone: the seed contract."""
    pipeline = load(bundle(FLUX))
    request = asked(0, mask=ellipse() if masked else None, seeds=(5, 9))
    states = pipeline.prepare([request])
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    for seed, image in zip((5, 9), pipeline.finish(states)[0], strict=True):
        assert np.array_equal(np.asarray(image, int), alone(pipeline, dataclasses.replace(request, seeds=(seed,))))


def test_a_speedup_is_used_with_the_image_that_the_model_reads_by_itself(bundle: Get) -> None:
    """It was measured with one, unlike those of models whose requests name ControlNets."""
    pipeline = load(bundle(FLUX))
    fewer = Speedup(
        "fewer", 1.0, 1, keeps_guidance=False, keeps_features=False, called_share=0.2, skip_period=2, psnr_db=31.0, ssim=0.99
    )
    pipeline.speedups.speedups = Speedups((fewer,), 1, 4, 7.5, 0.25)
    exact = asked(0, num_inference_steps=10)
    fast = dataclasses.replace(exact, fidelity=Fidelity("fast"))
    plan = pipeline.plan(fast)
    assert plan.speedup is not None
    assert (plan.speedup.name, plan.warnings) == ("fewer", ())
    assert plan.step_count < pipeline.plan(exact).step_count
    difference = np.abs(alone(pipeline, fast) - alone(pipeline, exact))
    assert 0 < difference.mean() < 20


def test_flux_control_takes_loras(bundle: Get, tiny_model: Get, tmp_path: Path) -> None:
    """Also LoRAs of the layer that reads the control image. Requests with and without LoRAs share calls."""
    folder = tmp_path / "loras"
    folder.mkdir()
    pairs = make(tiny_model(FLUX), 1, ("to_q", "x_embedder"), (8,))
    write_diffusers({module: (0.3 * down, 0.3 * up) for module, (down, up) in pairs.items()}, folder / "style.safetensors")
    pipeline = load(bundle(FLUX), loras=LoraSettings(LoraFiles(folder), Cache(2**28), 8))
    plain = asked(0)
    styled = dataclasses.replace(plain, loras=(LoraUse("style", 1.0, LoraFiles(folder).find("style").digest),))
    drawn = together(pipeline, [plain, styled])
    assert np.array_equal(drawn[0], alone(load(bundle(FLUX)), plain))
    pipe = oracle(tiny_model(FLUX), "FluxControlImg2ImgPipeline")
    pipe.load_lora_weights(folder, weight_name="style.safetensors")
    assert np.abs(drawn[1] - drawn_by(pipe, styled)[0]).max() <= 1
    assert np.abs(drawn[1] - drawn[0]).mean() > 1


def test_flux_control_in_pytorch_draws_the_same(
    tiny_model: Get, flux: Callable[[Request], np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    with cut_short():
        export_model(ExportOptions(source=str(tiny_model(FLUX)), output=tmp_path / "torch", backend="torch"))
    manifest = read_manifest(tmp_path / "torch")
    pipeline = load_pipeline(tmp_path / "torch", manifest, Execution("cpu"))
    assert (manifest.backend, manifest.family, type(pipeline)) == ("torch", "flux-control", FluxControl)
    batch = [asked(0), asked(3, mask=ellipse())]
    for request, image in zip(batch, together(pipeline, batch), strict=True):
        assert np.abs(image - flux(request)).max() <= 1


PAG_USES = (
    ControlUse("", lines(1)),
    ControlUse("", lines(2), scale=0.5, start=0.2, end=0.8),
    ControlUse("", lines(1), scale=0.0),
)


def test_pag_with_a_controlnet_matches_diffusers(bundle: Get, tiny_model: Get) -> None:
    pipeline = load_pipeline(bundle(PAG), read_manifest(bundle(PAG)), Execution("cpu"))
    assert isinstance(pipeline, OpaquePipeline)
    pipe = oracle(tiny_model(PAG), "StableDiffusionXLControlNetPAGImg2ImgPipeline")
    batch = [dataclasses.replace(asked(index), controls=(use,)) for index, use in enumerate(PAG_USES)]
    images = [alone(pipeline, request) for request in batch]
    for request, image in zip(batch, images, strict=True):
        (use,) = request.controls
        more = {"controlnet_conditioning_scale": use.scale, "control_guidance_start": use.start, "control_guidance_end": use.end}
        assert np.abs(image - drawn_by(pipe, request, **more)[0]).max() <= 1
    unmoved = alone(pipeline, dataclasses.replace(batch[0], controls=(PAG_USES[2],)))
    assert np.abs(images[0] - unmoved).mean() > 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Get) -> Iterator[RunningServer]:
    """A server of both models, with HTTP and KServe."""
    models = tmp_path_factory.mktemp("models")
    for name in (FLUX, PAG):
        (models / name).symlink_to(bundle(name))
    settings = {"models": models, "default_model": FLUX, "execution": Execution("cpu"), "http_port": 0, "kserve": True}
    with running_backend(local, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


ASKED: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 5, "strength": 0.8, "guidance_scale": 3.5, "seed": 11}


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)), int)


def test_every_api_sends_the_image_that_a_model_reads_by_itself(
    server: RunningServer, client: Client, flux: Callable[[Request], np.ndarray[Any, Any]]
) -> None:
    """gRPC, TransformBatch, HTTP as a file and as JSON, and KServe: one image."""
    first = client.transform(source(*SIZE), controls=[Control(None, lines(0))], **ASKED).images[0].data
    assert np.abs(pixels(first) - flux(asked(0))).max() <= 1
    batch: Any = [(source(*SIZE), {**ASKED, "controls": [Control(None, lines(0))], "seed": seed}) for seed in (11, 12)]
    outcomes = {outcome.index: outcome.result for outcome in client.transform_batch(batch)}
    assert outcomes[0] is not None
    assert outcomes[0].images[0].data == first
    file, image = png_of(lines(0)), png_of(source(*SIZE))
    address = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    settings = [("size", "source"), *((name, str(value)) for name, value in ASKED.items())]
    sent: tuple[tuple[str, bytes | str], ...] = (
        ("control_image", file),
        ("control_image[]", address),
        ("controls", json.dumps([{"image": address}])),
    )
    for field in sent:
        answer = ask(server, EDITS, *settings, field, image=image)
        assert answer.status == 200, answer.body
        assert np.array_equal(pixels(base64.b64decode(answer.json["data"][0]["b64_json"])), pixels(first))
    inputs = [image_input(image), text("control_images", file, (1,)), text("prompt", "a lake")]
    numbers = {"num_inference_steps": 5, "strength": 0.8, "guidance_scale": 3.5, "seed": 11}
    with client_of(server) as triton:
        answered = triton.infer(FLUX, inputs, parameters=numbers)
    assert np.array_equal(pixels(answered.as_numpy("images").flatten()[0]), pixels(first))


def test_models_list_required_control_images(server: RunningServer, client: Client) -> None:
    models = {model.id: model for model in (*client.models(), client.load_model(PAG))}
    listed = {name: {field.name for field in model.fields if "controls" in field.name} for name, model in models.items()}
    assert listed == {FLUX: {"controls"}, PAG: {"controls", "controls.scale", "controls.start", "controls.end"}}
    for model in models.values():
        field = model.field("controls")
        assert field is not None
        assert (field.required, field.max_count, model.controlnets) == (True, 1, ())
    (found,) = (model for model in ask_for_models(server) if model["id"] == FLUX)
    assert next(field for field in found["fields"] if field["name"] == "controls")["required"] is True


def ask_for_models(server: RunningServer) -> Any:
    return get(server, "/v1/models").json["data"]


@pytest.mark.parametrize(
    ("model", "controls", "field"),
    [
        (FLUX, [], "controls"),
        (PAG, [], "controls"),
        (FLUX, [Control(None, lines(0)), Control(None, lines(1))], "controls"),
        (FLUX, [Control("canny", lines(0))], r"controls\[0\]\.model"),
        (PAG, [Control(FLUX, lines(0))], r"controls\[0\]\.model"),
        (FLUX, [Control(None, lines(0), scale=0.5)], r"controls\[0\]\.scale"),
        (FLUX, [Control(None, lines(0), end=0.5)], r"controls\[0\]\.end"),
        (PAG, [Control(None, lines(0), control_mode=1)], r"controls\[0\]\.control_mode"),
        (PAG, [Control(None, lines(0), scale=11.0)], r"controls\[0\]\.scale"),
    ],
)
def test_wrong_controls_are_named(model: str, controls: list[Control], field: str, client: Client) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        client.transform(source(*SIZE), model=model, controls=controls, num_inference_steps=2)


def test_pag_takes_a_scale_over_every_api(server: RunningServer, client: Client) -> None:
    settings = {"model": PAG, "prompt": "a lake", "num_inference_steps": 4, "seed": 3}
    control = Control(None, lines(1), scale=0.5, start=0.25, end=0.75)
    first = client.transform(source(*SIZE), controls=[control], **settings).images[0].data  # type: ignore[arg-type]
    form = [("size", "source"), *((name, str(value)) for name, value in settings.items())]
    fields: list[tuple[str, bytes | str]] = [("controls", ":0.5:0.25:0.75"), ("control_image", png_of(lines(1)))]
    answer = ask(server, EDITS, *form, *fields, image=png_of(source(*SIZE)))
    assert answer.status == 200, answer.body
    assert np.array_equal(pixels(base64.b64decode(answer.json["data"][0]["b64_json"])), pixels(first))


def test_the_command_sends_and_reproduces_the_image(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", f"127.0.0.1:{server.port}"]
    house, edges, new = (str(tmp_path / f"{name}.png") for name in ("house", "edges", "new"))
    source(*SIZE).save(house)
    lines(0).save(edges)
    command = ["transform", house, "--output", new, "--steps", "4", "--quiet", *target]
    assert main([*command, "--control", edges]) == 0
    record = read_provenance(Path(new).read_bytes()) or {}
    assert [(use["model"], use["bundle_digest"], use["scale"]) for use in record["controls"]] == [("", "", 1.0)]
    again = ["reproduce", new, "--image", house, "--control", edges, "--max-difference", "0", *target]
    assert main(again) == 0
    assert "identical" in capsys.readouterr().out
    assert main([*command, "--model", PAG, "--control", f"{edges},scale=0.5,end=0.8"]) == 0
    assert main([*again, "--max-difference", "0"]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(command) != 0
    assert "controls: this model reads a control image" in capsys.readouterr().err


def test_previews_and_deadlines_work_with_a_control_image(client: Client) -> None:
    controls = [Control(None, lines(0))]
    with client.transform_stream(source(*SIZE), controls=controls, preview_interval=2, **ASKED) as events:
        steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == [1, 2, 3, 4]
    with pytest.raises(DeadlineExceeded):
        client.transform(source(*SIZE), controls=controls, timeout=0.001, **ASKED)
