"""Runs a command with low priority, and has it killed when the process that asked for it is: `low_priority PARENT COMMAND...`.

Standard library only, as it is the first thing in a process of its own.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_NICENESS = 10


def main(words: Sequence[str]) -> None:
    """Becomes the command, `words` from the second on, for the parent with the process id that is the first."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(words[0]):  # it died before that was asked for
        sys.exit(1)
    os.nice(_NICENESS)
    os.execvp(words[1], list(words[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
