"""Suggestions ("did you mean ...?") for unknown commands, flags, choices and variables."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '(?P<word>[^']*)'.*?\(choose from (?P<choices>.*)\)", re.DOTALL)


def meant(word: str, known: Iterable[str]) -> str:
    """A suggestion such as "; did you mean '--seed'?", or "" if nothing in `known` is similar to `word`."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean '{near[0]}'?" if near else ""


class Parser(argparse.ArgumentParser):
    """A parser whose errors have suggestions. Subcommands have parsers of this class too."""

    def error(self, message: str) -> NoReturn:
        """Prints usage and the message, and exits with status 2."""
        found = _CHOICE.search(message)
        if found is not None:
            choices = [choice.strip().strip("'\"") for choice in found["choices"].split(",")]
            message += meant(found["word"], choices)
        super().error(message)

    def check_flags(self, words: Sequence[str]) -> None:
        """Exits with status 2, like `error`, if one of `words`, which follow the command, is an unknown flag.

        argparse reports missing arguments first, but they may be missing because of a misspelt flag.
        """
        parsers = list(self._along(words))
        known = {flag for parser in parsers for flag in parser._option_string_actions}
        abbreviations = any(parser.allow_abbrev for parser in parsers)
        for word in words:
            flag = word.partition("=")[0]
            if flag == "--":
                return
            if not flag.startswith("--") or " " in word or flag in known:
                continue
            if not abbreviations or not any(option.startswith(flag) for option in known):
                parsers[-1].error(f"unrecognized arguments: {word}{meant(flag, known)}")

    @property
    def has_commands(self) -> bool:
        """Whether a subcommand is required."""
        return any(isinstance(action, argparse._SubParsersAction) and action.required for action in self._actions)

    def _along(self, words: Sequence[str]) -> Iterator["Parser"]:
        """This parser and those of the subcommands in `words`."""
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names: Mapping[str, Any] = action.choices
                chosen = next((index for index, word in enumerate(words) if word in names), None)
                if chosen is not None:
                    yield from names[words[chosen]]._along(words[chosen + 1 :])


def warn_of_variables(variables: Mapping[str, str]) -> None:
    """Warns on standard error about variables that look like misspelt settings of the server or the client.

    `img2img serve` refuses them. Other commands only warn, since a variable may belong to another program.
    """
    from img2img_server.__main__ import CLIENT_VARIABLES, CONFIG_VARIABLE, VARIABLES

    unknown = [name for name in variables if name.startswith(VARIABLES) and name not in (*CLIENT_VARIABLES, CONFIG_VARIABLE)]
    if not unknown:
        return
    from img2img_server.config import ServerConfig
    from img2img_server.settings.setting import settings_of

    known = {VARIABLES + one.name.upper() for one in settings_of(ServerConfig)} | {*CLIENT_VARIABLES, CONFIG_VARIABLE}
    for name in unknown:
        if name not in known and (suggestion := meant(name, known)):
            print(f"img2img: ignoring the unknown variable {name}{suggestion}", file=sys.stderr)
