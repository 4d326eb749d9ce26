"""Which fields a model takes: what GetModel lists is what requests may set, with these defaults and bounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from http_calls import VARIATIONS, ask, get, serving
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.api.request_fields import fields_of, is_set
from img2img_server.config import ServerConfig
from img2img_server.engine.request import Request
from img2img_server.support.model_fields import GUIDED, OWN_CONTROL, OWN_CONTROLNET, FieldRule, ModelFields
from img2img_server.support.source_rule import MaskUse, SourceRule
from messages import failure, png, request
from running import running, store

EVERYTHING: ModelFields = {**GUIDED, "true_cfg_scale": FieldRule(4.0)}
"""The fields of a model that takes all that this server knows."""

SET: dict[str, Any] = {
    "negative_prompt": "fog",
    "strength": 1.0,
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "reference_images": [pb.ImageSource(data=png())],
    "loras": [pb.Lora(id="woodcut")],
    "controls": [pb.Control(model=pb.ModelReference(path="canny"), image=pb.ImageSource(data=png()))],
    "image_prompts": [pb.ImagePrompt(adapter="plus", images=[pb.ImageSource(data=png())])],
    "scheduler": "DDIMScheduler",
    "mask": pb.ImageSource(data=png()),
    "mask_blur": 1.0,
    "mask_invert": True,
    "mask_paste": False,
}
"""A value for each field that not every model takes."""


class Model:
    """A server with one model, which takes `fields`."""

    def __init__(self, channel: grpc.Channel, pipeline: FakePipeline) -> None:
        self.pipeline = pipeline
        self._images, self._models = ImageToImageServiceStub(channel), ModelServiceStub(channel)

    @property
    def fields(self) -> dict[str, model_pb2.RequestField]:
        return {field.name: field for field in self._models.GetModel(model_pb2.GetModelRequest(id="m")).model.fields}

    def run(self, **values: Any) -> Request:
        """The request that the model gets."""
        self._images.Transform(pb.TransformRequest(image=pb.ImageSource(data=png()), **values))
        return self.pipeline.prepared[-1].request

    def refused(self, **values: Any) -> str:
        """The field that a request is refused by."""
        code, details = failure(lambda: self.run(**values))
        assert (code, details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), details
        return str(details["field"])


@contextmanager
def serving_model(
    fields: ModelFields, schedulers: tuple[str, ...] = FakePipeline.schedulers, mask: MaskUse = "none"
) -> Iterator[Model]:
    pipeline = FakePipeline()
    pipeline.fields, pipeline.schedulers, pipeline.source_rule = fields, schedulers, SourceRule(mask=mask)
    with (
        running(lambda: store(m=pipeline)) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield Model(channel, pipeline)


@pytest.fixture(scope="module")
def full() -> Iterator[Model]:
    with serving_model(EVERYTHING) as model:
        yield model


@pytest.fixture(scope="module")
def bare() -> Iterator[Model]:
    with serving_model({}, schedulers=()) as model:
        yield model


def test_the_table_has_every_field_of_the_contract() -> None:
    pipeline = FakePipeline()
    pipeline.fields, pipeline.source_rule = {name: FieldRule() for name in SET}, SourceRule(mask="optional")
    listed = {name.partition(".")[0] for name in fields_of(ServerConfig(), pipeline)}
    assert listed == {field.name for field in pb.TransformRequest.DESCRIPTOR.fields}
    pipeline.fields, pipeline.schedulers, pipeline.source_rule = {}, (), SourceRule()
    lacking = fields_of(ServerConfig(), pipeline)
    assert listed - {name.partition(".")[0] for name in lacking} == set(SET)


def test_the_table_is_made_once_for_models_that_take_the_same_fields() -> None:
    pipeline, other = FakePipeline(), FakePipeline()
    first = fields_of(ServerConfig(), pipeline)
    assert fields_of(ServerConfig(), other) is first
    other.fields = {**GUIDED, "strength": FieldRule(0.5)}
    assert (fields_of(ServerConfig(), other)["strength"].default, first["strength"].default) == (0.5, 0.8)
    assert fields_of(ServerConfig(max_steps=7), pipeline)["num_inference_steps"].maximum == 7


@pytest.mark.parametrize(("own", "numbers"), [(OWN_CONTROL, False), (OWN_CONTROLNET, True)])
def test_a_model_that_reads_a_control_image_by_itself_needs_exactly_one(own: ModelFields, numbers: bool) -> None:
    def control(**values: Any) -> pb.Control:
        return pb.Control(image=pb.ImageSource(data=png()), **values)

    with serving_model({**GUIDED, **own}) as model:
        listed = model.fields
        assert (listed["controls"].required, listed["controls"].max_count) == (True, 1)
        assert {name for name in listed if name.startswith("controls.")} == (
            {"controls.scale", "controls.start", "controls.end"} if numbers else set()
        )
        (use,) = model.run(controls=[control()]).controls
        assert (use.model, use.scale, use.start, use.end, use.mode) == ("", 1.0, 0.0, 1.0, None)
        model.run(controls=[control(model=pb.ModelReference(), scale=1.0, start=0.0, end=1.0)])
        assert model.refused() == "controls"
        assert model.refused(controls=[control(), control()]) == "controls"
        assert model.refused(controls=[pb.Control()]) == "controls[0].image"
        assert model.refused(controls=[control(model=pb.ModelReference(path="canny"))]) == "controls[0].model"
        assert model.refused(controls=[control(control_mode=0)]) == "controls[0].control_mode"
        for name, value in (("scale", 0.5), ("start", 0.1), ("end", 0.9)):
            if numbers:
                assert getattr(model.run(controls=[control(**{name: value})]).controls[0], name) == value
            else:
                assert model.refused(controls=[control(**{name: value})]) == f"controls[0].{name}"


def test_described_defaults_and_bounds_match_request_parsing(full: Model) -> None:
    fields = full.fields
    assert [name for name, field in fields.items() if field.required] == ["image"]
    asked = full.run()
    for name, value in (
        ("prompt", asked.prompt),
        ("strength", asked.strength),
        ("num_inference_steps", asked.num_inference_steps),
        ("guidance_scale", asked.guidance_scale),
        ("true_cfg_scale", asked.true_cfg_scale),
        ("image_count", len(asked.seeds)),
    ):
        assert getattr(fields[name], str(fields[name].WhichOneof("default"))) == value
    numbers = [
        field for field in fields.values() if field.HasField("minimum") and field.HasField("maximum") and "." not in field.name
    ]
    assert {field.name for field in numbers} > {"strength", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed"}
    whole = {"num_inference_steps", "seed", "image_count", "preview_interval"}
    for field in numbers:
        kind = int if field.name in whole else float
        least, most = kind(field.minimum), kind(field.maximum)
        usual: dict[str, Any] = {"num_inference_steps": 100, "strength": 0.02, "negative_prompt": ""}
        for value in (least, most):
            if value == least and field.exclusive_minimum:
                assert full.refused(**{**usual, field.name: value}) == field.name
            else:
                full.run(**{**usual, "strength": 1.0, field.name: value})
        assert full.refused(**{**usual, field.name: least - 1}) == field.name
        if field.name != "seed":  # whose largest is no double
            assert full.refused(**{**usual, field.name: most + 1}) == field.name
    for name in ("prompt", "negative_prompt"):
        full.run(**{name: "a" * int(fields[name].maximum)})
        assert full.refused(**{name: "a" * (int(fields[name].maximum) + 1)}) == name
    assert full.refused(width=int(fields["width"].minimum) - 1) == "width"


@pytest.mark.parametrize("name", SET)
def test_unsupported_field_is_not_listed_and_refused(bare: Model, name: str) -> None:
    assert name not in bare.fields
    assert bare.refused(**{name: SET[name]}) == name


def test_unset_and_empty_fields_are_accepted(bare: Model) -> None:
    """The default strength shortens nothing: one step is run of one, and all of several."""
    assert not is_set(request(negative_prompt=""), "negative_prompt")
    for steps in (1, 7):
        asked = bare.run(num_inference_steps=steps, negative_prompt="", scheduler="")
        assert bare.pipeline.prepared[-1].step_count == steps
        assert (asked.strength, asked.guidance_scale, asked.true_cfg_scale) == (1.0, 1.0, None)


def test_a_models_own_defaults_are_listed_and_used() -> None:
    with serving_model({"guidance_scale": FieldRule(3.5), "num_inference_steps": FieldRule(4)}) as model:
        assert model.fields["guidance_scale"].default_number == 3.5
        assert model.fields["num_inference_steps"].default_number == 4
        asked = model.run()
        assert (asked.guidance_scale, asked.num_inference_steps) == (3.5, 4)


def test_a_field_that_needs_a_mask_is_refused_without_one() -> None:
    """Such as the strength of models that edit, and Kontext's reference; without a mask the model's own default is not used
    either."""
    fields = {"strength": FieldRule(0.6, needs="mask"), "reference_images": FieldRule(needs="mask", max_count=1)}
    one = pb.ImageSource(data=png())
    with serving_model(fields, mask="optional") as model:
        assert (model.fields["strength"].needs, model.fields["strength"].default_number) == ("mask", 0.6)
        assert (model.fields["reference_images"].needs, model.fields["reference_images"].max_count) == ("mask", 1)
        assert model.fields["mask_blur"].needs == "mask"
        assert model.run().strength == 1.0
        assert model.refused(strength=0.6) == "strength"
        assert model.refused(reference_images=[one]) == "reference_images"
        assert model.run(mask=one).strength == 0.6
        asked = model.run(mask=one, strength=0.3, reference_images=[one])
        assert (asked.strength, len(asked.references)) == (0.3, 1)
        assert model.refused(mask=one, reference_images=[one, one]) == "reference_images"
        assert model.refused(mask=one, strength=0.0) == "strength"


def test_true_cfg_scale_and_negative_prompt_need_each_other(full: Model) -> None:
    assert full.refused(true_cfg_scale=2.0) == "true_cfg_scale"
    for negative in ("", "fog"):
        assert full.run(true_cfg_scale=2.0, negative_prompt=negative).true_cfg_scale == 2.0
    assert full.run(true_cfg_scale=1.0, negative_prompt="fog").true_cfg_scale == 1.0, "disabled on purpose"
    assert full.run(negative_prompt="fog").true_cfg_scale == 4.0
    with serving_model({"negative_prompt": FieldRule(), "true_cfg_scale": FieldRule(1.0)}) as model:
        assert model.refused(negative_prompt="fog") == "negative_prompt"
        assert model.run(negative_prompt="").negative_prompt == ""
        assert model.run(negative_prompt="fog", true_cfg_scale=3.0).true_cfg_scale == 3.0


def test_defaults_of_openais_api_do_not_refuse_a_model_without_the_fields() -> None:
    pipeline, editor = FakePipeline(), FakePipeline()
    pipeline.fields = {}
    editor.fields, editor.source_rule = {"strength": FieldRule(0.6, needs="mask")}, SourceRule(mask="optional")
    with serving(pipelines={"m": pipeline, "editor": editor}) as server:
        assert ask(server, VARIATIONS, ("model", "editor")).status == 200, "it has a strength with a mask only"
        assert editor.prepared[-1].request.strength == 1.0
        for stream in ("false", "true"):
            answer = ask(server, VARIATIONS, ("model", "m"), ("stream", stream))
            assert answer.status == 200, answer.body
            asked = pipeline.prepared[-1].request
            assert (asked.prompt, asked.strength, asked.guidance_scale) == ("", 1.0, 1.0)
        refused = ask(server, VARIATIONS, ("model", "m"), ("strength", "0.5"))
        assert (refused.status, refused.error["param"]) == (400, "strength")
        fields = {field["name"]: field for field in get(server, "/v1/models/m").json["fields"]}
        assert "strength" not in fields
        assert fields["num_inference_steps"] == {"name": "num_inference_steps", "default": 25, "minimum": 1, "maximum": 100}
