"""The one place where pipelines meet what serves them: a backend whose models run in this process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from img2img_server.backend import LocalBackend
from img2img_server.config import ServerConfig
from img2img_server.engine.cache import Cache
from img2img_server.models.store import ModelStore
from img2img_server.models.takeover import Contender

if TYPE_CHECKING:
    from img2img_server.pipelines.tensorrt_contender import Shelf


def local(config: ServerConfig) -> LocalBackend:
    """A backend for the bundles that `config` names. What is heavy is imported when it is opened, on a thread."""
    cache = Cache(config.cache_bytes)
    shelf: Shelf | None = None

    def load_models() -> ModelStore:
        from img2img_server.pipelines import providers

        # Before the loader's imports, which take seconds.
        providers.check(config.execution.provider)
        from img2img_server.pipelines.loader import load_pipeline
        from img2img_server.pipelines.tensorrt_contender import Shelf

        nonlocal shelf
        kept = shelf = Shelf()
        return ModelStore.load(
            config.models,
            lambda bundle, manifest: load_pipeline(bundle, manifest, config.execution, cache, keep=kept.keep),
            config.default_model,
            config.allow_unverified,
            config.residency,
        )

    def contend(models: ModelStore) -> Sequence[Contender]:
        from img2img_server.pipelines.tensorrt_contender import contenders

        assert shelf is not None, "the models were loaded"
        return contenders(models, config.execution, cache, shelf)

    return LocalBackend(config, load_models, cache, contend)
