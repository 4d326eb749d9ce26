"""The Python half of `scripts/fuzz`, which see."""

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
  scripts/fuzz --minutes 60 --target pictures,uris      two of them, an hour in all
  scripts/fuzz --target pictures --replay .fuzz/pictures-crash-0123   what became of one input

Each target runs in a process of its own, for an equal share of the time, guided by what of the server's code an input reaches
(atheris). RPCs go over a real connection to a real server, in the fuzzer's process, whose models are stand-ins.

exit status: 0 nothing was found, 1 something was (the input is saved), 2 wrong arguments
what is left: .fuzz/fuzz.json, and the inputs that broke something; --out names another folder
"""
_LEAST_SECONDS = 2.0
_CALL_SECONDS = 60
_START_SECONDS = 120.0
_MEGABYTES = 4096
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of fuzzing a target: the inputs tried, the branches of the server's code that they reached, what broke it."""

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
        description="Tries inputs that nobody would send on everything of the server that reads what others wrote.",
        epilog=_EPILOG + "\ntargets: " + ", ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, metavar="N", help="how long, all targets together (default: %(default)g)")
    add("--target", type=lambda text: text.split(","), default=names, metavar="NAME[,...]", help="which (default: all)")
    add("--replay", type=Path, metavar="FILE", help="try this one input on the target that is named")
    add("--out", type=Path, default=ROOT / ".fuzz", metavar="DIR", help="where what is found goes (default: .fuzz)")
    add("--child", help=argparse.SUPPRESS)
    add("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.target) - set(names):
        parser.error(f"no target is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if arguments.replay is not None and len(arguments.target) != 1:
        parser.error("--replay needs one --target")
    return arguments


def _run(name: str, seconds: float, folder: Path) -> Outcome:
    """Fuzzes one target for so long, in a process of its own."""
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
    """In the child: fuzzes until libFuzzer ends the process, which it does itself."""
    import logging

    import atheris  # type: ignore[import-untyped]

    logging.disable(logging.ERROR)  # every refusal has its line; what matters is the answer
    stack = contextlib.ExitStack()
    with atheris.instrument_imports(include=["img2img_server", "img2img_export"]):
        attempt = targets()[name].make(stack)
    atheris.Setup([sys.argv[0], *words], attempt)
    atheris.Fuzz()
    return 0


def _replay(target: Target, path: Path) -> int:
    """Tries one input: what it breaks is raised."""
    with contextlib.ExitStack() as stack:
        target.make(stack)(path.read_bytes())
    print("nothing broke")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.exit(main())
