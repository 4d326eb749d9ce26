"""Downloads: exports of models that a request names and the store does not have.

All input of callers is validated by its form before use, and the repository against the operator's list.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from img2img_server.bundle.manifest import Source
from img2img_server.config import ModelSettings
from img2img_server.errors import Exhausted, InvalidField, ModelUnavailable, PermissionDenied, ServerError, ShuttingDown
from img2img_server.support.call import current
from img2img_server.support.distribution import install_hint

_log = logging.getLogger(__name__)

EXPORTER = (sys.executable, "-m", "img2img_cli", "export")
_LOW_PRIORITY = (sys.executable, "-m", "img2img_server.support.child_process")
_LAST_WORDS = 20
"""Number of lines of a failed export's standard error that are logged."""
_LINE = 2**20
"""Maximum bytes of a line of the exporter's output: the last one has all measurements."""
_PATIENCE = 5.0
"""Seconds that a cancelled export has to delete unfinished files before it is killed."""

Tell = Callable[[str], object]
"""Called with a short text about the progress."""

_FIRST = 5.0
_MOST = 300.0
_DOUBLINGS = 10
"""Maximum exponent: with more, the delay exceeds _MOST anyway."""


@dataclass(slots=True)
class Backoff:
    """Exponential backoff: consecutive failures, the last reason, and the time before which there is no retry, in seconds."""

    failures: int = 0
    until: float = float("-inf")
    reason: str = ""

    def count(self, now: float, reason: str) -> None:
        """Records a failure at time `now`."""
        self.until = now + min(_MOST, _FIRST * 2 ** min(self.failures, _DOUBLINGS))
        self.failures += 1
        self.reason = reason

    def clear(self) -> None:
        """Resets it after a success, or to retry at once."""
        self.failures, self.until = 0, float("-inf")

    def left(self, now: float) -> float:
        """Seconds until the next retry is allowed, 0 if it is allowed now."""
        return max(0.0, self.until - now)


_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(f"{_PART}/{_PART}")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")
_PATTERN = re.compile(r"[A-Za-z0-9_.*?\[\]!-][A-Za-z0-9_./*?\[\]! -]{0,127}")
_MOST_PATTERNS = 32
_MOST_PENDING = 4
"""Maximum number of exports that run or wait."""
_RETRY_FULL = 60.0
"""Seconds until a caller may retry if too many exports wait; exports take minutes."""
_MOST_FAILURES = 256
"""Maximum number of remembered failures."""
_PATH = re.compile(r"\S*/\S*/\S*")
"""Matches paths and URLs, but not repository ids, which have one slash."""
_DIGEST = 8
"""Hexadecimal digits that distinguish bundles with different revisions or patterns."""


class Downloads:
    """Exports repositories into the folder `store`, one at a time. Requests for the same bundle share an export.

    `command` is the exporter. Used only on the event loop.
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
        """Whether downloads are enabled."""
        return self._settings.allow_downloads and self._store is not None

    def name_of(self, reference: Source, field: str) -> str:
        """The name of the bundle that `reference`, the message's field `field`, is exported to.

        Raises InvalidField, or PermissionDenied if its repository is not on the operator's list.
        """
        repo_id = check_reference(reference, field)
        if not any(fnmatchcase(repo_id, pattern) for pattern in self._settings.download_repos):
            raise PermissionDenied(f"the repository '{repo_id}' is not on this server's list of downloads")
        return bundle_name(reference)

    def pending(self, name: str) -> bool:
        """Whether the bundle of this name is being exported."""
        return name in self._pending

    async def wait(self, name: str) -> None:
        """Waits for the current export. Raises ModelUnavailable or ShuttingDown if it fails."""
        if (error := await asyncio.shield(self._pending[name])) is not None:
            raise self._with_reason(name, error)

    async def obtain(self, reference: Source, name: str, tell: Tell, ended: Callable[[bool], object]) -> None:
        """Exports `reference` as `name` and waits for the end. A cancelled wait does not cancel the export.

        `tell` is called with the progress, and `ended`, before the waiting callers continue, with whether there is a bundle.
        Raises ModelUnavailable if the export fails or failed recently, and Exhausted if too many exports wait.
        """
        if name not in self._pending:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            failed = self._failures.get(name)
            if failed is not None and (left := failed.left(self._clock())) > 0:
                error = ModelUnavailable(f"'{name}' could not be exported; the next attempt is possible in {left:.0f} s")
                raise self._with_reason(name, error)
            if len(self._pending) >= _MOST_PENDING:
                raise Exhausted(f"{len(self._pending)} models are being exported; retry later", retry_after=_RETRY_FULL)
            self._pending[name] = asyncio.create_task(self._run(reference, name, tell, ended))
        await self.wait(name)

    async def close(self) -> None:
        """Cancels all exports and starts no more."""
        self._closed = True
        tasks = list(self._pending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, reference: Source, name: str, tell: Tell, ended: Callable[[bool], object]) -> ServerError | None:
        made = False
        try:
            tell("waiting for another export")
            async with self._turn:
                await self._export(reference, name, tell)
            self._failures.pop(name, None)
            made = True
        except ExporterMissing as error:
            self._failures.pop(name, None)
            _log.error("model '%s' cannot be exported: %s", name, error)
            return ModelUnavailable(
                f"'{name}' is not in the store, and this server has no exporter: ask its operator to install it"
            )
        except (ExportFailed, OSError) as error:
            _log.error("model '%s' could not be exported: %s", name, error)
            self._note(name, str(error))
            return ModelUnavailable(f"'{name}' could not be exported")
        except asyncio.CancelledError:
            return ShuttingDown("the server is shutting down")
        finally:
            del self._pending[name]
            ended(made)
        return None

    async def _export(self, reference: Source, name: str, tell: Tell) -> None:
        assert self._store is not None, "downloads are enabled only with a folder"
        _log.info("model '%s': exporting %s", name, reference.repo_id)
        await export(arguments_of(reference, self._store / name), tell, self._command)

    def _note(self, name: str, problem: str) -> None:
        """Remembers a failure. The number of names is bounded, because callers choose them."""
        self._failures[name] = failed = self._failures.pop(name, Backoff())
        failed.count(self._clock(), problem)
        while len(self._failures) > _MOST_FAILURES:
            del self._failures[next(iter(self._failures))]

    def _with_reason(self, name: str, error: ServerError) -> ServerError:
        """Adds the exporter's reason, without paths, to the error if the current caller may load models."""
        failed = self._failures.get(name)
        if failed is None or not isinstance(error, ModelUnavailable):
            return error
        reason = _PATH.sub("(a path)", failed.reason) if current().admin else "the server's log says why"
        return ModelUnavailable(f"{error}: {reason}")


