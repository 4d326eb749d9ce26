"""The model store: which bundles there are, which one a request means, and what runs it."""

import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from img2img_server.bundle import MANIFEST_NAME, Manifest, Source, check_bundle, read_manifest
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError, InvalidField, ModelNotFound, ModelUnavailable

_log = logging.getLogger(__name__)

Load = Callable[[Path, Manifest], Pipeline]


class EngineState(enum.Enum):
    """How far an engine that may take over a model has come. The last three are final."""

    BUILDING = enum.auto()
    CHECKING = enum.auto()
    SERVING = enum.auto()
    REJECTED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """An engine that may take over, such as "onnx:tensorrt". `detail` is written for callers; `progress`, from 0 to 1, is that of
    the state."""

    name: str
    state: EngineState
    detail: str = ""
    progress: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle of the store. Without a manifest or a pipeline it cannot be served, and `problem` says why.

    `bundle` is its folder. `engines` are those that may take over from the one it was loaded with, or have done so.
    """

    id: str
    manifest: Manifest | None = None
    pipeline: Pipeline | None = None
    problem: str = ""
    bundle: Path | None = None
    engines: tuple[EngineStatus, ...] = ()


class ModelStore:
    """The models of a server, loaded once at start.

    A request's reference names one of them; where it names none, the default model is meant, or the only one there is. Any
    thread may read; one at a time may change.
    """

    def __init__(self, models: list[Model], default: str | None = None) -> None:
        self._models = {model.id: model for model in sorted(models, key=lambda model: model.id)}
        if default is None and len(self._models) == 1:
            (default,) = self._models
        if default is not None and default not in self._models:
            raise BundleError(f"the default model '{default}' is not in the store, which has {self._names()}")
        self.default = default

    @classmethod
    def load(cls, folder: Path, load: Load, default: str | None = None, allow_unverified: bool = False) -> "ModelStore":
        """Checks and loads every bundle in `folder`, or `folder` itself where it is one.

        `allow_unverified` also serves those whose verification failed when they were exported, with a warning.
        A bundle that does not load is listed with its problem. Raises BundleError where no bundle can be served.
        """
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder")
        bundles = [folder] if (folder / MANIFEST_NAME).is_file() else sorted(filter(_is_bundle, folder.iterdir()))
        if not bundles:
            raise BundleError(f"{folder} holds no bundle: make one with `img2img export MODEL --output {folder}/NAME`")
        models = [_load_model(bundle, load, allow_unverified) for bundle in bundles]
        if not any(model.pipeline for model in models):
            raise BundleError("no bundle can be served: " + "; ".join(model.problem for model in models))
        return cls(models, default)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str) -> Model:
        """The model with the id `name`. Raises ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(f"there is no model '{name}'; there are {self._names()}")
        return self._models[name]

    def replace(self, name: str, pipeline: Pipeline) -> None:
        """From now on, `pipeline` is what runs the model `name`."""
        self._models[name] = replace(self._models[name], pipeline=pipeline)

    def note(self, name: str, status: EngineStatus) -> None:
        """Notes how an engine of the model `name` is doing, in place of what was known of it."""
        model = self._models[name]
        others = tuple(known for known in model.engines if known.name != status.name)
        self._models[name] = replace(model, engines=(*others, status))

    def resolve(self, reference: Source) -> Model:
        """The one servable model whose bundle agrees with every field that is set in `reference`.

        `reference.path` is a model's id. Raises ModelNotFound, ModelUnavailable, or InvalidField where several agree.
        """
        if reference == Source():
            if self.default is None:
                raise InvalidField("model", f"several models are served, name one: {self._names()}")
            return _servable(self._models[self.default])
        found = [model for model in self if _agrees(model, reference)]
        if not found:
            raise ModelNotFound(f"no model is {_describe(reference)}; there are {self._names()}")
        if len(found) > 1:
            raise InvalidField("model", f"several models agree: {', '.join(model.id for model in found)}; set path to one")
        return _servable(found[0])

    def pipelines(self) -> dict[str, Pipeline]:
        """The pipelines of the models that can be served, by id."""
        return {model.id: model.pipeline for model in self if model.pipeline is not None}

    def _names(self) -> str:
        return ", ".join(self._models) or "none"


def _is_bundle(folder: Path) -> bool:
    return not folder.name.startswith(".") and (folder / MANIFEST_NAME).is_file()


def _load_model(bundle: Path, load: Load, allow_unverified: bool) -> Model:
    name = bundle.resolve().name
    manifest = None
    try:
        manifest = read_manifest(bundle)
        _log.info("model '%s': checking %d files", name, len(manifest.files))
        check_bundle(bundle, manifest, allow_unverified=allow_unverified)
        if not manifest.verification.passed:
            problems = "; ".join(manifest.verification.problems) or "nothing is known of why"
            _log.warning("model '%s' did not pass verification, and is served all the same: %s", name, problems)
        _log.info("model '%s': loading", name)
        pipeline = load(bundle, manifest)
    except BundleError as error:
        _log.error("model '%s' cannot be served: %s", name, error)
        return Model(name, manifest, problem=str(error))
    _log.info("model '%s': ready on %s", name, pipeline.engine)
    return Model(name, manifest, pipeline, bundle=bundle)


def _servable(model: Model) -> Model:
    if model.pipeline is None:
        raise ModelUnavailable(f"model '{model.id}' cannot be served; the server's log says why")
    return model


def _agrees(model: Model, wanted: Source) -> bool:
    if model.manifest is None:
        return wanted == Source(path=model.id)
    source = model.manifest.source
    pairs = (
        (wanted.path, model.id),
        (wanted.repo_id, source.repo_id),
        (wanted.variant, source.variant),
        (wanted.revision, source.revision),
        (wanted.allow_patterns, source.allow_patterns),
        (wanted.ignore_patterns, source.ignore_patterns),
    )
    return all(not asked or asked == has for asked, has in pairs)


def _describe(reference: Source) -> str:
    names = ("path", "repo_id", "variant", "revision", "allow_patterns", "ignore_patterns")
    return ", ".join(f"{name} {getattr(reference, name)!r}" for name in names if getattr(reference, name))
