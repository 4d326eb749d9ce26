"""The playground as a person meets it: in a browser that reaches nothing but this machine, over a real server."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from img2img_server.engine.request import RequestWarning
from playing import IMAGE, Stand, Visitor, ask, is_inverted, run_program
from playwright.async_api import expect

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _loaded(visitor: Visitor, selector: str) -> bool:
    return bool(await visitor.page.locator(selector).evaluate("image => image.decode().then(() => image.naturalWidth > 0)"))


async def test_dropped_image_shows_each_step_and_its_result(visitor: Visitor, stand: Stand) -> None:
    await visitor.see("Connected to")
    await expect(visitor.button("Transform")).to_be_disabled()
    await visitor.drop(IMAGE.read_bytes(), IMAGE.name)
    await visitor.see("noon-lake.png · 256 x 256 pixels")
    stand.gate.close()
    await visitor.begin()
    stand.gate.let(1)
    await visitor.see("Step 1 of 20")
    progress = visitor.page.get_by_role("progressbar")
    await expect(progress).to_have_attribute("aria-valuenow", "5")
    stand.gate.let(3)
    await visitor.see("Step 4 of 20")
    await visitor.page.locator(".preview").wait_for()
    assert await _loaded(visitor, ".preview")
    await expect(visitor.page.locator(".after")).to_have_count(0)
    stand.gate.open()
    await visitor.button("Use as source").wait_for()
    assert await _loaded(visitor, ".stage-image .before")
    assert await _loaded(visitor, ".stage-image .after")
    assert re.search(r"Seed \d+ · [\d.]+ s · m on fake:cpu", await visitor.page.locator(".facts").inner_text())
    async with visitor.page.expect_download() as download:
        await visitor.page.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"noon-lake-\d+\.png", (await download.value).suggested_filename)
    assert is_inverted(await (await download.value).path())


async def test_queue_position_is_shown(visit: Callable[[], Awaitable[Visitor]], stand: Stand) -> None:
    first, second = await visit(), await visit()
    stand.gate.close()
    for visitor, words in ((first, "Reading the image"), (second, "Next in the queue")):
        await visitor.choose()
        await visitor.button("Transform").click()
        await visitor.see(words)
    stand.gate.open()
    await second.button("Use as source").wait_for()


async def test_a_run_is_cancelled_at_the_server(visitor: Visitor, stand: Stand) -> None:
    await visitor.choose()
    stand.gate.close()
    stand.pipeline.forget()
    await visitor.begin()
    await visitor.button("Cancel").click()
    await expect(visitor.button("Transform")).to_be_enabled()
    await expect(visitor.banner).to_be_hidden()
    while not stand.pipeline.released_requests.acquire(timeout=0.5):
        stand.gate.let(1)
    (state,) = stand.pipeline.released
    assert state.step < state.step_count, "what nobody waits for is not computed to its end"
    stand.gate.open()
    await visitor.transform()


async def test_a_warning_is_shown_with_the_result(visitor: Visitor, stand: Stand) -> None:
    stand.pipeline.warnings = (RequestWarning("negative_prompt", "it was too long", "PROMPT_TRUNCATED"),)
    try:
        await visitor.choose()
        await visitor.transform()
        await visitor.see("Negative prompt: it was too long")
    finally:
        stand.pipeline.warnings = ()
    await visitor.transform()
    await expect(visitor.page.locator(".stage-warnings")).to_be_hidden()


async def test_the_slider_compares_by_keys_and_by_drag(visitor: Visitor) -> None:
    await visitor.choose()
    await visitor.transform()
    slider, before = visitor.page.get_by_role("slider", name="Compare before and after"), visitor.page.locator(".before")

    async def shares() -> tuple[str | None, str]:
        clip = str(await before.evaluate("image => image.style.clipPath"))
        return await slider.get_attribute("aria-valuetext"), clip

    assert await shares() == ("50 % before, 50 % after", "inset(0px 50% 0px 0px)")
    await slider.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        await slider.press(key)
    assert await shares() == ("52 % before, 48 % after", "inset(0px 48% 0px 0px)")
    await slider.press("Home")
    assert await shares() == ("0 % before, 100 % after", "inset(0px 100% 0px 0px)")
    box = await slider.bounding_box()
    assert box is not None
    await visitor.page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
    await visitor.page.mouse.down()
    await visitor.page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 10, steps=4)
    await visitor.page.mouse.up()
    assert await shares() == ("100 % before, 0 % after", "inset(0px 0% 0px 0px)")


async def test_history_restores_images_and_settings(visitor: Visitor) -> None:
    prompt, seed = visitor.page.get_by_label("Prompt", exact=True), visitor.page.get_by_label("Seed", exact=True)
    await visitor.choose()
    await prompt.fill("first")
    await seed.fill("41")
    await visitor.transform()
    await visitor.button("Use as source").click()
    await visitor.see("noon-lake-41.png")
    await prompt.fill("second")
    await visitor.button("Random seed").click()
    await expect(seed).not_to_have_value("41")
    drawn = await seed.input_value()
    await prompt.press("Control+Enter")
    await visitor.see(f"Seed {drawn} · ")
    entries = visitor.page.locator(".history-entry")
    await expect(entries).to_have_count(2)
    await expect(entries.first).to_have_attribute("aria-label", f"Restore: second, seed {drawn}")
    await visitor.button("Restore: first, seed 41").click()
    await expect(prompt).to_have_value("first")
    await expect(seed).to_have_value("41")
    await visitor.see("noon-lake.png · 256 x 256")
    await expect(entries.last).to_have_attribute("aria-current", "true")
    await visitor.page.reload()
    await expect(entries).to_have_count(2)
    await expect(prompt).to_have_value("first")
    await visitor.page.get_by_role("region", name="History").get_by_role("button", name="Clear").click()
    await expect(entries).to_have_count(0)


async def test_the_copied_program_makes_the_same_image(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    (tmp_path / IMAGE.name).write_bytes(IMAGE.read_bytes())
    await visitor.choose()
    await visitor.page.get_by_label("Prompt", exact=True).fill('a "quoted" \\ place\nin two lines')
    await visitor.page.get_by_label("Negative prompt").fill("fog")
    await visitor.page.get_by_label("Scheduler").click()
    await visitor.page.get_by_role("option", name="DDIMScheduler").click()
    await visitor.transform()
    await visitor.button("Python program").click()
    await visitor.button("Copy").click()
    await visitor.see("Copied")
    program = str(await visitor.page.evaluate("navigator.clipboard.readText()"))
    assert program == await visitor.page.locator(".code-words").evaluate("element => element.textContent")
    made = await asyncio.to_thread(run_program, program, tmp_path)
    assert made.name in program
    assert f"seed={made.stem.rpartition('-')[2]}," in program
    assert is_inverted(made)
    for words in ('scheduler="DDIMScheduler"', 'negative_prompt="fog"'):
        assert words in program


async def test_models_and_schedulers_are_listed_from_the_server(visitor: Visitor) -> None:
    options, model, scheduler = (
        visitor.page.get_by_role("option"),
        visitor.page.get_by_label("Model", exact=True),
        visitor.page.get_by_label("Scheduler"),
    )
    await visitor.see("Server's default (m)")
    await model.click()
    await expect(options).to_have_text(
        ["Server's default (m)", "asleep · not loaded", "broken · failed: its file is cut short", "m", "sees-depth"]
    )
    await expect(options.filter(has_text="broken")).to_have_attribute("aria-disabled", "true")
    await options.get_by_text("m", exact=True).click()
    await expect(options).to_have_count(0)
    await scheduler.click()
    await expect(options).to_have_text(["Model's default", "EulerDiscreteScheduler", "DDIMScheduler"])
    await options.get_by_text("DDIMScheduler").click()
    await expect(options).to_have_count(0)
    program = visitor.page.locator(".code-words")
    await visitor.button("Python for these settings").click()
    await expect(program).to_contain_text('scheduler="DDIMScheduler"')
    await expect(program).to_contain_text('model="m"')
    await visitor.button("Close").click()
    await expect(program).to_be_hidden()
    await model.click()
    await options.get_by_text("asleep").click()
    await expect(scheduler).to_have_value("Model's default")  # It has no other.
    await visitor.choose()
    await visitor.button("Transform").click()
    await visitor.see("The request failed.")
    await expect(visitor.page.locator(".q-field--error [data-field=model]")).to_have_count(1)
    await model.click()
    await options.get_by_text("m", exact=True).click()
    await expect(visitor.banner).to_be_hidden()
    await expect(visitor.page.locator(".q-field--error")).to_have_count(0)
    assert "secret" not in await visitor.page.locator("body").inner_text()


async def test_errors_name_the_field(visitor: Visitor) -> None:
    await visitor.drop(b"not an image", "note.png")
    await visitor.see("The image cannot be used.")
    await visitor.see("This is not an image in a supported format")
    await visitor.choose()
    steps = visitor.page.locator("[data-field=num_inference_steps]")
    await steps.fill("1000")
    await visitor.button("Transform").click()
    await visitor.see("num_inference_steps: 1000 is not in 1 to 100")
    await expect(visitor.page.locator(".q-field--error [data-field=num_inference_steps]")).to_have_count(1)
    await expect(visitor.page.locator(".q-field--error")).to_have_count(1)
    await visitor.page.locator("[data-field=strength]").fill("0.5")
    await expect(visitor.banner).to_be_visible()
    await steps.fill("4")
    await expect(visitor.page.locator(".q-field--error")).to_have_count(0)
    await expect(visitor.banner).to_be_hidden()
    await visitor.transform()


@pytest.mark.nightly
async def test_full_server_is_retried_and_then_reported(visit: Callable[[], Awaitable[Visitor]], stand: Stand) -> None:
    stand.gate.close()
    for words in ("Reading the image", "in the queue"):
        other = await visit()
        await other.choose()
        await other.button("Transform").click()
        await other.see(words)
    visitor = await visit()
    await visitor.choose()
    await visitor.button("Transform").click()
    await visitor.see("The server is busy. Retrying in")
    await visitor.banner.wait_for()
    assert re.search(r"The server is busy\.\n.*Retry in [\d.]+ s\.", await visitor.banner.inner_text())
    stand.gate.open()
    await visitor.button("Try again").click()
    await visitor.button("Use as source").wait_for()


async def test_connection_loss_and_recovery_are_shown(visitor: Visitor, stand: Stand) -> None:
    await visitor.see("Connected to")
    stand.down()
    try:
        await visitor.choose()
        await visitor.button("Transform").click()
        await visitor.banner.get_by_text(f"No response from {stand.target}.").wait_for()
        await visitor.page.locator(".pill.down").wait_for()
    finally:
        stand.up()
    await visitor.page.locator(".pill.up").wait_for()
    await expect(visitor.banner).to_be_hidden()
    await visitor.transform()


async def test_tabs_are_isolated_from_each_other(visitor: Visitor, stand: Stand) -> None:
    await visitor.choose()
    await visitor.transform()
    stage = str(await visitor.page.locator(".stage-image .after").get_attribute("src"))
    assert (await visitor.context.request.get(visitor.address + stage)).status == 200
    first, visitor.page = visitor.page, await visitor.open_tab()
    await expect(visitor.page.locator(".picker:not(.compact)")).to_have_count(1)
    await expect(visitor.page.locator(".history-entry")).to_have_count(0)
    await first.locator("[data-field=num_inference_steps]").fill("100")
    stand.gate.close()
    stand.pipeline.forget()
    await first.get_by_role("button", name="Transform").click()
    await first.get_by_text("Reading the image").wait_for()
    await first.close()
    while not stand.pipeline.released_requests.acquire(timeout=0.5):  # The tab has some seconds to come back.
        stand.gate.let(1)
    (state,) = stand.pipeline.released
    assert state.step < state.step_count, "what nobody waits for is not computed to its end"
    await expect(visitor.page.locator(".history-entry")).to_have_count(0)


async def test_page_fits_a_phone_screen(visit: Callable[..., Awaitable[Visitor]], stand: Stand) -> None:
    visitor = await visit(width=390)
    assert await visitor.too_wide() == []
    await visitor.choose()
    stand.gate.close()
    await visitor.begin()
    assert await visitor.too_wide() == []
    await expect(visitor.button("Cancel")).to_be_in_viewport()
    stand.gate.open()
    await visitor.button("Use as source").wait_for()
    assert await visitor.too_wide() == []
    await expect(visitor.button("Transform")).to_be_in_viewport()
    await visitor.page.locator("[data-field=num_inference_steps]").fill("1000")
    await visitor.button("Transform").click()
    await visitor.see("num_inference_steps: ")
    await visitor.button("Python for these settings").click()
    await visitor.button("Copy").wait_for()
    assert await visitor.too_wide() == []


async def test_dark_mode_follows_the_system_setting(visit: Callable[..., Awaitable[Visitor]]) -> None:
    async def brightness(selector: str, visitor: Visitor) -> int:
        colour = await visitor.page.locator(selector).first.evaluate("element => getComputedStyle(element).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", str(colour))[:3])

    light, dark = await visit(), await visit(dark=True)
    for selector in ("body", ".card"):
        assert await brightness(selector, light) > 600 > 200 > await brightness(selector, dark)


async def test_upload_size_is_limited(visitor: Visitor) -> None:
    await visitor.choose()
    source = str(await visitor.page.locator(".before").get_attribute("src"))
    way_in = source.partition("/images/")[0] + "/source"
    mebibyte = bytes(2**20)
    headers = {"Transfer-Encoding": "chunked"}
    status, _ = await asyncio.to_thread(ask, visitor.address, "PUT", way_in, [mebibyte] * 32 + [b"1"], **headers)
    assert status == 413
    assert await visitor.page.locator(".before").get_attribute("src") == source
    # A browser does not even begin.
    await visitor.page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(32 * 2 ** 20 + 1)], "huge.png", { type: "image/png" }));
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
        }"""
    )
    await visitor.see("huge.png is larger than 32 MiB.")
