"""The registry of models: finds a request's model, and keeps each model's state and pipeline."""

import enum
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from img2img_server.bundle import controls
from img2img_server.bundle.companions import FAMILIES
from img2img_server.bundle.control_kinds import ControlKind, control_kind
from img2img_server.bundle.image_adapters import PromptKind, prompt_kind
from img2img_server.bundle.image_encoders import EncoderWidths, encoder_widths
from img2img_server.bundle.manifest import Manifest, Source, read_manifest
from img2img_server.config import PRELOAD_WORDS, ModelSettings
from img2img_server.engine.request import Pipeline
from img2img_server.errors import BundleError, InvalidField, ModelNotFound, OutOfMemory, PermissionDenied
from img2img_server.models.memory import (
    PLAIN,
    Estimates,
    Meter,
    ProcessMeter,
    in_words,
    least_slots,
    measured,
    opened_later,
    session_bytes,
)
from img2img_server.models.repository import BundleRepository, Load, bundle_id

_log = logging.getLogger(__name__)

_MOST_SHOWN = 100
"""Maximum number of a caller's characters that an error repeats: it must fit into gRPC's metadata."""

WHY = "the server's log says why"
_MOST_DETAIL, _MOST_PROBLEM = 200, 2000
"""Maximum numbers of characters of `detail` and `problem`."""
_PATH = re.compile(r"(?<![\w.])/[^\s:;,'\"()]+")
"""An absolute path in a message."""

Allowed = Callable[[str], bool]
"""Whether the caller may use the model with this id."""


class Stage(enum.Enum):
    """The stage in which a model failed, as text for messages."""

    READING = "its bundle could not be read"
    LOADING = "it could not be loaded"
    WARM_UP = "it failed in warm-up"
    TRIAL = "it failed on a trial image"


class Hung(Exception):
    """A call of a model did not return."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model failed: `problem` for the log, `detail` for callers, without paths of the server."""

    problem: str
    detail: str

    @classmethod
    def of(cls, error: BaseException, stage: Stage, bundle: Path | None) -> "Failure":
        """Makes a Failure from the `error` of the model in the folder `bundle`.

        Callers get the text of a BundleError or Hung, without paths, and only the class of other errors.
        """
        text = " ".join(str(error).split())
        named = text if isinstance(error, BundleError | Hung) else f"{type(error).__name__}: {text}".rstrip(": ")
        problem = f"{stage.value}: {named}"[:_MOST_PROBLEM]
        if isinstance(error, BundleError | Hung):
            return cls(problem, f"{stage.value}: {_for_callers(text, bundle)}; {WHY}")
        if isinstance(error, MemoryError | OutOfMemory):
            return cls(problem, f"{stage.value}: out of memory; {WHY}")
        return cls(problem, f"{stage.value} ({type(error).__name__}); {WHY}")


class EngineState(enum.Enum):
    """The state of a candidate. The last three are final."""

    BUILDING = enum.auto()
    CHECKING = enum.auto()
    SERVING = enum.auto()
    REJECTED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A candidate, such as "onnx:tensorrt". `detail` is for callers; `progress`, from 0 to 1, is within the state."""

    name: str
    state: EngineState
    detail: str = ""
    progress: float = 0.0


class ModelState(enum.Enum):
    """Whether a model is ready to run."""

    UNLOADED = enum.auto()
    LOADING = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the store. It is ready if it has a pipeline; if it failed, `problem`, for the log only, says why.

    `bundle` is its folder. `engines` are its candidates and promoted engines. `loading` is set while it is loaded or exported.
    `memory` is its size in memory in bytes, now or when it was last loaded, 0 if unknown. `detail` says to callers what is being
    done, or why it is not ready. `slots` is the memory of its least slots for LoRAs when it was last loaded. `opened` is the
    memory of graphs that calls opened and that `memory` includes. `estimates` is how the server estimates models' memory.
    `control_kind` says which ControlNets fit, or of a ControlNet which models; `prompt_kind` says which image adapters fit;
    `encoder_widths` are those of an image encoder.
    """

    id: str
    manifest: Manifest | None = None
    pipeline: Pipeline | None = None
    problem: str = ""
    bundle: Path | None = None
    engines: tuple[EngineStatus, ...] = ()
    loading: bool = False
    memory: int = 0
    detail: str = ""
    slots: int = 0
    opened: int = 0
    estimates: Estimates = PLAIN
    control_kind: ControlKind = ()
    encoder_widths: EncoderWidths | None = None
    prompt_kind: PromptKind | None = None

    @property
    def state(self) -> ModelState:
        """Whether it is ready."""
        if self.pipeline is not None:
            return ModelState.READY
        if self.loading:
            return ModelState.LOADING
        return ModelState.FAILED if self.problem else ModelState.UNLOADED

    @property
    def is_controlnet(self) -> bool:
        """Whether it is a ControlNet, which other models' requests name."""
        return self.manifest is not None and self.manifest.family == controls.FAMILY

    @property
    def companion(self) -> str:
        """A description for messages if other models' requests use it; "" if it draws images."""
        return "" if self.manifest is None else FAMILIES.get(self.manifest.family, "")

    @property
    def expected_memory(self) -> int:
        """Its measured or estimated memory in bytes, with the slots for LoRAs that it will need and the graphs that it has opened
        since; 0 if unknown."""
        opened = max(0, opened_later(self.pipeline) - self.opened)
        return (self.memory or self.estimated_memory) + max(self.slot_memory, self.slots) + opened

    @property
    def estimated_memory(self) -> int:
        """Its memory in bytes by the sizes of its weights; 0 if they are unknown."""
        return 0 if self.manifest is None else self.estimates.memory(self.manifest)

    @property
    def weight_bytes(self) -> int:
        """The bytes of its weights on its device; 0 if they are unknown."""
        return 0 if self.manifest is None else self.estimates.weights(self.manifest)

    @property
    def slot_memory(self) -> int:
        """The memory in bytes of the slots for LoRAs that its pipeline has made since it was loaded; 0 if it has none."""
        return int(getattr(self.pipeline, "slot_bytes", 0))


