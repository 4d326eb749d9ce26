"""transformBatch of the Node client: many requests in one call, each with its own outcome."""

import threading
from pathlib import Path

import pytest
from fake_image_service import FakeServer, FakeService
from fake_statuses import queue_full, unavailable
from fakes import FakePipeline
from img2img_server.engine.scheduler import QueueLimits
from other_clients import IMAGE, PATIENCE, HeldPipeline, Run, started, succeeded
from running import RunningServer, running, store

HEAD = """
import { readFile } from "node:fs/promises";
import { Client } from "img2img-client";
const client = new Client(process.argv.length > 2 ? process.argv.slice(2) : process.env.IMG2IMG_TARGET);
const image = { data: await readFile(process.argv[1]) };
const request = { image, num_inference_steps: 4 };
function describe({ index, result, error }) {
  const fields = error?.fields?.map(({ field }) => field).join() ?? "";
  return `${index} ${result ? `seed ${result.images[0].seed}` : `${error.name} ${error.code} ${fields}`}`;
}
async function collected(requests, options) {
  const lines = [];
  for await (const outcome of client.transformBatch(requests, options)) lines.push(describe(outcome));
  return lines.sort((one, other) => parseInt(one) - parseInt(other));
}
"""


def test_list_and_async_iterable_requests_all_get_results(run: Run, server: RunningServer) -> None:
    program = """
const requests = Array.from({ length: 40 }, (_, seed) => ({ ...request, seed }));
async function* later() { for (const each of requests) { await new Promise(setImmediate); yield each; } }
console.log((await collected(requests)).join());
console.log((await collected(later())).join());
console.log((await collected([])).length, (await collected((function* () {})())).length);
client.close();
"""
    lines = succeeded(run(HEAD + program, IMAGE, target=f"localhost:{server.port}"))
    expected = ",".join(f"{index} seed {index}" for index in range(40))
    assert lines == [expected, expected, "0 0"]


def test_errors_belong_to_their_requests_whatever_the_cause(run: Run, server: RunningServer) -> None:
    program = """
const wrong = [
  { ...request, model: { repo_id: "none" } },
  { ...request, strength: 2 },
  { ...request, promt: "a lake" },
  { ...request, model: 5 },
  undefined,
  { ...request, image: { data: Buffer.from("no image") } },
  { ...request, image: { data: Buffer.alloc(64 * 2 ** 20) } },
  { ...request, output: { format: "OUTPUT_FORMAT_GIF" } },
];
console.log((await collected([{ ...request, seed: 1 }, ...wrong, { ...request, seed: 2 }])).join("\\n"));
client.close();
"""
    assert succeeded(run(HEAD + program, IMAGE, target=f"localhost:{server.port}")) == [
        "0 seed 1",
        "1 Img2ImgError NOT_FOUND ",
        "2 Img2ImgError INVALID_ARGUMENT strength",
        "3 TypeError undefined ",
        "4 TypeError undefined ",
        "5 TypeError undefined ",
        "6 Img2ImgError INVALID_ARGUMENT image.data",
        "7 Img2ImgError RESOURCE_EXHAUSTED ",
        "8 TypeError undefined ",
        "9 seed 2",
    ]


def test_results_arrive_in_completion_order_while_requests_are_read(run: Run, server: RunningServer) -> None:
    """The second request is made of the first one's result."""
    program = """
let resolve;
const promise = new Promise((done) => (resolve = done));
async function* chained() { yield { ...request, seed: 5 }; yield { ...request, seed: Number(await promise) + 1 }; }
for await (const outcome of client.transformBatch(chained())) {
  console.log(describe(outcome));
  resolve(outcome.result.images[0].seed);
}
client.close();
"""
    assert succeeded(run(HEAD + program, IMAGE, target=f"localhost:{server.port}")) == ["0 seed 5", "1 seed 6"]


def test_requests_are_read_only_as_results_are_consumed(run: Run, server: RunningServer) -> None:
    program = """
let [read, taken, most, returned] = [0, 0, 0, false];
function* endless() {
  try {
    for (;;) { most = Math.max(most, ++read - taken); yield request; }
  } finally {
    returned = true;
  }
}
for await (const _ of client.transformBatch(endless())) if (++taken === 100) break;
await new Promise(setImmediate);
console.log(taken, most <= 33, returned);
console.log((await collected([{ ...request, seed: 3 }])).join());
client.close();
"""
    # One that the client is about to add, and 32.
    assert succeeded(run(HEAD + program, IMAGE, target=f"localhost:{server.port}")) == ["100 true true", "0 seed 3"]


