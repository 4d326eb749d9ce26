"""Child processes that must not outlive their parent. Uses the standard library only, because it runs before all imports.

`python -m img2img_server.support.child_process PARENT COMMAND...` runs a command with low priority, bound to PARENT.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """On Linux, makes the kernel send this process the signal `number` when the thread that started it ends.

    Returns False if the `parent` process has already ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


_NICENESS = 10


def main(words: Sequence[str]) -> None:
    """Replaces this process by a command. `words` are the parent's process id, then the command and its arguments."""
    if not end_with(int(words[0]), signal.SIGTERM):
        sys.exit(1)
    os.nice(_NICENESS)
    os.execvp(words[1], list(words[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
