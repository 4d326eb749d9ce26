"""A model that is not made into graphs, served whole by PyTorch: the same calls, the same promises."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from fakes import Caller, make_request, run_out
from img2img_client import Client, Completed, Progress, Queued, Started
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine import request as engine_events
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Event, Failed, run_alone
from img2img_server.errors import ModelFailed, RequestCancelled
from img2img_server.models.registry import ModelRegistry
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.opaque.batch import SharedCall, Stepper
from img2img_server.runtime.opaque.pipeline import OpaquePipeline
from PIL import Image
from running import running

SETTINGS: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 5, "guidance_scale": 4.0}


def source(size: tuple[int, int] = (64, 64)) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def torch_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    from img2img_export.build import export_model
    from img2img_export.options import ExportOptions

    output = tmp_path_factory.mktemp("torch") / "kandinsky22"
    export_model(ExportOptions(source=str(tiny_model("kandinsky22")), output=output, backend="torch"))
    return output


@pytest.fixture(scope="module")
def client(torch_bundle: Path) -> Iterator[Client]:
    def load() -> ModelRegistry:
        return ModelRegistry.load(torch_bundle, load_pipeline)

    with running(load) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path]) -> Any:
    pipe = AutoPipelineForImage2Image.from_pretrained(str(tiny_model("kandinsky22")), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_model_reports_why_it_runs_in_pytorch(client: Client) -> None:
    (model,) = client.models()
    assert (model.backend, model.engine) == ("torch", "torch:cpu")
    assert "--backend torch" in model.backend_reason


@pytest.mark.parametrize(("size", "count"), [((64, 64), 1), ((96, 64), 1), ((64, 128), 2)])
def test_opaque_pipeline_image_matches_diffusers(client: Client, oracle: Any, size: tuple[int, int], count: int) -> None:
    result = client.transform(source(size), prompt="a lake", seed=3, image_count=count, **SETTINGS)
    for index, image in enumerate(result.images):
        # Width and height are exchanged: diffusers' Kandinsky passes them to its image processor in the wrong order.
        expected = oracle(
            "a lake", image=source(size), width=size[1], height=size[0],
            generator=torch.Generator().manual_seed(3 + index), **SETTINGS,
        ).images[0]  # fmt: skip
        assert image.image.size == expected.size == size
        assert np.asarray(expected).std() > 5, "a flat image would prove nothing"
        assert np.abs(np.asarray(image.image, int) - np.asarray(expected, int)).max() <= 1


def test_progress_is_reported_at_each_step(client: Client) -> None:
    events = list(client.transform_stream(source(), prompt="a lake", seed=3, image_count=2, **SETTINGS))
    assert [type(event) for event in events[:2]] == [Queued, Started]
    steps = [(event.step, event.step_count) for event in events if isinstance(event, Progress)]
    assert steps == [(step, 3) for step in range(1, 4)]
    assert isinstance(events[-1], Completed)


@pytest.fixture(scope="module")
def pipeline(torch_bundle: Path) -> Any:
    return load_pipeline(torch_bundle, read_manifest(torch_bundle))


def test_size_multiple_fits_the_unets_downsampling(pipeline: OpaquePipeline) -> None:
    """At odd sizes the upsampled states of Kandinsky's UNet do not fit the downsampled ones, even in the tiny model."""
    assert pipeline.size_multiple == 16
    (image,) = run_alone(pipeline, request(image=source((80, 48))))
    assert image.size == (80, 48)


def request(**settings: Any) -> Any:
    return make_request(**{"image": source(), "prompt": "a lake", **SETTINGS, **settings})


def pipeline_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "img2img-pipeline"]


def test_interleaved_requests_give_the_same_images_as_alone(pipeline: OpaquePipeline) -> None:
    requests = [request(seeds=(1,)), request(seeds=(2,), strength=1.0, guidance_scale=2.0), request(seeds=(5,), prompt="winter")]
    alone = [run_alone(pipeline, item)[0] for item in requests]
    engine = Engine({"m": pipeline})
    order: list[int] = []
    images: dict[int, Image.Image] = {}
    for index, item in enumerate(requests):

        def listen(event: Event, index: int = index) -> None:
            order.append(index)
            if isinstance(event, engine_events.Completed):
                images[index] = event.images[0]

        engine.submit(item, listen)
    run_out(engine)
    assert order.index(2) < len(order) - 1 - order[::-1].index(0), "the third had begun before the first was done"
    assert sorted(images) == [0, 1, 2]
    for index, image in images.items():
        # Two of them share a call, and sums of other lengths are rounded differently.
        assert np.abs(np.asarray(image, int) - np.asarray(alone[index], int)).max() <= 1
    assert pipeline_threads() == []


