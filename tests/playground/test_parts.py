"""The playground's parts, one by one: settings, displayed and copied text, and stored state."""

import argparse
import ast
import asyncio
import io
import zipfile
import zlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from img2img_client import (
    AsyncClient,
    DeadlineExceeded,
    FieldInfo,
    Img2ImgError,
    InvalidRequest,
    LoraInfo,
    ModelInfo,
    ModelNotFound,
    ModelReference,
    ModelState,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from img2img_client.options import build_request
from img2img_playground.command import configure, connection_of, run
from img2img_playground.extras import ControlImage, Extras, most_controls, offered_controlnets
from img2img_playground.failures import Failure, explain
from img2img_playground.history import Entry, History
from img2img_playground.image_prompts import PromptImages
from img2img_playground.images import MAX_PIXELS, ImageFile, UnusableImage, read_image, reduce
from img2img_playground.presets import BUILT_IN, Presets
from img2img_playground.run_bar import describe
from img2img_playground.session import Phase, Run, Session
from img2img_playground.sessions import Sessions, TooManyTabs
from img2img_playground.settings import DEFAULT_PROMPT, Settings
from img2img_playground.snippet import Connection, literal, python_code
from img2img_playground.watch import ServerState, ServerWatch
from PIL import Image, PngImagePlugin
from playing import IMAGE, REPOSITORY

_settings = st.builds(
    Settings,
    model=st.none() | st.text(),
    prompt=st.text(),
    negative_prompt=st.text(),
    scheduler=st.none() | st.text(),
    strength=st.none() | st.floats(allow_nan=False, allow_infinity=False),  # A control gives no other.
    num_inference_steps=st.none() | st.integers(1, 1000),
    guidance_scale=st.none() | st.floats(0, 30),
    seed=st.none() | st.integers(0, 2**63 - 1),
    fit=st.sampled_from([None, "native", 512]),
    image_count=st.none() | st.integers(1, 9),
    width=st.none() | st.integers(8, 2048),
    height=st.none() | st.integers(8, 2048),
    loras=st.dictionaries(st.text(), st.floats(-10, 10), max_size=2),
)


def _file(size: tuple[int, int] = (8, 4), kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "green").save(file, kind, **how)
    return file.getvalue()


def _entry(source: ImageFile, size: int = 10, seed: int = 1) -> Entry:
    return Entry(source, Settings(seed=seed), ImageFile("a.png", "image/png", 1, 1, bytes(size)), "m", "onnx:cpu", 1.0)


def _call(program: str) -> ast.Call:
    """The call of `transform` in a program."""
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    return next(call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "transform")


def test_untouched_settings_are_the_contracts_defaults() -> None:
    contract = (REPOSITORY / "protos" / "img2img" / "v1" / "image_to_image.proto").read_text(encoding="utf-8")
    settings = Settings()
    assert f'"{DEFAULT_PROMPT}"' in contract
    for name in ("strength", "num_inference_steps", "guidance_scale"):
        before = contract.partition(f" {name} = ")[0]
        assert before.rpartition("Default: ")[2].split("\n")[0] == f"{getattr(settings, name):g}."
    assert set(settings.options()) == {"prompt", "strength", "num_inference_steps", "guidance_scale", "fit"}


@given(st.floats() | st.none(), st.integers(0, 10**6) | st.none())
def test_at_most_twelve_previews_are_requested(strength: float | None, steps: int | None) -> None:
    interval = Settings(strength=strength, num_inference_steps=steps).preview_interval(None)
    assert interval >= 1
    if strength is not None and steps is not None and 0 < strength <= 1 and steps >= 1:
        assert steps * strength / interval <= 12


@given(_settings, st.text(), st.text())
def test_snippet_matches_the_settings(settings: Settings, source: str, output: str) -> None:
    connection = Connection("host:1", token_variable="IMG2IMG_TOKEN", ca=Path("/a b/ca.pem"), timeout=9.5)
    call = _call(python_code(connection, source, settings, output))
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert said == dict(settings.options())
    assert [ast.literal_eval(value) for value in call.args] == [source]


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        lambda item: st.lists(item) | st.dictionaries(st.text(), item),
        max_leaves=5,
    )
)
def test_literal_evaluates_to_its_value(value: object) -> None:
    assert ast.literal_eval(literal(value)) == value


@given(st.text())
def test_text_literal_is_one_line_and_round_trips(text: str) -> None:
    assert ast.literal_eval(literal(text)) == text
    assert len(literal(text).split("\n")) == 1


