"""Sources of images: allowed ones are read, all others are refused before anything is read."""

import base64
import functools
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server import images
from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings, SourceSettings
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from img2img_server.sources import fetching, reading
from img2img_server.sources.reading import Sources, path_of, read_below
from messages import failure, png, request
from running import running, store

LIMITS = ImageLimits(max_bytes=10_000)
NO_SUCH = "file not found in the folder"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(png())
    (root / "sub" / "b c%?#.png").write_bytes(png((8, 8)))
    (tmp_path / "secret.png").write_bytes(png((16, 16)))
    (root / "large.png").write_bytes(bytes(10_001))
    return root


async def sources_of(settings: SourceSettings) -> Sources:
    sources = Sources(settings, AssetStore(AssetSettings(url="none")), LIMITS)
    await sources.open()
    return sources


async def read(sources: Sources, uri: str) -> bytes:
    source = pb.ImageSource(uri=uri)
    sources.check(source)
    field, data = await sources.read(source)
    assert field == "image.uri"
    return data


async def refusal(sources: Sources, uri: str) -> str:
    with pytest.raises(InvalidField) as caught:
        await read(sources, uri)
    assert caught.value.field == "image.uri"
    return caught.value.description


async def test_files_below_the_root_are_read(root: Path) -> None:
    sources = await sources_of(SourceSettings(file_root=root))
    for uri in (f"file://{root}/a.png", f"FILE://localhost{root}/a.png", f"file:{root}/a.png", f"file://{root}/sub/../a.png"):
        assert await read(sources, uri) == png()
    assert await read(sources, f"file://{root}/sub/b%20c%25%3F%23.png") == png((8, 8))
    (root / "inner").symlink_to(root / "a.png")
    (root / "folder").symlink_to("sub")
    assert await read(sources, f"file://{root}/inner") == png()
    assert await read(sources, f"file://{root}/folder/b%20c%25%3F%23.png") == png((8, 8))


