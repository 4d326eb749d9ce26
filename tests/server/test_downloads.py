"""Models that are not in the store: exported into it if that is allowed, once for all requests, and never by a path."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from img2img_export.cli.export import configure
from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.errors import (
    BundleError,
    Exhausted,
    InvalidField,
    ModelNotFound,
    ModelUnavailable,
    PermissionDenied,
    ServerError,
    ShuttingDown,
)
from img2img_server.models.downloads import arguments_of, bundle_name, check_reference
from img2img_server.models.registry import Model, ModelRegistry, ModelState
from img2img_server.support.call import Call, answering
from model_folder import Memory, Rig, make_bundle, rig

_EXPORTER = """
import atexit, json, os, pathlib, shutil, subprocess, sys, time
control, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
output = pathlib.Path(next(word for word in arguments if word.startswith("--output=")).partition("=")[2])
repo = arguments[arguments.index("--") + 1]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) if repo.endswith("slow") else None
seen = {"arguments": arguments, "cwd": os.listdir(), "nice": os.nice(0), "pids": [os.getpid()] + ([child.pid] if child else [])}
with (control / "calls").open("a") as file:
    file.write(json.dumps(seen) + "\\n")
(control / "running").touch(exist_ok=False)
atexit.register((control / "running").unlink)
tell = lambda **event: print(json.dumps(event), flush=True)
print("a library prints what it likes")
tell(event="stage", text="tracing")
tell(event="progress", label="downloading it", done=1, total=4)
if child:
    child.wait()
if (control / "gate").exists():
    (control / "gate").open().read()
if repo.endswith("missing"):
    sys.exit("img2img export needs 'optimum': pip install 'img2img-server[export]'")
if repo.endswith("broken"):
    tell(event="error", message="the hub refuses acme/broken (401), see /root/.cache/hub")
    sys.exit(1)
shutil.copytree(control / "template", output.with_name(".staging"))
output.with_name(".staging").rename(output)
tell(event="result", path=str(output))
"""


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """The folder in which the fake exporter records its calls and finds its scripts."""
    make_bundle(tmp_path / "control" / "template", repo_id="acme/new")
    return tmp_path / "control"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "store" / "a")
    return tmp_path / "store"


def exporter(control: Path) -> list[str]:
    return [sys.executable, "-c", _EXPORTER, str(control)]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def calls(control: Path) -> list[dict[str, Any]]:
    path = control / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def downloading(folder: Path, control: Path, *repos: str) -> Any:
    return rig(folder, exporter(control), allow_downloads=True, download_repos=repos or ("acme/*",))


async def use(it: Rig, **reference: Any) -> Model:
    async with it.residency.using(Source(**reference)) as model:
        return model


async def begun(it: Rig, name: str, detail: str) -> None:
    await it.until(lambda: any(model.id == name and detail in model.detail for model in it.store))


async def test_a_missing_model_is_exported_once_for_all_callers(folder: Path, control: Path) -> None:
    os.mkfifo(control / "gate")
    async with downloading(folder, control) as it:
        waiting = [asyncio.create_task(use(it, repo_id="acme/new")) for _ in range(3)]
        await begun(it, "acme--new", "exporting: downloading it (25%)")
        assert it.store.get("acme--new").state is ModelState.LOADING
        waiting.append(asyncio.create_task(use(it, path="acme--new")))
        waiting.pop(0).cancel()
        await asyncio.to_thread((control / "gate").write_text, "")
        models = await asyncio.gather(*waiting)
        assert [(model.id, model.state, model.detail) for model in models] == [("acme--new", ModelState.READY, "")] * 3
        assert it.memory.loads == ["acme--new"]
        await use(it, repo_id="acme/new")
        await it.residency.unload("acme--new")
        await use(it, repo_id="acme/new")
    (call,) = calls(control)
    assert call["arguments"] == ["--json", f"--output={folder / 'acme--new'}", "--", "acme/new"]
    assert call["nice"] == min(19, os.nice(0) + 10), "ten above the server's own, and Linux has 19 at most"
    assert call["cwd"] == [], "a folder there that is called like the repository would be taken for it"
    assert ModelRegistry.load(folder, Memory().load).find(Source(repo_id="acme/new")).id == "acme--new"


async def test_only_listed_models_are_downloaded(folder: Path, control: Path) -> None:
    async with downloading(folder, control, "acme/n*", "other/one") as it:
        for repo in ("acme/old", "other/two", "evil/new"):
            with pytest.raises(PermissionDenied, match="not on this server's list"):
                await use(it, repo_id=repo)
    async with rig(folder, exporter(control)) as it:
        with pytest.raises(ModelNotFound, match="repo_id 'acme/new'"):
            await use(it, repo_id="acme/new")
    assert calls(control) == []
    assert names_in(folder) == ["a"]


async def test_export_on_demand_needs_access_to_the_model(folder: Path, control: Path) -> None:
    async with downloading(folder, control) as it:
        with answering(Call("m", "r", client="alice", models=("a",))), pytest.raises(PermissionDenied, match="acme--new"):
            await use(it, repo_id="acme/new")
        assert calls(control) == []


def test_downloads_without_a_list_are_refused_at_start(folder: Path) -> None:
    with pytest.raises(ValueError, match="allow_downloads needs download_repos"):
        ModelSettings(allow_downloads=True)
    settings = ModelSettings(allow_downloads=True, download_repos=("acme/*",))
    with pytest.raises(BundleError, match="downloads need a folder of bundles"):
        ModelRegistry.load(folder / "a", Memory().load, settings=settings)


async def test_store_may_start_empty_with_downloads_enabled(tmp_path: Path, control: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with downloading(tmp_path / "empty", control) as it:
        assert (await use(it, repo_id="acme/new")).id == "acme--new"


async def test_failed_downloads_are_refused_for_a_while_with_the_reason(folder: Path, control: Path) -> None:
    async with downloading(folder, control) as it:
        with pytest.raises(ModelUnavailable, match=r"the hub refuses acme/broken \(401\), see \(a path\)"):
            await use(it, repo_id="acme/broken")
        with answering(Call("m", "r", admin=False)), pytest.raises(ModelUnavailable, match="possible in 5 s") as caught:
            await use(it, repo_id="acme/broken")
        assert "hub" not in str(caught.value), "that is the operator's"
        assert [model.id for model in it.store] == ["a"]
        assert len(calls(control)) == 1
        it.clock.now = 5.0
        with pytest.raises(ModelUnavailable, match="hub refuses"):
            await use(it, repo_id="acme/broken")
        assert len(calls(control)) == 2


async def test_server_without_exporter_reports_it(folder: Path, control: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with downloading(folder, control) as it:
        for _ in range(2):
            with pytest.raises(ModelUnavailable, match="this server has no exporter"):
                await use(it, repo_id="acme/missing")
    assert "pip install 'img2img-server[export]'" in caplog.text


async def test_export_command_names_the_missing_extra(folder: Path) -> None:
    """The result of `img2img export` without the exporter's packages."""
    code = "import sys; sys.modules['huggingface_hub'] = None; from img2img_cli.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "export"]
    async with rig(folder, command, allow_downloads=True, download_repos=("acme/*",)) as it:
        with pytest.raises(ModelUnavailable, match="no exporter"):
            await use(it, repo_id="acme/new")


