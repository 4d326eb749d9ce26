"""Builds a TensorRT engine in a process of its own: `python -m img2img_server.runtime.tensorrt.build`.

Building takes minutes, all cores and much memory, and may crash; none of that may happen in the serving process. The process
reads its job as JSON from standard input (`graph`, the ONNX file; `folder`, where to write the engine; `options` of the TensorRT
provider), reports progress in lines of JSON, and ends with its parent. Not yet run on a GPU.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from img2img_server.errors import BundleError
from img2img_server.support.cancellation import Stop
from img2img_server.support.child_process import end_with

if TYPE_CHECKING:
    from img2img_server.runtime.onnx.sessions import Open

_log = logging.getLogger(__name__)

_NICENESS = 10
_LOGGED_CHARACTERS = 2000
"""Characters of a failed build's standard error that go into the log: the last ones."""

Report = Callable[[str, float], None]
"""Called with the current step, in a few words, and the share of it that is done, from 0 to 1."""


def run_build(command: Sequence[str], job: Mapping[str, Any], report: Report, stop: Stop) -> None:
    """Runs `command`, which reads `job` from its standard input by `read_job`, until it is done.

    Raises BundleError if it exits with another status than 0, Stopped if `stop` was requested: then it was killed.
    """
    stop.check()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
        stop.ending(process.kill),
    ):
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        # A process that exits at once does not read its job; its status is checked below.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            json.dump({"parent": os.getpid(), **job}, process.stdin)
        problem = _follow(process.stdout, report)
        status = process.wait()
        stop.check()
        if status:
            _log.warning("a build's last words: %s", _tail(errors))
            raise BundleError(f"the build {problem or _ended(status)}")


def read_job() -> dict[str, Any]:
    """In the building process: reads its job. From then on it has low priority, and is killed when the thread that started it
    ends."""
    job: dict[str, Any] = json.load(sys.stdin)
    if not end_with(job.pop("parent")):
        sys.exit(1)
    os.nice(_NICENESS)
    return job


def report_to_parent(**message: Any) -> None:
    """In the building process: reports `step` and `progress` from 0 to 1, or the `problem` if it failed."""
    print(json.dumps(message), flush=True)


def _follow(lines: Iterable[str], report: Report) -> str:
    """Forwards the progress of the process. Returns its problem, "" if it reported none."""
    problem = ""
    for line in lines:
        try:
            message = json.loads(line)
            problem = message.get("problem", problem)
            if "progress" in message:
                report(str(message.get("step", "")), min(1.0, max(0.0, float(message["progress"]))))
        except (ValueError, TypeError, AttributeError):  # Libraries print what they like.
            _log.debug("a build printed: %s", line.rstrip())
    return f"failed: {problem}" if problem else ""


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - _LOGGED_CHARACTERS))
    return errors.read().decode(errors="replace").strip() or "none"


def _ended(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"


def build(graph: Path, folder: Path, options: dict[str, str], open_graph: "Open | None" = None) -> None:
    """Builds the engine of `graph` into `folder`, which becomes this process's directory. `open_graph` defaults to open_session.

    Raises BundleError if TensorRT cannot, or takes only a part of the graph: then no context is written.
    """
    # The parent imports this module, too; only the child needs the libraries that build.
    from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
    from img2img_server.runtime.tensorrt.options import CONTEXT

    graph = graph.resolve()
    # The provider writes to the current directory, and refuses any other.
    os.chdir(folder)
    (open_graph or open_session)(graph, SessionOptions("tensorrt", provider_options=tuple(options.items())))
    if not Path(CONTEXT).is_file():
        raise BundleError("TensorRT does not take the whole graph")


def main() -> int:
    """Builds what the job asks for. Returns 0, or 1 if that failed, after reporting the problem to the parent."""
    job = read_job()
    report_to_parent(step="building", progress=0.0)
    try:
        build(Path(job["graph"]), Path(job["folder"]), job["options"])
    except BundleError as error:
        report_to_parent(problem=str(error))
        return 1
    report_to_parent(step="built", progress=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
