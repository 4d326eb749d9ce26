"""Codec processes: results, limits and failures, isolated per caller."""

import asyncio
import io
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import kept_processes
import psutil
import pytest
from endless_jobs import Crash, Endless, Hoard, make_importable
from fakes import FakePipeline
from icc_profiles import display_p3
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server import images
from img2img_server.api import parsing
from img2img_server.codecs import pool
from img2img_server.codecs.jobs import Ask, Inspect, JobDone, LoadImage, digest_of
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.codecs.process import COMMAND, CodecProcess
from img2img_server.config import CodecSettings
from img2img_server.errors import ImageMemoryFull, InvalidField, ShuttingDown
from img2img_server.images import ImageLimits, SizeRule
from img2img_server.support.call import Call, answering
from messages import png, request
from PIL import Image
from running import RunningServer, running, store

LIMITS = ImageLimits()
LOAD = LoadImage("image.data", LIMITS, SizeRule(), 8, "PNG")
MEMORY = 2**30


@pytest.fixture(autouse=True)
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers here start and end processes of their own."""
    kept_processes.end_all()
    monkeypatch.setattr("running.KeptProcess", CodecProcess)


@pytest.fixture
async def codecs(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Codecs]:
    make_importable(monkeypatch)
    others = set(psutil.Process().children())
    made = Codecs(2, 2, ImageMemory(MEMORY))
    await made.start()
    yield made
    await made.close()
    assert set(psutil.Process().children()) <= others, "all of its processes have ended"


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels_of(image: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    return image.mode, image.size, image.tobytes()


NOISE = Image.effect_noise((120, 88), 90).convert("RGB")


@pytest.mark.parametrize("file_format", images.READ_FORMATS)
async def test_subprocess_decodes_like_the_functions(codecs: Codecs, file_format: str) -> None:
    data = saved(NOISE, file_format)
    image, digest, _ = await codecs.load(data, LOAD)
    expected = images.decode(data, LIMITS, "image.data")
    assert pixels_of(image) == pixels_of(expected)
    assert digest == digest_of(expected.size, expected.tobytes())
    found = await codecs.inspect(data, Inspect("chunk", LIMITS))
    assert found.media_type == images.check_header(data, LIMITS, "chunk")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
async def test_subprocess_encodes_like_the_functions(codecs: Codecs, file_format: images.WriteFormat) -> None:
    assert await codecs.encode(NOISE, file_format, 80) == images.encode(NOISE, file_format, 80)


async def test_only_the_pixels_of_a_decoded_image_are_asked_for(codecs: Codecs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question costs two switches between processes."""
    received: list[type] = []
    receive = CodecProcess._receive

    async def counted(process: CodecProcess) -> Any:
        message, file = await receive(process)
        received.append(type(message))
        return message, file

    monkeypatch.setattr(CodecProcess, "_receive", counted)
    await codecs.load(saved(NOISE, "PNG"), LOAD)
    assert received == [Ask, JobDone]
    received.clear()
    await codecs.encode(NOISE, "PNG", 90)
    assert received == [JobDone]


async def test_memory_of_an_image_stays_for_the_next(codecs: Codecs) -> None:
    """Otherwise the kernel clears hundreds of pages for each image: 786 kB of pixels alone have 192."""
    image = Image.effect_noise((512, 512), 90).convert("RGB")
    data = saved(image, "PNG", compress_level=1)
    faults: list[int] = []
    for _ in range(6):
        await codecs.load(data, LOAD)
        await codecs.encode(image, "PNG", 90)
        processes = [process for process in psutil.Process().children() if "img2img_server.codecs.worker" in process.cmdline()]
        faults.append(sum(minor_faults(process.pid) for process in processes))
    assert faults[-1] - faults[-4] < 192


def minor_faults(process: int) -> int:
    """Page faults of a process until now that needed no disk."""
    return int(Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[7])


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("I;16", "PNG", {}),
        ("LA", "PNG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGBA", "WEBP", {"lossless": True, "method": 0}),
        ("LAB", "TIFF", {"compression": "tiff_deflate"}),
        ("F", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "lzma"}),
        ("P", "GIF", {"transparency": 3}),
        ("RGB", "BMP", {}),
    ],
)
async def test_large_images_of_every_mode_fit_the_reserved_memory(
    codecs: Codecs, mode: str, file_format: str, options: dict[str, Any]
) -> None:
    """Six million pixels, which take 12 to 26 bytes each: a mode that took more than it asks for would fail."""
    data = saved(Image.new(mode, (3000, 2000)), file_format, **options)
    image, *_ = await codecs.load(data, LoadImage("image.data", ImageLimits(max_bytes=2**25), SizeRule(64, 64), 8, "PNG"))
    assert image.size == (64, 64)


@pytest.mark.parametrize("mode", ["I;16", "RGB"])
async def test_small_images_that_need_numpy_are_decoded(codecs: Codecs, mode: str) -> None:
    image = Image.new("RGB", (24, 16), "gray")
    data = saved(image, "PNG", icc_profile=display_p3())
    if mode == "I;16":
        data = saved(Image.new("I;16", (24, 16), 128 * 257), "PNG")
    decoded, *_ = await codecs.load(data, LOAD)
    assert decoded.getpixel((0, 0)) == (128, 128, 128)  # grays are equal in both color spaces


async def answers(codecs: Codecs) -> bool:
    """Whether images are decoded."""
    return (await codecs.load(png(), LOAD))[0].size == (24, 16)


async def test_codec_crash_fails_only_its_own_image(codecs: Codecs, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidField, match="is damaged"):
        await codecs.load(png(), Crash())  # type: ignore[arg-type]
    assert await answers(codecs)
    assert "signal 11" in caplog.text


