"""Every program in docs/recipes.md runs unchanged, except for ports, against the demo model's server.

Recipes that need other servers (three, or one with TLS) get real ones with a fake model.
"""

import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trustme
from conftest import REPOSITORY
from fakes import FakePipeline
from img2img_server.access import tokens
from img2img_server.access.tokens import Token
from img2img_server.config import AssetSettings, ImageAdapterFolder, TlsSettings
from img2img_server.images.sizes import centered_square
from img2img_server.models.registry import ModelRegistry
from PIL import Image
from prompting import ADAPTERS, SIDE, image_encoder, model, write_adapters
from running import running, store

TEXT = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:])
RECIPES = {title: "".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)) for title, text in SECTIONS.items()}
PATIENCE = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the recipes run and write."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "demo").symlink_to(REPOSITORY / "demo")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path, bundle: Callable[[str], Path]) -> Iterator[str]:
    """The demo model's server: with it a second time under another name, and with room for few requests."""
    for name in ("demo", "other"):
        shutil.copytree(bundle("demo"), folder / "models" / name)
    words = ["--models", "models", "--default-model", "demo", "--assets", "assets", "--warm-up", "1"]
    words += ["--max-active", "2", "--max-waiting", "4"]
    command = [str(Path(sys.executable).parent / "img2img"), "serve", *words, "--port", "0", "--port-file", "port"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stderr=log)
    try:
        while not (folder / "port").exists():
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield (folder / "port").read_text().strip()
    finally:
        process.terminate()
        assert process.wait(60) == 0


def program(title: str, **ports: object) -> str:
    """A recipe, with other ports."""
    text = RECIPES[title]
    for old, new in ports.items():
        assert old.removeprefix("p") in text
        text = text.replace(old.removeprefix("p"), str(new))
    return text


def run(folder: Path, text: str) -> str:
    """Runs a program and returns what it printed."""
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_a_folder_of_images(folder: Path, port: str) -> None:
    made = run(folder, program("A folder of images", p50051=port)).split()
    assert made == [f"winter/noon-{name}.png" for name in ("dunes", "hills", "lake")]
    for name in made:
        assert size(folder / name) == (256, 256)
        assert (folder / name).read_bytes() != (folder / "demo" / "images" / Path(name).name).read_bytes()


def test_large_photos_and_long_prompts(folder: Path, port: str) -> None:
    fitted, warning = run(folder, program("Large photos and long prompts", p50051=port)).splitlines()
    assert fitted == "312 x 208"
    assert warning.startswith("prompt PROMPT_TRUNCATED ")
    assert warning.endswith("with snow on every tree and on every roof ,"), "as the tokenizer spells it"
    assert size(folder / "hills.png") == (312, 208)


def test_redraw_a_part(folder: Path, port: str) -> None:
    run(folder, program("Redraw a part", p50051=port))
    with Image.open(folder / "demo" / "images" / "noon-lake.png") as source, Image.open(folder / "sky.png") as made:
        below, above = (0, 200, 256, 256), (0, 0, 256, 80)
        assert made.convert("RGB").crop(below).tobytes() == source.convert("RGB").crop(below).tobytes()
        assert made.convert("RGB").crop(above).tobytes() != source.convert("RGB").crop(above).tobytes()


def test_a_larger_canvas(folder: Path, port: str) -> None:
    run(folder, program("A larger canvas", p50051=port))
    with Image.open(folder / "demo" / "images" / "noon-lake.png") as source, Image.open(folder / "wide.png") as made:
        assert made.size == (320, 256)
        kept = (0, 0, 240, 256)
        assert made.convert("RGB").crop(kept).tobytes() == source.convert("RGB").crop(kept).tobytes()


def test_the_style_of_another_image(folder: Path) -> None:
    """A fake model that takes image prompts, beside one that does not."""
    pipeline = FakePipeline()

    def models() -> ModelRegistry:
        return ModelRegistry([*store(a=FakePipeline()), model("m", pipeline), image_encoder()])

    adapters = ImageAdapterFolder(write_adapters(folder / "adapters"))
    with running(models, image_adapters=adapters) as server:
        assert run(folder, program("The style of another image", p50051=server.port)) == ""
    assert size(folder / "like-dunes.png") == (256, 256)
    (use,) = pipeline.prepared[0].request.image_prompts
    with Image.open(folder / "demo" / "images" / "noon-dunes.png") as dunes:
        expected = centered_square(dunes.convert("RGB"), SIDE)
    assert (use.adapter, use.scale, use.images[0].tobytes()) == (ADAPTERS[0], 0.6, expected.tobytes())


def test_variations_and_reproducing_one(folder: Path, port: str) -> None:
    assert run(folder, program("Variations and reproducing one", p50051=port)) in ("True\n", "False\n")
    files = {(folder / f"sunset-{seed}.png").read_bytes() for seed in range(100, 104)}
    assert len(files) == 4


def test_progress_and_previews(folder: Path, port: str) -> None:
    said = run(folder, program("Progress and previews", p50051=port)).splitlines()
    assert [line for line in said if line.startswith("step")] == [f"step {step} of 6" for step in range(1, 7)]
    assert re.fullmatch(r"seed \d+ on \S+", next(line for line in said if line.startswith("seed")))
    assert [size(folder / f"preview-{step}.jpg") for step in (2, 4)] == [(32, 32)] * 2
    assert size(folder / "lake.png") == (256, 256)


def test_cancel_early(folder: Path, port: str) -> None:
    assert run(folder, program("Cancel early", p50051=port)) == "left after step 3\n"
    assert size(folder / "enough.png") == (256, 256)


