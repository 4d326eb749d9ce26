"""For a process that must not outlive the one that started it. Standard library only, as it runs before anything else."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """On Linux, has the kernel send this process the signal `number` when the thread that started it ends.

    Returns False if the process `parent`, which is to be the one that started it, has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    return os.getppid() == parent
