"""Messages between processes survive pickling: errors with all attributes, images unchanged."""

import inspect
import pickle
from collections.abc import Iterator
from copy import copy
from dataclasses import fields, replace
from typing import Any

import pytest
from fakes import FakePipeline, make_request
from img2img_server.api.interceptors import to_status
from img2img_server.backends.ray import roster
from img2img_server.backends.ray.messages import Card, ModelQuery, RemoteRequest, ReplicaLost, check_lost
from img2img_server.bundle.image_adapters import PromptKind
from img2img_server.bundle.image_encoders import EncoderWidths
from img2img_server.bundle.manifest import Component
from img2img_server.engine.request import Completed, Failed, Mask, Progress, Request, RequestWarning, Started, Timings
from img2img_server.errors import DeadlineUnmeetable, EngineStuck, InvalidField, QueueFull, ServerError, ShuttingDown
from img2img_server.models.registry import KINDS, ModelState
from img2img_server.support.call import Call
from img2img_server.support.model_fields import FieldRule
from img2img_server.support.source_rule import EditSize, SourceRule
from PIL import Image
from running import store

ARGUMENTS = {
    "message": "no luck", "field": "image.data", "description": "it is too small", "retry_after": 2.5, "estimate": 12.5,
    "allowed": "POST",
}  # fmt: skip


