"""Test bed of the playground: a server whose model waits for the test, the playground in a process, and a browser."""

import contextlib
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any, Self

from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from fakes import FakePipeline, FakeState
from img2img_server.bundle.controls import FAMILY
from img2img_server.config import ImageAdapterFolder, LoraFolder
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.support.model_fields import CONTROLNETS as NAMES_CONTROLNETS
from img2img_server.support.model_fields import GUIDED, IMAGE_PROMPTS, OWN_CONTROL, FieldRule
from img2img_server.support.source_rule import SourceRule
from PIL import Image, ImageChops, ImageOps
from playwright.async_api import Browser, BrowserContext, Locator, Page, async_playwright, expect
from prompting import KIND as PROMPT_KIND
from prompting import image_encoder, write_adapters
from running import RunningServer, manifest, running

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGE = REPOSITORY / "demo" / "images" / "noon-lake.png"
LORAS = ("detail", "ghibli 'style'")
CONTROLNETS = ("depth", "edges")
_KIND = (("family", "small"),)
PATIENCE = 60.0
"""Seconds that a busy machine may take for what takes none."""

_FLAGS = (
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No other name resolves, so requests to other hosts fail, which the test checks.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


class Gate:
    """Lets a test control a pipeline's steps. Open at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps = float("inf")

    def close(self) -> None:
        self._set(0)

    def open(self) -> None:
        self._set(float("inf"))

    def let(self, steps: int) -> None:
        with self._changed:
            self._steps += steps
            self._changed.notify_all()

    def pass_one(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._steps > 0, PATIENCE), "the gate was left closed"
            self._steps -= 1

    def _set(self, steps: float) -> None:
        with self._changed:
            self._steps = steps
            self._changed.notify_all()


class InvertingPipeline(FakePipeline):
    """Inverts an image's colors, and counts the requests that were released."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.before["denoise"] = gate.pass_one
        self.native_size = (256, 256)  # IMAGE's
        self.source_rule = SourceRule(mask="optional")
        self.fields = {**GUIDED, "reference_images": FieldRule(), "loras": FieldRule(), **NAMES_CONTROLNETS, **IMAGE_PROMPTS}
        self.released_requests = threading.Semaphore(0)

    def finish(self, states: Sequence[FakeState]) -> Sequence[Sequence[Image.Image]]:
        return [[ImageOps.invert(image) for image in images] for images in super().finish(states)]

    def release(self, state: FakeState) -> None:
        super().release(state)
        self.released_requests.release()

    def forget(self) -> None:
        """Forgets the requests that were released before."""
        self.released.clear()
        self.released_requests = threading.Semaphore(0)


class Stand:
    """A server with one place in its queue, which a test can take down and bring back at the same port."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.pipeline = InvertingPipeline(self.gate)
        self.port = 0
        self._ends = contextlib.ExitStack()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def up(self) -> None:
        limits = QueueLimits(max_active=1, max_waiting=1, max_batch_size=1)
        self.pipeline = InvertingPipeline(self.gate)
        folder, adapters = (Path(self._ends.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        for name in LORAS:
            (folder / f"{name}.safetensors").write_bytes(b"the fake pipeline does not read it")
        image_adapters = ImageAdapterFolder(write_adapters(adapters))
        server: RunningServer = self._ends.enter_context(
            running(self._models, limits=limits, port=self.port, loras=LoraFolder(folder), image_adapters=image_adapters)
        )
        self.port = server.port

    def _models(self) -> ModelRegistry:
        """One that runs, one with a built-in control input, one that is not in memory, one that cannot be loaded, two
        ControlNets and the image encoder of the first, and a ControlNet of another kind."""
        own = FakePipeline()
        own.fields = {**GUIDED, **OWN_CONTROL}
        there = [
            Model("m", manifest("acme/m"), self.pipeline, control_kind=_KIND, prompt_kind=PROMPT_KIND),
            Model("asleep", manifest("acme/asleep")),
            Model("sees-depth", manifest("acme/sees-depth"), own),
        ]
        broken = Model("broken", problem="a secret of the server's", detail="its file is cut short")
        kinds = {**dict.fromkeys(CONTROLNETS, _KIND), "depth-xl": (("family", "XL"),)}
        nets = [
            Model(name, replace(manifest(f"acme/{name}"), family=FAMILY), FakePipeline(), control_kind=kind)
            for name, kind in kinds.items()
        ]
        return ModelRegistry([*there, broken, *nets, image_encoder()], default="m")

    def down(self) -> None:
        self.gate.open()
        self._ends.close()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()


@contextlib.contextmanager
def playground(target: str, folder: Path, *flags: str, warning: str = "") -> Iterator[str]:
    """Runs `img2img playground` in its own process and yields the page's address. It must exit with 0, print only `warning` on
    standard error, and leave no files in its folder."""
    words = [str(Path(sys.executable).parent / "img2img"), "playground", "--target", target, "--port", "0", "--no-open", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMG2IMG_")}
    home = folder / "home"
    home.mkdir()
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(words, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None, (folder / "stderr").read_text()
            yield found[0]
        finally:
            process.terminate()
            status = process.wait(PATIENCE)
            assert process.stdout is not None
            process.stdout.close()
        assert (status, (folder / "stderr").read_text(), list(home.iterdir())) == (0, warning, [])


def chromium() -> str:
    """The path of a Chromium; the first call on a new machine installs it."""
    # The browser does not belong into the tests' own cache folder.
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    script = str(REPOSITORY / "scripts" / "chromium")
    result = subprocess.run([script], env=environment, stdout=subprocess.PIPE, text=True, timeout=280)
    assert result.returncode == 0, "scripts/chromium found none and could not install one"
    return result.stdout.strip()


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """A headless Chromium that reaches this machine only."""
    # Not the blocking interface: its greenlets confuse Python 3.11's parser, with which pytest shows what failed.
    expect.set_options(timeout=PATIENCE * 1000)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=_FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


class Visitor:
    """A page of the playground in its own browser, with a user's actions. Created by `open`."""

    def __init__(self, address: str, context: BrowserContext) -> None:
        self.address = address
        self.context = context
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        self.page: Page

    @classmethod
    async def open(cls, browser: Browser, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Self:
        context = await browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        context.set_default_timeout(PATIENCE * 1000)
        visitor = cls(address, context)
        visitor.page = await visitor.open_tab()
        return visitor

    async def open_tab(self) -> Page:
        """One more tab."""
        page = await self.context.new_page()
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda websocket: self._note(websocket.url.replace("ws", "http", 1)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        await page.goto(self.address)
        await page.locator(".page").wait_for()
        return page

    def _note(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(url)

    async def drop(self, data: bytes, name: str) -> None:
        """Drops a file on the page, as a file manager does."""
        await self.page.evaluate(
            """([bytes, name]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
                for (const kind of ["dragover", "drop"])
                    document.body.dispatchEvent(
                        new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
            }""",
            [list(data), name],
        )

    async def choose(self, path: Path = IMAGE) -> None:
        """Chooses a file, and waits until it is on the stage."""
        await self.page.set_input_files(".stage-foot input[type=file]", path)
        await self.page.locator(".stage-name", has_text=path.name).wait_for()

    @property
    def banner(self) -> Locator:
        """The error above the image. Messages below fields are alerts, too."""
        return self.page.locator(".banner[role=alert]")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    async def begin(self) -> None:
        """Begins a run, and waits until the server computes it."""
        await self.button("Transform").click()
        await self.see("Reading the image")

    async def transform(self) -> None:
        """Runs to the end: waits until the stage shows another result than before."""
        address = "document.querySelector('.stage-image .after')?.getAttribute('src')"
        before = await self.page.evaluate(address)
        await self.button("Transform").click()
        await self.page.wait_for_function(f"before => {{ const now = {address}; return now && now !== before; }}", arg=before)
        await self.button("Use as source").wait_for()

    async def see(self, words: str) -> None:
        """Waits until words are to be seen."""
        await self.page.get_by_text(words).first.wait_for()

    async def axe_violations(self) -> list[str]:
        """axe-core's findings on the page after its transitions: rule, element, reason."""
        ended = """() => document.getAnimations().every(
            (one) => one.playState !== "running" || one.effect.getTiming().iterations === Infinity)"""
        await self.page.wait_for_function(ended)
        results = await Axe().run(self.page)
        return [
            f"{violation['id']}: {node['target']} {node['failureSummary']}"
            for violation in results.response["violations"]
            for node in violation["nodes"]
        ]

    async def too_small(self) -> list[str]:
        """The visible controls that are smaller than a finger (44 px)."""
        return list(
            await self.page.evaluate(
                """() => [...document.querySelectorAll("button, a[href], input, textarea, .q-slider, [role=option]")]
                    .filter((one) => one.tabIndex >= 0 && one.checkVisibility({ visibilityProperty: true }))
                    .map((one) => [one, (one.closest(".q-field__control") ?? one).getBoundingClientRect()])
                    .filter(([, box]) => box.width < 44 || box.height < 44)
                    .map(([one, box]) => one.outerHTML.slice(0, 120) + ` ${box.width} x ${box.height}`)"""
            )
        )

    async def too_wide(self) -> list[str]:
        """The elements that make the page wider than the window."""
        return list(
            await self.page.evaluate(
                """() => document.documentElement.scrollWidth <= innerWidth ? [] : [document.documentElement.scrollWidth + " px",
                    ...[...document.querySelectorAll("*")].filter((one) => one.getBoundingClientRect().right > innerWidth)
                        .map((one) => one.tagName + " " + one.className)]"""
            )
        )

    async def leave(self) -> None:
        """Closes everything. Checks that the page sent no request to another machine, and had no error."""
        await self.context.close()
        assert self.elsewhere == []
        assert self.complaints == []


def is_inverted(file: bytes | Path) -> bool:
    """Whether an image's file is what InvertingPipeline makes of IMAGE."""
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as made, Image.open(IMAGE) as source:
        wanted = ImageOps.invert(source.convert("RGB"))
        return made.size == wanted.size and ImageChops.difference(made.convert("RGB"), wanted).getbbox() is None


def run_program(program: str, folder: Path) -> Path:
    """Runs a Python program in a folder, and gives the file that it has made there."""
    before = set(folder.iterdir())
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stderr) == (0, "")
    (made,) = set(folder.iterdir()) - before
    return made


def ask(address: str, method: str, path: str, body: Iterable[bytes] = (), **headers: Any) -> tuple[int, Message]:
    """The status and headers of the playground's answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    try:
        connection.request(method, path, iter(body) if body else None, headers, encode_chunked=bool(body))
        response = connection.getresponse()
        return response.status, response.headers
    finally:
        connection.close()