def check_reference(reference: Source, field: str) -> str:
    """The repository's id. Raises InvalidField if a part of `reference`, the message's field `field`, is malformed."""
    if (repo_id := reference.repo_id) is None:
        raise InvalidField(f"{field}.repo_id", "only repositories can be downloaded: set it")
    for name, form in (("repo_id", _REPO_ID), ("variant", _VARIANT), ("revision", _REVISION)):
        value = getattr(reference, name)
        if value is not None and (not form.fullmatch(value) or ".." in value or (name != "revision" and "--" in value)):
            raise InvalidField(f"{field}.{name}", f"it is not a valid {name}")
    for name in ("allow_patterns", "ignore_patterns"):
        patterns = getattr(reference, name)
        if len(patterns) > _MOST_PATTERNS:
            raise InvalidField(f"{field}.{name}", f"it has {len(patterns)} patterns, the maximum is {_MOST_PATTERNS}")
        if not all(_PATTERN.fullmatch(pattern) and ".." not in pattern for pattern in patterns):
            raise InvalidField(
                f"{field}.{name}", "a pattern has up to 128 letters, digits and _.*?[]!-/, and must not contain .."
            )
    return repo_id


def bundle_name(reference: Source) -> str:
    """The folder name of a checked reference: "owner--name--variant--digest", with a digest of revision and patterns.

    Unset parts are left out, or empty. No part contains "--", so different references have different names.
    """
    parts = [str(reference.repo_id).replace("/", "--"), reference.variant or ""]
    rest = [reference.revision, reference.allow_patterns, reference.ignore_patterns]
    if any(rest):
        parts.append(hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:_DIGEST])
    return "--".join(parts) if any(parts[1:]) else parts[0]


class ExportFailed(Exception):
    """The export failed. The text is the exporter's error, for the operator."""


class ExporterMissing(ExportFailed):
    """The exporter's packages are not installed."""


async def export(arguments: Sequence[str], tell: Tell, command: Sequence[str] = EXPORTER) -> None:
    """Runs `command` with these arguments. If cancelled, ends the process and its children. Raises ExportFailed."""
    # A repository id could also be a relative path, so the exporter runs in an empty folder.
    with tempfile.TemporaryDirectory(prefix="img2img-export-") as empty:
        process = await asyncio.create_subprocess_exec(
            *(*_LOW_PRIORITY, str(os.getpid()), *command, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            cwd=empty,
            limit=_LINE,
        )
        assert process.stdout is not None, "opened as a pipe"
        assert process.stderr is not None, "opened as a pipe"
        try:
            problem, words = await asyncio.gather(_follow(process.stdout, tell), _last_lines(process.stderr))
            status = await process.wait()
        finally:
            await _end(process)
    if status:
        _log.warning("an export failed; end of its standard error: %s", "\n".join(words) or "none")
        if words and install_hint("export") in words[-1]:
            raise ExporterMissing(words[-1])
        raise ExportFailed(problem or f"the exporter ended with status {status}")


def arguments_of(reference: Source, output: Path) -> list[str]:
    """The exporter's arguments. A caller's values are joined to their flags, so that they cannot be flags themselves."""
    chosen = [("variant", reference.variant), ("revision", reference.revision)]
    chosen += [("allow-pattern", pattern) for pattern in reference.allow_patterns]
    chosen += [("ignore-pattern", pattern) for pattern in reference.ignore_patterns]
    flags = [f"--{name}={value}" for name, value in chosen if value is not None]
    return ["--json", f"--output={output.resolve()}", *flags, "--", str(reference.repo_id)]


async def _follow(stream: asyncio.StreamReader, tell: Tell) -> str:
    """Passes the exporter's progress to `tell`. Returns its error, or ""."""
    problem = ""
    async for line in _lines(stream):
        try:
            event = json.loads(line)
            if event["event"] == "stage":
                tell(str(event["text"]))
            elif event["event"] == "progress":
                share = f" ({event['done'] / event['total']:.0%})" if event["total"] else ""
                tell(f"{event['label']}{share}")
            elif event["event"] == "error":
                problem = str(event["message"])
        except (ValueError, TypeError, KeyError):  # output of a library
            _log.debug("output of an export: %s", line)
    return problem


async def _last_lines(stream: asyncio.StreamReader) -> deque[str]:
    return deque([line async for line in _lines(stream) if line.strip()], maxlen=_LAST_WORDS)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a process's output, without lines that are longer than the stream's limit."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the process and its session, if it still runs."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
