"""Results: lines with a value, a target or an error, appended to a file immediately and printed as a table at the end."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Line:
    """One result. `passed` is None if it has no target; `note` is an error or a remark."""

    section: str
    name: str
    value: float | None = None
    unit: str = ""
    aim: str = ""
    passed: bool | None = None
    note: str = ""

    def at_most(self, most: float | None) -> "Line":
        """The line with an upper limit as its target; unchanged if that is None."""
        if self.value is None or most is None:
            return self
        return dataclasses.replace(self, aim=f"<= {most:.3g} {self.unit}", passed=self.value <= most)

    def at_least(self, least: float | None) -> "Line":
        """The line with a lower limit as its target; unchanged if that is None."""
        if self.value is None or least is None:
            return self
        return dataclasses.replace(self, aim=f">= {least:.3g} {self.unit}", passed=self.value >= least)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Appends the lines to a JSON Lines file, so that they survive the end of the process."""
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of the file; none if it does not exist. An incomplete last line is skipped."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [Line(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def print_table(lines: Sequence[Line]) -> None:
    """Prints the lines and the number of targets met."""
    words = {True: "ok", False: "NO", None: ""}
    rows = [
        (
            line.section,
            line.name,
            "" if line.value is None else f"{line.value:.4g} {line.unit}",
            line.aim,
            words[line.passed],
            line.note[:160],
        )
        for line in lines
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip())
    aims = [line for line in lines if line.passed is not None]
    print(f"{sum(bool(line.passed) for line in aims)} of {len(aims)} targets met")
