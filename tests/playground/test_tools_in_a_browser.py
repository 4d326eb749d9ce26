"""The playground's tools in a browser: sizes, views, presets, settings of files; use by finger, keyboard and screen reader."""

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from covering import nightly_but
from PIL import Image, ImageChops
from playing import CONTROLNETS, IMAGE, LORAS, Stand, Visitor
from playwright.async_api import Locator, Route, expect
from prompting import ADAPTERS

pytestmark = pytest.mark.asyncio(loop_scope="module")

WIDTHS = (390, 768, 1366)
CHOSEN = CONTROLNETS[1]
"""The ControlNet below the first one in the list."""


async def _size(visitor: Visitor, selector: str = ".stage-image .after") -> tuple[int, int]:
    image = visitor.page.locator(selector)
    width, height = await image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    return width, height


async def _choose_option(visitor: Visitor, label: str, option: str) -> None:
    await visitor.page.get_by_label(label, exact=True).click()
    await visitor.page.get_by_role("option", name=option, exact=True).click()
    await expect(visitor.page.get_by_role("option")).to_have_count(0)


async def test_phone_photo_is_fitted_to_the_models_size(visitor: Visitor, tmp_path: Path) -> None:
    photo = tmp_path / "IMG_0001.jpg"
    with Image.open(IMAGE) as image:
        image.convert("RGB").resize((3000, 2000)).save(photo, exif=b"")
    await visitor.choose(photo)
    await visitor.transform()
    width, height = await _size(visitor)
    assert 256 * 256 * 0.8 <= width * height <= 256 * 256 * 1.2, "the model's area"
    assert abs(width / height - 1.5) < 0.15, "the photo's aspect ratio"


async def test_the_size_can_be_exact(visitor: Visitor) -> None:
    await visitor.choose()
    await expect(visitor.page.get_by_label("Width")).to_be_hidden()
    await _choose_option(visitor, "Size", "Exact width and height")
    await visitor.page.get_by_label("Width").fill("64")
    await visitor.page.get_by_label("Height").fill("96")
    await visitor.transform()
    assert await _size(visitor) == (64, 96)
    await visitor.page.get_by_label("Height").fill("-8")
    await visitor.button("Transform").click()
    await visitor.banner.wait_for()
    await expect(visitor.page.locator(".q-field--error [data-field=height]")).to_have_count(1)
    await _choose_option(visitor, "Size", "Model's native size")
    await expect(visitor.page.get_by_label("Width")).to_be_hidden()
    await visitor.transform()
    assert await _size(visitor) == (256, 256)


async def test_several_images_are_made_and_saved_at_once(visitor: Visitor) -> None:
    await visitor.choose()
    await visitor.page.locator("[data-field=image_count]").fill("3")
    await visitor.transform()
    entries = visitor.page.locator(".history-entry")
    await expect(entries).to_have_count(3)
    labels = [await entry.get_attribute("aria-label") for entry in await entries.all()]
    assert len(set(labels)) == 3, "a seed each"
    await expect(entries.first).to_have_attribute("aria-current", "true")
    await entries.last.click()
    await expect(visitor.page.locator("[data-field=image_count]")).to_have_value("1")
    async with visitor.page.expect_download() as download:
        await visitor.page.get_by_role("link", name="Save all").click()
    found = await download.value
    assert found.suggested_filename == "img2img-results.zip"
    with zipfile.ZipFile(await found.path()) as archive:
        assert len(archive.namelist()) == 3
        for name in archive.namelist():
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert image.size == (256, 256)