def _kinds(kind: type[ServerError] = ServerError) -> Iterator[type[ServerError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _make(kind: type[ServerError]) -> ServerError:
    if kind.__init__ is Exception.__init__:
        return kind("no luck")
    return kind(*(ARGUMENTS[name] for name in inspect.signature(kind).parameters))


@pytest.mark.parametrize("kind", sorted(set(_kinds()), key=str))
def test_errors_survive_pickling(kind: type[ServerError]) -> None:
    error = _make(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy(error)):  # noqa: S301 - what this test has just written
        assert type(again) is kind
        assert again is not error
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
        assert to_status(again, "id") == to_status(error, "id")


def test_pickled_errors_include_some_with_several_attributes() -> None:
    made = [_make(kind) for kind in (InvalidField, QueueFull, DeadlineUnmeetable)]
    assert vars(made[0]) == {"field": "image.data", "description": "it is too small"}
    assert [vars(error) for error in made[1:]] == [{"retry_after": 2.5}, {"estimate": 12.5}]


def _sent(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))  # noqa: S301 - what this test has just written


def test_request_survives_pickling_with_its_remaining_seconds() -> None:
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    request = make_request(
        image=image, prompt="p", negative_prompt="n", strength=0.5, guidance_scale=3.0, seeds=(2**63 - 1, 4), deadline=107.0,
        scheduler="DDIMScheduler", preview_interval=2, image_digest=b"digest", client="c", id="i", follow=False, cache_scope="s",
        true_cfg_scale=2.5, references=(image.rotate(90), image), reference_digests=(b"one", b"two"),
    )  # fmt: skip
    message = RemoteRequest.of(request, now=100.0)
    assert message.model == request.model
    again = _sent(message).received(now=5000.0)
    assert again.deadline == 5007.0
    assert (again.image.mode, again.image.size, again.image.tobytes()) == ("RGB", (24, 16), image.tobytes())
    for field in fields(Request):
        if field.name not in ("image", "deadline"):
            assert getattr(again, field.name) == getattr(request, field.name), field.name
    assert _sent(RemoteRequest.of(make_request(), 1.0)).received(2.0).deadline is None


def test_events_arrive_unchanged() -> None:
    image = Image.effect_noise((8, 24), 90).convert("RGB")
    completed = Completed((image, image.rotate(180)), Timings(1, 2, 3, 4), (RequestWarning("prompt", "cut", "PROMPT_TRUNCATED"),))
    again = check_lost(_sent(completed))
    assert isinstance(again, Completed)
    assert (again.timings, again.warnings) == (completed.timings, completed.warnings)
    assert [each.tobytes() for each in again.images] == [each.tobytes() for each in completed.images]
    step = _sent(Progress(3, 4, 1.5, image))
    assert (step.step, step.step_count, step.eta, step.preview.tobytes()) == (3, 4, 1.5, image.tobytes())
    assert _sent(Progress(1, 4)) == Progress(1, 4)
    assert _sent(Started(4)) == Started(4)


def test_pickled_images_take_three_bytes_per_pixel() -> None:
    message = pickle.dumps(RemoteRequest.of(make_request(image=Image.new("RGB", (64, 48), "red")), 0.0))
    assert 64 * 48 * 3 <= len(message) < 64 * 48 * 3 + 2000


@pytest.mark.parametrize("kind", [ShuttingDown, EngineStuck])
def test_replica_shutdown_errors_count_as_replica_losses(kind: type[ServerError]) -> None:
    with pytest.raises(ReplicaLost, match="no luck"):
        check_lost(Failed(_make(kind)))


def test_other_errors_are_not_replica_losses() -> None:
    error = _make(InvalidField)
    assert check_lost(Failed(error)) == Failed(error)


def test_cards_describe_model_fields_and_edit_mode() -> None:
    pipeline = FakePipeline()
    pipeline.fields = {"reference_images": FieldRule(), "true_cfg_scale": FieldRule(4.0)}
    pipeline.source_rule = SourceRule(keeps_size=True, edit_size=EditSize(preferred=((64, 32),), by_last=True))
    (model,) = store(m=pipeline)
    card = _sent(Card.of(model))
    assert (card.request_fields, card.source_rule) == (pipeline.fields, pipeline.source_rule)


def test_cards_say_which_companions_fit() -> None:
    """So a front chooses them before a replica has loaded them."""
    (model,) = store(m=FakePipeline())
    prompts = PromptKind((32, 64), 48)
    kinds = {"control_kind": (("family", "Flux"),), "encoder_widths": EncoderWidths(24, 32), "prompt_kind": prompts}
    assert kinds.keys() == KINDS.keys()
    merged = roster._model([_sent(Card.of(replace(model, **kinds)))], 1)  # type: ignore[arg-type]
    assert {name: getattr(merged, name) for name in kinds} == kinds


def test_card_size_does_not_depend_on_the_manifest() -> None:
    """Each front gets one of every model from every replica, twice a second."""
    (model,) = store(m=FakePipeline())
    manifest = model.manifest
    assert manifest is not None
    parts = tuple(Component(f"part{n}", "fp32") for n in range(50))
    long = replace(manifest, components=parts, files={f"f{n}": "0" * 64 for n in range(500)}, tools={"torch": "1" * 500})
    card = Card.of(replace(model, manifest=long))
    assert len(pickle.dumps(card)) < 1500
    assert card.manifest is not None
    assert pickle.loads(pickle.dumps(card)).manifest.digest == long.digest  # noqa: S301 - what this test has just written
    assert (card.manifest.family, card.manifest.backend, card.manifest.precision) == (
        manifest.family,
        manifest.backend,
        manifest.precision,
    )


def test_card_has_the_fields_needed_to_parse_requests() -> None:
    model = store(m=FakePipeline()).get("m")
    card: Card = pickle.loads(pickle.dumps(Card.of(model)))  # noqa: S301 - what this test has just written
    assert (card.id, card.state, card.runs_on, card.size_multiple) == ("m", ModelState.READY, "fake:cpu", 8)
    assert card.schedulers == FakePipeline.schedulers
    assert card.manifest is not None
    assert (card.manifest.source.repo_id, card.manifest.verification.passed) == ("acme/m", True)
    assert pickle.loads(pickle.dumps(ModelQuery(Call("m", "i"), name="m"))).name == "m"  # noqa: S301 - likewise


def test_mask_survives_pickling_unchanged() -> None:
    mask = Mask(Image.radial_gradient("L").resize((64, 48)), b"digest", paste=False)
    request = make_request(image=Image.new("RGB", (64, 48), "red"), mask=mask)
    again = pickle.loads(pickle.dumps(RemoteRequest.of(request, 0.0))).received(0.0).mask  # noqa: S301 - just written
    assert (again.image.mode, again.image.tobytes()) == ("L", mask.image.tobytes())
    assert (again.digest, again.paste) == (b"digest", False)


def test_card_says_whether_the_model_accepts_a_mask() -> None:
    pipeline = FakePipeline()
    pipeline.source_rule = SourceRule(mask="required")
    (model,) = store(m=pipeline)
    assert Card.of(model).source_rule.mask == "required"
