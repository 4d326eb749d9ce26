"""Files that are read again when they change. A change that is no good is logged once, and what was good before stays."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
Contents = tuple[bytes, ...]


class FileReloader(Generic[_T]):
    """What `make` makes of the contents that `read` gives, as `value`. Any thread may look.

    Contents are compared, not times or inodes: a file that was written in place, renamed over, or swapped by a symbolic link
    above it is found alike. Both functions raise OSError or ValueError for files that will not do; so does the constructor.
    `name` is what the log calls them.
    """

    def __init__(self, name: str, read: Callable[[], Contents], make: Callable[[Contents], _T]) -> None:
        self._name, self._read, self._make = name, read, make
        self._lock = threading.Lock()
        self._contents = read()
        self._problem = ""
        self.value = make(self._contents)

    def look(self) -> _T | None:
        """Reads the files. Returns the new value where there is one that is good, else None."""
        with self._lock:
            try:
                contents = self._read()
                if contents == self._contents:
                    self._problem = ""
                    return None
                value = self._make(contents)
            except (OSError, ValueError) as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    _log.error("%s: reload failed; keeping the previous version: %s", self._name, error)
                return None
            self._contents, self._problem, self.value = contents, "", value
            _log.info("%s: reloaded", self._name)
            return value
