"""The Node client's programs against a real server."""

import re
from dataclasses import replace
from pathlib import Path

from fakes import FakePipeline
from img2img_server.bundle.controls import FAMILY
from img2img_server.config import ImageAdapterFolder
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.model_fields import CONTROLNETS, FieldRule
from other_clients import IMAGE, PATIENCE, STEPS, HeldPipeline, Run, Secured, failed, holding, started, succeeded
from PIL import Image, ImageChops
from prompting import ADAPTERS, image_encoder, model, write_adapters
from running import RunningServer, manifest, running, store


def same(one: Path, other: Path) -> bool:
    with Image.open(one) as first, Image.open(other) as second:
        return ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getbbox() is None


def test_models_are_listed(run: Run, server: RunningServer) -> None:
    assert succeeded(run("models.js", "--target", f"localhost:{server.port}")) == [
        "m  ready  fake:cpu  stable-diffusion  default"
    ]


def test_a_file_is_transformed(run: Run, server: RunningServer, tmp_path: Path) -> None:
    target = f"localhost:{server.port}"
    lines = succeeded(run("transform.js", IMAGE, "out.png", "--seed", 2**63 - 1, "--steps", 4, target=target))
    # A seed of 63 bits, too large for a JavaScript number, is sent and received exactly.
    assert lines[0] == f"out.png: 256 x 256, seed {2**63 - 1}, m on fake:cpu"
    assert re.fullmatch(r"\d+ ms on the server, request [0-9a-f]{32}", lines[1])
    assert same(tmp_path / "out.png", IMAGE)
    succeeded(run("transform.js", IMAGE, "out.webp", "--steps", 4, target=target))
    with Image.open(tmp_path / "out.webp") as made:
        assert made.format == "WEBP"


def test_stream_reports_each_step_and_previews(run: Run, server: RunningServer, tmp_path: Path) -> None:
    result = run("stream.js", IMAGE, "out.png", "--steps", 5, "--preview-every", 2, target=f"localhost:{server.port}")
    queued, started, *steps, done = succeeded(result)
    assert queued == "queued behind 0"
    assert re.fullmatch(r"started on fake:cpu, seed \d+", started)
    assert steps == ["step 1 of 4", "step 2 of 4, with a preview", "step 3 of 4", "step 4 of 4"]
    assert re.fullmatch(r"out.png after \d+ ms", done)
    with Image.open(tmp_path / "out-step-2.jpg") as preview:
        assert (preview.format, preview.size) == ("JPEG", (4, 4))
    assert same(tmp_path / "out.png", IMAGE)


def test_cancelled_stream_frees_the_device(run: Run, held: tuple[HeldPipeline, str], tmp_path: Path) -> None:
    pipeline, target = held
    result = run("stream.js", IMAGE, "out.png", "--steps", STEPS, "--stop-at", 1, target=target)
    assert (result.returncode, result.stderr.splitlines()[0]) == (1, "CANCELLED: Cancelled on client")
    assert result.stdout.splitlines()[-1] == f"step 1 of {int(STEPS * 0.8)}"
    assert pipeline.end_of_call("TransformStream") == "CANCELLED"
    assert not (tmp_path / "out.png").exists()


