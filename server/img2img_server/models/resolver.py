"""Which model a reference means: one of the store, one that is in its folder by now, or one that is exported into it."""

import asyncio
from collections.abc import Callable, Sequence

from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.errors import ModelNotFound, PermissionDenied
from img2img_server.models.downloads import Downloads
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.call import current


class ModelResolver:
    """Finds models of `models` for the current call, and those that it does not know yet. Used on the event loop only."""

    def __init__(
        self, settings: ModelSettings, models: ModelRegistry, exporter: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self._models = models
        self._downloads = Downloads(settings, models.folder.root if models.folder else None, exporter, clock)

    async def find(self, reference: Source, named: str) -> str:
        """The id of the model that is meant; `named` is the message's field.

        Raises ModelNotFound, InvalidField, PermissionDenied, and ModelUnavailable or Exhausted where it cannot be exported.
        """
        allowed = current().may_use
        try:
            name = self._models.find(reference, allowed).id
        except ModelNotFound as error:
            name = await self._find_new(reference, named, error)
        if self._downloads.pending(name):
            await self._downloads.wait(name)
        return name

    async def close(self) -> None:
        """Ends what is being exported, and begins nothing more."""
        await self._downloads.close()

    async def _find_new(self, reference: Source, named: str, not_found: ModelNotFound) -> str:
        """What was not in the store: a bundle that is in its folder by now, or one to be exported into it."""
        if reference.path is not None:
            _check_allowed(reference.path)
            if await asyncio.to_thread(self._models.discover, reference.path):
                return self._models.find(reference, current().may_use).id
        if reference.path is not None or reference.repo_id is None or not self._downloads.allowed:
            raise not_found
        name = self._downloads.name_of(reference, named)
        _check_allowed(name)
        known = {model.id for model in self._models}
        if name in known or await asyncio.to_thread(self._models.discover, name):
            return name
        await self._downloads.obtain(
            reference,
            name,
            lambda detail: self._models.change(name, loading=True, detail=f"exporting: {detail}"),
            lambda made: self._exported(name, made),
        )
        return name

    def _exported(self, name: str, made: bool) -> None:
        if not made or not self._models.discover(name):
            self._models.forget(name)


def _check_allowed(name: str) -> None:
    """Raises PermissionDenied where the caller may not use a model of this name, whether there is one or not."""
    if not current().may_use(name):
        raise PermissionDenied(f"your token does not allow the model {ascii(name)[:100]}")
