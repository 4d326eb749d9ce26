"""The one place where pipelines meet what serves them: a backend whose models run in this process."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.backends.base import LocalBackend
from img2img_server.bundle.manifest import Manifest
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Pipeline
from img2img_server.models.cost_store import CostStore
from img2img_server.models.promotion import Candidate
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.distribution import version

if TYPE_CHECKING:
    from img2img_server.runtime.tensorrt.candidate import RunnerCache

_log = logging.getLogger(__name__)


def local(config: ServerConfig) -> LocalBackend:
    """A backend for the bundles that `config` names. What is heavy is imported when it is opened, on a thread.

    Raises BundleError if there is no bundle that could be loaded.
    """
    cache = Cache(config.cache_bytes)
    runner_cache: RunnerCache | None = None

    def load(bundle: Path, manifest: Manifest) -> Pipeline:
        from img2img_server.runtime.loader import load_pipeline

        assert runner_cache is not None, "the models are loaded"
        return load_pipeline(bundle, manifest, config.execution, cache, keep=runner_cache.keep)

    models = ModelRegistry.find_bundles(config.models, load, config.default_model, config.allow_unverified, config.residency)

    def load_models() -> ModelRegistry:
        begun = time.monotonic()
        _log.info("models in %s: %d; importing the libraries that run them", config.models, len(list(models)))
        from img2img_server.runtime.onnx import providers

        # Before the loader's imports, which take seconds.
        providers.check(config.execution.provider)
        import img2img_server.runtime.loader  # noqa: F401 - the heavy one
        from img2img_server.runtime.common.device_copy import start_device
        from img2img_server.runtime.tensorrt.candidate import RunnerCache

        nonlocal runner_cache
        runner_cache = RunnerCache()
        start_device(config.execution.provider)
        _log.info("libraries imported in %.1f s", time.monotonic() - begun)
        models.preload(config.residency)
        return models

    def contend(models: ModelRegistry) -> Sequence[Candidate]:
        from img2img_server.runtime.tensorrt.candidate import candidates

        assert runner_cache is not None, "the models were loaded"
        return candidates(models, config.execution, cache, runner_cache)

    def open_costs() -> CostStore | None:
        from img2img_server.runtime.common import cpu
        from img2img_server.runtime.tensorrt import cache as engine_cache

        try:
            root = config.execution.cache or engine_cache.default_root()
        except RuntimeError:  # a user without a home
            return None
        facts = {
            "img2img": version(),
            "machine": cpu.machine(),
            "free_cores": cpu.count(),
            "execution": {name: str(value) for name, value in asdict(config.execution).items() if name != "cache"},
            "max_batch_size": config.limits.max_batch_size,
            "warm_up": config.warm_up,
        }
        return CostStore(root / engine_cache.COSTS, facts)

    return LocalBackend(config, load_models, cache, contend, open_costs)
