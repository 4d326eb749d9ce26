"""Errors of the Node client: their fields, retries, and options refused before sending."""

import re

import pytest
from fake_image_service import FakeServer
from fake_statuses import error_info, queue_full, rich_status, unavailable
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from other_clients import IMAGE, Run, failed, succeeded
from running import RunningServer


def test_unmeetable_deadline_error_has_the_estimate(run: Run, fake: FakeServer) -> None:
    info = error_info("DEADLINE_UNMEETABLE", estimate_seconds="12.345")
    fake.service.failure = rich_status(code_pb2.DEADLINE_EXCEEDED, "it would take 12.3 s", info)
    lines = failed(run("transform.js", IMAGE, "out.png", "--timeout", 20, target=fake.target))
    assert lines == ["DEADLINE_EXCEEDED (DEADLINE_UNMEETABLE): it would take 12.3 s", "  it would take 12.345 s"]
    (left,) = fake.service.seconds_left
    assert left is not None
    assert 0 < left <= 20


def test_a_wrong_field_is_named(run: Run, server: RunningServer) -> None:
    lines = failed(run("transform.js", IMAGE, "out.png", "--strength", 2, target=f"localhost:{server.port}"))
    assert lines[:2] == [
        "INVALID_ARGUMENT (INVALID_FIELD): strength: 2.0 is not in (0, 1]",
        "  field strength: 2.0 is not in (0, 1]",
    ]
    assert re.fullmatch(r"  request [0-9a-f]{32}", lines[2])


@pytest.mark.parametrize("program", ["transform.js", "stream.js"])
def test_queue_full_error_has_the_retry_delay(program: str, run: Run, fake: FakeServer) -> None:
    # Longer than the maximum wait: the caller gets the error.
    fake.service.failure, fake.service.fail_before = queue_full(90.25), 0
    lines = failed(run(program, IMAGE, "out.png", target=fake.target))
    assert lines == ["RESOURCE_EXHAUSTED (QUEUE_FULL): the queue is full", "  retry in 90.25 s"]
    assert len(fake.service.requests) == 1


def test_queue_full_is_retried_but_out_of_memory_is_not(run: Run, fake: FakeServer) -> None:
    fake.service.failures = [queue_full(0.05), queue_full(0.05)]
    succeeded(run("transform.js", IMAGE, "out.png", target=fake.target))
    assert len(fake.service.requests) == 3
    no_memory = error_info("OUT_OF_MEMORY")
    fake.service.failures = [rich_status(code_pb2.RESOURCE_EXHAUSTED, "no memory for it", no_memory)]
    assert failed(run("transform.js", IMAGE, "out.png", target=fake.target)) == [
        "RESOURCE_EXHAUSTED (OUT_OF_MEMORY): no memory for it"
    ]
    assert len(fake.service.requests) == 4


def test_stream_is_retried_only_before_it_has_started(run: Run, fake: FakeServer) -> None:
    fake.service.fail_before, fake.service.failures = 0, [queue_full(0.05), unavailable()]
    assert succeeded(run("stream.js", IMAGE, "out.png", target=fake.target))[0] == "queued behind 3"
    assert len(fake.service.requests) == 3
    fake.service.fail_before, fake.service.failures = 2, [unavailable()]
    result = run("stream.js", IMAGE, "out.png", target=fake.target)
    assert (result.returncode, result.stderr) == (1, "UNAVAILABLE (SHUTTING_DOWN): shutting down\n")
    assert result.stdout.splitlines() == ["queued behind 3", "started on onnx:cpu, seed 7"]
    assert len(fake.service.requests) == 4


def test_no_attempt_begins_after_the_deadline(run: Run, fake: FakeServer) -> None:
    fake.service.failure = queue_full(45)  # which would be waited for, but for the deadline
    lines = failed(run("transform.js", IMAGE, "out.png", "--timeout", 40, target=fake.target))
    assert lines[0] == "RESOURCE_EXHAUSTED (QUEUE_FULL): the queue is full"
    assert len(fake.service.requests) == 1


LARGE = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
const { request_id: id } = await client.transform({ image: { data: Buffer.alloc(3 * 2 ** 20) } }, { requestId: "order-4711" });
console.log(id);
client.close();
"""


def test_grpc_retries_unavailable_calls_with_large_images(run: Run, fake: FakeServer) -> None:
    fake.service.failures = [unavailable(), unavailable()]
    assert succeeded(run(LARGE, target=fake.target)) == ["order-4711"]
    assert len(fake.service.requests) == 3
    assert [sent.get("grpc-previous-rpc-attempts") for sent in fake.service.metadata] == [None, "1", "2"]


REFUSED = """
import { Client } from "img2img-client";
const client = new Client(process.env.IMG2IMG_TARGET);
for (const call of [() => client.upload(Buffer.alloc(4 * 2 ** 20)), () => client.download("0".repeat(64))]) {
  await call().catch((error) => console.log(error.code, error.reason, error.fields.map(({ field }) => field).join()));
}
client.close();
"""


def test_refused_upload_and_missing_asset_are_errors(run: Run, server: RunningServer) -> None:
    lines = succeeded(run(REFUSED, target=f"localhost:{server.port}"))
    assert lines == ["INVALID_ARGUMENT INVALID_FIELD chunk", "NOT_FOUND ASSET_NOT_FOUND "]


def test_a_damaged_download_is_an_error(run: Run, fake: FakeServer) -> None:
    fake.assets.damage = lambda data: data[:-1]
    program = REFUSED.replace("Buffer.alloc(4 * 2 ** 20)", "Buffer.from('an image')").replace('"0".repeat(64)', "asset.id")
    program = program.replace("() => client.upload", "async () => (asset = await client.upload").replace(
        "('an image'))", "('an image')))"
    )
    assert succeeded(run(f"let asset;\n{program}", target=fake.target)) == ["DATA_LOSS  "]


WRONG = """
import { Client } from "img2img-client";
const client = new Client("localhost:1");
const image = { asset_id: "none" };
for (const wrong of [{ promt: "a lake" }, { output: { format: "OUTPUT_FORMAT_GIF" } }, { model: { name: "m" } }]) {
  await client.transform({ image, ...wrong }).catch((error) => console.log(error.name, error.message));
}
client.close();
"""


def test_invalid_options_are_refused_before_sending(run: Run) -> None:
    assert succeeded(run(WRONG)) == [
        "TypeError promt is not a field of img2img.v1.TransformRequest",
        "TypeError output.format must be one of OUTPUT_FORMAT_UNSPECIFIED, OUTPUT_FORMAT_PNG, "
        "OUTPUT_FORMAT_JPEG, OUTPUT_FORMAT_WEBP, not OUTPUT_FORMAT_GIF",
        "TypeError model.name is not a field of img2img.v1.ModelReference",
    ]


@pytest.mark.parametrize("arguments", [["only-one.png"], ["a", "b", "--quality", "9"]])
def test_wrong_arguments_are_reported(arguments: list[str], run: Run) -> None:
    result = run("transform.js", *arguments)
    assert result.returncode == 2
    assert "node examples/transform.js IN OUT" in result.stderr