async def test_kernel_refuses_memory_beyond_the_requested_size(codecs: Codecs) -> None:
    with pytest.raises(InvalidField, match="more memory than its size allows"):
        await codecs.load(png(), Hoard())  # type: ignore[arg-type]
    assert await answers(codecs)


async def test_cpu_time_of_a_codec_is_limited(codecs: Codecs) -> None:
    with pytest.raises(InvalidField, match="more processor time than its size allows"):
        await codecs.load(png(), Endless())  # type: ignore[arg-type]
    assert await answers(codecs)


async def test_codec_job_is_ended_at_its_time_limit(codecs: Codecs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_LONGEST", 0.01)
    with pytest.raises(InvalidField, match="too much time"):
        await codecs.load(png(), Endless())  # type: ignore[arg-type]


async def begun(codecs: Codecs, *jobs: "asyncio.Task[Any]") -> None:
    """Returns once so many jobs are in progress."""
    while codecs.stats["decode"].running < len(jobs):  # noqa: ASYNC110 - it counts without an event
        await asyncio.sleep(0)


def endless(codecs: Codecs, client: str = "") -> "asyncio.Task[Any]":
    with answering(Call("", "", client=client)):
        return asyncio.create_task(codecs.load(png(), Endless()))  # type: ignore[arg-type]


async def test_cancelling_the_caller_ends_its_running_job(codecs: Codecs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE", 0.0)
    job = endless(codecs)
    await begun(codecs, job)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await codecs._decoders._slots.settle()
    assert (codecs.stats["decode"].running, codecs.memory.held) == (0, 0)
    assert await answers(codecs)


async def test_cancelling_the_caller_removes_its_waiting_job(codecs: Codecs) -> None:
    first, second = endless(codecs), endless(codecs)
    await begun(codecs, first)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert codecs.stats["decode"].waiting == 0
    first.cancel()


async def test_one_client_does_not_take_all_processes(codecs: Codecs) -> None:
    jobs = [endless(codecs, "greedy") for _ in range(5)]
    await begun(codecs, jobs[0])
    with answering(Call("", "", client="other")):
        assert await answers(codecs)
        assert await codecs.encode(NOISE, "PNG", 90)
    assert (codecs.stats["decode"].running, codecs.stats["decode"].waiting) == (1, 4)
    for job in jobs:
        job.cancel()


def test_codec_process_exits_if_its_parent_is_gone() -> None:
    """The other end of its socket stays open, as a copy in some other process would keep it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = subprocess.run([*COMMAND, str(theirs.fileno()), "1"], pass_fds=(theirs.fileno(),), timeout=60, check=True)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
    assert worker.returncode == 0


async def test_closing_aborts_codec_jobs_without_waiting(codecs: Codecs) -> None:
    jobs = [endless(codecs, str(client)) for client in range(5)]
    await begun(codecs, *jobs[:2])
    await codecs.close()
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(outcome, ShuttingDown) for outcome in outcomes)
    assert not psutil.Process().children()


async def test_killed_idle_codec_process_is_replaced(codecs: Codecs) -> None:
    before = {child.pid for child in psutil.Process().children()}
    for child in psutil.Process().children():
        child.kill()
    while any(process.alive for process in codecs._decoders._all):  # noqa: ASYNC110 - asyncio has no event for it
        await asyncio.sleep(0)
    assert await answers(codecs)
    assert not before & {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


async def test_image_above_the_memory_budget_is_refused_at_once_unless_alone(codecs: Codecs) -> None:
    data = saved(Image.new("RGB", (2000, 2000)), "PNG")
    other = Call("", "1", client="other")
    with codecs.memory.hold(other, MEMORY):
        with pytest.raises(ImageMemoryFull) as refused:
            await codecs.load(data, LOAD)
        assert refused.value.retry_after
    assert codecs.memory.held == 0
    codecs.memory.budget = 1000
    await codecs.load(data, LOAD)  # alone it may always be


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A server whose decoders never end, and its calls."""
    make_importable(monkeypatch)
    monkeypatch.setattr(parsing, "LoadImage", Endless)

    def call(server: RunningServer, channel: grpc.Channel) -> list[Any]:
        stub = ImageToImageServiceStub(channel)
        calls: list[Any] = [stub.Transform.future(request()), stub.Transform.future(request())]
        calls += [stub.TransformStream(pb.TransformStreamRequest(request=request()))]
        while server.server._codecs.stats["decode"].running == 0:
            pass
        return calls

    return lambda: call


@pytest.mark.parametrize("now", [False, True])
def test_a_server_stops_while_its_decoders_are_busy(busy: Callable[[], Any], now: bool) -> None:
    """At the first signal, and at the second or the watchdog's end, without waiting for code in C."""
    with (
        running(lambda: store(m=FakePipeline()), codecs=CodecSettings(decoders=3), grace=0.1) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        calls = busy()(server, channel)
        if now:
            asyncio.run_coroutine_threadsafe(server.server.stop_now(), server.loop).result(60)
        server.stop().result(60)
        assert not psutil.Process().children()
        assert all(call.code() is not grpc.StatusCode.OK for call in calls)


def test_deadline_ends_decoding(busy: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE", 0.0)
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        with pytest.raises(grpc.RpcError) as late:
            ImageToImageServiceStub(channel).Transform(request(), timeout=1.0)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        async def settled() -> int:
            await server.server._codecs._decoders._slots.settle()
            return server.server._codecs.stats["decode"].running

        assert asyncio.run_coroutine_threadsafe(settled(), server.loop).result(60) == 0
