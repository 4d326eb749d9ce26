"""Runs `img2img export` in a child process."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

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


def arguments_of(
    repo_id: str,
    output: Path,
    variant: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] = (),
    ignore_patterns: Sequence[str] = (),
) -> list[str]:
    """The exporter's arguments. A caller's values are joined to their flags, so that they cannot be flags themselves."""
    chosen = [("variant", variant), ("revision", revision)]
    chosen += [("allow-pattern", pattern) for pattern in allow_patterns]
    chosen += [("ignore-pattern", pattern) for pattern in ignore_patterns]
    flags = [f"--{name}={value}" for name, value in chosen if value is not None]
    return ["--json", f"--output={output.resolve()}", *flags, "--", repo_id]


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