async def test_images_can_be_viewed_side_by_side_and_zoomed(visitor: Visitor) -> None:
    await visitor.choose()
    await expect(visitor.button("Side by side")).to_have_count(0)
    await visitor.transform()
    panes, slider = visitor.page.locator(".stage-image"), visitor.page.get_by_role("slider", name="Compare before and after")
    await visitor.button("Side by side").click()
    await expect(panes).to_have_count(2)
    await expect(slider).to_have_count(0)
    first, second = await panes.nth(0).bounding_box(), await panes.nth(1).bounding_box()
    assert first is not None
    assert second is not None
    assert first["x"] + first["width"] <= second["x"]
    assert (first["width"], first["y"]) == pytest.approx((second["width"], second["y"]), abs=1)
    for zoom in (2, 4, 8):
        await visitor.button("Zoom in").click()
        await visitor.see(f"{zoom}x")
    await expect(visitor.button("Zoom in")).to_be_disabled()
    await panes.nth(0).evaluate("pane => pane.scrollTo(100, 60)")
    await expect(panes.nth(1)).to_have_js_property("scrollLeft", 100)
    await expect(panes.nth(1)).to_have_js_property("scrollTop", 60)
    await panes.nth(1).hover()
    before = await panes.nth(1).evaluate("pane => pane.scrollLeft")
    await visitor.page.mouse.down()
    await visitor.page.mouse.move(second["x"] + 10, second["y"] + second["height"] / 2, steps=3)
    await visitor.page.mouse.up()
    assert await panes.nth(1).evaluate("pane => pane.scrollLeft") > before
    await visitor.button("Side by side").click()
    await expect(slider).to_have_count(1)
    await slider.press("Home")
    await expect(slider).to_have_attribute("aria-valuetext", "0 % before, 100 % after")
    for _ in range(3):
        await visitor.button("Zoom out").click()
    await expect(visitor.button("Zoom out")).to_be_disabled()


async def test_presets_can_be_applied_undone_stored_and_deleted(visitor: Visitor) -> None:
    strength, prompt = visitor.page.locator("[data-field=strength]"), visitor.page.get_by_label("Prompt", exact=True)
    await prompt.fill("mine")
    await _choose_option(visitor, "Preset", "Subtle")
    await expect(strength).to_have_value("0.35")
    await expect(prompt).to_have_value("mine")
    await visitor.button("Undo").click()
    await expect(strength).to_have_value("0.8")
    await strength.fill("0.5")
    await visitor.button("Save as preset").click()
    await visitor.button("Save").click()
    await visitor.see("A name has 1 to 60 characters.")
    await visitor.page.get_by_label("Name").fill("  <b>my</b>   own ")
    await visitor.button("Save").click()
    await expect(visitor.page.get_by_label("Preset", exact=True)).to_have_value("<b>my</b> own")
    await visitor.page.reload()
    await visitor.page.locator(".page").wait_for()
    await strength.fill("0.9")
    await _choose_option(visitor, "Preset", "<b>my</b> own")
    await expect(strength).to_have_value("0.5")
    await visitor.button("Delete preset").click()
    await visitor.page.get_by_label("Preset", exact=True).click()
    await expect(visitor.page.get_by_role("option")).to_have_text(["Subtle", "Balanced", "Strong", "Draft"])
    assert json.loads(str(await visitor.page.evaluate("localStorage.getItem('img2img.presets')"))) == {}


async def test_dropping_a_result_restores_its_settings(visitor: Visitor) -> None:
    prompt, seed = visitor.page.get_by_label("Prompt", exact=True), visitor.page.get_by_label("Seed", exact=True)
    await visitor.choose()
    await prompt.fill('a "quoted" prompt, with € and line\nbreak')
    await visitor.page.get_by_label("Negative prompt").fill("fog")
    await visitor.page.locator("[data-field=strength]").fill("0.6")
    await seed.fill("77")
    await visitor.transform()
    async with visitor.page.expect_download() as download:
        await visitor.page.get_by_role("link", name="Download").click()
    made = await asyncio.to_thread((await (await download.value).path()).read_bytes)
    await prompt.fill("another")
    await seed.fill("1")
    await visitor.drop(made, "again.png")
    await visitor.see("Settings restored from again.png.")
    await expect(prompt).to_have_value('a "quoted" prompt, with € and line\nbreak')
    await expect(seed).to_have_value("77")
    await expect(visitor.page.get_by_label("Negative prompt")).to_have_value("fog")
    await expect(visitor.page.locator("[data-field=strength]")).to_have_value("0.6")
    await expect(visitor.page.get_by_label("Width")).to_have_value("256")
    await visitor.button("Undo").click()
    await expect(prompt).to_have_value("another")
    await expect(seed).to_have_value("1")
    await expect(visitor.page.get_by_text("The settings are those")).to_be_hidden()