class ModelRegistry:
    """The models of a server, found at start or later. Thread-safe.

    A request without a reference means the default model, or the only one at start, apart from ControlNets and
    image encoders.

    `folder` is the folder of bundles, None if
    the models have no bundles. `estimates` estimates their memory.
    """

    def __init__(
        self,
        models: Iterable[Model],
        default: str | None = None,
        folder: BundleRepository | None = None,
        estimates: Estimates = PLAIN,
    ) -> None:
        self._lock = threading.Lock()
        self._estimates = estimates
        # Never changed, always replaced, so readers need no lock.
        self._models = _by_id(models)
        own = [model.id for model in self._models.values() if not model.companion]
        if default is None and len(own) == 1:
            (default,) = own
        if default is not None and default not in self._models:
            raise BundleError(f"the default model '{default}' is not in the store, which has {self._names()}")
        self.default = default
        self.folder = folder

    @classmethod
    def find_bundles(
        cls,
        folder: Path,
        load: Load,
        default: str | None = None,
        allow_unverified: bool = False,
        settings: ModelSettings | None = None,
        estimates: Estimates = PLAIN,
    ) -> "ModelRegistry":
        """A registry of all bundles in `folder`, or of `folder` itself if it is a bundle. Reads manifests and loads nothing.

        `allow_unverified` also accepts bundles whose verification failed at export, with a warning. A bundle that cannot be read
        is listed with its problem. Raises BundleError if there is no bundle, none can be read, or one that the settings name does
        not exist.
        """
        settings = settings or ModelSettings()
        bundles = BundleRepository(folder, load, allow_unverified)
        if settings.allow_downloads and bundles.is_bundle:
            raise BundleError(f"{folder} is a bundle: downloads need a folder of bundles")
        models = [_read(bundle, estimates) for bundle in bundles.bundles()]
        for entry, reason in bundles.others():
            _log.warning("%s is not served: it is %s", entry, reason)
        if not models and not settings.allow_downloads:
            made = f"make one with `img2img export MODEL --output {folder / 'NAME'}`"
            raise BundleError(f"models: {folder} has no bundle: {made}")
        store = cls(models, default, bundles, estimates)
        _chosen(settings.preload, store._models, store.default)
        store.check_any(settings)
        return store

    @classmethod
    def load(
        cls,
        folder: Path,
        load: Load,
        default: str | None = None,
        allow_unverified: bool = False,
        settings: ModelSettings | None = None,
        meter: Meter | None = None,
    ) -> "ModelRegistry":
        """`find_bundles` and `preload` in one; without `settings`, every model is loaded."""
        settings = settings or ModelSettings(preload=("all",))
        store = cls.find_bundles(folder, load, default, allow_unverified, settings)
        store.preload(settings, meter)
        return store

    def check_any(self, settings: ModelSettings) -> None:
        """Raises BundleError if every model has failed and none can be downloaded."""
        failed = [model for model in self if model.state is ModelState.FAILED]
        if failed and len(failed) == len(self._models) and not settings.allow_downloads:
            raise BundleError("no model can be served: " + "; ".join(f"{model.id}: {model.problem}" for model in failed))

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str, allowed: Allowed = lambda name: True) -> Model:
        """The model with the id `name`. Raises ModelNotFound, also if the caller may not use it."""
        models = self._models
        if name not in models or not allowed(name):
            raise ModelNotFound(f"model {_shown(name)} does not exist; available: {self._names(allowed)}")
        return models[name]

    def change(self, name: str, **values: Any) -> None:
        """Replaces these fields of the model `name`, or adds it."""
        with self._lock:
            self._put(replace(self._models.get(name, Model(name)), **values))

    def put(self, model: Model) -> None:
        """Replaces the model with the id of `model`, or adds it."""
        with self._lock:
            self._put(model)

    def _put(self, model: Model) -> None:
        models = {**self._models, model.id: model}
        self._models = dict(sorted(models.items())) if model.id not in self._models else models

    def forget(self, name: str) -> None:
        """Removes the model `name`."""
        with self._lock:
            self._models = {known: model for known, model in self._models.items() if known != name}

    def note(self, name: str, status: EngineStatus) -> None:
        """Replaces the status of a candidate of the model `name`, or adds it."""
        with self._lock:
            model = self._models[name]
            others = tuple(known for known in model.engines if known.name != status.name)
            self._models = {**self._models, name: replace(model, engines=(*others, status))}

    def find(self, reference: Source, allowed: Allowed = lambda name: True) -> Model:
        """The model that matches every set field of `reference`, ready or not.

        `reference.path` is a model's id. Raises ModelNotFound, InvalidField if several models match, or PermissionDenied if the
        caller may not use any match.
        """
        models = self._models
        if reference == Source():
            if self.default is None:
                raise InvalidField("model", f"several models are served, set path to one of: {self._names(allowed)}")
            found = [models[self.default]]
        else:
            found = [model for model in models.values() if _agrees(model, reference)]
        if not found:
            raise ModelNotFound(f"no model matches {_describe(reference)}; available: {self._names(allowed)}")
        usable = [model for model in found if allowed(model.id)]
        if not usable:
            raise PermissionDenied(f"your token does not allow the model '{found[0].id}'")
        if len(usable) > 1:
            raise InvalidField("model", f"several models match, set path to one of: {', '.join(model.id for model in usable)}")
        return usable[0]

    def discover(self, name: str) -> bool:
        """Adds the bundle of this name, if the folder has it. Returns whether it does. Reads the disk."""
        found = None if self.folder is None else self.folder.find(name)
        if found is None:
            return False
        read = _read(found, self._estimates)
        values = {"problem": read.problem, "detail": read.detail, "bundle": found, "loading": False, "estimates": read.estimates}
        kinds = {name: getattr(read, name) for name in KINDS}
        self.change(name, manifest=read.manifest, **kinds, **values)
        _log.info("model '%s' was found", name)
        return True

    def open(self, name: str) -> tuple[Manifest, Pipeline]:
        """Checks and loads the bundle of the model `name`, which is slow. Raises BundleError and the libraries' errors."""
        bundle = self._models[name].bundle
        if self.folder is None or bundle is None:
            raise BundleError(f"the model '{name}' has no bundle")
        return self.folder.open(bundle)

    def controlnets(self, model: Model, allowed: Allowed = lambda name: True) -> list[str]:
        """The ids of the ControlNets that fit a model and that the caller may use, ready or not."""
        if not model.control_kind or model.is_controlnet:
            return []
        return [net.id for net in self if net.is_controlnet and net.control_kind == model.control_kind and allowed(net.id)]

    def pipelines(self) -> dict[str, Pipeline]:
        """The pipelines of the ready models, by id."""
        return {model.id: model.pipeline for model in self if model.pipeline is not None}

    @contextmanager
    def growing(self, name: str, meter: Meter | None = None, weights: int = 0) -> Iterator[None]:
        """Adds the growth of memory within the block, which loads so many bytes of `weights`, to the memory of the ready model
        `name`."""
        meter, model = meter or ProcessMeter(), self._models[name]
        before, known = meter.read(), opened_later(model.pipeline)
        yield
        if model.pipeline is not None and model.memory:
            grown = before.grown_to(meter.read(), model.pipeline.engine)
            more = measured(grown, weights, session_bytes(weights)) if weights else max(0, grown or 0)
            opened = model.opened + opened_later(model.pipeline) - known
            self.change(name, memory=model.memory + more, opened=opened)

    def preload(self, settings: ModelSettings, meter: Meter | None = None) -> None:
        """Loads the models in `settings.preload` that fit into memory. A model that fails is listed with its problem. Raises
        BundleError like `check_any`."""
        meter, chosen = meter or ProcessMeter(), _chosen(settings.preload, self._models, self.default)
        for number, name in enumerate(chosen, start=1):
            model = self._models[name]
            if model.manifest is None:
                continue
            used, on_gpu = sum(other.expected_memory for other in self if other.pipeline is not None), meter.read()
            bound = settings.memory
            # Bounded by the GPU's free memory, except for the first model: the estimate may be too high.
            if used and on_gpu.gpu_free is not None and (bound is None or used + on_gpu.gpu_free < bound):
                bound = used + on_gpu.gpu_free
            if bound is not None and used + model.expected_memory > bound:
                of = f"{in_words(model.expected_memory)}, and {in_words(used)} of {in_words(bound)} are taken"
                _log.log(
                    logging.INFO if "all" in settings.preload else logging.WARNING,
                    "model '%s' is not preloaded: it takes about %s",
                    name,
                    of,
                )
                continue
            _log.info("model '%s' (%d of %d): loading", name, number, len(chosen))
            self._load_now(model, meter)
        self.check_any(settings)

    def _load_now(self, model: Model, meter: Meter) -> None:
        before, begun = meter.read(), time.monotonic()
        try:
            manifest, pipeline = self.open(model.id)
        except BaseException as error:  # noqa: BLE001 - any library's, also Rust's panics: the other models are served
            self.fail(model.id, Stage.LOADING, error)
            return
        grown = before.grown_to(meter.read(), pipeline.engine)
        memory = model.estimates.measured(manifest, grown)
        sizes = {"memory": memory, "slots": least_slots(pipeline), "opened": opened_later(pipeline)}
        self.change(model.id, manifest=manifest, pipeline=pipeline, problem="", detail="", **sizes)
        seconds = time.monotonic() - begun
        _log.info("model '%s': loaded in %.1f s on %s, %s", model.id, seconds, pipeline.engine, in_words(memory))

    def fail(self, name: str, stage: Stage, error: BaseException) -> str:
        """Marks the model `name` as FAILED, and logs why. Returns the problem, for the log only."""
        failure = Failure.of(error, stage, self._models[name].bundle)
        _log.error("model '%s' cannot be served: %s", name, failure.problem)
        _log.debug("model '%s': traceback", name, exc_info=error)
        self.change(name, pipeline=None, problem=failure.problem, detail=failure.detail)
        return failure.problem

    def _names(self, allowed: Allowed = lambda name: True) -> str:
        return ", ".join(filter(allowed, self._models)) or "none"


