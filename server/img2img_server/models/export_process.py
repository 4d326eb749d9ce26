"""Runs `img2img export` beside the server, in a process of its own: the server knows nothing of how that is done."""

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
"""Lines of what a failed export wrote on standard error that go into the log."""
_LINE = 2**20
"""Bytes that a line of the exporter's may have: the last one has all that was measured."""
_PATIENCE = 5.0
"""Seconds that an export gets to clear away what is half done, before it is killed."""

Tell = Callable[[str], object]
"""Is told what is being done, in a few words."""


class ExportFailed(Exception):
    """No bundle was made. The text says why, in the exporter's own words: for the operator."""


class ExporterMissing(ExportFailed):
    """The exporter's packages are not installed here."""


async def export(arguments: Sequence[str], tell: Tell, command: Sequence[str] = EXPORTER) -> None:
    """Exports by `command` with these arguments. Cancelled, it ends the process and all that it started.

    Raises ExportFailed.
    """
    # A repository's id is also a path. In an empty folder there is nothing that could be taken for it.
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
        assert process.stdout is not None, "a pipe was asked for"
        assert process.stderr is not None, "a pipe was asked for"
        try:
            problem, words = await asyncio.gather(_follow(process.stdout, tell), _last_lines(process.stderr))
            status = await process.wait()
        finally:
            await _end(process)
    if status:
        _log.warning("an export's last words: %s", "\n".join(words) or "none")
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
    """The exporter's arguments. What a caller chose is in one word with its flag, so that it can be no flag itself."""
    chosen = [("variant", variant), ("revision", revision)]
    chosen += [("allow-pattern", pattern) for pattern in allow_patterns]
    chosen += [("ignore-pattern", pattern) for pattern in ignore_patterns]
    flags = [f"--{name}={value}" for name, value in chosen if value is not None]
    return ["--json", f"--output={output.resolve()}", *flags, "--", repo_id]


async def _follow(stream: asyncio.StreamReader, tell: Tell) -> str:
    """Passes on what the exporter tells. Returns its error, "" where it told of none."""
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
        except (ValueError, TypeError, KeyError):  # libraries print what they like
            _log.debug("an export printed: %s", line)
    return problem


async def _last_lines(stream: asyncio.StreamReader) -> deque[str]:
    return deque([line async for line in _lines(stream) if line.strip()], maxlen=_LAST_WORDS)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """What a process prints, by lines; one that is longer than any of ours is left out."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the process, if it has not, and all others of its session."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