async def test_history_survives_a_tab_that_is_left_and_reopened(visitor: Visitor, stand: Stand) -> None:
    await visitor.choose()
    await visitor.transform()
    await visitor.page.locator("[data-field=num_inference_steps]").fill("100")
    stand.gate.close()
    stand.pipeline.forget()
    await visitor.begin()
    await visitor.page.goto("about:blank")
    while not stand.pipeline.released_requests.acquire(timeout=0.5):  # The run ends when the page is given up.
        stand.gate.let(1)
    (state,) = stand.pipeline.released
    assert state.step < state.step_count, "the run of a page that is gone is not computed to its end"
    stand.gate.open()
    await visitor.page.go_back()
    await expect(visitor.page.locator(".history-entry")).to_have_count(1)
    await visitor.see("noon-lake.png")
    await visitor.transform()
    await expect(visitor.page.locator(".history-entry")).to_have_count(2)


async def _stroke(visitor: Visitor, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke on the mask, in shares of its sides."""
    canvas = visitor.page.locator(".mask-canvas")
    box = await canvas.bounding_box()
    assert box is not None
    (x0, y0), (x1, y1) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
    await visitor.page.mouse.move(x0, y0)
    await visitor.page.mouse.down()
    await visitor.page.mouse.move(x1, y1, steps=6)
    await visitor.page.mouse.up()


async def _drag(visitor: Visitor, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke on the mask that has arrived."""
    async with visitor.page.expect_response(lambda response: response.url.endswith("/mask")):
        await _stroke(visitor, start, end)


async def _result(visitor: Visitor) -> Image.Image:
    address = await visitor.page.locator(".stage-image .after").get_attribute("src")
    response = await visitor.context.request.get(f"{visitor.address}{address}")
    return Image.open(io.BytesIO(await response.body())).convert("RGB")


def _redrawn(made: Image.Image) -> Image.Image:
    """The mask of pixels in which an image differs from IMAGE."""
    with Image.open(IMAGE) as source:
        return ImageChops.difference(made, source.convert("RGB")).convert("L").point(lambda value: 255 if value else 0)


async def test_mask_can_be_drawn_erased_inverted_and_removed(visitor: Visitor) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    await expect(visitor.page.locator("[data-field=mask_blur]")).to_be_hidden()
    await visitor.button("Mask").click()
    await _drag(visitor, (0.1, 0.25), (0.9, 0.25))
    await expect(visitor.page.locator("[data-field=mask_blur]")).to_be_visible()
    await visitor.transform()
    redrawn = _redrawn(await _result(visitor))
    box = redrawn.getbbox()
    assert box is not None
    assert 40 <= box[1] < 64 < box[3] <= 88, "only the stroke is redrawn"
    assert (box[0] < 32, box[2] > 220) == (True, True)
    entry = visitor.page.locator(".history-entry")
    await visitor.button("Mask").click()
    await visitor.button("Erase").click()
    await _drag(visitor, (0.0, 0.25), (0.5, 0.25))
    await visitor.transform()
    box = _redrawn(await _result(visitor)).getbbox()
    assert box is not None
    assert box[0] > 120, "the left half was erased"
    await visitor.button("Mask").click()
    async with visitor.page.expect_response(lambda response: response.url.endswith("/mask")):
        await visitor.button("Invert").click()
    await visitor.transform()
    assert _redrawn(await _result(visitor)).getpixel((200, 64)) == 0
    assert _redrawn(await _result(visitor)).getbbox() == (0, 0, 256, 256)
    await entry.last.click()  # The first run, with its mask
    await visitor.page.reload()
    await visitor.button("Mask").click()
    middle = "canvas => canvas.getContext('2d').getImageData(128, 64, 1, 1).data[3]"
    await visitor.page.wait_for_function(f"({middle})(document.querySelector('.mask-canvas')) > 200")
    await visitor.button("Clear mask").click()
    await expect(visitor.button("Clear mask")).to_be_disabled()
    await visitor.transform()
    assert _redrawn(await _result(visitor)).getbbox() == (0, 0, 256, 256)


async def test_last_mask_drawn_during_an_upload_is_sent(visitor: Visitor) -> None:
    """The first one is delayed; of the masks drawn meanwhile the last is sent, and it stays on the canvas."""
    held, may_go, sent = asyncio.Event(), asyncio.Event(), 0

    async def send(route: Route) -> None:
        nonlocal sent
        sent += 1
        held.set()
        await may_go.wait()
        await route.continue_()

    await visitor.choose()
    await visitor.button("Mask").click()
    await visitor.page.route("**/mask", send)
    await _stroke(visitor, (0.1, 0.25), (0.9, 0.25))
    await held.wait()
    await _stroke(visitor, (0.1, 0.5), (0.9, 0.5))
    await _stroke(visitor, (0.1, 0.75), (0.9, 0.75))
    await visitor.page.evaluate("new Promise((done) => document.createElement('canvas').toBlob(() => setTimeout(done)))")
    assert sent == 1
    async with visitor.page.expect_response(lambda response: response.url.endswith("/mask") and sent == 2):
        may_go.set()
    await visitor.transform()
    redrawn = _redrawn(await _result(visitor))
    assert [redrawn.getpixel((128, y)) for y in range(32, 193, 32)] == [0, 255, 0, 255, 0, 255]


async def test_a_mask_is_drawn_by_finger_on_a_phone(visit: Callable[..., Awaitable[Visitor]]) -> None:
    visitor = await visit(width=390)
    await visitor.see("Server's default (m)")
    await visitor.choose()
    await visitor.button("Mask").click()
    box = await visitor.page.locator(".mask-canvas").bounding_box()
    assert box is not None
    touch = await visitor.context.new_cdp_session(visitor.page)
    place = {"x": box["x"] + box["width"] / 4, "y": box["y"] + box["height"] / 4}
    await touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [place]})
    moved = {**place, "x": place["x"] + 60}
    await touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [moved]})
    async with visitor.page.expect_response(lambda response: response.url.endswith("/mask")):
        await touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert await visitor.axe_violations() == []
    assert await visitor.too_small() == []
    assert await visitor.too_wide() == []
    await visitor.transform()
    redrawn = _redrawn(await _result(visitor))
    box_ = redrawn.getbbox()
    assert box_ is not None
    assert box_[3] < 128


