"""Models that are not in the store: which a request may have exported into it, under which name, and how often that is tried.

Everything that a caller sends is checked by its form before it is used, and the repository against the operator's list.
"""

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.errors import Exhausted, InvalidField, ModelUnavailable, PermissionDenied, ServerError, ShuttingDown
from img2img_server.models.export_process import EXPORTER, ExporterMissing, ExportFailed, Tell, arguments_of, export
from img2img_server.support.call import current

_FIRST = 5.0
_MOST = 300.0
_DOUBLINGS = 10
"""More would be beyond the most in any case."""


@dataclass(slots=True)
class Backoff:
    """How often something failed in a row, why it last did, and until when it is not tried again. Times in seconds."""

    failures: int = 0
    until: float = float("-inf")
    reason: str = ""

    def count(self, now: float, reason: str) -> None:
        """Notes a failure."""
        self.until = now + min(_MOST, _FIRST * 2 ** min(self.failures, _DOUBLINGS))
        self.failures += 1
        self.reason = reason

    def clear(self) -> None:
        """Notes that it worked, or that it is to be tried at once."""
        self.failures, self.until = 0, float("-inf")

    def left(self, now: float) -> float:
        """Seconds until it may be tried again, 0 where it may be now."""
        return max(0.0, self.until - now)


