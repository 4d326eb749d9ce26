"""Adapters of requests (LoRAs, image adapters) in memory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from img2img_server.bundle.adapter_files import AdapterFiles, AdapterProblem
from img2img_server.engine.cache import Cache
from img2img_server.errors import InvalidField

_log = logging.getLogger(__name__)


class Sized(Protocol):
    """The content of a file."""

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        ...


_Adapter = TypeVar("_Adapter", bound=Sized)


class AdapterStore(Generic[_Adapter]):
    """The adapters of one model: `read` makes one of a file when a request first names it, and checks that it fits the model.
    They stay in `cache`, which models may share, up to its number of bytes (LRU). Thread-safe."""

    def __init__(self, files: AdapterFiles, cache: Cache, read: Callable[[Path], _Adapter]) -> None:
        self._files = files
        self._cache = cache
        self._read = read
        self._own = object()  # marks this model's entries of the cache

    def get(self, field: str, name: str, digest: str) -> _Adapter:
        """The adapter with the id `name`, whose file had this digest when the request arrived. Raises InvalidField, which names
        `field`."""
        key = (self._own, digest)
        adapter: _Adapter | None = self._cache.get(key)
        if adapter is None:
            try:
                adapter = self._load(name, digest)
            except AdapterProblem as problem:
                raise InvalidField(field, f"{self._files.what} '{name}' {problem}") from problem
            self._cache.put(key, adapter, adapter.bytes)
            _log.info("%s '%s' was read: %.1f MB", self._files.what, name, adapter.bytes / 1e6)
            if adapter.bytes > self._cache.budget:
                _log.warning(
                    "%s '%s' is larger than the cache (%s), so it is read each time it is needed, which delays other requests",
                    self._files.what,
                    name,
                    self._files.cache_flag,
                )
        return adapter

    def close(self) -> None:
        """Removes this model's adapters from the cache."""
        self._cache.drop(lambda key: key[0] is self._own)

    def _load(self, name: str, digest: str) -> _Adapter:
        file = self._files.find(name)
        if file.digest != digest:
            raise AdapterProblem("was replaced after the request had arrived: send it again")
        adapter = self._read(file.path)
        if self._files.find(name).digest != digest:
            raise AdapterProblem("was replaced while it was read: send the request again")
        return adapter