async def test_a_mask_is_loaded_from_a_file(visitor: Visitor, tmp_path: Path) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    await visitor.button("Mask").click()
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "half.png")
    await visitor.page.set_input_files(".mask-file", tmp_path / "half.png")
    await expect(visitor.button("Clear mask")).to_be_enabled()
    await visitor.transform()
    box = _redrawn(await _result(visitor)).getbbox()
    assert box is not None
    assert 112 <= box[0] <= 132
    await visitor.button("Mask").click()
    (tmp_path / "bad.png").write_bytes(b"no image")
    await visitor.page.set_input_files(".mask-file", tmp_path / "bad.png")
    await visitor.see("The mask cannot be used.")
    await visitor.button("Clear mask").click()
    await expect(visitor.banner).to_be_hidden()


async def test_references_are_sent_up_to_the_maximum(visitor: Visitor, stand: Stand) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    files = visitor.page.locator(".references input[type=file]")
    shown = visitor.page.locator(".reference")
    for count in range(1, 5):
        await files.set_input_files(IMAGE)
        await expect(shown).to_have_count(count)
    await expect(visitor.button("Add a reference")).to_be_hidden()
    await visitor.button("Remove noon-lake.png").first.click()
    await expect(shown).to_have_count(3)
    assert await visitor.axe_violations() == []
    assert await visitor.too_small() == []
    stand.pipeline.forget()
    await visitor.transform()
    (state,) = stand.pipeline.released
    assert len(state.request.references) == 3
    await visitor.button("Python program").click()
    program = visitor.page.locator(".code-words")
    await expect(program).to_contain_text('reference_images=["noon-lake.png", "noon-lake.png", "noon-lake.png"]')