def test_deadlines(folder: Path, port: str) -> None:
    refused, made = run(folder, program("Deadlines", p50051=port)).splitlines()
    assert re.fullmatch(r"too long for a second: (None|[\d.]+) s", refused)
    assert re.fullmatch(r"1 in \d+ ms", made)


def test_retry_when_the_server_is_full(folder: Path, port: str) -> None:
    printed = run(folder, program("Retry when the server is full", p50051=port))
    assert printed.endswith(f"drawn: {list(range(8))}\n")
    assert re.search(r"attempt \d+: QUEUE_FULL, again in \d+\.\d\d s", printed), "the server takes six of eight requests"


def test_edit_in_rounds_with_assets(folder: Path, port: str) -> None:
    rounds = run(folder, program("Edit in rounds with assets", p50051=port)).splitlines()
    assert [line.rpartition(" ")[0] for line in rounds] == ["the lake in autumn", "the lake in autumn, at dusk"]
    assert size(folder / "dusk.png") == (256, 256)
    assert [path for path in (folder / "assets").rglob("*") if re.fullmatch(r"[0-9a-f]{64}", path.name)] == []


def test_choose_a_scheduler(folder: Path, port: str) -> None:
    assert re.fullmatch(r"\d+ schedulers\n", run(folder, program("Choose a scheduler", p50051=port)))
    assert pixels(folder / "EulerDiscreteScheduler.png") != pixels(folder / "DPM++.png")


def test_several_models(folder: Path, port: str) -> None:
    *lines, last = run(folder, program("Several models", p50051=port)).splitlines()
    assert [line.split()[:2] for line in lines] == [["demo", "ready"], ["other", "ready"]]
    assert "another" in last
    assert pixels(folder / "by-demo.png") == pixels(folder / "by-other.png")


def test_concurrent_requests_with_asyncio(folder: Path, port: str) -> None:
    names = run(folder, program("Concurrent requests with asyncio", p50051=port)).split()
    assert sorted(names) == sorted(
        f"noon-{it}-{season}.webp" for it in ("dunes", "hills", "lake") for season in ("winter", "autumn")
    )
    assert all(size(folder / name) == (256, 256) for name in names)


def test_a_web_page_with_live_progress(folder: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    text = program("A web page with live progress", p50051=port, p8080=own)
    command = [sys.executable, "-u", "-c", text]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as page:
        assert page.stdout is not None
        try:
            assert "Running on" in page.stdout.readline()
            with urllib.request.urlopen(f"http://localhost:{own}/draw?prompt=a+lake", timeout=PATIENCE) as answer:
                events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", answer.read().decode())
            with socket.create_connection(("localhost", own)) as gone:  # closes the page at the first step
                gone.sendall(b"GET /draw HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"200" in gone.makefile("rb").readline()
            with urllib.request.urlopen(f"http://localhost:{own}/draw", timeout=PATIENCE) as answer:
                assert b"event: done" in answer.read()
        finally:
            page.send_signal(signal.SIGINT)
            rest = page.communicate(timeout=60)[0]
    assert "Traceback" not in rest
    assert [kind for kind, _ in events] == [*["progress"] * 6, "done"]
    steps = [json.loads(data) for kind, data in events if kind == "progress"]
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert base64.b64decode(steps[1]["preview"]).startswith(b"\xff\xd8")
    assert base64.b64decode(json.loads(events[-1][1])["image"]).startswith(b"RIFF")


def test_several_servers(folder: Path) -> None:
    pipelines = [FakePipeline() for _ in range(3)]
    with ExitStack() as stack:
        ports = [
            stack.enter_context(running(partial(store, m=pipeline), assets=AssetSettings(url="none"))).port
            for pipeline in pipelines
        ]
        said = run(folder, program("Several servers", p50051=ports[0], p50052=ports[1], p50053=ports[2]))
    assert said == "24 images\n"
    assert sum(len(pipeline.prepared) for pipeline in pipelines) == 24


def test_tls_and_a_token(folder: Path) -> None:
    authority, secret = trustme.CA(), tokens.make_secret()
    own = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    own.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    own.private_key_pem.write_to_path(str(folder / "server.key"))
    (folder / "server.key").chmod(0o600)
    (folder / "token.txt").write_text(f"{secret}\n")
    with tokens.editing(folder / "tokens.toml") as known:
        known["alice"] = Token("alice", tokens.digest(secret))
    tls = TlsSettings(folder / "server.pem", folder / "server.key")
    assets = AssetSettings(url="none")
    with running(partial(store, m=FakePipeline()), tls=tls, tokens=folder / "tokens.toml", assets=assets) as server:
        drawn, denied, stranger = run(folder, program("TLS and a token", p50051=server.port)).splitlines()
    assert drawn == "drawn by m"
    assert denied.startswith("not allowed: ")
    assert stranger.startswith("who is that? ")


def test_traces(folder: Path, port: str) -> None:
    said = run(folder, program("Traces", p50051=port))
    inner, outer = (json.loads(span) for span in re.findall(r"^\{$.*?^\}$", said, re.MULTILINE | re.DOTALL))
    assert (inner["name"], outer["name"]) == ("img2img.transform", "an order")
    assert inner["parent_id"] == outer["context"]["span_id"]
    assert inner["attributes"]["img2img.request_id"] == "order-4711"


def test_every_recipe_has_a_test_and_a_contents_entry() -> None:
    titles = list(RECIPES)
    assert all(RECIPES.values())
    assert TEXT.count("```") == 2 * len(titles), "one program each"
    tests = {name for name in globals() if name.startswith("test_")}
    assert {"test_" + re.sub(r"\W+", "_", title.lower()) for title in titles} < tests
    contents = re.findall(r"\[([^]]+)\]\(#([\w-]+)\)", TEXT.partition("\n## ")[0])
    assert contents == [(title, re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")) for title in titles]
