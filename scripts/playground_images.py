"""Regenerates docs/images/playground*.png with the demo model, a server and a headless Chromium.

Run scripts/demo first, which makes the bundle, then .venv/bin/python scripts/playground_images.py
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from playing import Visitor, browsing, playground  # noqa: E402 - the tests' own helpers

MODELS = REPOSITORY / ".demo" / "models"
IMAGES = REPOSITORY / "docs" / "images"
_PROMPTS = (
    ("a lake below snowy mountains, stars and a moon at night", "2", 0.85),
    ("a lake below snowy mountains in thick fog", "5", 0.7),
    ("a lake below snowy mountains at sunset", "11", 0.75),
)
_SECONDS_TO_SERVE = 120.0


@contextmanager
def _serving(folder: Path) -> Iterator[str]:
    """Serves the demo's bundle and yields the server's address."""
    port = folder / "port"
    words = [
        str(Path(sys.executable).parent / "img2img"),
        "serve",
        "--models",
        str(MODELS),
        "--port",
        "0",
        "--port-file",
        str(port),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stderr=log)
    try:
        deadline = time.monotonic() + _SECONDS_TO_SERVE
        while not port.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.1)
        yield f"localhost:{port.read_text().strip()}"
    finally:
        process.terminate()
        process.wait()


async def _take_screenshots(address: str) -> None:
    async with browsing() as browser:
        for name, width, dark in (("playground", 1280, False), ("playground-dark", 1280, True), ("playground-phone", 390, True)):
            visitor = await Visitor.open(browser, address, width=width, height=1030 if width > 900 else 844, dark=dark)
            await visitor.choose()
            for prompt, seed, strength in _PROMPTS:
                await visitor.page.get_by_label("Prompt", exact=True).fill(prompt)
                await visitor.page.get_by_label("Seed", exact=True).fill(seed)
                await visitor.page.locator("[data-field=strength]").fill(str(strength))
                await visitor.transform()
                await visitor.page.locator(f"[aria-current][aria-label$='seed {seed}']").wait_for()
            await visitor.page.mouse.move(0, 0)
            await visitor.page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
            await visitor.page.wait_for_timeout(500)  # The buttons' colours fade.
            await visitor.page.screenshot(path=IMAGES / f"{name}.png")
            await visitor.leave()


def main() -> None:
    """Takes all screenshots."""
    if not MODELS.is_dir():
        raise SystemExit(f"{MODELS} does not exist: run scripts/demo first")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, _serving(Path(folder)) as target, playground(target, Path(folder)) as address:
        asyncio.run(_take_screenshots(address))
    for path in sorted(IMAGES.glob("playground*.png")):
        print(f"{path.relative_to(REPOSITORY)}  {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