def test_snippet_names_the_token_file_not_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG2IMG_TOKEN", "secret")
    monkeypatch.delenv("IMG2IMG_CA", raising=False)
    (tmp_path / "token").write_text("also secret")
    parser = argparse.ArgumentParser()
    configure(parser)
    plain = connection_of(parser.parse_args(["--target", "host:1"]))
    flags = ["--target", "https://host:1", "--token-file", str(tmp_path / "token"), "--ca", "ca.pem", "--timeout", "5"]
    flags += ["--server-name", "img2img.internal"]
    named = connection_of(parser.parse_args(flags))
    for connection, words in (
        (plain, 'Client("host:1", token=os.environ["IMG2IMG_TOKEN"])'),
        (
            named,
            f'token=Path("{tmp_path}/token").read_text().strip(), ca="{Path("ca.pem").absolute()}",'
            ' server_name="img2img.internal", timeout=5.0)',
        ),
    ):
        program = python_code(connection, "a.png", Settings(), "b.png")
        assert words in program
        assert "secret" not in program
        assert {"import os", "from pathlib import Path"} & set(program.splitlines())


@pytest.mark.parametrize("count", [1, 3])
def test_the_program_saves_every_image(count: int) -> None:
    program = python_code(Connection("host:1"), "a {b}.png", Settings(image_count=count), 'a {b}"-after.png')
    saves = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Attribute) and node.attr == "save"]
    assert len(saves) == 1
    if count > 1:
        calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
        (call,) = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "save"]
        name = eval(compile(ast.Expression(call.args[0]), "name", "eval"), {"image": argparse.Namespace(seed=5)})
        assert name == 'a {b}"-after-5.png'


def test_settings_from_a_record_repeat_the_same_request() -> None:
    record = {
        "model": "m", "prompt": "p", "negative_prompt": None, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3,
        "scheduler": None, "seed": 2**63 - 1, "width": 64, "height": 72, "format": "png", "quality": None,
    }  # fmt: skip
    settings = Settings.from_record(record)
    assert settings.options() == {
        "model": "m", "prompt": "p", "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3, "seed": 2**63 - 1,
        "width": 64, "height": 72,
    }  # fmt: skip
    damaged = [("strength", float("nan")), ("strength", "0.5"), ("seed", 2**63), ("width", -1), ("num_inference_steps", 10**30)]
    for name, value in [*damaged, ("guidance_scale", float("inf")), ("prompt", None), ("seed", True), ("model", 5)]:
        with pytest.raises(ValueError, match=name):
            Settings.from_record({**record, name: value})


def test_only_extras_that_the_model_supports_are_sent() -> None:
    mask, images = ImageFile("m.png", "image/png", 1, 1, b"m"), [ImageFile(f"{i}.png", "image/png", 1, 1, b"r") for i in range(3)]
    extras = Extras(mask, tuple(images))
    both = replace(_MODEL, fields=(FieldInfo("mask"), FieldInfo("reference_images", max_count=2)))
    request = build_request(b"file", {**Settings(mask_blur=3.0).options(), **extras.fitted(both).options()})
    assert (request.mask.data, [image.data for image in request.reference_images], request.mask_blur) == (b"m", [b"r", b"r"], 3.0)
    for model in (None, _MODEL, replace(_MODEL, fields=(FieldInfo("strength"),))):
        assert extras.fitted(model) == Extras()
        session = _new_session()
        session.extras, session.model, session.settings = extras, model, Settings(mask_blur=3.0)
        settings, kept = session.fitted()
        assert (settings.mask_blur, kept) == (None, Extras()), "a blur without a mask is refused"
    said = {"mask": "m.png", "reference_images": ["0.png", "1.png"]}
    call = _call(python_code(Connection("host:1"), "a.png", Settings(), "b.png", extras.fitted(both).names()))
    assert said.items() <= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}.items()


async def test_new_source_drops_the_mask_and_history_restores_it() -> None:
    session = _new_session()
    session.use(ImageFile("s.png", "image/png", 8, 4, _file()))
    session.set_mask(b"no image")
    assert session.failure is not None
    assert session.failure.field == "mask"
    session.set_mask(_file())
    assert session.failure is None
    assert session.extras.mask is not None
    assert session.extras.mask.name == "s-mask.png"
    assert session.source is not None
    entry = replace(_entry(session.source), extras=session.extras)
    session.use(ImageFile("t.png", "image/png", 8, 4, _file()))
    assert session.extras == Extras()
    session.recall(entry)
    assert session.extras == entry.extras
    session.set_mask(b"")
    assert session.extras == Extras()
    await session.close()