REFERENCES = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
const image = { data: await readFile(process.argv[1]) };
const fields = Object.fromEntries((await client.getModel("m")).fields.map((field) => [field.name, field]));
console.log(fields.reference_images.max_count, fields.true_cfg_scale.default_number, "strength" in fields);
await client.transform({ image, reference_images: [image, image], true_cfg_scale: 2.5, negative_prompt: "fog" });
for (const wrong of [{ image, reference_images: [image, { path: "a.png" }] }, { image, strength: 0.5 }]) {
  await client.transform(wrong).catch((error) => console.log(error.message));
}
client.close();
"""


def test_reference_images_and_the_fields_of_a_model(node: Path) -> None:
    pipeline = FakePipeline()
    pipeline.fields = {"reference_images": FieldRule(), "negative_prompt": FieldRule(), "true_cfg_scale": FieldRule(4.0)}
    with (
        running(lambda: store(m=pipeline)) as server,
        started(node, REFERENCES, IMAGE, target=f"localhost:{server.port}") as process,
    ):
        lines = process.stdout.read().splitlines()
        assert process.wait(PATIENCE) == 0
    assert lines[0] == "4 4 false"
    assert lines[1] == "reference_images[1].path is not a field of img2img.v1.ImageSource"
    assert lines[2].startswith("strength: this model has no strength")
    request = pipeline.prepared[-1].request
    assert ([image.size for image in request.references], request.true_cfg_scale) == ([(256, 256)] * 2, 2.5)


CONTROLS = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
const image = { data: await readFile(process.argv[1]) };
const edges = { model: { path: "edges" }, image, scale: 0.5, end: 0.75 };
console.log((await client.getModel("m")).fields.find((field) => field.name === "controls").max_count);
await client.transform({ image, controls: [edges, { model: { path: "edges" }, image }] });
for (const wrong of [{ ...edges, begin: 0 }, { ...edges, start: 1 }, { ...edges, model: { path: "m" } }]) {
  await client.transform({ image, controls: [edges, wrong] }).catch((error) => console.log(error.message));
}
client.close();
"""


def test_controls_of_a_request(node: Path) -> None:
    pipeline = FakePipeline()
    pipeline.fields = dict(CONTROLNETS)
    edges = Model("edges", replace(manifest("acme/edges"), family=FAMILY), FakePipeline())
    with (
        running(lambda: ModelRegistry([Model("m", manifest("acme/m"), pipeline), edges])) as server,
        started(node, CONTROLS, IMAGE, target=f"localhost:{server.port}") as process,
    ):
        lines = process.stdout.read().splitlines()
        assert process.wait(PATIENCE) == 0
    assert lines[0] == "4"
    assert lines[1] == "controls[1].begin is not a field of img2img.v1.Control"
    assert lines[2].startswith("controls[1].start: 1 is not in 0 to 1, below 1")
    assert lines[3].startswith("controls[1].model: model 'm' is not a ControlNet")
    (request,) = (state.request for state in pipeline.prepared)
    found = [(use.model, use.scale, use.start, use.end, use.image.size) for use in request.controls]
    assert found == [("edges", 0.5, 0.0, 0.75, (256, 256)), ("edges", 1.0, 0.0, 1.0, (256, 256))]


IMAGE_PROMPTS = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
const image = { data: await readFile(process.argv[1]) };
const style = { adapter: "style", images: [image, image], scale: 0.5 };
console.log((await client.getModel("m")).image_adapters.join());
await client.transform({ image, image_prompts: [style, { adapter: "plain", images: [image] }] });
for (const wrong of [{ ...style, image }, { adapter: "style", images: [{ path: "a.png" }] }, { ...style, adapter: "other" }]) {
  await client.transform({ image, image_prompts: [style, wrong] }).catch((error) => console.log(error.message));
}
client.close();
"""


def test_image_prompts_of_a_request(node: Path, tmp_path: Path) -> None:
    pipeline = FakePipeline()

    def models() -> ModelRegistry:
        return ModelRegistry([model("m", pipeline), image_encoder()])

    with (
        running(models, image_adapters=ImageAdapterFolder(write_adapters(tmp_path))) as server,
        started(node, IMAGE_PROMPTS, IMAGE, target=f"localhost:{server.port}") as process,
    ):
        lines = process.stdout.read().splitlines()
        assert process.wait(PATIENCE) == 0
    assert lines[0] == ",".join(ADAPTERS)
    assert lines[1] == "image_prompts[1].image is not a field of img2img.v1.ImagePrompt"
    assert lines[2] == "image_prompts[1].images[0].path is not a field of img2img.v1.ImageSource"
    assert lines[3].startswith("image_prompts[1].adapter: image adapter 'other' does not fit this model")
    (request,) = (state.request for state in pipeline.prepared)
    found = [(use.adapter, use.scale, len(use.images)) for use in request.image_prompts]
    assert found == [("style", 0.5, 2), ("plain", 1.0, 1)]


LEAVING = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
const image = { data: await readFile(process.argv[1]) };
for await (const event of client.transformStream({ image, num_inference_steps: 12 })) if (event.progress) break;
console.log("left");
for await (const _ of process.stdin); // stays, so that it is not its end that ends the call
client.close();
"""