def _chosen(preload: tuple[str, ...], names: Iterable[str], default: str | None) -> list[str]:
    """The models to load, the default one first. Raises BundleError for an unknown one."""
    if preload == ("none",):
        return []
    if unknown := sorted(set(preload) - {*PRELOAD_WORDS, *names}):
        known = ", ".join(names) or "none"
        raise BundleError(f"preload: model {', '.join(map(repr, unknown))} does not exist; available: {known}")
    chosen = names if "all" in preload else [name for word in preload if (name := default if word == "default" else word)]
    return sorted(set(chosen), key=lambda name: (name != default, name))


def _by_id(models: Iterable[Model]) -> dict[str, Model]:
    """The models by id, sorted. Raises BundleError if two have the same one."""
    found: dict[str, Model] = {}
    for model in sorted(models, key=lambda model: model.id):
        if (other := found.get(model.id)) is not None:
            raise BundleError(f"two models have the id '{model.id}': {other.bundle} and {model.bundle}; rename one of them")
        found[model.id] = model
    return found


def _read(bundle: Path, estimates: Estimates) -> Model:
    """Reads a bundle's manifest."""
    name = bundle_id(bundle)
    try:
        manifest = read_manifest(bundle)
        return Model(name, manifest, bundle=bundle, estimates=estimates, **kinds_of(bundle, manifest))
    except BundleError as error:
        failure = Failure.of(error, Stage.READING, bundle)
        _log.error("model '%s' cannot be served: %s", name, failure.problem)
        return Model(name, problem=failure.problem, bundle=bundle, detail=failure.detail, estimates=estimates)


KINDS: dict[str, Callable[[Path, Manifest], Any]] = {
    "control_kind": control_kind,
    "encoder_widths": encoder_widths,
    "prompt_kind": prompt_kind,
}
"""The fields of a Model that say what fits it, and how they are read from a bundle."""


def kinds_of(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """The values of KINDS, read from the bundle's configurations."""
    return {name: read(bundle, manifest) for name, read in KINDS.items()}


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
    return ", ".join(f"{name} {_shown(getattr(reference, name))}" for name in names if getattr(reference, name))


def _shown(value: object) -> str:
    """A caller's value, escaped and shortened for a message."""
    text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _for_callers(text: str, bundle: Path | None) -> str:
    """Shortens `text`, replaces the bundle's path by its name, and removes other absolute paths."""
    for path in () if bundle is None else (bundle, bundle.absolute(), bundle.resolve()):
        text = text.replace(str(path), bundle.name if bundle is not None else "")
    text = _PATH.sub("...", text)
    return text if len(text) <= _MOST_DETAIL else f"{text[:_MOST_DETAIL]}..."
