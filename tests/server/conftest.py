"""A server that keeps assets, around a fake pipeline, and stubs of it: shared by the tests of assets over a channel. A module
that needs another server or pipeline defines a fixture of that name.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from asset_calls import LIMITS, QUOTA
from fakes import FakePipeline
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.config import AssetSettings
from running import RunningServer, running, store
from server_process import Process


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The server's folder of assets."""
    return tmp_path / "assets"


@pytest.fixture
def server(pipeline: FakePipeline, folder: Path) -> Iterator[RunningServer]:
    settings = AssetSettings(url=str(folder), quota=QUOTA)
    with running(lambda: store(m=pipeline), assets=settings, image_limits=LIMITS) as server:
        yield server


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield channel


@pytest.fixture
def assets(channel: grpc.Channel) -> AssetServiceStub:
    return AssetServiceStub(channel)


@pytest.fixture
def transforms(channel: grpc.Channel) -> ImageToImageServiceStub:
    return ImageToImageServiceStub(channel)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a process, which is killed at the end if it did not end."""
    started: list[Process] = []

    def begin(*words: str) -> Process:
        started.append(Process(tmp_path, *words))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.communicate()
