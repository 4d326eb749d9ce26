"""Options that the caller sets are sent unchanged; omitted options stay unset."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from fake_image_service import FakeService, image_bytes
from img2img.v1 import image_to_image_pb2 as messages
from img2img_client import Asset, Client, Completed, FieldInfo, ModelInfo, ModelReference, TransformOptions, taken_options
from img2img_client.options import MAX_MESSAGE_BYTES
from PIL import Image


def test_every_option_is_sent_as_set(client: Client, service: FakeService) -> None:
    client.transform(
        b"file",
        model=ModelReference("owner/name", "folder", "fp16", "main", ("*.json", "*.txt"), ("*.bin",)),
        prompt="winter",
        negative_prompt="summer",
        strength=0.5,
        num_inference_steps=30,
        guidance_scale=4.5,
        seed=2**62,
        image_count=3,
        width=640,
        height=480,
        format="webp",
        quality=75,
        scheduler="DPM++ 2M Karras",
        preview_interval=4,
        as_asset=True,
        mask=b"mask",
        mask_blur=2.5,
        mask_invert=True,
        mask_paste=False,
        reference_images=[b"one", "https://host/two.png"],
        true_cfg_scale=3.5,
    )
    assert service.requests == [
        messages.TransformRequest(
            model=messages.ModelReference(
                repo_id="owner/name",
                path="folder",
                variant="fp16",
                revision="main",
                allow_patterns=["*.json", "*.txt"],
                ignore_patterns=["*.bin"],
            ),
            prompt="winter",
            negative_prompt="summer",
            image=messages.ImageSource(data=b"file"),
            strength=0.5,
            num_inference_steps=30,
            guidance_scale=4.5,
            seed=2**62,
            image_count=3,
            output=messages.OutputOptions(format=messages.OUTPUT_FORMAT_WEBP, quality=75, as_asset=True),
            width=640,
            height=480,
            scheduler="DPM++ 2M Karras",
            preview_interval=4,
            mask=messages.ImageSource(data=b"mask"),
            mask_blur=2.5,
            mask_invert=True,
            mask_paste=False,
            reference_images=[messages.ImageSource(data=b"one"), messages.ImageSource(uri="https://host/two.png")],
            true_cfg_scale=3.5,
        )
    ]


def test_options_cover_every_field_of_the_contract() -> None:
    from img2img_client import TransformOptions

    fields = {field.name for field in messages.TransformRequest.DESCRIPTOR.fields} - {"image", "output"}
    inner = {field.name for of in (messages.OutputOptions, messages.Fidelity) for field in of.DESCRIPTOR.fields} - {"level"}
    assert set(TransformOptions.__annotations__) == fields | inner


def test_a_bound_is_a_level_a_psnr_or_an_ssim(client: Client, service: FakeService) -> None:
    for options in ({"fidelity": "exact"}, {"fidelity": "high"}, {"fidelity": "fast"}, {"min_psnr_db": 0.0}, {"min_ssim": 0.9}):
        client.transform(b"file", **options)
    levels = (messages.FIDELITY_LEVEL_EXACT, messages.FIDELITY_LEVEL_HIGH, messages.FIDELITY_LEVEL_FAST)
    sent = [request.fidelity for request in service.requests]
    assert sent[:3] == [messages.Fidelity(level=level) for level in levels]
    assert sent[3:] == [messages.Fidelity(min_psnr_db=0.0), messages.Fidelity(min_ssim=0.9)]
    with pytest.raises(ValueError, match="fidelity and min_ssim are both a bound"):
        client.transform(b"file", fidelity="fast", min_ssim=0.9)
    with pytest.raises(ValueError, match="fidelity must be one of exact, high, fast"):
        client.transform(b"file", fidelity="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("streamed", [False, True])
def test_omitted_options_stay_unset(client: Client, service: FakeService, streamed: bool) -> None:
    if streamed:
        list(client.transform_stream(b"file", prompt=None, seed=None))
    else:
        client.transform(b"file", prompt=None, seed=None)
    assert [field.name for field, _ in service.requests[0].ListFields()] == ["image"]


def test_zero_and_empty_values_are_sent(client: Client, service: FakeService) -> None:
    client.transform(b"file", prompt="", guidance_scale=0, seed=0, width=0)
    set_fields = {field.name for field, _ in service.requests[0].ListFields()}
    assert set_fields == {"image", "prompt", "guidance_scale", "seed", "width"}


def test_a_string_model_is_its_id(client: Client, service: FakeService) -> None:
    client.transform(b"file", model="demo")
    assert service.requests[0].model == messages.ModelReference(path="demo")


def test_quality_without_a_format_leaves_the_format_unset(client: Client, service: FakeService) -> None:
    client.transform(b"file", quality=50)
    assert service.requests[0].output == messages.OutputOptions(quality=50)


def test_paths_bytes_and_addresses_arrive_untouched(client: Client, service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(image_bytes(image_format="JPEG"))
    for image in (path, str(path), path.read_bytes()):
        client.transform(image)
    assert [request.image.data for request in service.requests] == [path.read_bytes()] * 3
    addresses = ["data:image/png;base64,AAAA", "asset:1f", "https://example.org/a.png", "http://example.org/a", "file:///a.png"]
    for address in addresses:
        client.transform(address)
    assert [request.image.uri for request in service.requests[3:]] == addresses


def test_asset_is_sent_by_its_id(client: Client, service: FakeService) -> None:
    client.transform(Asset("1f", "image/png", 5, "ab"))
    assert service.requests[0].image == messages.ImageSource(asset_id="1f")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pillow_images_arrive_without_loss(client: Client, service: FakeService, mode: str) -> None:
    image = Image.effect_noise((9, 5), 80).convert(mode)
    client.transform(image)
    with Image.open(io.BytesIO(service.requests[0].image.data)) as arrived:
        assert (arrived.format, arrived.mode) == ("PNG", mode)
        assert arrived.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_large_images_are_sent_and_received(client: Client, service: FakeService) -> None:
    service.script[-1].completed.images[0].data = b"x" * 20_000_000
    *_, completed = client.transform_stream(b"y" * 20_000_000)
    assert isinstance(completed, Completed)
    assert len(service.requests[0].image.data) == len(completed.result.images[0].data) == 20_000_000


def test_invalid_requests_are_not_sent(client: Client, service: FakeService, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.transform(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="image must be a path"):
        client.transform(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown option 'steps'"):
        client.transform(b"file", steps=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="png, jpeg, webp, not 'gif'"):
        client.transform(b"file", format="gif")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="range"):
        client.transform(b"file", width=2**40)
    with pytest.raises(ValueError, match="upload the image first"):
        client.transform(bytes(MAX_MESSAGE_BYTES))
    with pytest.raises(FileNotFoundError):
        client.transform_stream(tmp_path / "missing.png")
    assert service.requests == []


def test_taken_options_drops_options_the_model_does_not_support() -> None:
    def info(name: str, *fields: str, is_default: bool = False) -> ModelInfo:
        known = tuple(FieldInfo(field) for field in fields)
        return ModelInfo(name, ModelReference(), "", "", "", "", "", "ready", 8, is_default, fields=known)

    edits, usual, asleep = info("edits", "prompt", "image", is_default=True), info("usual", "prompt", "strength"), info("asleep")
    options: TransformOptions = {"prompt": "a lake", "strength": 0.5, "format": "jpeg", "as_asset": True}
    rest: TransformOptions = {"prompt": "a lake", "format": "jpeg", "as_asset": True}
    models = (edits, usual, asleep)
    assert taken_options(options, models) == rest, "the default model's"
    assert taken_options(options, [edits]) == rest
    for name in ("usual", "asleep", "unknown"):
        assert taken_options({**options, "model": name}, models) == {**options, "model": name}
    by_reference: TransformOptions = {**options, "model": ModelReference(path="edits")}
    assert "strength" not in taken_options(by_reference, models)
    masked = replace(edits, fields=(*edits.fields, FieldInfo("mask"), FieldInfo("strength", needs="mask")))
    assert taken_options(options, [masked]) == rest, "a strength needs a mask"
    for mask, taken in ((None, False), (b"mask", True)):
        asked: TransformOptions = {**options, "mask": mask}
        assert ("strength" in taken_options(asked, [masked])) is taken
    unclear: TransformOptions = {**options, "model": ModelReference(repo_id="acme/edits")}
    assert taken_options(unclear, models) == unclear
