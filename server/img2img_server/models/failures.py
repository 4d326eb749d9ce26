"""Why a model cannot be served: the full reason for the log, and a short one without internals for callers."""

import enum
import re
from dataclasses import dataclass
from pathlib import Path

from img2img_server.errors import BundleError, OutOfMemory

WHY = "the server's log says why"
_MOST_DETAIL, _MOST_PROBLEM = 200, 2000
"""Characters."""
_PATH = re.compile(r"(?<![\w.])/[^\s:;,'\"()]+")
"""An absolute path in a message."""


class Stage(enum.Enum):
    """The stage in which a model failed, as text for messages."""

    READING = "its bundle could not be read"
    LOADING = "it could not be loaded"
    WARM_UP = "it failed in warm-up"
    TRIAL = "it failed on a trial image"


class Hung(Exception):
    """A call of a model did not return."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model failed: `problem` for the log, `detail` for callers, without paths of the server."""

    problem: str
    detail: str

    @classmethod
    def of(cls, error: BaseException, stage: Stage, bundle: Path | None) -> "Failure":
        """Makes a Failure from the `error` of the model in the folder `bundle`.

        Callers get the text of a BundleError or Hung, without paths, and only the class of other errors.
        """
        text = " ".join(str(error).split())
        named = text if isinstance(error, BundleError | Hung) else f"{type(error).__name__}: {text}".rstrip(": ")
        problem = f"{stage.value}: {named}"[:_MOST_PROBLEM]
        if isinstance(error, BundleError | Hung):
            return cls(problem, f"{stage.value}: {_for_callers(text, bundle)}; {WHY}")
        if isinstance(error, MemoryError | OutOfMemory):
            return cls(problem, f"{stage.value}: out of memory; {WHY}")
        return cls(problem, f"{stage.value} ({type(error).__name__}); {WHY}")


def _for_callers(text: str, bundle: Path | None) -> str:
    """Shortens `text`, replaces the bundle's path by its name, and removes other absolute paths."""
    for path in () if bundle is None else (bundle, bundle.absolute(), bundle.resolve()):
        text = text.replace(str(path), bundle.name if bundle is not None else "")
    text = _PATH.sub("...", text)
    return text if len(text) <= _MOST_DETAIL else f"{text[:_MOST_DETAIL]}..."