def test_input_error_is_thrown_after_earlier_results(run: Run, server: RunningServer) -> None:
    program = """
function* broken() { yield request; yield request; throw new RangeError("mine"); }
let count = 0;
for (const input of [broken(), 7]) {
  try {
    for await (const { result } of client.transformBatch(input)) count += result.images.length;
  } catch (error) {
    console.log(count, error.name);
  }
}
client.close();
"""
    assert succeeded(run(HEAD + program, IMAGE, target=f"localhost:{server.port}")) == ["2 RangeError", "2 TypeError"]


ABORTED = """
const stop = new AbortController();
const requests = (async function* () { yield { ...request, num_inference_steps: 12 }; await new Promise(() => {}); })();
const results = client.transformBatch(requests, { signal: stop.signal });
const ended = results.next().catch((error) => error);
await once(process.stdin, "data");
stop.abort();
console.log((await ended).code, (await results.next()).done);
await client.transformBatch([], { signal: stop.signal }).next().catch((error) => console.log(error.code));
process.stdin.resume();
await once(process.stdin, "end");
client.close();
"""


def test_abort_signal_ends_the_batch_even_while_waiting_for_requests(node: Path, held: tuple[HeldPipeline, str]) -> None:
    pipeline, target = held
    began = threading.Event()
    pipeline.before_call = began.set
    program = 'import { once } from "node:events";' + HEAD + ABORTED
    with started(node, program, IMAGE, target=target) as process:
        assert began.wait(PATIENCE)
        process.stdin.write("abort\n")
        process.stdin.flush()
        assert process.stdout.readline() == "CANCELLED true\n"
        assert process.stdout.readline() == "CANCELLED\n"
        assert pipeline.end_of_call("TransformBatch") == "CANCELLED"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_unfinished_requests_are_resent_to_another_server(node: Path) -> None:
    pipelines = FakePipeline(), FakePipeline()
    begun, may_run = threading.Semaphore(0), threading.Semaphore(60)

    def step() -> None:
        begun.release()
        assert may_run.acquire(timeout=PATIENCE)

    for pipeline in pipelines:
        pipeline.before_call = step
    program = """
const requests = Array.from({ length: 100 }, (_, seed) => ({ ...request, seed, num_inference_steps: 50 }));
console.log((await collected(requests)).join());
client.close();
"""
    limits = QueueLimits(max_active=2)
    with (
        running(lambda: store(m=pipelines[0]), limits=limits, grace=0.0) as first,
        running(lambda: store(m=pipelines[1]), limits=limits, grace=0.0) as second,
        started(node, HEAD + program, IMAGE, f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}") as process,
    ):
        assert all(begun.acquire(timeout=PATIENCE) for _ in range(60))
        one = first if pipelines[0].prepared else second
        stopped = one.stop()
        may_run.release(100 * 50)
        stopped.result(PATIENCE)
        assert process.stdout.read() == ",".join(f"{index} seed {index}" for index in range(100)) + "\n"
        assert process.wait(PATIENCE) == 0
    assert all(pipeline.prepared for pipeline in pipelines), "both had a part"


def test_only_transient_errors_are_retried(run: Run, fake: FakeServer) -> None:
    program = """
await collected([request], { timeout: 50 }).then((lines) => console.log(lines.length), (error) => console.log(error.code));
client.close();
"""
    fake.service.failures = [unavailable(), queue_full(0.05)]
    assert succeeded(run(HEAD + program, IMAGE, target=fake.target)) == ["1"]
    assert len(fake.service.requests) == 3
    assert all("grpc-previous-rpc-attempts" not in sent for sent in fake.service.metadata), "gRPC itself makes no attempts"
    assert all(left is not None and left <= 50 for left in fake.service.seconds_left)
    fake.service.failures = [queue_full(90)]
    assert succeeded(run(HEAD + program, IMAGE, target=fake.target)) == ["RESOURCE_EXHAUSTED"]
    fake.service.failures = [unavailable()] * 9
    assert succeeded(run(HEAD + program, IMAGE, target=fake.target)) == ["UNAVAILABLE"]
    assert len(fake.service.failures) == 4


def test_a_server_that_ends_the_call_without_all_results_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeService, "TransformBatch", lambda _self, requests, _context: iter([next(requests)][:0]))
    fake = FakeServer()
    fake.start()
    program = """
await collected([request, request]).catch((error) => console.log(error.code, error.message));
client.close();
"""
    try:
        lines = succeeded(run(HEAD + program, IMAGE, target=fake.target))
    finally:
        fake.stop()
    assert lines == ["INTERNAL the server ended the batch without a result for each request"]


def test_unreachable_server_ends_the_batch(run: Run) -> None:
    program = """
await collected([request, request]).catch((error) => console.log(error.code));
client.close();
"""
    assert succeeded(run(HEAD + program, IMAGE, target="127.0.0.1:1")) == ["UNAVAILABLE"]