_log = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(f"{_PART}/{_PART}")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")
_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]!-][A-Za-z0-9_./*?\[\]! -]{0,127}")
_MOST_PATTERNS = 32
_MOST_PENDING = 4
"""Exports that run or wait for their turn."""
_RETRY_FULL = 60.0
"""Seconds after which a caller may try again where too many exports wait: they take minutes."""
_MOST_FAILURES = 256
"""Names whose last export failed that are remembered."""
_PATH = re.compile(r"\S*/\S*/\S*")
"""Paths and URLs; a repository's id has a single slash."""
_DIGEST = 8
"""Hexadecimal digits that tell bundles apart which differ in revision or patterns."""


class Downloads:
    """Exports repositories into the folder `store`, one at a time; all who ask for the same share an export.

    `command` is the exporter. Used on the event loop only.
    """

    def __init__(
        self,
        settings: ModelSettings,
        store: Path | None,
        command: Sequence[str] = EXPORTER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._command = command
        self._clock = clock
        self._turn = asyncio.Lock()
        self._pending: dict[str, asyncio.Task[ServerError | None]] = {}
        self._failures: dict[str, Backoff] = {}
        self._closed = False

    @property
    def allowed(self) -> bool:
        """Whether anything may be downloaded at all."""
        return self._settings.allow_downloads and self._store is not None

    def name_of(self, reference: Source, field: str) -> str:
        """The bundle that `reference` is to become, a message's field of the name `field`.

        Raises InvalidField, or PermissionDenied where its repository is not on the list.
        """
        check_reference(reference, field)
        assert reference.repo_id is not None, "only repositories are downloaded"
        if not any(fnmatchcase(reference.repo_id, pattern) for pattern in self._settings.download_repos):
            raise PermissionDenied(f"the repository '{reference.repo_id}' is not on this server's list of downloads")
        return bundle_name(reference)

    def pending(self, name: str) -> bool:
        """Whether the bundle of this name is being exported."""
        return name in self._pending

    async def wait(self, name: str) -> None:
        """Waits for the export under way. Raises ModelUnavailable or ShuttingDown where it makes no bundle."""
        if (error := await asyncio.shield(self._pending[name])) is not None:
            raise self._told(name, error)

    async def obtain(self, reference: Source, name: str, tell: Tell, ended: Callable[[bool], object]) -> None:
        """Has `reference` exported as `name`, and waits for that; leaving early does not end it. `tell` hears how it goes, and
        `ended` whether it made a bundle, before anybody who waits does.

        Raises ModelUnavailable where it fails, or did a short while ago, and Exhausted where too many exports wait.
        """
        if name not in self._pending:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            failed = self._failures.get(name)
            if failed is not None and (left := failed.left(self._clock())) > 0:
                error = ModelUnavailable(f"'{name}' could not be exported, and is not tried again for {left:.0f} s")
                raise self._told(name, error)
            if len(self._pending) >= _MOST_PENDING:
                raise Exhausted(f"{len(self._pending)} models are being exported already", retry_after=_RETRY_FULL)
            self._pending[name] = asyncio.create_task(self._run(reference, name, tell, ended))
        await self.wait(name)

    async def close(self) -> None:
        """Ends what is being exported, and begins nothing more."""
        self._closed = True
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, reference: Source, name: str, tell: Tell, ended: Callable[[bool], object]) -> ServerError | None:
        made = False
        try:
            tell("waits for another export")
            async with self._turn:
                await self._export(reference, name, tell)
            self._failures.pop(name, None)
            made = True
        except ExporterMissing as error:
            self._failures.pop(name, None)
            _log.error("model '%s' cannot be exported: %s", name, error)
            return ModelUnavailable(
                f"'{name}' is not in the store, and this server has no exporter: its operator has to install it"
            )
        except (ExportFailed, OSError) as error:
            _log.error("model '%s' was not exported: %s", name, error)
            self._note(name, str(error))
            return ModelUnavailable(f"'{name}' could not be exported")
        except asyncio.CancelledError:
            return ShuttingDown("the server is shutting down")
        finally:
            del self._pending[name]
            ended(made)
        return None

    async def _export(self, reference: Source, name: str, tell: Tell) -> None:
        assert self._store is not None, "only what is allowed is downloaded"
        assert reference.repo_id is not None, "only repositories are downloaded"
        _log.info("model '%s': exporting %s", name, reference.repo_id)
        arguments = arguments_of(
            reference.repo_id,
            self._store / name,
            reference.variant,
            reference.revision,
            reference.allow_patterns,
            reference.ignore_patterns,
        )
        await export(arguments, tell, self._command)

    def _note(self, name: str, problem: str) -> None:
        """Remembers a failure, of a bounded number of names: callers choose them."""
        self._failures[name] = failed = self._failures.pop(name, Backoff())
        failed.count(self._clock(), problem)
        while len(self._failures) > _MOST_FAILURES:
            del self._failures[next(iter(self._failures))]

    def _told(self, name: str, error: ServerError) -> ServerError:
        """The error as the current caller sees it: who may load models learns what the exporter said, but for its paths."""
        failed = self._failures.get(name)
        if failed is None or not isinstance(error, ModelUnavailable):
            return error
        reason = _PATH.sub("(a path)", failed.reason) if current().admin else "the server's log says why"
        return ModelUnavailable(f"{error}: {reason}")


def check_reference(reference: Source, field: str) -> None:
    """Raises InvalidField where a part of `reference`, the message's field `field`, has not the form that such parts have."""
    parts = (("repo_id", _REPO_ID), ("variant", _VARIANT), ("revision", _REVISION))
    for name, form in parts:
        value = getattr(reference, name)
        if value is not None and (not form.fullmatch(value) or ".." in value or (name != "revision" and "--" in value)):
            raise InvalidField(f"{field}.{name}", "it does not have the form of one")
    for name in ("allow_patterns", "ignore_patterns"):
        patterns = getattr(reference, name)
        if len(patterns) > _MOST_PATTERNS:
            raise InvalidField(f"{field}.{name}", f"there are {len(patterns)}, the most is {_MOST_PATTERNS}")
        if not all(_PATTERN.fullmatch(pattern) and ".." not in pattern for pattern in patterns):
            raise InvalidField(
                f"{field}.{name}", "a pattern is up to 128 letters, digits and _.*?[]!-/, and no path out of the model"
            )


def bundle_name(reference: Source) -> str:
    """The folder that a checked reference is exported to: "owner--name--variant--digest", the digest being that of
    the revision and the patterns. What was not asked is left out, or empty; no part has "--" in it, so two are never one."""
    assert reference.repo_id is not None, "only repositories are downloaded"
    parts = [reference.repo_id.replace("/", "--"), reference.variant or ""]
    rest = [reference.revision, reference.allow_patterns, reference.ignore_patterns]
    if any(rest):
        parts.append(hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:_DIGEST])
    return "--".join(parts) if any(parts[1:]) else parts[0]
