"""Layout of the exporter's reports: facts and tables. Colours on a terminal only; markup in quoted text is escaped."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PASSED, FAILED = "passed", "FAILED"
SHEET = "verification/sheet.png"
"""The image sheet's path in a bundle."""

_STYLES = {PASSED: "green", FAILED: "bold red"}
_WIDTH_OF_A_PIPE = 200
_INFINITE_PSNR = 999.0


def open_console(stream: TextIO) -> "Console":
    """A console as wide as the terminal, or wide enough for tables if the stream is not a terminal."""
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else _WIDTH_OF_A_PIPE, highlight=False)


def print_line(console: "Console", text: str) -> None:
    """Prints a line without wrapping, so that it can be copied."""
    console.print(_text(text), soft_wrap=True)


def print_facts(console: "Console", facts: Iterable[tuple[str, str]]) -> None:
    """Prints names and values in two columns. Facts without a value are omitted."""
    from rich.table import Table

    grid = Table.grid("", "", padding=(0, 2, 0, 0))
    grid.columns[0].style, grid.columns[0].no_wrap, grid.columns[1].overflow = "bold", True, "fold"
    for name, value in facts:
        if value:
            grid.add_row(f"  {name}", _text(value))
    console.print(grid)


def print_table(console: "Console", title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a title and a table. A column whose name begins with ">" is right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    console.print()
    console.print(_text(title), style="bold")
    console.print(table)


def verdict(passed: bool) -> str:
    """The result as a word."""
    return PASSED if passed else FAILED


def decibels(psnr: float) -> str:
    """A PSNR as text: that of equal images is infinite, which manifests store as 999."""
    return "infinite" if psnr >= _INFINITE_PSNR else f"{psnr:.1f} dB"


def clean(text: str) -> str:
    """Replaces unprintable characters, so that text from a bundle or model cannot send terminal control codes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _text(value: str) -> "Text":
    from rich.text import Text

    return Text(clean(value), style=_STYLES.get(value, ""))