async def test_file_root_may_be_a_symlink(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    sources = await sources_of(SourceSettings(file_root=tmp_path / "link"))
    assert await read(sources, f"file://{tmp_path}/link/a.png") == png()
    assert await read(sources, f"file://{root}/a.png") == png()


@pytest.mark.timeout(60)
async def test_file_sources_stay_within_the_root_and_are_regular_files(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(png())
    (root / "out.png").symlink_to(secret)
    (root / "relative.png").symlink_to("../secret.png")
    (root / "up").symlink_to("..")
    (root / "circle").symlink_to("circle")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    (root / "noted").mkdir()
    sources = await sources_of(SourceSettings(file_root=root))
    ways = [
        str(secret), f"{root}/../secret.png", f"{root}/%2e%2e/secret.png", f"{root}/..%2fsecret.png",
        f"{root}/sub/../../secret.png", f"{root}2/a.png",
        f"{root}/out.png", f"{root}/relative.png", f"{root}/up/secret.png", f"{root}/circle", f"{root}/device",
        f"{root}/fifo", f"{root}/noted", f"{root}", f"{root}/none.png", f"{root}/a.png/b", "/", "/etc/passwd", "/dev/zero",
        "/proc/self/environ", f"{root}/{'a' * 300}", f"{root}/{'a/' * 3000}", f"{root}/%ff",
    ]  # fmt: skip
    for way in ways:
        assert (await refusal(sources, f"file://{way}")).startswith(NO_SUCH), way


async def test_oversized_file_is_not_read(root: Path) -> None:
    sources = await sources_of(SourceSettings(file_root=root))
    assert "more than 10000 bytes" in await refusal(sources, f"file://{root}/large.png")


async def test_file_uri_without_a_local_file_is_refused(root: Path) -> None:
    sources = await sources_of(SourceSettings(file_root=root))
    for uri in ("file://otherhost/a.png", "file://127.0.0.1/a.png", "file:a.png", "file:", "file://", f"file://{root}/a.png?x",
                f"file://{root}/a.png#x", f"file://{root}/a%00.png", "file://[::1/a.png"):  # fmt: skip
        assert "file: URI" in await refusal(sources, uri), uri


def test_symlink_swapped_in_after_the_check_is_not_followed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, or the file, is replaced by a link between the check of a path and its opening."""
    open_ = reading._open

    def swap(what: Path, target: Path) -> None:
        def swapped(*arguments: object) -> int:
            what.rename(tmp_path / f"away-{what.name}")
            what.symlink_to(target)
            return open_(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(reading, "_open", swapped)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b c%?#.png").write_bytes(b"secret")
    swap(root / "sub", tmp_path / "other")
    with pytest.raises(InvalidField, match=NO_SUCH):
        read_below(root, root / "sub" / "b c%?#.png", 10_000, "image.uri")
    swap(root / "a.png", tmp_path / "secret.png")
    with pytest.raises(InvalidField, match=NO_SUCH):
        read_below(root, root / "a.png", 10_000, "image.uri")


def test_file_uri_is_percent_decoded() -> None:
    assert path_of("file:///a%20b/c.png", "f") == Path("/a b/c.png")


async def test_invalid_root_is_reported_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="file_root"):
        await sources_of(SourceSettings(file_root=tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "schemes"),
    [
        (SourceSettings(), "data:"),
        (SourceSettings(allow_http=True), "data:, http:, https:"),
        (SourceSettings(file_root=Path("/")), "data:, file:"),
    ],
)
async def test_unsupported_uri_error_lists_the_allowed_schemes(settings: SourceSettings, schemes: str) -> None:
    sources = await sources_of(settings)
    uris = ["ftp://example.com/a.png", "a.png", "/etc/passwd", "", "s3://bucket/a.png", "javascript:1", "//example.com/a.png"]
    if not settings.allow_http:
        uris += ["http://example.com/a.png", "https://example.com/a.png"]
    if settings.file_root is None:
        uris.append("file:///etc/passwd")
    for uri in uris:
        assert f"only {schemes} addresses" in await refusal(sources, uri)
    await sources.close()


async def test_data_uris_are_always_allowed() -> None:
    sources = await sources_of(SourceSettings())
    assert await read(sources, "DATA:image/png;base64," + base64.b64encode(png()).decode()) == png()
    escaped = "".join(f"%{byte:02x}" for byte in png())
    assert await read(sources, f"data:image/png,{escaped}") == png()
    assert await read(sources, "data:,a=b%3D%25c+%0a%3d%0D=") == b"a=b=%c+\n=\r="


async def test_long_data_uris_are_decoded_off_the_event_loop_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    decode, threads = images.decode_data_uri, []

    def noted(uri: str, limits: ImageLimits, field: str) -> bytes:
        threads.append(threading.current_thread())
        return decode(uri, limits, field)

    monkeypatch.setattr(images, "decode_data_uri", noted)
    sources = Sources(SourceSettings(file_root=root), AssetStore(AssetSettings(url="none")), ImageLimits())
    uri = "data:image/png," + "%41" * 10**6
    tracemalloc.start()
    try:
        assert await read(sources, uri) == b"A" * 10**6
        assert tracemalloc.get_traced_memory()[1] < 10 * len(uri)
    finally:
        tracemalloc.stop()
    assert threading.main_thread() not in threads
    assert "the maximum is" in await refusal(sources, "file:///" + "%41" * 10**6)
    assert NO_SUCH in await refusal(sources, "file:///" + "%41" * 4000)


@pytest.mark.parametrize("look", [reading.asset_of, reading.is_fetched])
def test_a_long_address_is_not_copied_to_see_its_scheme(look: Callable[[pb.ImageSource], object]) -> None:
    source = pb.ImageSource(uri="data:image/png;base64," + "A" * 2**22)
    tracemalloc.start()
    try:
        look(source)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 2**22, "the message's text once, which protobuf makes"
    finally:
        tracemalloc.stop()


class Site(ThreadingHTTPServer):
    """A web server on loopback that gives an image, or at /hang nothing until `over`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.hanging, self.gone, self.over = threading.Event(), threading.Event(), threading.Event()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site = self.server
        assert isinstance(site, Site)
        site.asked.append(self.path)
        if self.path == "/hang":
            site.hanging.set()
            # A connection that its caller closed has no data.
            if self.connection.recv(1) == b"":
                site.gone.set()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png((40, 24)))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        yield site
        site.shutdown()
        thread.join(120)


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def reachable(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the server take loopback, and the site's port, for the internet."""
    allowed: Callable[[str], bool] = lambda address: address == "127.0.0.1"  # noqa: E731
    with_site = functools.partial(fetching.Fetcher, allowed=allowed, ports=(site.server_port,))
    monkeypatch.setattr(fetching, "Fetcher", with_site)


@contextmanager
def transforming(pipeline: FakePipeline, **sources: object) -> Iterator[ImageToImageServiceStub]:
    settings = SourceSettings(**sources)  # type: ignore[arg-type]
    with (
        running(lambda: store(m=pipeline), sources=settings, assets=AssetSettings(url="none")) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield ImageToImageServiceStub(channel)


def at(uri: str, **fields: object) -> pb.TransformRequest:
    return request(image=pb.ImageSource(uri=uri), **fields)


@pytest.mark.usefixtures("reachable")
def test_an_image_of_an_address_is_a_source(site: Site, pipeline: FakePipeline) -> None:
    with transforming(pipeline, allow_http=True) as stub:
        stub.Transform(at(f"http://127.0.0.1:{site.server_port}/a.png"))
    assert pipeline.prepared[0].request.image.size == (40, 24)


def test_private_network_urls_are_refused(site: Site, pipeline: FakePipeline) -> None:
    with transforming(pipeline, allow_http=True) as stub:
        for host in ("127.0.0.1", "localhost", "169.254.169.254", "[::1]", "[fd00:ec2::254]"):
            code, details = failure(lambda host=host: stub.Transform(at(f"http://{host}/latest/meta-data")))  # type: ignore[misc]
            assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "image.uri")
            assert host not in str(details["message"])
    assert site.asked == []


@pytest.mark.usefixtures("reachable")
def test_invalid_request_fetches_nothing(site: Site, pipeline: FakePipeline) -> None:
    wrong: dict[str, dict[str, object]] = {
        "strength": {"strength": 3.0},
        "scheduler": {"scheduler": "none"},
        "preview_interval": {"preview_interval": -1},
        "width": {"width": 2**30},
        "height": {"height": 1, "width": 64},
        "output.format": {"output": pb.OutputOptions(format=99)},  # type: ignore[arg-type]
    }
    with transforming(pipeline, allow_http=True) as stub:
        for field, fields in wrong.items():
            asked = at(f"http://127.0.0.1:{site.server_port}/a.png", **fields)
            code, details = failure(lambda asked=asked: stub.Transform(asked))  # type: ignore[misc]
            assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        asked = at(f"http://127.0.0.1:{site.server_port}/a.png", output=pb.OutputOptions(as_asset=True))
        assert failure(lambda: stub.Transform(asked))[0] == grpc.StatusCode.UNIMPLEMENTED
    assert site.asked == []


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("way", ["deadline", "cancel"])
def test_disconnecting_cancels_the_fetch(site: Site, pipeline: FakePipeline, way: str) -> None:
    with transforming(pipeline, allow_http=True, http_seconds=600.0) as stub:
        call = stub.Transform.future(at(f"http://127.0.0.1:{site.server_port}/hang"), timeout=0.5 if way == "deadline" else None)
        assert site.hanging.wait(120)
        if way == "cancel":
            call.cancel()
        assert site.gone.wait(120)
    assert pipeline.prepared == []