async def test_exports_run_one_at_a_time_and_excess_ones_are_refused(folder: Path, control: Path) -> None:
    os.mkfifo(control / "gate")
    async with downloading(folder, control) as it:
        waiting = []
        for number in range(4):
            waiting.append(asyncio.create_task(use(it, repo_id="acme/new", variant=f"v{number}")))
            await begun(it, f"acme--new--v{number}", "downloading" if number == 0 else "waiting")
        with pytest.raises(Exhausted) as caught:
            await use(it, repo_id="acme/new", variant="v4")
        assert caught.value.retry_after == 60
        for number in range(4):
            await begun(it, f"acme--new--v{number}", "downloading")
            assert len(calls(control)) == number + 1, "one at a time"
            await asyncio.to_thread((control / "gate").write_text, "")
        models = await asyncio.gather(*waiting)
        assert [model.id for model in models] == [f"acme--new--v{number}" for number in range(4)]


async def test_closing_ends_the_export_and_its_child_processes(folder: Path, control: Path) -> None:
    async with downloading(folder, control) as it:
        waiter = asyncio.create_task(use(it, repo_id="acme/slow"))
        await begun(it, "acme--slow", "downloading")
        (call,) = calls(control)
        processes = [psutil.Process(pid) for pid in call["pids"]]
        assert len(processes) == 2
        await it.residency.close()
        with pytest.raises(ShuttingDown):
            await waiter
        _, alive = psutil.wait_procs(processes, timeout=120)
        assert not alive
        assert [model.id for model in it.store] == ["a"]