def test_a_cancelled_request_unwinds_at_its_next_step(pipeline: OpaquePipeline) -> None:
    engine = Engine({"m": pipeline})
    caller = Caller(engine)
    caller.ticket = engine.submit(request(num_inference_steps=50), caller.events.append).ticket
    while not caller.steps:
        engine.step()
    caller.ticket.cancel()
    engine.step()
    assert isinstance(caller.error, RequestCancelled)
    assert pipeline_threads() == [], "nothing is left of its call"


def test_a_failure_in_the_pipeline_ends_its_request(pipeline: OpaquePipeline) -> None:
    engine = Engine({"m": pipeline})
    caller = Caller(engine)
    engine.submit(request(seeds=("not a number",)), caller.events.append)
    run_out(engine)
    assert isinstance(caller.error, ModelFailed)
    assert isinstance(caller.endings[0], Failed)
    assert pipeline_threads() == []


def test_stepper_runs_only_between_resume_and_pause() -> None:
    done: list[str] = []

    def call(run: Stepper) -> list[Image.Image]:
        done.append("first")
        run.pause()
        done.append("second")
        return []

    run = Stepper(call)
    assert done == []
    run.resume()
    assert (done, run.done) == (["first"], False)
    run.resume()
    assert (done, run.done) == (["first", "second"], True)
    run.abandon()


def test_consecutive_runs_use_one_thread() -> None:
    """torch.compile's recordings for a GPU belong to a thread. Concurrent runs have one thread each."""
    threads: list[int] = []

    def call(run: Stepper) -> list[Image.Image]:
        threads.append(threading.get_ident())
        run.pause()
        assert threading.get_ident() in threads
        return []

    def fails(run: Stepper) -> list[Image.Image]:
        threads.append(threading.get_ident())
        raise ValueError

    def panics(run: Stepper) -> list[Image.Image]:
        threads.append(threading.get_ident())
        raise BaseException("a library in Rust")

    for work in (call, fails, panics):
        run = Stepper(work)
        run.resume()
        run.abandon()
        assert run.done
    assert len(set(threads)) == 1
    some = [Stepper(call) for _ in range(3)]
    for run in some:
        run.resume()
    assert len(set(threads[-3:])) == 3
    for run in some:
        run.resume()
    last = Stepper(call)
    last.resume()
    last.abandon()
    assert threads[-1] == threads[-2], "the one that was used last"


def test_a_panic_in_the_pipeline_is_an_error() -> None:
    def panics(run: Stepper) -> list[Image.Image]:
        raise BaseException("a library in Rust")

    run = Stepper(panics)
    run.resume()
    assert run.done
    assert "a library in Rust" in str(run.error)


def test_run_can_be_abandoned_before_its_start() -> None:
    run = Stepper(lambda run: pytest.fail("it never ran"))
    run.abandon()
    assert run.done
    assert pipeline_threads() == []


@pytest.mark.parametrize("pieces", [0, 1, 2])
@pytest.mark.parametrize("problem", [None, RuntimeError("told to")])
def test_ended_call_is_freed_without_garbage_collection(pieces: int, problem: Exception | None) -> None:
    """Whether it never began, was cancelled or finished: its images are freed without the garbage collector."""

    def draw(call: SharedCall) -> list[Image.Image]:
        call.pause()
        if problem is not None:
            raise problem
        return [source()]

    gc.disable()
    try:
        call = SharedCall([make_request()], 1, 1, draw)
        watched = weakref.ref(call)
        for _ in range(pieces):
            call.resume()
        call.leave()
        del call
        if problem is not None:
            problem.__traceback__ = None  # the engine drops the error; here the test holds it
        assert watched() is None
    finally:
        gc.enable()
