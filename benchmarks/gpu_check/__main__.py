"""Takes measurements and makes checks that need an NVIDIA GPU, with random weights, and prints a table.

Every section runs in its own process with a time limit. A section that fails, hangs or crashes becomes a line of the table, and
the others continue. Results are appended to a file immediately, so a run that is killed keeps the results so far.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gpu_check.results import Line, append, print_table, read
from gpu_check.settings import READY_NAME, Settings


@dataclass(frozen=True, slots=True)
class Section:
    """`limit` is in seconds. `model` is the model that it needs: its graphs get weights before the section starts."""

    name: str
    limit: float
    model: str = "sd15"


PREFLIGHT = Section("preflight", 60, "tiny-sd15")
SECTIONS = (
    PREFLIGHT,
    Section("switch", 60),
    Section("replay", 60),
    Section("host", 90),
    Section("unet-sd15", 90),
    Section("unet-sdxl", 120, "sdxl"),
    Section("vae", 60),
    Section("image", 60),
    Section("cold", 60),
    Section("memory", 60),
    Section("compile-sd15", 150),
    Section("compile-sdxl", 200, "sdxl"),
)
"""The sections in their order, by importance: those without time left are skipped."""
_MAKE_LIMIT, _FILL_LIMIT = 600.0, 120.0
_LEAST = 5.0
"""Minimum seconds left to start a section."""


@dataclass(slots=True, eq=False)
class Run:
    """A process of this command and the file of its output."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait(self, limit: float) -> str:
        """Waits for its end for at most `limit` seconds. Returns why it failed, or an empty text."""
        try:
            status = self.process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"stopped after {limit:.0f} s: {self._last_line()}"
        if status == 0:
            return ""
        ended = f"ended with status {status}" if status != 1 else ""
        return ": ".join(filter(None, (ended, self._last_line()))) or "ended with status 1"

    def stop(self) -> None:
        """Kills the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")


class Runs:
    """Starts processes of this command. When they end, their output is appended to one log next to the results."""

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self._running: dict[str, Run] = {}

    def start(self, name: str) -> Run:
        """Starts the section or step `name`."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "gpu_check", *self._settings.words(), "--section", name]
        log = self._settings.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        self._running[name] = Run(process, log)
        return self._running[name]

    def wait(self, name: str, limit: float) -> str:
        """Waits for the end of the run `name` for at most `limit` seconds. Returns why it failed, or an empty text."""
        run = self._running.pop(name)
        failure = run.wait(limit)
        self._keep_log(name, run)
        return failure

    def stop_all(self) -> None:
        """Kills all running processes."""
        for name, run in self._running.items():
            run.stop()
            self._keep_log(name, run)

    def _keep_log(self, name: str, run: Run) -> None:
        with self._settings.out.with_suffix(".log").open("ab") as file:
            file.write(f"== {name}\n".encode() + run.log.read_bytes())


def main(words: Sequence[str] | None = None) -> int:
    """Runs the sections. Returns 0 if all targets are met, otherwise 1."""
    names = ", ".join(section.name for section in SECTIONS)
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    add = parser.add_argument
    add("--provider", choices=("cuda", "cpu"), default="cuda", help="execution provider to check (default: %(default)s)")
    add("--tiny", action="store_true", help="use tiny models without targets, to test this command")
    add("--only", metavar="SECTION,...", help=f"run only these sections, of {names}")
    add("--no-compile", action="store_true", help="skip torch.compile")
    add("--packed", type=Path, metavar="DIR", help="folder of scripts/gpu_check_pack --unpack, with packages and graphs")
    add(
        "--graphs",
        type=Path,
        metavar="DIR",
        help="folder of graphs; missing ones are made (default: in --folder)",
    )
    add("--folder", type=Path, metavar="DIR", help="folder of models, kept for the next run (default: a temporary folder)")
    add("--out", type=Path, metavar="FILE", help="append results to this file, one JSON object per line, with the log next to it")
    add("--seconds", type=float, default=4.0, metavar="N", help="duration of each comparison (default: %(default)s)")
    add("--budget", type=float, default=460.0, metavar="N", help="seconds for all sections (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="CPU threads (default: all)")
    add("--no-values", action="store_true", help="do not check values: the device computes none (tests/cuda/fake)")
    add("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check-")))
        graphs = arguments.graphs or (arguments.packed / "graphs" if arguments.packed else folder / "graphs")
        settings = Settings(
            folder.absolute(),
            graphs.absolute(),
            (arguments.out or folder / "results.jsonl").absolute(),
            arguments.provider,
            arguments.tiny,
            not arguments.no_compile,
            not arguments.no_values,
            arguments.seconds,
            arguments.threads,
        )
        if arguments.section:
            run_section(arguments.section, settings)
            return 0
        wanted = arguments.only.split(",") if arguments.only else [section.name for section in SECTIONS]
        if unknown := set(wanted) - {section.name for section in SECTIONS}:
            parser.error(f"argument --only: unknown section {', '.join(sorted(unknown))}; the sections are {names}")
        if arguments.packed and not (arguments.packed / "site").is_dir():
            parser.error(f"argument --packed: {arguments.packed} has no folder 'site': run scripts/gpu_check_pack --unpack first")
        folder.mkdir(parents=True, exist_ok=True)
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        lines = check(settings, wanted, arguments.budget, _environment(settings, arguments.packed))
    print_table(lines)
    return 0 if all(line.passed is not False for line in lines) else 1