def test_export_process_ends_if_the_server_is_killed(control: Path, tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from img2img_server.bundle.manifest import Source
from img2img_server.models.downloads import arguments_of, export
arguments = arguments_of(Source(repo_id="acme/slow"), Path("x"))
asyncio.run(export(arguments, lambda detail: print(detail, flush=True), {exporter(control)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "tracing\n"
        (call,) = calls(control)
        exporting, child = map(psutil.Process, call["pids"])
        server.kill()
        psutil.wait_procs([exporting], timeout=120)
        assert not exporting.is_running()
        child.kill()


BAD: dict[str, dict[str, Any]] = {
    "a path": {"repo_id": "../x"},
    "an absolute path": {"repo_id": "/etc/passwd"},
    "a flag": {"repo_id": "--force/x"},
    "too deep": {"repo_id": "a/b/c"},
    "no owner": {"repo_id": "model"},
    "up": {"repo_id": "a/.."},
    "hidden": {"repo_id": "a/.b"},
    "two dashes": {"repo_id": "a/b--c"},
    "NUL": {"repo_id": "a/b\0"},
    "a newline": {"repo_id": "a/b\n"},
    "long": {"repo_id": "a/" + "b" * 100_000},
    "a variant with a path": {"repo_id": "a/b", "variant": "../x"},
    "a variant that is a flag": {"repo_id": "a/b", "variant": "--force"},
    "a revision with a way up": {"repo_id": "a/b", "revision": "a/../b"},
    "a revision that is a flag": {"repo_id": "a/b", "revision": "-x"},
    "a pattern out of the model": {"repo_id": "a/b", "allow_patterns": ("../*",)},
    "an absolute pattern": {"repo_id": "a/b", "ignore_patterns": ("/etc/*",)},
    "NUL in a pattern": {"repo_id": "a/b", "allow_patterns": ("a\0",)},
    "many patterns": {"repo_id": "a/b", "allow_patterns": ("a",) * 100},
}


@pytest.mark.parametrize("name", BAD)
async def test_malformed_model_references_are_refused(name: str, folder: Path, control: Path) -> None:
    async with downloading(folder, control, "*") as it:
        with pytest.raises(InvalidField) as caught:
            await use(it, **BAD[name])
        assert caught.value.field == f"model.{list(BAD[name])[-1]}"
        assert len(str(caught.value)) < 500
        with pytest.raises(InvalidField, match=r"^source\."):
            await it.residency.load(Source(**BAD[name]))
    assert calls(control) == []
    assert names_in(folder) == ["a"]


def test_bundle_names_of_references_are_unique() -> None:
    references = [
        Source(repo_id=repo, variant=variant, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        for repo in ("a/b", "a-b/c", "a/b-c")
        for variant in (None, "fp16", "c", "fp-16")
        for revision in (None, "main", "v1")
        for allow in ((), ("unet/*",), ("unet/*", "*.json"))
        for ignore in ((), ("unet/*",))
    ]
    for reference in references:
        check_reference(reference, "model")
    names = [bundle_name(reference) for reference in references]
    assert len(set(names)) == len(names)
    assert bundle_name(references[0]) == "a--b"
    assert bundle_name(Source(repo_id="a/b", variant="fp16")) == "a--b--fp16"
    assert all(len(name) < 250 and "/" not in name and not name.startswith(".") for name in names)


def test_export_arguments_round_trip_through_the_exporters_parser() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    configure(parser)
    reference = Source("acme/new", None, "fp16", "v1", ("--force", "unet/*"), ("-x",))
    words = arguments_of(reference, Path("/store/x"))
    parsed = parser.parse_args(words)
    assert (parsed.source, str(parsed.output), parsed.variant, parsed.revision) == ("acme/new", "/store/x", "fp16", "v1")
    assert (parsed.allow_pattern, parsed.ignore_pattern, parsed.force, parsed.json) == (
        ["--force", "unet/*"],
        ["-x"],
        False,
        True,
    )


UNKNOWN = [
    "../x",
    "..",
    ".",
    "",
    "a/../a",
    "/etc",
    "a/",
    "./a",
    "a\0",
    "\0",
    "a" * 100_000,
    "\ud7ff",
    ".hidden",
    "~",
    "*",
    "link",
    "c:\\a",
]


@pytest.mark.parametrize("name", UNKNOWN)
async def test_model_name_cannot_be_a_path(name: str, folder: Path, tmp_path: Path) -> None:
    """No name reaches a file outside of the store, not even through a symlink in the store."""
    make_bundle(tmp_path / "x")
    make_bundle(folder / ".hidden")
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "deep").mkdir()
    make_bundle(folder / "deep" / "bundle")
    store = ModelRegistry(
        [Model("a")], folder=ModelRegistry.load(folder, Memory().load, settings=ModelSettings(preload=("none",))).folder
    )
    assert store.discover(name) is False
    assert [model.id for model in store] == ["a"]
    async with rig(folder) as it:
        it.store.forget("link")  # found at start, because an operator made it
        with pytest.raises(ServerError) as caught:
            async with it.residency.using(Source(path=name) if name else Source(path="deep/bundle")):
                pass
        assert isinstance(caught.value, ModelNotFound)
        assert len(str(caught.value)) < 500, "it has to fit into gRPC's metadata"
        assert it.memory.loads == []


async def test_bundle_added_later_is_found_when_requested(folder: Path) -> None:
    async with rig(folder) as it:
        with pytest.raises(ModelNotFound):
            await use(it, path="later")
        make_bundle(folder / "later")
        assert [model.id for model in it.store] == ["a"], "nobody has asked"
        assert (await use(it, path="later")).state is ModelState.READY
        assert (await use(it, repo_id="acme/later")).id == "later"
        make_bundle(folder / "another")
        assert (await it.residency.load(Source(path="another"))).state is ModelState.READY
        assert [model.id for model in it.store] == ["a", "another", "later"]
