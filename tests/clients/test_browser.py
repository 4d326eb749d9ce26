"""The page of docs/clients.md (Browsers) in a browser: Connect's stock gRPC-Web client through Envoy, from another origin."""

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from fakes import FakePipeline
from img2img_server.config import ServerConfig, TlsSettings
from kserve_calls import Gate, ending
from other_clients import CLIENTS, IMAGE, blocks
from playing import browsing
from playwright.async_api import Page
from proxying import certify, proxied
from running import running, store

PACKAGES = ("@bufbuild/protobuf", "@connectrpc/connect", "@connectrpc/connect-web")
START = """([bytes, options]) => {
    window.shown = [];
    window.aborting = new AbortController();
    const show = (line) => window.shown.push(line);
    window.running = window.transform(new Blob([new Uint8Array(bytes)]), options, show, window.aborting.signal);
    window.running.catch(() => {});
}"""
RESULT = "async () => Array.from(new Uint8Array(await (await window.running).arrayBuffer()))"
ERROR = "() => window.running.then(() => null, (error) => [error.name, error.code, error.rawMessage])"


class Files(http.server.SimpleHTTPRequestHandler):
    """The page's files, without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the origin at which a web server has its files."""
    folder = tmp_path / "site"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


def import_map() -> str:
    """The import map of the packages, from their package.json, as a bundler reads it."""
    places: dict[str, str] = {}
    for name in PACKAGES:
        exports = json.loads((CLIENTS / "node" / "node_modules" / name / "package.json").read_text())["exports"]
        places |= {name + path[1:]: f"/node_modules/{name}/{found['import'][2:]}" for path, found in exports.items()}
    return json.dumps({"imports": places})


def put_page(folder: Path, proxy: str) -> None:
    (folder / "node_modules").symlink_to(CLIENTS / "node" / "node_modules")
    command = [Path(sys.executable).parent / "buf", "build", REPOSITORY / "protos", "-o", folder / "img2img.binpb"]
    subprocess.run([*map(str, command)], check=True, timeout=60)
    (program,) = blocks(REPOSITORY / "docs" / "clients.md", "js")
    assert program.count("http://localhost:8080") == 1
    (folder / "page.js").write_text(program.replace("http://localhost:8080", proxy))
    loads = 'import { transform } from "./page.js"; window.transform = transform;'
    maps = f'<script type="importmap">{import_map()}</script>'
    (folder / "index.html").write_text(f'<!doctype html>{maps}<script type="module">{loads}</script>')


async def shown(page: Page, count: int) -> list[str]:
    """The page's output, once it has so many lines."""
    await page.wait_for_function(f"window.shown.length >= {count}")
    lines: list[str] = await page.evaluate("window.shown")
    return lines


async def test_the_page_shows_steps_results_and_errors(node: Path, site: tuple[Path, str], tmp_path: Path) -> None:
    folder, origin = site
    pipeline = FakePipeline()
    gate = Gate(pipeline)
    image = list(IMAGE.read_bytes())
    with (
        running(lambda: store(m=pipeline)) as server,
        proxied(server.port, tmp_path, origin=origin) as port,
        ending() as calls,
    ):
        put_page(folder, f"http://localhost:{port}")
        async with browsing() as browser:
            page = await browser.new_page()
            await page.goto(f"{origin}/index.html")
            await page.wait_for_function("'transform' in window")

            await page.evaluate(START, [image, {"strength": 2}])
            assert await page.evaluate(ERROR) == ["ConnectError", 3, "strength: 2.0 is not in (0, 1]"]
            assert calls.wait("TransformStream") == "INVALID_ARGUMENT"

            await page.evaluate(START, [image, {"prompt": "in winter", "numInferenceSteps": 5}])
            for step in range(1, 5):
                gate.wait_for_call()
                gate.step()
                assert (await shown(page, step))[-1] == f"step {step} of 4"
            assert bytes(await page.evaluate(RESULT)).startswith(b"\x89PNG")
            assert pipeline.prepared[-1].request.prompt == "in winter"
            assert calls.wait("TransformStream") == "OK"

            await page.evaluate(START, [image, {"numInferenceSteps": 25}])
            gate.wait_for_call()
            gate.step()
            await shown(page, 1)
            await page.evaluate("window.aborting.abort()")
            assert (await page.evaluate(ERROR))[:2] == ["ConnectError", 1]
            assert calls.wait("TransformStream") == "CANCELLED"
            gate.open()

            # The same page at another address is another origin.
            await page.goto(f"{origin.replace('localhost', '127.0.0.1')}/index.html")
            await page.wait_for_function("'transform' in window")
            before = len(pipeline.prepared)
            await page.evaluate(START, [image, {}])
            assert "Failed to fetch" in (await page.evaluate(ERROR))[2]
            assert len(pipeline.prepared) == before


async def test_oversized_message_gets_a_status_over_http2(node: Path, site: tuple[Path, str], tmp_path: Path) -> None:
    """Over HTTP/2, which browsers use with TLS."""
    folder, origin = site
    certify(tmp_path)
    tls = TlsSettings(tmp_path / "server.pem", tmp_path / "server.key")
    with (
        running(lambda: store(m=FakePipeline()), tls=tls) as server,
        proxied(server.port, tmp_path, options=True, origin=origin) as port,
    ):
        put_page(folder, f"https://localhost:{port}")
        async with browsing() as browser:
            page = await browser.new_page(ignore_https_errors=True)
            await page.goto(f"{origin}/index.html")
            await page.wait_for_function("'transform' in window")
            start = START.replace("new Uint8Array(bytes)", "new Uint8Array(bytes[0])")
            image, message = ServerConfig(Path()).image_limits.max_bytes, ServerConfig(Path()).max_message_bytes
            for size, code, said in ((image + 1, 3, "image.data"), (message + 1, 8, "larger than max")):
                await page.evaluate(start, [[size], {}])
                name, got, text = await page.evaluate(ERROR)
                assert (name, got) == ("ConnectError", code)
                assert said in text
