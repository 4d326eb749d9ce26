"""For a process that must not outlive the one that started it. Standard library only, as it runs before anything else.

`python -m img2img_server.support.child_process PARENT COMMAND...` runs a command with low priority, bound to PARENT.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """On Linux, has the kernel send this process the signal `number` when the thread that started it ends.

    Returns False if the process `parent`, which is to be the one that started it, has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


_NICENESS = 10


def main(words: Sequence[str]) -> None:
    """Becomes the command, `words` from the second on, for the parent with the process id that is the first."""
    if not end_with(int(words[0]), signal.SIGTERM):
        sys.exit(1)
    os.nice(_NICENESS)
    os.execvp(words[1], list(words[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