async def test_loras_are_chosen_with_scales_and_kept_with_the_result(visitor: Visitor, stand: Stand) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    listed, scales = visitor.page.get_by_role("combobox", name="LoRAs"), visitor.page.locator(".lora-scales input[type=number]")
    await listed.click()
    options = visitor.page.get_by_role("option")
    await expect(options).to_have_text(list(LORAS))
    for name in LORAS:
        await options.get_by_text(name, exact=True).click()
    await visitor.page.keyboard.press("Escape")
    await expect(scales).to_have_count(2)
    await visitor.page.get_by_role("spinbutton", name=LORAS[1], exact=True).fill("-0.5")
    assert await visitor.axe_violations() == []
    assert await visitor.too_small() == []
    stand.pipeline.forget()
    await visitor.transform()
    (state,) = stand.pipeline.released
    assert {lora.id: lora.scale for lora in state.request.loras} == {LORAS[0]: 1.0, LORAS[1]: -0.5}
    await visitor.page.get_by_role("spinbutton", name=LORAS[0], exact=True).fill("11")
    await visitor.button("Transform").click()
    await visitor.see("loras[0].scale: 11 is not in -10 to 10")
    await expect(visitor.page.locator(".loras .q-field--error")).not_to_have_count(0)
    await visitor.page.get_by_role("spinbutton", name=LORAS[0], exact=True).fill("1")
    await expect(visitor.banner).to_be_hidden()
    await listed.click()
    await options.get_by_text(LORAS[0], exact=True).click()
    await visitor.page.keyboard.press("Escape")
    await expect(scales).to_have_count(1)
    await visitor.page.locator(".history-entry").click()
    await expect(scales).to_have_count(2)
    await expect(scales.last).to_have_value("-0.5")
    await visitor.button("Python program").click()
    await expect(visitor.page.locator(".code-words")).to_contain_text(f'loras={{"{LORAS[0]}": 1.0, "{LORAS[1]}": -0.5}}')


async def test_control_images_have_a_controlnet_and_numbers_and_are_kept_with_the_result(visitor: Visitor, stand: Stand) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    page, files = visitor.page, visitor.page.locator(".control-images input[type=file]")
    rows = page.locator(".control-row")
    for count in range(1, 5):
        await files.set_input_files(IMAGE)
        await expect(rows).to_have_count(count)
    await expect(visitor.button("Add a control image")).to_be_hidden()
    for count in (3, 2):
        await rows.last.get_by_role("button", name="Remove noon-lake.png").press("Enter")
        await expect(rows).to_have_count(count)
    nets = rows.last.get_by_role("combobox", name="ControlNet")
    await nets.focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("option")).to_have_text(list(CONTROLNETS))
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("option")).to_have_count(0)
    await rows.first.get_by_role("slider", name="Scale").locator("[tabindex]").press("ArrowRight")
    await expect(rows.first.get_by_role("spinbutton", name="Scale")).to_have_value("1.05")
    for name, number in (("Scale", "1.5"), ("Start", "0.25"), ("End", "0.75")):
        await rows.last.get_by_role("spinbutton", name=name, exact=True).fill(number)
    stand.pipeline.forget()
    await visitor.transform()
    (state,) = stand.pipeline.released
    found = [(use.model, use.scale, use.start, use.end) for use in state.request.controls]
    assert found == [("depth", 1.05, 0.0, 1.0), (CHOSEN, 1.5, 0.25, 0.75)]
    await rows.last.get_by_role("spinbutton", name="Start", exact=True).fill("1")
    await visitor.button("Transform").click()
    await visitor.see("controls[1].start: 1 is not in 0 to 1, below 1")
    await expect(rows.first.locator(".q-field--error")).to_have_count(0)
    await expect(rows.last.locator(".q-field--error")).not_to_have_count(0)
    await rows.last.get_by_role("spinbutton", name="Start", exact=True).fill("0")
    await expect(visitor.banner).to_be_hidden()
    await rows.first.get_by_role("button", name="Remove noon-lake.png").click()
    await expect(rows).to_have_count(1)
    await page.locator(".history-entry").click()
    await expect(rows).to_have_count(2)
    await expect(rows.last.get_by_role("spinbutton", name="Start", exact=True)).to_have_value("0.25")
    await expect(rows.last.get_by_role("combobox", name="ControlNet")).to_have_value(CHOSEN)
    await visitor.button("Python program").click()
    words = f'controls=[Control("depth", "noon-lake.png", scale=1.05, start=0.0, end=1.0), Control("{CHOSEN}", '
    await expect(page.locator(".code-words")).to_contain_text(words)