def test_breaking_out_of_the_stream_loop_frees_the_device(node: Path, held: tuple[HeldPipeline, str]) -> None:
    pipeline, target = held
    with started(node, LEAVING, IMAGE, target=target) as process:
        assert process.stdout.readline() == "left\n"
        assert pipeline.end_of_call("TransformStream") == "CANCELLED"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_a_deadline_ends_the_call_on_both_sides(run: Run) -> None:
    for seconds in (1.5, 6, 24):
        with holding() as (pipeline, target):
            told = failed(run("transform.js", IMAGE, "out.png", "--steps", STEPS, "--timeout", seconds, target=target))
            assert told[0].startswith("DEADLINE_EXCEEDED")
            if pipeline.prepared:
                # The server's deadline is later by the transfer time of the request.
                assert pipeline.end_of_call("Transform") in ("DEADLINE_EXCEEDED", "CANCELLED")
                break
    else:
        raise AssertionError("no request reached the device before its deadline")


def test_images_stay_on_the_server(run: Run, server: RunningServer, tmp_path: Path) -> None:
    lines = succeeded(run("assets.js", IMAGE, "out.png", "--steps", 3, target=f"localhost:{server.port}"))
    assert lines[0].endswith(f": image/png, {IMAGE.stat().st_size} bytes")
    assert [line.partition(":")[0] for line in lines[1:]] == ["winter", "autumn"]
    assert same(tmp_path / "out-winter.png", IMAGE)
    assert same(tmp_path / "out-autumn.png", IMAGE)


def test_tls_and_a_token(run: Run, secured: Secured, tmp_path: Path) -> None:
    target = f"https://localhost:{secured.port}"
    assert succeeded(run("models.js", "--target", target, "--ca", secured.ca, "--token-file", secured.token)) != []
    assert failed(run("models.js", "--target", target, "--ca", secured.ca))[0].startswith("UNAUTHENTICATED (UNAUTHENTICATED)")
    # The system does not know its certificate authority.
    told = failed(run("models.js", "--target", target, "--token-file", secured.token, "--timeout", 30))
    assert told[0].startswith("UNAVAILABLE")
    assert "unable to verify the first certificate" in told[0]
    plain = run("models.js", "--target", "192.0.2.1:50051", "--token-file", secured.token)
    assert "would be sent over the network in plaintext" in plain.stderr


TURNS = """
import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline/promises";
import { Client } from "img2img-client";
const client = new Client(process.argv.slice(2));
const image = { data: await readFile(process.argv[1]) };
const some = () => Promise.all(Array.from({ length: 8 }, (_, seed) => client.transform({ image, seed, num_inference_steps: 4 })));
for await (const _ of createInterface(process.stdin)) console.log((await some()).length);
client.close();
"""


def test_calls_alternate_between_servers_and_survive_a_stop(node: Path) -> None:
    pipelines = FakePipeline(), FakePipeline()
    with running(lambda: store(m=pipelines[0])) as first, running(lambda: store(m=pipelines[1])) as second:
        targets = [f"127.0.0.1:{server.port}" for server in (first, second)]
        with started(node, TURNS, IMAGE, *targets) as process:

            def draw_eight() -> None:
                process.stdin.write("again\n")
                process.stdin.flush()
                assert process.stdout.readline() == "8\n"

            # The first calls go to the first connected server; from then on the servers take turns.
            for _ in range(500):
                draw_eight()
                if all(len(pipeline.prepared) >= 8 for pipeline in pipelines):
                    break
            second.stop().result(PATIENCE)
            before = [len(pipeline.prepared) for pipeline in pipelines]
            for _ in range(5):
                draw_eight()
            process.stdin.close()
            assert process.wait(PATIENCE) == 0
    assert min(before) >= 8
    assert [len(pipeline.prepared) for pipeline in pipelines] == [before[0] + 5 * 8, before[1]]


def test_unreachable_server_is_skipped(run: Run, server: RunningServer) -> None:
    lines = succeeded(run("many.js", IMAGE, 6, "--steps", 4, "--target", "127.0.0.1:1", "--target", f"127.0.0.1:{server.port}"))
    assert lines == ["6 images, seeds 0 1 2 3 4 5"]
