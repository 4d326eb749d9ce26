"""The Python half of `scripts/gpu_check`, which see: runs each section in a process of its own, with a time limit of its own.

A section that fails, hangs or takes the process down with it is a line of the table, and the others go on.
"""

import argparse
import dataclasses
import json
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

from gpu_check_parts.settings import Line, Settings

_LOG_LINES = 1


@dataclass(frozen=True, slots=True)
class Section:
    """`limit` is in seconds on a GPU. `needs` are the sections without which it can do nothing."""

    name: str
    limit: float
    needs: tuple[str, ...] = ()


BUILDS = (
    Section("build-sd15", 150),
    Section("build-sdxl", 240),
    Section("compile-sd15", 150),
    Section("compile-sdxl", 240),
)
"""Run side by side: they take one core each, mostly, and are not timed against each other."""

SECTIONS = (
    Section("about", 60),
    Section("unet-sd15", 90, ("build-sd15",)),
    Section("picture", 60, ("build-sd15",)),
    Section("cold", 60, ("build-sd15",)),
    Section("unet-sdxl", 120, ("build-sdxl",)),
    Section("vae", 40, ("build-sd15",)),
    Section("memory", 40, ("build-sd15",)),
    Section("tensorrt", 120, ("build-sd15",)),
)
"""Run one after the other, the most wanted first: what no time is left for is left out."""


@dataclass(slots=True)
class Running:
    """A section's process, and where it writes what it finds."""

    section: Section
    process: "subprocess.Popen[bytes]"
    found: Path
    log: Path
    begun: float

    def wait(self, left: float) -> list[Line]:
        """Its lines, once it has ended or its time is over, which it does not outlive."""
        limit = max(1.0, min(self.section.limit, left) - (time.monotonic() - self.begun))
        why = ""
        try:
            status = self.process.wait(limit)
            why = "" if status == 0 else f"ended with status {status}: {_end_of(self.log)}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {time.monotonic() - self.begun:.0f} s: {_end_of(self.log)}"
        self.stop()
        lines = [Line(**each) for each in json.loads(self.found.read_text())] if self.found.is_file() else []
        return lines + ([Line(self.section.name, "failed", passed=False, note=why)] if why else [])

    def stop(self) -> None:
        """Ends the process and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def main(words: Sequence[str] | None = None) -> int:
    """Checks. Returns 0 where all that has an aim reached it, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    add = parser.add_argument
    add("--provider", choices=("cuda", "cpu"), default="cuda", help="what to check (default: %(default)s)")
    add("--tiny", action="store_true", help="tiny models, to see whether it runs at all")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--only", metavar="SECTION,...", help=f"of {', '.join(section.name for section in SECTIONS)}")
    add("--seconds", type=float, default=4.0, metavar="N", help="how long each comparison takes turns (default: %(default)s)")
    add("--budget", type=float, default=460.0, metavar="N", help="seconds for all of it (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="CPU threads (default: all)")
    add("--folder", type=Path, metavar="DIR", help="make the models here, and keep them (default: a temporary folder)")
    add("--out", type=Path, metavar="FILE", help="write the lines here as JSON, and the sections' logs beside it")
    add("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu_check-")))
        settings = Settings(
            folder.absolute(), arguments.provider, arguments.tiny, not arguments.no_compile, arguments.seconds, arguments.threads
        )
        if arguments.section:
            return _run_section(arguments.section, settings)
        wanted = arguments.only.split(",") if arguments.only else [section.name for section in SECTIONS]
        if unknown := set(wanted) - {section.name for section in SECTIONS}:
            parser.error(f"no section {', '.join(sorted(unknown))}")
        lines = _check(settings, wanted, arguments.budget)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=1) + "\n")
            log = "\n".join(f"== {path.stem}\n{path.read_text(errors='replace')}" for path in sorted(folder.glob("*.log")))
            arguments.out.with_suffix(".log").write_text(log)
    print_table(lines)
    return 0 if all(line.passed is not False for line in lines) else 1


def _check(settings: Settings, wanted: Sequence[str], budget: float) -> list[Line]:
    """Runs the builds that are needed side by side, then the sections one after the other."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    sections = [section for section in SECTIONS if section.name in wanted]
    needed = {name for section in sections for name in section.needs}
    if settings.compile:
        needed |= {f"compile-{model}" for model in ("sd15", "sdxl") if f"unet-{model}" in wanted}
    lines: list[Line] = []
    running: list[Running] = []
    try:
        running = [_start(section, settings) for section in BUILDS if section.name in needed]
        failed = set()
        for build in running:
            made = build.wait(end - time.monotonic())
            failed |= {build.section.name} if any(line.name == "failed" for line in made) else set()
            lines += made
        for section in sections:
            left = end - time.monotonic()
            if missing := failed.intersection(section.needs):
                lines.append(Line(section.name, "left out", passed=False, note=f"{', '.join(missing)} failed"))
            elif left < 5:
                lines.append(Line(section.name, "left out", passed=False, note="no time is left"))
            else:
                running.append(_start(section, settings))
                lines += running[-1].wait(left)
    except KeyboardInterrupt:
        lines.append(Line("all", "cut short", passed=False))
    finally:
        for each in running:
            each.stop()
    return lines


def _start(section: Section, settings: Settings) -> Running:
    print(f"{section.name} ...", file=sys.stderr, flush=True)
    log = settings.folder / f"{section.name}.log"
    found = settings.folder / f"{section.name}.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, *settings.words(), "--section", section.name]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(settings.folder / "inductor"), **os.environ}
    environment |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    return Running(section, process, found, log, time.monotonic())


def _run_section(name: str, settings: Settings) -> int:
    """In a section's own process: runs it, and writes its lines."""
    from gpu_check_parts import sections

    head, _, model = name.partition("-")
    if name == "first-picture":
        lines = sections.first_picture(settings)
    elif head in ("build", "compile", "unet"):
        lines = {"build": sections.build, "compile": sections.compiling, "unet": sections.unet}[head](settings, model)
    elif name == "vae":
        lines = sections.vae(settings, "sd15")
    else:
        alone = {"about": sections.about, "picture": sections.picture, "cold": sections.cold}
        lines = (alone | {"memory": sections.memory, "tensorrt": sections.tensorrt})[name](settings)
    (settings.folder / f"{name}.json").write_text(json.dumps([dataclasses.asdict(line) for line in lines]))
    return 0


def print_table(lines: Sequence[Line]) -> None:
    """Prints the lines, the aims, and which of them were reached."""
    words = {True: "ok", False: "NO", None: ""}
    rows = [
        (
            line.section,
            line.name,
            "" if line.value is None else f"{line.value:.4g} {line.unit}",
            line.aim,
            words[line.passed],
            line.note,
        )
        for line in lines
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5][:160]]).rstrip())
    aims = [line for line in lines if line.passed is not None]
    print(f"{sum(bool(line.passed) for line in aims)} of {len(aims)} aims reached")


def _end_of(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_LINES:])


if __name__ == "__main__":
    sys.exit(main())
