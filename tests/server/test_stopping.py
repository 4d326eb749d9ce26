"""No client can delay a drain, the end of the process, or the unloading of a model."""

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from fakes import FakePipeline
from img2img.v1 import asset_pb2, model_pb2
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from kserve_calls import serving
from messages import png, request
from running import running, store
from server_process import FAULTY, Process
from soak_parts.hostile import WATCH, crowd, unread, watch_of

READY, UNLOADED = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_UNLOADED
ENDED = 120
"""Seconds after which a process counts as one that does not end: --grace, 5 s, and much for a busy machine."""


def _asset(channel: grpc.Channel) -> str:
    data = png()
    messages = [
        asset_pb2.UploadAssetRequest(info=asset_pb2.UploadAssetInfo(size=len(data))),
        asset_pb2.UploadAssetRequest(chunk=data),
    ]
    return AssetServiceStub(channel).UploadAsset(iter(messages)).asset.id


@pytest.mark.parametrize(
    ("fault", "signals", "watchdog", "status"),
    [
        ("none", [signal.SIGTERM], "0", 0),
        ("call", [signal.SIGTERM], "0", 143),  # its engine never ends: the process does
        pytest.param("call", [signal.SIGTERM, signal.SIGTERM], "0", 143, marks=pytest.mark.nightly),
        ("call", [], "1", 70),
        pytest.param("call", [signal.SIGTERM], "1", 70, marks=pytest.mark.nightly),
    ],
    ids=["drain", "drain with a hung device", "second signal", "watchdog", "watchdog in a drain"],
)
def test_process_ends_despite_connected_clients_that_never_read(
    start: Callable[..., Process], tmp_path: Path, fault: str, signals: list[signal.Signals], watchdog: str, status: int
) -> None:
    grace = "1" if watchdog == "0" else "60"  # so that the watchdog, even if late, acts before the end of the drain
    flags = ("--models", "m", "--kserve", "--watchdog", watchdog, "--grace", grace, "--assets", str(tmp_path / "assets"))
    process = start(*FAULTY, fault, *flags)
    with process.channel() as channel:
        asset = _asset(channel)
    with crowd(process.port, request(), asset):
        if fault == "call":
            assert process.next_output() == "call"  # the engine is in a call: else a drain would have nothing to wait for
        for number in signals:
            process.popen.send_signal(number)
        assert process.popen.wait(ENDED) == status


def test_models_load_and_unload_beside_watchers_that_never_read(tmp_path: Path) -> None:
    names = ("", "models/m", "models/second")
    with (
        serving(tmp_path) as (server, _),
        unread(server.port, *((WATCH, watch_of(name)) for name in names * 3)),
        crowd(server.port, request()),
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        models = ModelServiceStub(channel)
        for _ in range(2):
            assert models.UnloadModel(model_pb2.UnloadModelRequest(id="second"), timeout=120).model.state == UNLOADED
            assert models.LoadModel(model_pb2.LoadModelRequest(id="second"), timeout=120).model.state == READY
        server.stop().result(120)  # with all of them connected


def test_drain_works_with_an_exhausted_thread_pool() -> None:
    """All are blocked, for example by reads of a hanging disk."""
    go = threading.Event()
    with running(lambda: store(m=FakePipeline())) as server:
        try:
            for _ in range(200):
                asyncio.run_coroutine_threadsafe(asyncio.to_thread(go.wait), server.loop)
            server.stop().result(ENDED)
        finally:
            go.set()
