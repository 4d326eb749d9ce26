"""`scripts/fuzz`: coverage-guided fuzzing of everything that parses input."""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fuzz_parts.targets import Target, targets

ROOT = Path(__file__).resolve().parents[1]
_EPILOG = """\
examples:
  scripts/fuzz --minutes 5                              every target, five minutes in all
  scripts/fuzz --minutes 60 --target images,uris        two of them, an hour in all
  scripts/fuzz --target images --replay .fuzz/images-crash-0123   run one input

Each target runs in its own process for an equal share of the time, guided by code coverage (atheris). RPCs go over a real
connection to a real server with fake models in the fuzzer's process.

exit status: 0 no findings, 1 findings (their inputs are saved), 2 invalid arguments
output: .fuzz/fuzz.json and the inputs of findings; --out sets another folder
"""
_LEAST_SECONDS = 2.0
_CALL_SECONDS = 60
_START_SECONDS = 120.0
_MEGABYTES = 4096
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of fuzzing a target: the number of inputs, the branches of the server's code that they covered, the findings."""

    target: str
    inputs: int
    coverage: int
    seconds: float
    findings: tuple[str, ...]
    status: int


def main() -> int:
    """Runs the fuzzers, or one input. Returns the exit status."""
    arguments = _parse()
    if arguments.child:
        return _fuzz(arguments.child, arguments.rest)
    if arguments.replay is not None:
        return _replay(targets()[arguments.target[0]], arguments.replay)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    seconds = max(_LEAST_SECONDS, 60 * arguments.minutes / len(arguments.target))
    outcomes = [_run(name, seconds, folder) for name in arguments.target]
    (folder / "fuzz.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n", encoding="utf-8")
    total = sum(each.inputs for each in outcomes)
    print(f"{total} inputs to {len(outcomes)} targets in {sum(each.seconds for each in outcomes):.0f} s")
    found = [finding for each in outcomes for finding in each.findings]
    for finding in found:
        print(f"FOUND: {finding}")
    return 1 if found or any(each.status for each in outcomes) else 0


def _parse() -> argparse.Namespace:
    names = list(targets())
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Fuzzes everything in the server and the exporter that parses input.",
        epilog=_EPILOG + "\ntargets: " + ", ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, metavar="N", help="minutes for all targets together (default: %(default)g)")
    add("--target", type=lambda text: text.split(","), default=names, metavar="NAME[,...]", help="targets to fuzz (default: all)")
    add("--replay", type=Path, metavar="FILE", help="run this input on the target")
    add("--out", type=Path, default=ROOT / ".fuzz", metavar="DIR", help="folder of the results (default: .fuzz)")
    add("--child", help=argparse.SUPPRESS)
    add("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.target) - set(names):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; the targets are {', '.join(names)}")
    if arguments.replay is not None and len(arguments.target) != 1:
        parser.error("--replay needs exactly one --target")
    return arguments


def _run(name: str, seconds: float, folder: Path) -> Outcome:
    """Fuzzes one target for `seconds` in its own process."""
    begun = time.monotonic()
    before = set(folder.glob(f"{name}-*"))
    log = folder / f"{name}.log"
    with tempfile.TemporaryDirectory(prefix="img2img-fuzz-") as corpus:
        for number, data in enumerate(targets()[name].corpus()):
            (Path(corpus) / f"seed-{number}").write_bytes(data)
        command = [sys.executable, __file__, "--child", name, "--", corpus]
        command += [f"-max_total_time={seconds:.0f}", f"-artifact_prefix={folder}/{name}-", f"-timeout={_CALL_SECONDS}"]
        command += [f"-rss_limit_mb={_MEGABYTES}", f"-max_len={targets()[name].most_bytes}", "-print_final_stats=1"]
        with log.open("wb") as file:
            status = _waited(subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT), seconds + _START_SECONDS)
    text = log.read_text(encoding="utf-8", errors="replace")
    inputs = _EXECUTED.search(text)
    coverage = _COVERAGE.findall(text)
    new = sorted(path.name for path in set(folder.glob(f"{name}-*")) - before)
    outcome = Outcome(
        name, int(inputs[1]) if inputs else 0, int(coverage[-1]) if coverage else 0, time.monotonic() - begun, tuple(new), status
    )
    print(f"{name:40} {outcome.inputs:8} inputs, {outcome.coverage:5} branches, {len(new)} findings", flush=True)
    if status or not outcome.inputs:
        print(f"  status {status}; the end of {log}:\n" + "\n".join(text.splitlines()[-25:]), flush=True)
    return outcome


def _waited(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1


def _fuzz(name: str, words: Sequence[str]) -> int:
    """Runs in the child process: fuzzes until libFuzzer ends the process."""
    import logging

    import atheris  # type: ignore[import-untyped]

    logging.disable(logging.ERROR)  # each refusal logs a line; only the answers matter
    stack = contextlib.ExitStack()
    with atheris.instrument_imports(include=["img2img_server", "img2img_export"]):
        attempt = targets()[name].make(stack)
    atheris.Setup([sys.argv[0], *words], attempt)
    atheris.Fuzz()
    return 0


def _replay(target: Target, path: Path) -> int:
    """Runs one input. Raises an error for a finding."""
    with contextlib.ExitStack() as stack:
        target.make(stack)(path.read_bytes())
    print("no finding")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main())
