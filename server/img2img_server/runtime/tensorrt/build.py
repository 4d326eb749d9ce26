"""Builds a TensorRT engine in a child process: `python -m img2img_server.runtime.tensorrt.build`.

Building takes minutes, all cores and much memory, and may crash, so it does not run in the server's process. The child reads its
job as JSON from standard input (`graph`, the ONNX file; `folder`, where to write the engine; `options` of the TensorRT
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
"""Called with a short name of the current step and its progress, from 0 to 1."""


def run_build(command: Sequence[str], job: Mapping[str, Any], report: Report, stop: Stop) -> None:
    """Runs `command`, which reads `job` from its standard input with `read_job`, and waits for its end.

    Raises BundleError if its exit status is not 0, and Stopped, after killing it, if `stop` is requested.
    """
    stop.check()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
        stop.ending(process.kill),
    ):
        assert process.stdin is not None, "opened as a pipe"
        assert process.stdout is not None, "opened as a pipe"
        # A process that exits at once may not read its job; its status is checked below.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            json.dump({"parent": os.getpid(), **job}, process.stdin)
        problem = _follow(process.stdout, report)
        status = process.wait()
        stop.check()
        if status:
            _log.warning("a TensorRT build failed; end of its standard error: %s", _tail(errors))
            raise BundleError(f"the build {problem or _ended(status)}")


def read_job() -> dict[str, Any]:
    """In the child process: reads its job, lowers its priority, and arranges to be killed when the parent's thread ends."""
    job: dict[str, Any] = json.load(sys.stdin)
    if not end_with(job.pop("parent")):
        sys.exit(1)
    os.nice(_NICENESS)
    return job


def report_to_parent(**message: Any) -> None:
    """In the child process: reports `step` and `progress` (0 to 1), or the `problem` if it failed."""
    print(json.dumps(message), flush=True)


def _follow(lines: Iterable[str], report: Report) -> str:
    """Forwards the child's progress to `report`. Returns the problem that it reported, or ""."""
    problem = ""
    for line in lines:
        try:
            message = json.loads(line)
            problem = message.get("problem", problem)
            if "progress" in message:
                report(str(message.get("step", "")), min(1.0, max(0.0, float(message["progress"]))))
        except (ValueError, TypeError, AttributeError):  # output of a library
            _log.debug("output of a TensorRT build: %s", line.rstrip())
    return f"failed: {problem}" if problem else ""


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - _LOGGED_CHARACTERS))
    return errors.read().decode(errors="replace").strip() or "none"


def _ended(status: int) -> str:
    return f"ended with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"


def build(graph: Path, folder: Path, options: dict[str, str], open_graph: "Open | None" = None) -> None:
    """Builds the engine of `graph` in `folder`, which becomes the current directory. `open_graph` defaults to open_session.

    Raises BundleError if TensorRT fails, or supports only a part of the graph: then it writes no context.
    """
    # The parent imports this module, too, without these heavy imports.
    from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
    from img2img_server.runtime.tensorrt.options import CONTEXT

    graph = graph.resolve()
    # The provider writes only to the current directory.
    os.chdir(folder)
    (open_graph or open_session)(graph, SessionOptions("tensorrt", provider_options=tuple(options.items())))
    if not Path(CONTEXT).is_file():
        raise BundleError("TensorRT does not support the whole graph")


def main() -> int:
    """Builds the job's engine. Returns 0, or 1 if it failed, after reporting the problem to the parent."""
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
