"""Runs a command with low priority, and has it killed when the process that asked for it is: `low_priority PARENT COMMAND...`.

Standard library only, as it is the first thing in a process of its own.
"""

import os
import signal
import sys
from collections.abc import Sequence

from img2img_server.support.child_process import end_with

_NICENESS = 10


def main(words: Sequence[str]) -> None:
    """Becomes the command, `words` from the second on, for the parent with the process id that is the first."""
    if not end_with(int(words[0]), signal.SIGTERM):
        sys.exit(1)
    os.nice(_NICENESS)
    os.execvp(words[1], list(words[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