async def test_a_damaged_record_leaves_the_image_usable() -> None:
    session = _new_session()
    for text, words in (("{", "damaged"), ('{"model": 5}', "damaged"), ("[" * 9000, "damaged")):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("img2img", text)
        await session.upload(_file(pnginfo=info), "a.png")
        assert session.source is not None
        assert session.failure is None
        assert session.notice is not None
        assert words in session.notice.text
        assert (session.notice.undo, session.settings) == (None, Settings())
    await session.upload(_file(), "img2img.png")
    assert session.notice is None
    await session.close()


@pytest.mark.parametrize("field", ["strength", "prompt", "model"])
async def test_failure_is_cleared_when_its_field_changes(field: str) -> None:
    session = _new_session()
    session.fail(Failure("Refused.", "wrong", field))
    session.set(guidance_scale=2.0)
    assert session.failure is not None
    session.set(**{field: None})
    assert session.failure is None
    session.fail(Failure("No answer.", "", may_pass=True, disconnected=True))
    session.set(**{field: None})
    assert session.failure is not None, "no setting mends it"
    session.reconnected()
    assert session.failure is None
    await session.close()


def test_presets_keep_everything_but_the_seed() -> None:
    presets, settings = Presets(), Settings("m", "p", "n", "s", 0.4, 7, 2.0, 5, None, 3.5, 2, 64, 72)
    presets.save(" my  own ", settings)
    other = Presets()
    other.load(presets.dump())
    assert other.names == ("my own", *BUILT_IN)
    assert other.apply("my own", Settings(seed=9)) == replace(settings, seed=9)
    for name in BUILT_IN:
        assert other.apply(name, settings).prompt == "p"
        other.apply(name, settings).options()
    other.save("Subtle", settings)
    assert other.apply("Subtle", Settings()) == replace(settings, seed=None), "the user's own replaces a built-in one"
    other.delete("Subtle")
    assert other.apply("Subtle", Settings()).strength == BUILT_IN["Subtle"]["strength"]
    for name in ("", "  ", "x" * 61):
        with pytest.raises(ValueError, match="1 to 60 characters"):
            other.save(name, settings)
    for number in range(49):
        other.save(str(number), settings)
    with pytest.raises(ValueError, match="Delete one first"):
        other.save("one more", settings)
    other.save("my own", Settings())
    assert other.names[0] == "my own"


@pytest.mark.parametrize(
    "stored",
    [
        None,
        5,
        "",
        "{",
        "[]",
        "null",
        '{"a": 1}',
        '{"a": {"strength": "x"}}',
        '{"a": {"seed": 1e999}}',
        '{"": {}}',
        '{"a": {"fit": []}}',
    ],
)
def test_invalid_presets_are_ignored(stored: object) -> None:
    presets = Presets()
    presets.load(stored)
    assert presets.names == tuple(BUILT_IN)


def test_an_archive_holds_all_results_under_distinct_names() -> None:
    source = ImageFile("s.png", "image/png", 1, 1, b"")
    history = History()
    for data, name in ((b"1", "a.png"), (b"2", "a.png"), (b"3", "a-2.png"), (b"4", "b.webp")):
        history.add(Entry(source, Settings(), ImageFile(name, "image/png", 1, 1, data), "m", "e", 1.0))
    with zipfile.ZipFile(io.BytesIO(history.archive())) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "a.png": b"1", "a-2.png": b"2", "a-2-2.png": b"3", "b.webp": b"4",
        }  # fmt: skip


_MODEL = ModelInfo("m", ModelReference(), "f", "P", "onnx", "", "e", "ready", 8, True)


def _new_session() -> Session:
    return Session(lambda on_retry: AsyncClient("127.0.0.1:1", retries=None), "127.0.0.1:1")


async def test_detached_session_is_kept_until_others_need_its_slot() -> None:
    sessions = Sessions(_new_session, most=2)
    first = sessions.enter("first")
    assert sessions.enter("first") is first
    sessions.leave("first")
    second = sessions.enter("second")
    sessions.leave("first")
    assert sessions.find(first.key) is first
    assert sessions.enter("first") is first, "the tab has come back"
    with pytest.raises(TooManyTabs):
        sessions.enter("third")
    sessions.leave("second")
    sessions.enter("third")
    assert sessions.find(second.key) is None
    assert len(sessions) == 2
    await sessions.close()
    assert len(sessions) == 0
    sessions.leave("third")


