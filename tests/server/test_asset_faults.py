"""The asset store when things go wrong: crashes, damage, full disks, failing filesystems, callers that leave, all at once."""

import asyncio
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from assets_store import DAY, Time, files_of, opened, put, streamed
from img2img_server.assets.files import LocalAssetFiles
from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings
from img2img_server.errors import AssetNotFound, AssetQuotaFull, StorageFailed
from messages import png


async def test_concurrent_uploads_of_the_same_content_store_one_file(tmp_path: Path) -> None:
    data = os.urandom(2**20)
    async with opened(tmp_path, quota=20 * 2**20) as store:
        ids = await asyncio.gather(*(put(store, data) for _ in range(16)))
        assert len(set(ids)) == 1
        assert (store.stats.count, store.stats.bytes, store.stats.reserved) == (1, len(data), 0)
        assert [path.read_bytes() for path in files_of(tmp_path)] == [data]


@pytest.mark.parametrize("damage", ["torn", "changed", "longer", "empty"])
@pytest.mark.parametrize("reader", ["read", "stream"])
@pytest.mark.parametrize("restart", [False, True])
async def test_damaged_file_is_never_served_as_complete(tmp_path: Path, damage: str, reader: str, restart: bool) -> None:
    data = os.urandom(2**20 + 1000)
    harm = {"torn": data[:5000], "changed": data[:-1] + bytes([data[-1] ^ 1]), "longer": data + b"x", "empty": b""}[damage]
    store = await _open(tmp_path)
    asset_id = await put(store, data)
    files_of(tmp_path)[0].write_bytes(harm)
    if restart:
        await store.close()
        store = await _open(tmp_path)
    got: list[bytes] = []
    if (damage, reader, restart) == ("longer", "stream", False):
        assert await streamed(store, asset_id) == data, "as many bytes are read as were stored"
    else:
        with pytest.raises(StorageFailed, match="upload it again"):
            await _collect(store, asset_id, reader, got)
        assert len(b"".join(got)) < len(data)
        assert (store.stats.damaged, files_of(tmp_path)) == (1, [])
        with pytest.raises(AssetNotFound):
            await store.find("shared", asset_id)
    assert await put(store, data) == asset_id
    assert await streamed(store, asset_id) == data
    await store.close()


async def _open(folder: Path) -> AssetStore:
    store = AssetStore(AssetSettings(url=str(folder)))
    await store.open()
    return store


async def _collect(store: AssetStore, asset_id: str, reader: str, got: list[bytes]) -> None:
    if reader == "read":
        got.append(await store.read("shared", asset_id, 10**8) or b"")
        return
    async for block in store.stream("shared", asset_id):
        got.append(block)


async def test_uploading_again_repairs_a_damaged_asset(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        asset_id = await put(store, png())
        (path,) = files_of(tmp_path)
        path.write_bytes(b"torn")
        await put(store, png())
        assert await store.read("shared", asset_id, 10**6) == png()


async def test_asset_stored_during_deletion_of_its_older_copy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, begun, go = Time(), threading.Event(), threading.Event()
    remove = LocalAssetFiles.remove

    def slow(self: LocalAssetFiles, owner: str, asset_id: str) -> None:
        begun.set()
        assert go.wait(120)
        remove(self, owner, asset_id)

    monkeypatch.setattr(LocalAssetFiles, "remove", slow)
    async with opened(tmp_path, clock, max_age=DAY) as store:
        asset_id = await put(store, png())
        clock.now += 2 * DAY
        sweeping = asyncio.create_task(store.sweep())
        await asyncio.to_thread(begun.wait, 120)
        storing = asyncio.create_task(put(store, png()))
        await asyncio.wait([storing], timeout=0.1)
        go.set()
        await asyncio.gather(sweeping, storing)
        assert await store.read("shared", asset_id, 10**6) == png()
        assert (store.stats.count, store.stats.bytes) == (1, len(png()))


async def test_kill_loses_no_confirmed_asset(tmp_path: Path) -> None:
    code = """
import asyncio, os, sys
from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings

async def keep(store):
    while True:
        data = os.urandom(200_000)
        async with store.reserve("shared", len(data)) as room:
            print((await store.put("shared", data, room)).id, flush=True)

async def main():
    store = AssetStore(AssetSettings(url=sys.argv[1], quota=2**40))
    await store.open()
    await asyncio.gather(*(keep(store) for _ in range(8)))

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    said = [(await process.stdout.readline()).decode().strip() for _ in range(40)]
    process.kill()
    said += [line.strip() for line in (await process.stdout.read()).decode().splitlines(keepends=True) if len(line) == 65]
    await process.wait()
    async with opened(tmp_path, quota=2**40) as store:
        assert store.stats.count >= len(said)
        for asset_id in said:
            assert len(await store.read("shared", asset_id, 10**6) or b"") == 200_000
        for path in files_of(tmp_path):
            if path.parent.name != ".parts":
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


async def test_only_old_temporary_files_are_removed_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put(store, png())
    parts = tmp_path / ".parts"
    (parts / "old").write_bytes(b"half")
    (parts / "young").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    young = (parts / "young").stat().st_mtime
    os.utime(parts / "old", (young - 3700, young - 3700))
    async with opened(tmp_path) as store:
        assert sorted(path.name for path in parts.iterdir()) == ["young"]
        assert store.stats.count == 1
    assert (tmp_path / "notes.txt").exists()


class Broken:
    """A store's files, some of whose calls fail."""

    def __init__(self, store: AssetStore, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.error: Exception | None = error
        real = store._opened
        assert real is not None
        for name in ("write", "read", "look"):
            monkeypatch.setattr(real, name, self._breaking(getattr(real, name)))

    def _breaking(self, call: Callable[..., object]) -> Callable[..., object]:
        def broken(*arguments: object) -> object:
            if self.error is not None:
                raise self.error
            return call(*arguments)

        return broken


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "/secret/path"), RuntimeError("botocore says key=abc")])
async def test_filesystem_errors_do_not_reveal_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        broken = Broken(store, monkeypatch, error)
        with pytest.raises(StorageFailed) as caught:
            await put(store, png())
        assert not any(secret in str(caught.value) for secret in ("secret", "botocore", "abc"))
        assert ("is full" in str(caught.value)) == isinstance(error, OSError)
        assert repr(error) in caplog.text, "the operator sees the cause"
        assert (store.stats.count, store.stats.bytes, store.stats.reserved) == (0, 0, 0)
        broken.error = None
        asset_id = await put(store, png())
        assert await store.read("shared", asset_id, 10**6) == png()