async def _drop(picker: Locator, *names: str) -> None:
    """Drops files with these names on a picker's button."""
    await picker.evaluate(
        """(picker, [bytes, names]) => {
            const transfer = new DataTransfer();
            for (const name of names) transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            for (const kind of ["dragover", "drop"])
                picker.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [list(IMAGE.read_bytes()), names],
    )


async def test_a_control_image_is_dropped_on_its_button(visitor: Visitor) -> None:
    """It does not become the source, as files dropped elsewhere do. Of several files one is used."""
    await visitor.see("Server's default (m)")
    await visitor.choose()
    await _drop(visitor.page.locator(".control-images .picker"), "edges.png", "more.png")
    await expect(visitor.page.get_by_role("group", name="Control image edges.png")).to_have_count(1)
    await expect(visitor.page.locator(".picker-veil")).to_have_count(0)
    await expect(visitor.page.locator(".stage-name")).to_contain_text("noon-lake.png")
    await _choose_option(visitor, "Model", "asleep · not loaded")
    await expect(visitor.page.locator(".control-images")).to_be_hidden()


async def test_image_prompts_have_an_adapter_images_and_a_scale_and_are_kept_with_the_result(
    visitor: Visitor, stand: Stand
) -> None:
    await visitor.see("Server's default (m)")
    await visitor.choose()
    page, rows = visitor.page, visitor.page.locator(".image-prompts .control-row")
    first, second = rows.nth(0), rows.nth(1)
    picker = page.locator(".image-prompts > .picker")
    await _drop(picker, "moss.png", "rust.png")
    await expect(first.locator("img")).to_have_count(2)
    await expect(rows).to_have_count(1)
    await expect(page.locator(".stage-name")).to_contain_text("noon-lake.png")
    await picker.locator("input[type=file]").set_input_files(IMAGE)
    await expect(rows).to_have_count(2)
    await first.locator("input[type=file]").set_input_files([IMAGE, IMAGE])
    await expect(first.locator("img")).to_have_count(4)
    await first.get_by_role("button", name="Remove rust.png").press("Enter")
    await expect(first.locator("img")).to_have_count(3)
    await second.get_by_role("combobox", name="Image adapter").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("option")).to_have_text(list(ADAPTERS))
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("option")).to_have_count(0)
    await first.get_by_role("slider", name="Scale").locator("[tabindex]").press("ArrowRight")
    await expect(first.get_by_role("spinbutton", name="Scale")).to_have_value("1.05")
    scale = second.get_by_role("spinbutton", name="Scale")
    await scale.fill("0.5")
    stand.pipeline.forget()
    await visitor.transform()
    (state,) = stand.pipeline.released
    found = [(use.adapter, use.scale, len(use.images)) for use in state.request.image_prompts]
    assert found == [(ADAPTERS[0], 1.05, 3), (ADAPTERS[1], 0.5, 1)]
    await scale.fill("11")
    await visitor.button("Transform").click()
    await visitor.see("image_prompts[1].scale: 11 is not in -10 to 10")
    await expect(first.locator(".q-field--error")).to_have_count(0)
    await expect(second.locator(".q-field--error")).not_to_have_count(0)
    await scale.fill("1")
    await expect(visitor.banner).to_be_hidden()
    await second.get_by_role("button", name="Remove noon-lake.png").click()
    await expect(rows).to_have_count(1)
    await page.locator(".history-entry").click()
    await expect(rows).to_have_count(2)
    await expect(scale).to_have_value("0.5")
    await expect(second.get_by_role("combobox", name="Image adapter")).to_have_value(ADAPTERS[1])
    await visitor.button("Python program").click()
    words = f'ImagePrompt("{ADAPTERS[1]}", ["noon-lake.png"], scale=0.5)]'
    await expect(page.locator(".code-words")).to_contain_text(words)
    await visitor.button("Close").click()
    await _choose_option(visitor, "Model", "asleep · not loaded")
    await expect(page.locator(".image-prompts")).to_be_hidden()


async def test_model_with_a_control_input_requires_a_control_image(visitor: Visitor, stand: Stand) -> None:
    """Without a ControlNet and numbers. The choice for another model is kept for that one."""
    await visitor.see("Server's default (m)")
    await visitor.choose()
    page, rows = visitor.page, visitor.page.locator(".control-row")
    files = page.locator(".control-images input[type=file]")
    for count in (1, 2):
        await files.set_input_files(IMAGE)
        await expect(rows).to_have_count(count)
    await page.get_by_label("Model", exact=True).click()
    await page.get_by_role("option").filter(has_text="sees-depth").click()
    await expect(page.locator(".control-images")).to_contain_text("Control image, which this model needs")
    await expect(rows).to_have_count(1)
    await expect(page.get_by_role("combobox", name="ControlNet")).to_have_count(0)
    await expect(page.get_by_role("spinbutton", name="Scale", exact=True)).to_have_count(0)
    assert await visitor.axe_violations() == []
    await visitor.transform()
    for _ in range(2):
        await rows.first.get_by_role("button", name="Remove noon-lake.png").click()
    await expect(rows).to_have_count(0)
    await visitor.button("Transform").click()
    await visitor.see("controls: this model reads a control image, such as edges or a depth map: send one")
    await expect(visitor.button("Add a control image")).to_be_visible()
    await files.set_input_files(IMAGE)
    await expect(page.get_by_role("alert")).to_be_hidden()
    await visitor.transform()


@pytest.mark.parametrize("width", nightly_but(WIDTHS, *WIDTHS[:2]))
async def test_every_width_is_accessible(
    width: int, visit: Callable[..., Awaitable[Visitor]], stand: Stand, tmp_path: Path
) -> None:
    """axe-core finds nothing, fingers can hit everything, and nothing is wider than the window, in every state of the page."""
    visitor = await visit(width=width, dark=width == 768)

    async def check() -> None:
        assert await visitor.axe_violations() == []
        assert await visitor.too_small() == []
        assert await visitor.too_wide() == []

    await visitor.see("Server's default (m)")
    await check()
    await visitor.choose()
    await visitor.page.locator(".control-images input[type=file]").set_input_files(IMAGE)
    await expect(visitor.page.locator(".control-row")).to_have_count(1)
    await visitor.page.locator(".image-prompts input[type=file]").set_input_files([IMAGE] * 8)
    await expect(visitor.page.locator(".image-prompts img")).to_have_count(8)
    prompt = visitor.page.get_by_label("Prompt", exact=True)
    await prompt.fill("a long prompt " * 100)
    box = await prompt.bounding_box()
    assert box is not None
    assert box["height"] < 250
    stand.gate.close()
    await visitor.begin()
    for place in ("scrollTo(0, 0)", "scrollTo(0, document.body.scrollHeight)"):
        await visitor.page.evaluate(place)
        await expect(visitor.button("Cancel")).to_be_in_viewport(ratio=1)
    stand.gate.open()
    await visitor.button("Use as source").wait_for()
    await visitor.button("Zoom in").click()
    await check()
    await visitor.button("Side by side").click()
    await visitor.page.locator("[data-field=num_inference_steps]").fill("1000")
    await _choose_option(visitor, "Size", "Exact width and height")
    await visitor.button("Transform").click()
    await visitor.banner.wait_for()
    await check()
    for name, leave in (("Python for these settings", "Close"), ("Save as preset", "Do not save")):
        await visitor.button(name).click()
        await visitor.button(leave).wait_for()
        await check()
        await visitor.button(leave).click()
        await expect(visitor.button(leave)).to_be_hidden()
    await visitor.page.get_by_label("Model", exact=True).click()
    await visitor.page.get_by_role("option").first.wait_for()
    await check()


async def test_every_control_is_reachable_by_keyboard(visitor: Visitor) -> None:
    await visitor.choose()
    await visitor.transform()
    wanted = {
        "Side by side",
        "Zoom in",
        "Compare before and after",
        "Prompt",
        "Strength",
        "Size",
        "Transform",
        "Save all",
        "Preset",
    }
    for _ in range(80):
        await visitor.page.keyboard.press("Tab")
        name = await visitor.page.evaluate(
            """() => {
                const one = document.activeElement, label = one.labels?.[0];
                return one.ariaLabel ?? label?.ariaLabel ?? label?.innerText?.split("\\n")[0] ?? one.innerText;
            }"""
        )
        wanted -= {word for word in wanted if word in str(name)}
        if not wanted:
            break
    assert wanted == set()