async def test_abandoned_sessions_are_closed() -> None:
    sessions = Sessions(_new_session, seconds_to_return=0)
    session = sessions.enter("tab")
    sessions.leave("tab")
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0, passed.set)  # After the session's own timer
    await passed.wait()
    assert sessions.find(session.key) is None
    await sessions.close()


class _FakeServer:
    """Replaces an AsyncClient; tests set its health and models."""

    def __init__(self) -> None:
        self.asked = 0
        self.changes: asyncio.Queue[bool | Img2ImgError] = asyncio.Queue()
        self.problem: Img2ImgError | None = None
        self.states: list[ModelState] = []
        self.fields: tuple[FieldInfo, ...] = ()

    async def models(self, *, timeout: float) -> tuple[ModelInfo, ...]:  # noqa: ASYNC109
        self.asked += 1
        if self.problem is not None:
            raise self.problem
        state: ModelState = self.states.pop(0) if self.states else "ready"
        return (replace(_MODEL, state=state, fields=self.fields),)

    async def loras(self, *, timeout: float) -> tuple[LoraInfo, ...]:  # noqa: ASYNC109
        return (LoraInfo("a", 1),)

    async def watch_health(self) -> AsyncGenerator[bool, None]:
        while True:
            change = await self.changes.get()
            if isinstance(change, Img2ImgError):
                raise change
            yield change

    async def close(self) -> None: ...


async def test_models_are_requested_only_after_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_playground.watch._PAUSE", 0.0)
    monkeypatch.setattr("img2img_playground.watch._WHILE_LOADING", 0.0)
    server, changed = _FakeServer(), asyncio.Event()
    watch = ServerWatch(server, "host:1")  # type: ignore[arg-type]

    async def until(wanted: Callable[[ServerState], bool]) -> None:
        while not wanted(watch.state):
            await asyncio.wait_for(changed.wait(), 60)
            changed.clear()

    watch.listen(changed.set)
    await until(lambda state: state.known and state.problem is None)
    assert server.asked == 1
    server.changes.put_nowait(False)
    await until(lambda state: state.problem is not None)
    server.changes.put_nowait(True)
    await until(lambda state: state.problem is None)
    assert server.asked == 3
    server.problem = Unavailable("refused")
    server.changes.put_nowait(Unavailable("broken"))
    await until(lambda state: state.problem is not None and state.problem.disconnected)
    server.problem = None
    server.changes.put_nowait(True)
    await until(lambda state: state.problem is None)
    assert server.asked == 5
    server.states = ["loading", "loading", "ready"]
    watch.refresh()
    await until(lambda state: state.models[0].state == "loading")
    await until(lambda state: state.models[0].state == "ready")
    assert server.asked == 8, "a model that is loading is asked for until it is ready"
    assert watch.state.loras == (), "no model is known to take any"
    server.fields = (FieldInfo("loras"),)
    watch.refresh()
    await until(lambda state: state.loras == ("a",))
    watch.forget(changed.set)
    watch.refresh()
    await asyncio.sleep(0)
    assert server.asked == 9, "nothing is asked for without a page"
    await watch.close()


async def test_run_cancelled_at_once_ends() -> None:
    session = _new_session()
    session.use(ImageFile("s.png", "image/png", 1, 1, b""))
    over = asyncio.Event()
    session.start()
    session.listeners.append(over.set)
    session.cancel()
    await asyncio.wait_for(over.wait(), 60)
    assert session.run is None
    await session.close()


def test_options_match_the_client() -> None:
    settings = Settings("sdxl", "p", "n", "DDIMScheduler", 0.5, 9, 3.0, 2**63 - 1, 768)
    request = build_request(b"file", settings.options())
    assert (request.model.path, request.prompt, request.negative_prompt) == ("sdxl", "p", "n")
    assert (request.strength, request.num_inference_steps, request.guidance_scale) == (0.5, 9, 3.0)
    assert (request.scheduler, request.seed, request.fit.longest_side) == ("DDIMScheduler", 2**63 - 1, 768)
    assert build_request(b"file", Settings().options()).fit.HasField("native_area"), "a photo is no dead end on the page"
    assert not build_request(b"file", Settings(fit=None).options()).HasField("fit")
    exact = build_request(b"file", Settings(width=64, image_count=3).options())
    assert (exact.width, exact.HasField("height"), exact.HasField("fit"), exact.image_count) == (64, False, False, 3)