async def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    async with opened(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("img2img_server.assets.files.os.fsync", full)
            with pytest.raises(StorageFailed, match="is full"):
                await put(store, png())
        assert files_of(tmp_path) == []
        await put(store, png())


def test_full_disk_refuses_uploads_but_keeps_stored_assets(tmp_path: Path) -> None:
    """With the kernel's limit on a file's size, in a separate process."""
    code = """
import asyncio, os, resource, signal, sys
from img2img_server.assets.store import AssetStore
from img2img_server.config import AssetSettings
from img2img_server.errors import StorageFailed

async def put(store, data):
    async with store.reserve("shared", len(data)) as room:
        return (await store.put("shared", data, room)).id

async def main():
    store = AssetStore(AssetSettings(url=sys.argv[1]))
    await store.open()
    small = await put(store, b"x" * 1000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        await put(store, os.urandom(20000))
    except StorageFailed as error:
        print(error)
    print(await store.read("shared", small, 10000) == b"x" * 1000, store.stats.count, store.stats.reserved)
    await put(store, os.urandom(2000))
    await store.close()

asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["asset storage is full", "True 1 0"]
    assert sorted(path.stat().st_size for path in files_of(tmp_path)) == [1000, 2000]


async def test_disconnecting_does_not_corrupt_stored_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    write = LocalAssetFiles.write

    def slow(self: LocalAssetFiles, owner: str, asset_id: str, data: bytes) -> None:
        begun.set()
        assert go.wait(120)
        write(self, owner, asset_id, data)

    monkeypatch.setattr(LocalAssetFiles, "write", slow)
    data = os.urandom(1000)
    async with opened(tmp_path, quota=1500) as store:
        storing = asyncio.create_task(put(store, data))
        await asyncio.to_thread(begun.wait, 120)
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
        assert store.stats.reserved == 1000, "its bytes still count, as they are still being written"
        with pytest.raises(AssetQuotaFull):
            async with store.reserve("shared", 600):
                pass
        go.set()
    assert (store.stats.count, store.stats.bytes, store.stats.reserved) == (1, 1000, 0), "closing waits for it"
    assert [path.read_bytes() for path in files_of(tmp_path)] == [data]


async def test_vanished_storage_is_reported(tmp_path: Path) -> None:
    async with opened(tmp_path / "assets") as store:
        asset_id = await put(store, png())
        shutil.rmtree(tmp_path / "assets")
        with pytest.raises(AssetNotFound):
            await store.read("shared", asset_id, 10**6)
        with pytest.raises(StorageFailed):
            await put(store, png())
        assert store.stats.reserved == 0


async def test_undeletable_asset_does_not_block_deletion_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, remove = Time(), LocalAssetFiles.remove

    def stuck(self: LocalAssetFiles, owner: str, asset_id: str) -> None:
        if asset_id == first:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        remove(self, owner, asset_id)

    monkeypatch.setattr(LocalAssetFiles, "remove", stuck)
    async with opened(tmp_path, clock, max_age=DAY) as store:
        first = await put(store, b"first")
        await put(store, b"second")
        await put(store, b"third")
        clock.now += 2 * DAY
        await store.sweep()
        await store.sweep()
        assert [path.name for path in files_of(tmp_path)] == [first]


async def test_file_deleted_while_being_stored_again_counts_towards_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, remove = threading.Event(), threading.Event(), LocalAssetFiles.remove

    def slow(self: LocalAssetFiles, owner: str, asset_id: str) -> None:
        remove(self, owner, asset_id)
        begun.set()
        assert go.wait(120)

    monkeypatch.setattr(LocalAssetFiles, "remove", slow)
    async with opened(tmp_path, quota=1500) as store:
        asset_id = await put(store, bytes(1000))
        deleting = asyncio.create_task(store.delete("shared", asset_id))
        await asyncio.to_thread(begun.wait, 120)
        async with store.reserve("shared", 0) as room:
            storing = asyncio.create_task(store.put("shared", bytes(1000), room))
            await asyncio.wait([storing], timeout=0.2)
            # The next request finds the deleted file's bytes free as soon as they are.
            go.set()
            await deleting
            async with store.reserve("shared", 600):
                with pytest.raises(AssetQuotaFull):
                    await storing
            assert (store.stats.count, store.stats.bytes, store.stats.reserved) == (0, 0, 0)


async def test_parent_folders_of_a_new_file_are_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    async with opened(tmp_path / "new" / "assets") as store:
        assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "assets")} <= synced
        synced.clear()
        await put(store, png())
    (path,) = files_of(tmp_path)
    assert {str(path.parent), str(path.parent.parent), str(tmp_path / "new" / "assets")} <= synced
