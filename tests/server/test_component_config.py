"""Fields of a component's config.json that are missing, of another kind than any model has, or absurd: a bundle loads as before,
or the error names the file and the field, before anything large is made."""

import functools
import inspect
import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
from covering import nightly_but
from img2img_server.bundle.component_config import FIELDS, refuse_wrong_fields
from img2img_server.bundle.manifest import read_manifest
from img2img_server.bundle.unsafe_files import refuse_unsafe_config
from img2img_server.errors import BundleError
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.onnx import components
from img2img_server.runtime.onnx.sessions import open_session

MISSING = object()
CHANGES: dict[str, Any] = {
    "missing": MISSING,
    "negative": -3,
    "zero": 0,
    "huge": 10**12,
    "large": 2**24,
    "four thousand": 4000,
    "nan": float("nan"),
    "infinite": float("inf"),
    "a fraction": 0.37,
    "a text": "seven",
    "null": None,
    "true": True,
    "a list of three": [2, 2, 2],
    "a list of too many": [2] * 5000,
    "an empty list": [],
    "a list of texts": ["x", "y"],
    "an object": {"x": 1},
}
MOST_GROWTH = 2**30
"""Bytes by which the process may grow while all these are loaded."""
GRAPHS = [
    "sd1",
    "chroma",
    "sdxl",
    "lcm",
    "sd3",
    "flux-dev",
    "flux-control",
    "kontext",
    "klein",
    "qwenimage",
    "qwenimage-edit",
    "zimage",
]
COMPANIONS = ["controlnet", "image encoder"]
VIDEOS_AND_SOUND = ("UNet1DModel", "UVit2DModel")
"""Classes of diffusers that no image-to-image pipeline has, and whose fields have other meanings."""


class Mutations:
    """A copy of a bundle, of which one config.json at a time is changed. Its graphs are opened once."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.folder = folder / bundle.name
        shutil.copytree(bundle, self.folder, copy_function=os.link)
        self._manifest = read_manifest(bundle)
        self._open = functools.cache(open_session)

    @property
    def configurations(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*/config.json")) if (path.parent / "model.onnx").is_file()]

    def load(self) -> None:
        execution = Execution(provider="cpu", arithmetic="fp32", threads=1)
        load_pipeline(self.folder, self._manifest, execution, open_graph=self._open, companions=Companions())

    def problem(self, path: Path, content: Any) -> str:
        """The error of loading with this content of a config.json; "" if there is none."""
        before = path.read_bytes()
        path.unlink()  # it is a link to the kept bundle's
        path.write_text(json.dumps(content))
        try:
            self.load()
        except BundleError as error:
            return str(error)
        finally:
            path.write_bytes(before)
        return ""


def places(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """All fields, those of objects as paths."""
    for name, value in content.items():
        yield (name,)
        if isinstance(value, dict) and name in ("text_config", "vision_config", "rope_parameters"):
            yield from ((name, *inner) for inner in places(value))


def value_at(content: dict[str, Any], place: Sequence[str]) -> Any:
    return functools.reduce(lambda one, name: one[name], place, content)


def changed(content: dict[str, Any], where: Iterable[tuple[str, ...]], value: Any) -> dict[str, Any]:
    """The content with another value at these places, or without them if the value is MISSING."""
    copy: dict[str, Any] = json.loads(json.dumps(content))
    for place in where:
        owner = value_at(copy, place[:-1])
        owner[place[-1]] = value
        if value is MISSING:
            del owner[place[-1]]
    return copy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers, processors and schedulers, which do not change, are loaded once."""
    load, kept = components._load, {}

    def load_once(kind: Any, folder: Path, *more: Any) -> Any:
        if list(folder.glob("*.safetensors")):
            return load(kind, folder, *more)
        if folder not in kept:
            kept[folder] = load(kind, folder, *more)
        return kept[folder]

    monkeypatch.setattr(components, "_load", load_once)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", nightly_but([*GRAPHS, *COMPANIONS], "sd3", "qwenimage-edit", *COMPANIONS))
def test_wrong_and_missing_fields_are_named(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    given = {"controlnet": ("control_bundle", "sd1-a"), "image encoder": ("image_encoder_bundle", "h")}
    fixture, key = given.get(name, ("bundle", name))
    model = Mutations(request.getfixturevalue(fixture)(key), tmp_path)
    model.load()
    before, refused, unnamed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, set(), []
    for path in model.configurations:
        content = json.loads(path.read_text())
        others = [
            place for place in places(content) if place[-1] not in FIELDS and not isinstance(value_at(content, place), dict)
        ]
        for kind, value in CHANGES.items():
            for place in places(content):
                if place in others:
                    continue
                if problem := model.problem(path, changed(content, [place], value)):
                    refused.add(place)
                    field = (
                        "" if isinstance(value_at(content, place), dict) else f"{place[-1]}'"
                    )  # of an object, one of its fields
                    named = str(path) in problem and field in problem
                    unnamed += [] if named else [f"{kind}: {place}: {problem}"]
            # What is not in FIELDS is not read, so all of it may be wrong at once.
            if (problem := model.problem(path, changed(content, others, value))) and "the key '" not in problem:
                unnamed.append(f"{kind}: {problem}")
    assert not unnamed, "\n".join(unnamed)
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_GROWTH


def test_defaults_of_diffusers_classes_are_accepted() -> None:
    found = [getattr(diffusers, name, None) for name in dir(diffusers)]
    classes = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)]
    assert len(classes) > 100
    for kind in classes:
        if kind.__name__ not in VIDEOS_AND_SOUND:
            defaults = {name: item.default for name, item in inspect.signature(kind.__init__).parameters.items()}
            known = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty and name in FIELDS}
            refuse_wrong_fields(json.loads(json.dumps(known)), Path(kind.__name__))


@pytest.mark.parametrize("path", [("num_hidden_layers",), ("text_config", "num_hidden_layers"), ("a", "b", "window_size")])
@pytest.mark.parametrize("value", [-1, 10**9, "x", [], 0.5, True])
def test_wrong_fields_of_any_component_are_refused(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    """Also of components in PyTorch, and of the exporter's sources: all are checked before they are opened."""
    content = functools.reduce(lambda inner, name: {name: inner}, reversed(path), value)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"in_channels": None, "other": [1], **content}))
    with pytest.raises(BundleError, match=f"'{'.'.join(path)}'") as caught:
        refuse_unsafe_config(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("sizes", [(4096, 1, 1), (7, 14, 2), (112, 14, 9)])
def test_absurd_windows_of_a_vision_tower_are_refused(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Tables of windows would take gigabytes, or a window has no token."""
    file = tmp_path / "config.json"
    vision = dict(zip(("window_size", "patch_size", "spatial_merge_size"), sizes, strict=True))
    file.write_text(json.dumps({"vision_config": vision}))
    with pytest.raises(BundleError, match=r"'vision_config\.window_size' gives windows of"):
        refuse_unsafe_config(file)