def test_history_keeps_the_newest_within_its_bounds() -> None:
    source = ImageFile("s.png", "image/png", 1, 1, bytes(100))
    history = History(entries=3, most_bytes=140)
    entries = [_entry(source, seed=seed) for seed in range(5)]
    for entry in entries:
        history.add(entry)
        assert history.size <= 140, "the source that all share is counted once"
    assert list(history) == entries[:1:-1]
    history.add(_entry(source, size=35))
    assert len(history) == 1, "35 and 10 and the source's 100 are too many"
    huge = _entry(source, size=1000)
    history.add(huge)
    assert list(history) == [huge], "what was just made stays"
    assert history.find(huge.id) is huge
    assert history.find(entries[0].id) is None
    assert history.image(source.id) is source
    history.clear()
    assert (len(history), history.size, history.image(source.id)) == (0, 0, None)


def test_images_are_read_by_their_header() -> None:
    image = read_image(IMAGE.read_bytes(), "C:\\here\\..\\noon-lake.png")
    assert (image.name, image.stem, image.media_type) == ("noon-lake.png", "noon-lake", "image/png")
    assert (image.width, image.height) == (256, 256)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    lying = read_image(_file(kind="JPEG", exif=exif), "../../etc/x\n.jpg")
    assert (lying.width, lying.height, lying.name) == (4, 8, "x.jpg")
    assert read_image(_file(kind="WEBP"), "").name == "image.webp"
    assert read_image(_file(), "a" * 300 + ".png").name == "a" * 80 + ".png"
    assert len({read_image(_file(), "").id for _ in range(9)}) == 9


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "jpeg"), ("RGBA", "webp"), ("P", "jpeg")])
def test_oversized_images_are_reduced(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_playground.images.MOST_SENT_PIXELS", 100 * 50)
    monkeypatch.setattr("img2img_playground.images.REDUCED_SIDE", 60)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new(mode, (120, 60)).save(file, "PNG", exif=exif)
    image = reduce(read_image(file.getvalue(), "photo.png"))
    assert (image.width, image.height, image.name) == (30, 60, f"photo-reduced.{kind}")
    again = read_image(image.data, image.name)
    assert (again.width, again.height, again.media_type) == (30, 60, f"image/{kind}")
    small = read_image(_file((100, 50)), "small.png")
    assert reduce(small) is small
    damaged = file.getvalue()
    with pytest.raises(UnusableImage, match="damaged"):
        reduce(ImageFile("a.png", "image/png", 120, 60, damaged[: damaged.index(b"IDAT") + 4] + b"damaged pixels"))


async def test_reducing_an_image_shows_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_playground.images.MOST_SENT_BYTES", 10)
    monkeypatch.setattr("img2img_playground.images.REDUCED_SIDE", 4)
    session = _new_session()
    await session.upload(_file((8, 4)), "a.png")
    assert session.source is not None
    assert (session.source.width, session.source.height) == (4, 2)
    assert session.notice is not None
    assert "reduced from 8 x 4 to 4 x 2 pixels" in session.notice.text
    await session.close()


def test_metadata_does_not_make_an_image_unusable() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_500_000, zip=True)
    image = read_image(_file(pnginfo=texts), "a.png")
    assert (image.media_type, image.width, image.height) == ("image/png", 8, 4)
    lying = read_image(_file(kind="JPEG", exif=b"Exif\0\0II\x2a\0\x08\0\0\0"), "a.jpg")
    assert (lying.width, lying.height) == (8, 4)
    several = read_image(_file(kind="MPO", save_all=True, append_images=[Image.new("RGB", (8, 4))]), "")
    assert (several.media_type, several.name) == ("image/jpeg", "image.jpeg"), "browsers do not know image/mpo"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"nothing", "not an image in a supported format: PNG, JPEG, WEBP, GIF, BMP"),
        (_file(kind="TIFF"), "not an image in a supported format"),
        (_file()[:20], "not an image in a supported format"),
        (bytes(32 * 2**20 + 1), "The file is larger than 32 MiB"),
        (_file((40_000, 4), "BMP")[:18] + (40_000).to_bytes(4, "little") * 2 + bytes(40), "not an image|pixels"),
    ],
    ids=["empty", "words", "tiff", "cut", "large", "bomb"],
)
def test_a_file_that_is_not_an_image_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(UnusableImage, match=words):
        read_image(data, "a.png")


