"""A model must not run code: pickles and Python planted in a bundle are never opened.

Each bundle here loads without the planted files, and these leave a mark if they are run, which is tested too.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.bundle.unsafe_files import refuse_unsafe
from img2img_server.errors import BundleError
from img2img_server.runtime import loader
from img2img_server.runtime.execution import Execution

Backend = Literal["torch", "hybrid"]
READ_PICKLE = torch.load
BACKENDS: tuple[Backend, ...] = ("torch", "hybrid")
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.bin", "model.ckpt", "model.pt", "model.pth", "model.pkl")


class Trap:
    """A file that leaves a mark when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.opened: list[object] = []

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)

    @property
    def python(self) -> str:
        """Code that leaves the mark when imported, and defines a class."""
        made = "class Evil:\n    from_pretrained = from_config = classmethod(lambda *a, **k: None)\n"
        return f"open({str(self.mark)!r}, 'w').close()\n{made}"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    """A mark that also records whether torch read a pickle, even with its own restricted reader."""
    trap = Trap(tmp_path / "mark")

    def load(file: object, *words: object, **settings: object) -> object:
        trap.opened.append(file)
        return READ_PICKLE(file, *words, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", load)
    return trap


@pytest.fixture(autouse=True)
def allow_unsafe_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "refuse_unsafe", lambda bundle: None)


@pytest.fixture
def bundle(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_model("sd1"), copy)
    return copy


def load(bundle: Path, backend: Backend) -> object:
    manifest = Manifest(
        source=Source(repo_id="tiny"), pipeline_class="StableDiffusionImg2ImgPipeline", family="stable-diffusion",
        backend=backend, components=(), files={}, tools={}, verification=Verification(passed=True),
    )  # fmt: skip
    return loader.load_pipeline(bundle, manifest, Execution(provider="cpu", arithmetic="fp32", threads=1))


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def refused_unrun(bundle: Path, backend: Backend, trap: Trap) -> None:
    with pytest.raises(BundleError):
        load(bundle, backend)
    assert not trap.mark.exists()
    assert not trap.opened


@pytest.mark.parametrize("name", [*PICKLES, "EVIL.PY", "evil.so", "unknown.pickle"])
@pytest.mark.parametrize("where", ["", "unet", "unet/deeper", "linked"])
def test_bundle_with_a_pickle_or_code_is_refused(name: str, where: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "unet" / "deeper").mkdir(parents=True)
    (bundle / "elsewhere").mkdir()
    (bundle / "linked").symlink_to("elsewhere")
    (bundle / "unet" / "round").symlink_to(bundle)
    (bundle / "unet" / "config.json").write_text("{}")
    refuse_unsafe(bundle)
    (bundle / where / name).write_text("")
    with pytest.raises(BundleError, match="is not allowed in a bundle"):
        refuse_unsafe(bundle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("shard", ["shard.dat", "../../shard.safetensors", "/shard.safetensors", 3])
def test_an_index_that_names_pickles_is_not_followed(
    shard: object, component: str, backend: Backend, bundle: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the scan prevents this: diffusers and transformers would open them."""
    monkeypatch.setattr(loader, "refuse_unsafe", refuse_unsafe)
    folder = bundle / component
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    torch.save(trap, folder / "shard.dat")
    torch.save(trap, bundle.parent / "shard.safetensors")
    (folder / f"{weights.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
    refused_unrun(bundle, backend, trap)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json", "model.bin.index.json"])
def test_only_a_valid_safetensors_index_passes(name: str, tmp_path: Path) -> None:
    index = tmp_path / name
    index.write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})
    )
    refuse_unsafe(tmp_path)
    for bad in ("", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(bad)
        with pytest.raises(BundleError):
            refuse_unsafe(tmp_path)


def test_loader_refuses_unsafe_files(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "refuse_unsafe", refuse_unsafe)
    (bundle / "unet" / "unused.pkl").write_text("")
    with pytest.raises(BundleError, match="is not allowed in a bundle"):
        load(bundle, "torch")


# From here on the door is open: no loader behind it runs anything either.


def test_traps_fire_if_opened(trap: Trap, tmp_path: Path) -> None:
    torch.save(trap, tmp_path / "trap.bin")
    torch.load(tmp_path / "trap.bin", weights_only=False)
    assert trap.opened
    assert trap.mark.exists()
    trap.mark.unlink()
    pickle.loads(pickle.dumps(trap))  # noqa: S301 - that is the point
    assert trap.mark.exists()
    trap.mark.unlink()
    (tmp_path / "evil.py").write_text(trap.python)
    subprocess.run([sys.executable, tmp_path / "evil.py"], check=True)
    assert trap.mark.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clean_bundle_loads(bundle: Path, backend: Backend) -> None:
    assert load(bundle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickle_instead_of_safetensors_is_not_opened(component: str, backend: Backend, bundle: Path, trap: Trap) -> None:
    for weights in (bundle / component).glob("*.safetensors"):
        weights.unlink()
    for name in PICKLES:
        torch.save(trap, bundle / component / name)
    refused_unrun(bundle, backend, trap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickle_named_safetensors_is_not_opened(backend: Backend, bundle: Path, trap: Trap) -> None:
    (weights,) = (bundle / "unet").glob("*.safetensors")
    torch.save(trap, weights)
    refused_unrun(bundle, backend, trap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_code_files_in_a_component_folder_are_not_run(backend: Backend, bundle: Path, trap: Trap) -> None:
    edit(bundle / "model_index.json", unet=["evil", "Evil"])
    (bundle / "unet" / "evil.py").write_text(trap.python)
    (bundle / "evil.py").write_text(trap.python)
    refused_unrun(bundle, backend, trap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_pipeline_code_of_a_bundle_is_not_run(backend: Backend, bundle: Path, trap: Trap) -> None:
    edit(bundle / "model_index.json", _class_name=["evil", "Evil"])
    for name in ("evil.py", "pipeline.py"):
        (bundle / name).write_text(trap.python)
    with contextlib.suppress(BundleError):  # the manifest names its class, so it may load
        load(bundle, backend)
    assert not trap.mark.exists()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("component", "config", "automatic"),
    [("tokenizer", "tokenizer_config.json", "AutoTokenizer"), ("text_encoder", "config.json", "AutoModel"),
     ("unet", "config.json", "AutoModel")],
)  # fmt: skip
def test_an_auto_class_does_not_run_the_bundles_code(
    component: str, config: str, automatic: str, backend: Backend, bundle: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not ask at the terminal, where the answer would be yes."""
    asked: list[object] = []

    def agree(*words: object) -> str:
        asked.append(words)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    library = "diffusers" if component == "unet" else "transformers"
    edit(bundle / "model_index.json", **{component: [library, automatic]})
    value = ["evil.Evil", None] if automatic == "AutoTokenizer" else "evil.Evil"
    about = {"auto_map": {automatic: value, "AutoConfig": "evil.Evil"}, "model_type": "evil", "tokenizer_class": "Evil"}
    edit(bundle / component / config, **about)
    (bundle / component / "evil.py").write_text(trap.python)
    refused_unrun(bundle, backend, trap)
    assert not asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("library", ["os", "subprocess", "..os", "stable_diffusion.os", "", "builtins"])
def test_only_classes_of_diffusers_and_transformers_are_loaded(library: str, backend: Backend, bundle: Path, trap: Trap) -> None:
    edit(bundle / "model_index.json", scheduler=[library, "system"])
    refused_unrun(bundle, backend, trap)
