"""OpenAI's client for Node, unchanged, against the HTTP front."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakePipeline
from http_calls import port_of, serving
from kserve_calls import Gate, ending
from other_clients import CLIENTS, IMAGE, PATIENCE, environment
from running import RunningServer

MODULE = (CLIENTS / "node" / "node_modules" / "openai" / "index.mjs").as_uri()
HEAD = f"""\
import fs from "node:fs";
import OpenAI from "{MODULE}";

const [port, file] = process.argv.slice(1);
const client = new OpenAI({{baseURL: `http://localhost:${{port}}/v1`, apiKey: "none", maxRetries: 0}});
const image = () => fs.createReadStream(file);
"""

Js = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def front(pipeline: FakePipeline) -> Iterator[RunningServer]:
    with serving(pipelines={"m": pipeline}) as made:
        yield made


@pytest.fixture
def js(node: Path, front: RunningServer) -> Js:
    """Runs a program, and gives the lines that it prints."""

    def run(program: str) -> list[str]:
        command = [str(node), "--input-type=module", "--eval", HEAD + program, "--", str(port_of(front)), str(IMAGE)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_an_image_is_edited(js: Js, pipeline: FakePipeline) -> None:
    program = """
const more = {n: 2, size: "16x8", seed: 7, strength: 0.5};
const result = await client.images.edit({image: image(), prompt: "a lake", model: "m", ...more});
console.log(result.data.length, result.output_format, result.data[0].seed);
console.log(Buffer.from(result.data[0].b64_json, "base64").subarray(1, 4).toString());
"""
    assert js(program) == ["2 png 7", "PNG"]
    asked = pipeline.prepared[-1].request
    assert (asked.prompt, asked.strength, asked.seeds, asked.image.size) == ("a lake", 0.5, (7, 8), (16, 8))


def test_a_stream_has_previews_and_the_result(js: Js) -> None:
    program = """
const stream = await client.images.edit({image: image(), prompt: "a lake", model: "m", stream: true, partial_images: 2});
for await (const event of stream)
    if (event.type === "image_edit.partial_image") console.log("preview", event.partial_image_index);
    else if (event.type === "image_edit.completed") console.log("completed", event.b64_json.length > 0);
"""
    assert js(program) == ["preview 0", "preview 1", "completed true"]


def test_models_and_variations(js: Js) -> None:
    program = """
for await (const model of client.models.list()) console.log(model.id, model.state);
console.log((await client.images.createVariation({image: image(), model: "m"})).data.length);
"""
    assert js(program) == ["m ready", "1"]


def test_errors_name_the_problem(js: Js) -> None:
    program = """
for (const more of [{mask: image()}, {n: 9}, {model: "nope"}])
    try { await client.images.edit({image: image(), prompt: "a lake", model: "m", ...more}); }
    catch (error) { console.log(error.constructor.name, error.status, error.code, error.param); }
"""
    assert js(program) == [
        "BadRequestError 400 INVALID_FIELD mask",
        "BadRequestError 400 INVALID_FIELD n",
        "NotFoundError 404 MODEL_NOT_FOUND model",
    ]


def test_aborted_request_frees_the_device(js: Js, front: RunningServer, pipeline: FakePipeline) -> None:
    done, gate = len(pipeline.batches), Gate(pipeline)
    program = """
const controller = new AbortController();
const {signal} = controller;
const stream = await client.images.edit({image: image(), prompt: "a lake", model: "m", stream: true}, {signal});
for await (const event of stream) if (event.type === "image_edit.started") break;
controller.abort();
console.log("aborted");
"""
    with ending() as calls:
        assert js(program) == ["aborted"]
        assert calls.wait("edits") == "CANCELLED"
    gate.open()
    pipeline.before_call = lambda: None
    assert len(pipeline.batches) - done <= 1