@pytest.mark.parametrize("size", [(10_001, 10_000), (15_000, 15_000)], ids=["a warning to Pillow", "an error to Pillow"])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int]) -> None:
    head = bytearray(_file((1, 1)))
    head[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    with pytest.raises(UnusableImage, match=r"pixels") as refused:
        read_image(bytes(head), "a.png")
    assert str(MAX_PIXELS // 10**6) in str(refused.value)


def test_failures_give_advice() -> None:
    def explained(error: Exception) -> Failure:
        return explain(error, "host:1")  # type: ignore[arg-type]

    assert explained(InvalidRequest("wrong", fields=(("loras[0].id", "unknown"),))).field == "loras"
    wrong = explained(InvalidRequest("wrong", fields=(("image.data", "not an image"),)))
    assert (wrong.field, wrong.text, wrong.may_pass) == ("image", "image.data: not an image", False)
    busy = explained(Overloaded("256 requests are waiting already", retry_after=2.5))
    assert (busy.text, busy.may_pass) == ("256 requests are waiting already. Retry in 2.5 s.", True)
    assert not explained(Overloaded("no memory", reason="OUT_OF_MEMORY")).may_pass
    assert explained(Unavailable("refused")).title == "No response from host:1."
    assert "It would take about 12 s" in explained(DeadlineExceeded("too long", estimate=12.0)).text
    assert "--token-file" in explained(Unauthenticated("a token is needed")).text
    assert "request r-1" in explained(ModelNotFound("no such model", request_id="r-1")).text


@pytest.mark.parametrize(
    ("phase", "position", "step", "eta", "words"),
    [
        ("sending", 0, 0, None, "Sending the image"),
        ("queued", 0, 0, None, "Next in the queue"),
        ("queued", 3, 0, 12.4, "3 ahead in the queue · about 12 s left"),
        ("running", 0, 0, None, "Reading the image"),
        ("running", 0, 4, 600.0, "Step 4 of 20 · about 10 min left"),
        ("running", 0, 20, 0.1, "Step 20 of 20"),
        ("waiting", 0, 0, 1.26, "Busy. Retrying in 1.3 s"),
    ],
)
def test_a_run_is_described(phase: Phase, position: int, step: int, eta: float | None, words: str) -> None:
    source = ImageFile("s.png", "image/png", 1, 1, b"")
    run_ = Run(
        source, Settings(), Extras(), phase, position, step, 20 if step else 0, eta, None, "Busy." if phase == "waiting" else ""
    )
    assert describe(run_) == words


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--port", "70000"], 2, "--port must be 0 to 65535, not 70000"),
        (["--retries", "-1"], 2, "--retries must be at least 0, not -1"),
        (["--token-file", "/nowhere"], 1, "/nowhere: No such file or directory"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1:7860"),
    ],
)
def test_invalid_flags_are_reported(
    flags: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMG2IMG_TOKEN", raising=False)
    parser = argparse.ArgumentParser()
    configure(parser)
    assert run(parser.parse_args([*flags, "--no-open"])) == status
    assert words in capsys.readouterr().err


def test_playground_imports_no_grpc_and_no_server_code() -> None:
    """It uses no stub, no protobuf message and no module of the server."""
    for path in (REPOSITORY / "playground").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"img2img", "grpc", "google", "img2img_server", "torch"}, path


def _info(name: str, *fields: FieldInfo) -> ModelInfo:
    return ModelInfo(name, ModelReference(), "", "", "", "", "", "ready", 8, False, fields=fields)


_USUAL = _info("usual", *(FieldInfo(name) for name in ("negative_prompt", "scheduler")), FieldInfo("strength", default=0.8),
               FieldInfo("guidance_scale", default=7.5), FieldInfo("num_inference_steps", default=25))  # fmt: skip
_EDITS = _info("edits", FieldInfo("num_inference_steps", default=4.0), FieldInfo("true_cfg_scale", default=4.0),
               FieldInfo("negative_prompt"))  # fmt: skip
_UNKNOWN = _info("unknown")


def test_settings_that_the_model_does_not_take_are_not_sent() -> None:
    settings = Settings(negative_prompt="fog", scheduler="DDIMScheduler", true_cfg_scale=2.0)
    assert set(settings.fitted(_EDITS).options()) == {"prompt", "negative_prompt", "num_inference_steps", "true_cfg_scale", "fit"}
    assert "true_cfg_scale" not in replace(settings, negative_prompt="").fitted(_EDITS).options(), "it needs a negative prompt"
    assert settings.fitted(_USUAL) == replace(settings, true_cfg_scale=None)
    for unknown in (_UNKNOWN, None):
        assert settings.fitted(unknown) == settings


def test_strength_and_references_that_need_a_mask_are_sent_with_one_only() -> None:
    """The same for models that edit; without a strength they run all steps."""
    fields = (*_EDITS.fields, FieldInfo("mask"), FieldInfo("strength", default=1.0, needs="mask"))
    session = _new_session()
    session.model = replace(_EDITS, fields=(*fields, FieldInfo("reference_images", max_count=1, needs="mask")))
    image = ImageFile("m.png", "image/png", 1, 1, b"m")
    session.settings = Settings(strength=0.5, num_inference_steps=48)
    session.extras = Extras(None, (image,))
    settings, extras = session.fitted()
    assert (settings.strength, extras.references, session.most_references) == (None, (), 0)
    assert settings.preview_interval(session.model, extras.given) == 4
    session.extras = Extras(image, (image,))
    settings, extras = session.fitted()
    assert (settings.strength, extras.references, session.most_references) == (0.5, (image,), 1)
    assert settings.preview_interval(session.model, extras.given) == 2
    assert replace(settings, strength=None).preview_interval(session.model, extras.given) == 4, "its own strength is 1"


def test_control_images_are_sent_as_the_model_takes_them() -> None:
    """For a ControlNet that fits, or for the model itself, with the numbers that it takes."""
    nets = ("canny", "depth", "canny-xl")
    numbers = ("controls.scale", "controls.start", "controls.end")
    usual = replace(
        _info("usual", FieldInfo("controls", max_count=4), *map(FieldInfo, ("controls.model", *numbers))), controlnets=nets[:2]
    )
    older = _info("older", FieldInfo("controls", max_count=4))
    own = _info("own", FieldInfo("controls", required=True, max_count=1))
    scaled = replace(own, fields=(*own.fields, *map(FieldInfo, numbers)))
    image = ImageFile("e.png", "image/png", 1, 1, b"e")
    named, unnamed = ControlImage(image, "depth", 0.5, 0.1, 0.9), ControlImage(image, "", 0.5, 0.1, 0.9)
    for model, offered, expected in (
        (usual, ("canny", "depth"), (named, replace(named, model="canny"))),
        (older, nets, (named, replace(named, model="canny"))),
        (replace(usual, controlnets=()), (), (named, None)),
        (own, (), (ControlImage(image, ""), ControlImage(image, ""))),
        (scaled, (), (replace(named, model=""), unnamed)),
        (_EDITS, (), (None, None)),
        (None, (), (None, None)),
    ):
        session = _new_session()
        session.model, session.controlnets = model, offered_controlnets(model, nets)
        assert session.controlnets == offered
        for control, sent in zip((named, unnamed), expected, strict=True):
            session.extras = Extras(controls=(control,))
            assert session.fitted()[1].controls == (() if sent is None else (sent,)), (model, control)
    request = build_request(b"file", Extras(controls=(ControlImage(image, ""),)).options())
    assert not request.controls[0].HasField("model")
    code = python_code(Connection("host:1"), "a.png", Settings(), "b.png", Extras(controls=(ControlImage(image, ""),)).names())
    assert 'Control(None, "e.png", scale=1.0, start=0.0, end=1.0)' in code


def test_a_control_image_is_added_for_the_first_controlnet_that_fits_or_for_the_model() -> None:
    for model, offered, name in (
        (
            replace(_info("usual", FieldInfo("controls", max_count=4), FieldInfo("controls.model")), controlnets=("b",)),
            ("b",),
            "b",
        ),
        (_info("own", FieldInfo("controls", required=True, max_count=1)), (), ""),
    ):
        session = _new_session()
        session.model, session.controlnets = model, offered
        for _ in range(2):
            session.add_control(IMAGE.read_bytes(), "edges.png")
        assert [control.model for control in session.extras.controls] == [name] * min(2, most_controls(model))


_PROMPTED = replace(
    _info("prompted", FieldInfo("image_prompts", max_count=2), FieldInfo("image_prompts.images", max_count=3)),
    image_adapters=("plain", "style"),
)


def test_image_prompts_are_sent_as_the_model_takes_them() -> None:
    one, two = (ImageFile(name, "image/png", 1, 1, name.encode()) for name in ("one.png", "two.png"))
    prompts = (
        PromptImages("a", "style", (one, two), 0.5),
        PromptImages("b", "plain", (two,)),
        PromptImages("c", "plain", (one,)),
    )
    session = _new_session()
    session.extras = Extras(prompts=prompts)
    for model, sent in ((_PROMPTED, prompts[:2]), (_USUAL, ()), (None, ())):
        session.model = model
        assert session.fitted()[1].prompts == sent
    extras = Extras(prompts=prompts[:2])
    request = build_request(b"file", extras.options())
    found = [(prompt.adapter, [image.data for image in prompt.images], prompt.scale) for prompt in request.image_prompts]
    assert found == [("style", [b"one.png", b"two.png"], 0.5), ("plain", [b"two.png"], 1.0)]
    code = python_code(Connection("host:1"), "a.png", Settings(), "b.png", extras.names())
    assert "import Client, ImagePrompt\n" in code
    assert (
        'image_prompts=[ImagePrompt("style", ["one.png", "two.png"], scale=0.5), ImagePrompt("plain", ["two.png"], scale=1.0)]'
        in code
    )
    both = Extras(controls=(ControlImage(one, "canny"),), prompts=prompts[:1])
    assert "import Client, Control, ImagePrompt\n" in python_code(
        Connection("host:1"), "a.png", Settings(), "b.png", both.names()
    )
    assert session.image(two.id) is two, "the page can show it"


def test_images_are_added_to_the_image_prompt_with_their_id_and_leave_with_it() -> None:
    session = _new_session()
    session.model = replace(_PROMPTED, image_adapters=())
    session.add_prompt_image(IMAGE.read_bytes(), "a.png", "first")
    assert list(session.extras.prompts) == [], "no adapter fits"
    session.model = _PROMPTED
    for prompt_id, name in (("first", "a.png"), ("first", "b.png"), ("second", "c.png"), ("third", "d.png")):
        session.add_prompt_image(IMAGE.read_bytes(), name, prompt_id)
        if prompt_id == "first":
            session.change_prompt(replace(session.extras.prompts[0], adapter="style"))
    prompts = session.extras.prompts
    names = [(prompt.id, prompt.adapter, [image.name for image in prompt.images]) for prompt in prompts]
    assert names == [("first", "style", ["a.png", "b.png"]), ("second", "style", ["c.png"])], "the model takes two"
    session.add_prompt_image(b"text", "text.png", "first")
    assert session.failure is not None
    assert (session.failure.title, session.failure.index("image_prompts")) == (
        "The image cannot be used as an image prompt.",
        -1,
    )
    for name in ("e.png", "f.png"):
        session.add_prompt_image(IMAGE.read_bytes(), name, "first")
    assert session.failure is not None
    assert (session.failure.title, session.failure.text) == ("f.png was not added.", "An image prompt has at most 3 images.")
    session.remove_prompt_image(session.extras.prompts[1].images[0])
    assert session.failure is None
    session.model = replace(_PROMPTED, image_adapters=("other",))
    session.add_prompt_image(IMAGE.read_bytes(), "g.png", "fourth")
    assert [(prompt.id, prompt.adapter) for prompt in session.extras.prompts] == [("first", "style"), ("fourth", "other")]


@pytest.mark.parametrize(
    ("text", "field", "index"),
    [
        ("controls[1].scale: no", "controls", 1),
        ("controls: no", "controls", -1),
        ("image_prompts[12].images[3].data: no", "image_prompts", 12),
    ],
)
def test_a_failure_names_the_element_of_a_list(text: str, field: str, index: int) -> None:
    failure = Failure("Refused.", text, field)
    assert (failure.index(field), failure.index("prompt")) == (index, None)


def test_untouched_settings_follow_the_models_defaults() -> None:
    followed = Settings().followed(_USUAL, _EDITS)
    assert (followed.num_inference_steps, followed.true_cfg_scale, followed.strength) == (4, 4.0, 0.8)
    assert followed.followed(_EDITS, _USUAL).num_inference_steps == 25
    assert replace(Settings(), num_inference_steps=9).followed(_USUAL, _EDITS).num_inference_steps == 9, "the user's own"
    assert Settings().followed(None, _UNKNOWN) == Settings()