def check(settings: Settings, wanted: Sequence[str], budget: float, environment: dict[str, str]) -> list[Line]:
    """Runs the sections and returns the lines of this run. Missing graphs are made meanwhile, each model's in its own process."""
    before, end = len(read(settings.out)), time.monotonic() + budget
    sections = [section for section in SECTIONS if section.name in wanted]
    if not settings.compile:
        sections = [section for section in sections if not section.name.startswith("compile")]
    runs = Runs(settings, environment)
    try:
        kinds = dict.fromkeys(settings.kind(section.model) for section in sections)
        making = {kind for kind in kinds if not (settings.graphs / kind / READY_NAME).is_file()}
        for kind in making:
            runs.start(f"make-{kind}")
        for section in sections:
            failure = _prepare(section, settings, runs, making, end)
            if not failure and (left := end - time.monotonic()) < _LEAST:
                failure = "skipped: no time left"
            if not failure:
                runs.start(section.name)
                failure = runs.wait(section.name, min(section.limit, left))
            if failure:
                append(settings.out, [Line(section.name, "failed", passed=False, note=failure)])
            if failure and section is PREFLIGHT:
                break
    except KeyboardInterrupt:
        append(settings.out, [Line("all", "interrupted", passed=False)])
    finally:
        runs.stop_all()
    return read(settings.out)[before:]


def _prepare(section: Section, settings: Settings, runs: Runs, making: set[str], end: float) -> str:
    """Waits for the graphs of the section's model and makes its weights. Returns why that failed, or an empty text."""
    kind = settings.kind(section.model)
    filled, graphs = settings.bundle(section.model) / READY_NAME, settings.graphs / kind / READY_NAME
    if filled.is_file() and filled.read_text() == settings.precision:
        return ""
    if kind in making:
        making.remove(kind)
        if failure := runs.wait(f"make-{kind}", min(_MAKE_LIMIT, end - time.monotonic())):
            return f"{kind} has no graphs: {failure}"
    if not graphs.is_file():
        return f"{kind} has no graphs"
    if graphs.read_text() != settings.precision:
        return f"{graphs.parent} is in {graphs.read_text()}, and --provider {settings.provider} needs {settings.precision}"
    runs.start(f"fill-{kind}")
    failure = runs.wait(f"fill-{kind}", min(_FILL_LIMIT, end - time.monotonic()))
    return f"{kind} has no weights: {failure}" if failure else ""


def run_section(name: str, settings: Settings) -> None:
    """Runs in the child process: runs a section and appends its lines immediately, or makes graphs or weights."""
    step, _, model = name.partition("-")
    if step in ("make", "fill"):
        from gpu_check import weightless

        if step == "make":
            weightless.make(model, settings.graphs / model, settings.precision)
        else:
            # On CUDA the server opens only the fused graph if there is one; SDXL's plain graph would take 5 GB.
            only_fused = settings.device == "cuda" and model == "sdxl"
            weightless.fill(settings.graphs / model, settings.folder / model, lambda graph: not only_fused or graph != "unet")
        return
    if not settings.values:
        import torch

        # So that the server does not refuse images of a device that computes nothing.
        torch.isfinite = lambda input: torch.ones(input.shape, dtype=torch.bool)
    from gpu_check.preflight import preflight
    from gpu_check.sections import SECTIONS as CALLS

    for line in (preflight if name == PREFLIGHT.name else CALLS[name])(settings):
        append(settings.out, [line])


def _environment(settings: Settings, packed: Path | None) -> dict[str, str]:
    """The environment of the sections' processes."""
    paths = [str(packed.absolute() / "site")] if packed else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    environment |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.folder / "inductor"))
    return environment


if __name__ == "__main__":
    sys.exit(main())
