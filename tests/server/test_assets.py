"""The asset store: files are complete, separate for each owner, within the quota, and deleted when they expire."""

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from assets_store import DAY, Time, files_of, opened, put, streamed
from img2img_server.assets.files import AssetFiles, LocalAssetFiles, owner_of
from img2img_server.assets.store import AssetStore, steady_clock
from img2img_server.config import AssetSettings
from img2img_server.errors import AssetNotFound, AssetQuotaFull, NotSupported
from img2img_server.support.call import Call
from messages import png
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def s3() -> Any:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    if request.param == "s3":
        endpoint = request.getfixturevalue("s3")
        variables = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for key, value in {**variables, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(key, value)
        import s3fs  # type: ignore[import-untyped]

        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        if not bucket.exists("images"):
            bucket.mkdir("images")
        return f"s3://images/{name}"
    return f"memory://{name}" if request.param == "memory" else str(tmp_path / "assets")


async def test_asset_id_is_the_content_digest_and_data_round_trips(url: str) -> None:
    data = png((640, 480))
    async with opened(url) as store:
        asset_id = await put(store, data)
        assert asset_id == hashlib.sha256(data).hexdigest()
        assert await store.read("shared", asset_id, len(data)) == data
        assert await streamed(store, asset_id) == data
        found = await store.find("shared", asset_id)
        assert (found.id, found.size, found.media_type) == (asset_id, len(data), "image/png")
        assert (store.stats.count, store.stats.bytes, store.stats.reserved) == (1, len(data), 0)
        assert (store.stats.uploads, store.stats.downloads) == (1, 2)
    async with opened(url) as again:
        assert (again.stats.count, again.stats.bytes) == (1, len(data)), "a new start knows what is there"
        assert await again.read("shared", asset_id, len(data)) == data
        assert (await again.find("shared", asset_id)).media_type == "image/png"
        await again.delete("shared", asset_id)
        assert (again.stats.count, again.stats.bytes) == (0, 0)
        for call in (again.find("shared", asset_id), again.read("shared", asset_id, 1), again.delete("shared", asset_id)):
            with pytest.raises(AssetNotFound):
                await call


async def test_a_large_image_is_streamed_in_blocks(url: str) -> None:
    data = os.urandom(3 * 2**20 + 17)
    async with opened(url) as store:
        blocks = [block async for block in store.stream("shared", await put(store, data))]
    assert [len(block) for block in blocks] == [2**20, 2**20, 2**20, 17]
    assert b"".join(blocks) == data


async def test_assets_are_not_read_ahead_of_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reader holds one block in memory."""
    starts: list[int] = []
    read = LocalAssetFiles.read

    def noted(self: LocalAssetFiles, owner: str, asset_id: str, start: int, end: int) -> bytes:
        starts.append(start)
        return read(self, owner, asset_id, start, end)

    monkeypatch.setattr(LocalAssetFiles, "read", noted)
    async with opened(tmp_path) as store:
        asset_id = await put(store, os.urandom(3 * 2**20))
        stream = store.stream("shared", asset_id)
        for taken in range(3):
            await anext(stream)
            assert starts == [index * 2**20 for index in range(taken + 1)]
        await stream.aclose()


async def test_assets_are_private_to_their_owner(url: str) -> None:
    data = png()
    alice, bob = (owner_of(Call("m", "r", client=name, authenticated=True)) for name in ("alice", "bob"))
    async with opened(url) as store:
        asset_id = await put(store, data, alice)
        for call in (store.find(bob, asset_id), store.read(bob, asset_id, 10**6), store.delete(bob, asset_id)):
            with pytest.raises(AssetNotFound):
                await call
        await put(store, data, bob)
        await store.delete(bob, asset_id)
        assert await store.read(alice, asset_id, 10**6) == data


def test_owner_names_are_not_paths_and_do_not_collide() -> None:
    names = ["shared", "..", "/etc", "a/b", "A", "a", "", "\0", "x" * 5000]
    owners = [owner_of(Call("m", "r", client=name, authenticated=True)) for name in names]
    owners.append(owner_of(Call("m", "r", client="127.0.0.1")))
    assert len({owner.casefold() for owner in owners}) == len(owners)
    assert all(owner.replace("-", "").isalnum() and len(owner) < 50 for owner in owners)


async def test_two_servers_share_one_asset_store(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        asset_id = await put(one, png())
        assert await other.read("shared", asset_id, 10**6) == png()
        await other.delete("shared", asset_id)
        for call in (one.read("shared", asset_id, 10**6), one.find("shared", asset_id)):
            with pytest.raises(AssetNotFound):
                await call
        assert await put(one, png()) == asset_id
        assert await other.read("shared", asset_id, 10**6) == png()


async def test_one_client_cannot_fill_the_quota(url: str) -> None:
    """The client's quota covers stored files and uploads in progress, survives a restart, and is freed by deletions."""
    alice, bob = (owner_of(Call("m", "r", client=name, authenticated=True)) for name in ("alice", "bob"))
    async with opened(url, quota=1000, client_quota=600) as store:
        kept = await put(store, os.urandom(500), alice)
        for owner, size, fits in ((alice, 101, False), (alice, 100, True), (bob, 500, True), (bob, 501, False)):
            with contextlib.nullcontext() if fits else pytest.raises(AssetQuotaFull):
                async with store.reserve(owner, size):
                    pass
        async with store.reserve(alice, 60) as room:
            with pytest.raises(AssetQuotaFull, match="within your share of 600 bytes"):
                async with store.reserve(alice, 41):
                    pass
            with pytest.raises(AssetQuotaFull):
                await store.put(alice, os.urandom(101), room)
        assert (store.stats.bytes, store.stats.reserved) == (500, 0)
    async with opened(url, quota=1000, client_quota=600) as store:
        with pytest.raises(AssetQuotaFull):
            await put(store, os.urandom(101), alice)
        await store.delete(alice, kept)
        await put(store, os.urandom(600), alice)
        assert store._index._taken == {alice: 600}


async def test_quota_includes_uploads_in_progress(url: str) -> None:
    async with opened(url, quota=1000) as store:
        kept = await put(store, os.urandom(600))
        with pytest.raises(AssetQuotaFull) as full:
            async with store.reserve("shared", 401):
                pass
        assert full.value.status == "RESOURCE_EXHAUSTED"
        async with store.reserve("shared", 300) as first:
            assert store.stats.reserved == 300
            with pytest.raises(AssetQuotaFull):
                async with store.reserve("shared", 101):
                    pass
            with pytest.raises(AssetQuotaFull):
                await store.put("shared", os.urandom(401), first)
            await store.put("shared", os.urandom(400), first)
        assert (store.stats.bytes, store.stats.reserved) == (1000, 0)
        assert await store.read("shared", kept, 1000), "what is not too old is never driven out"
        await store.delete("shared", kept)
        await put(store, os.urandom(600))


async def test_expired_entries_are_evicted_and_used_ones_stay(url: str) -> None:
    clock = Time()
    async with opened(url, clock, quota=1000, max_age=DAY) as store:
        old, used = await put(store, os.urandom(500)), await put(store, os.urandom(400))
        clock.now += 0.9 * DAY
        assert (await store.find("shared", used)).expires == clock.now + DAY
        with pytest.raises(AssetQuotaFull):
            await put(store, os.urandom(200))
        clock.now += 0.2 * DAY
        new = await put(store, os.urandom(500))
        assert (store.stats.expired, store.stats.count) == (1, 2)
        with pytest.raises(AssetNotFound):
            await store.find("shared", old)
        clock.now += 0.95 * DAY
        with pytest.raises(AssetNotFound):
            await store.read("shared", used, 1000)
        assert store.stats.expired == 2
        assert await store.read("shared", new, 1000)


async def test_last_use_survives_a_restart(tmp_path: Path) -> None:
    clock = Time()
    async with opened(tmp_path, clock, max_age=DAY) as store:
        used, unused = await put(store, b"used"), await put(store, b"unused")
        clock.now += 0.8 * DAY
        await store.read("shared", used, 100)
    clock.now += 0.5 * DAY
    async with opened(tmp_path, clock, max_age=DAY) as store:
        assert await store.read("shared", used, 100) == b"used"
        with pytest.raises(AssetNotFound):
            await store.find("shared", unused)
        assert [path.name for path in files_of(tmp_path)] == [used], "what is too old goes at start"


async def test_asset_used_by_another_server_does_not_expire(tmp_path: Path) -> None:
    clock = Time()
    async with opened(tmp_path, clock, max_age=DAY) as one, opened(tmp_path, clock, max_age=DAY) as other:
        asset_id = await put(one, png())
        clock.now += 0.8 * DAY
        await other.read("shared", asset_id, 10**6)
        clock.now += 0.5 * DAY
        await one.sweep()
        assert await one.read("shared", asset_id, 10**6) == png()


async def test_expired_assets_are_deleted_automatically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    remove = LocalAssetFiles.remove

    def watched(self: LocalAssetFiles, owner: str, asset_id: str) -> None:
        remove(self, owner, asset_id)
        loop.call_soon_threadsafe(gone.set)

    monkeypatch.setattr(LocalAssetFiles, "remove", watched)
    store = AssetStore(AssetSettings(url=str(tmp_path), max_age=DAY), clock, sweep_seconds=0.01)
    await store.open()
    await put(store, png())
    clock.now += 2 * DAY
    await asyncio.wait_for(gone.wait(), 120)
    assert files_of(tmp_path) == []
    await store.close()


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "/proc/version/assets", "s3://no-such-bucket-here/x"])
async def test_unusable_storage_is_reported_at_start(url: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(key, value)
    store = AssetStore(AssetSettings(url=url))
    with pytest.raises(OSError, match="assets"):
        await store.open()
    await store.close()


async def test_url_none_disables_the_asset_store(tmp_path: Path) -> None:
    async with opened("none") as store:
        assert not store.kept
        assert store.stats.count == 0
        with pytest.raises(NotSupported, match="'assets'"):
            store.require("x")


async def test_default_asset_folder_is_private_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = AssetStore(AssetSettings())
    await store.open()
    await put(store, png())
    await store.close()
    root = tmp_path / "img2img" / "assets"
    (path,) = files_of(root)
    assert root.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_foreign_files_in_the_folder_are_ignored() -> None:
    files: Any = AssetFiles(None, "root")
    digest = hashlib.sha256(b"").hexdigest()
    good = f"root/shared/{digest[:2]}/{digest}"
    info = {"type": "file", "size": 0, "mtime": 5.0}
    assert files._described(good, info).used == 5.0
    for name in (f"root/shared/{digest}", f"root/other/{digest[:2]}/{digest}", f"root/shared/00/{digest}", "root/.parts/x"):
        assert files._described(name, info) is None


@pytest.mark.parametrize("jump", [2 * DAY, -2 * DAY])
async def test_adjusting_the_system_clock_deletes_no_asset(tmp_path: Path, jump: float) -> None:
    wall, passed = Time(), Time()
    store = AssetStore(AssetSettings(url=str(tmp_path)), steady_clock(lambda: wall.now, lambda: passed.now))
    await store.open()
    asset_id = await put(store, png())
    wall.now += jump
    passed.now += 60
    await store.sweep()
    assert (await store.find("shared", asset_id)).id == asset_id
    assert store.stats.expired == 0
    passed.now += DAY + 60
    await store.sweep()
    assert store.stats.expired == 1, "what is too old by the time that passed still goes"
    await store.close()
