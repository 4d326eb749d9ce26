"""The fake GPU of tests/cuda in this process: its counters, and injection of memory limits and failing calls."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PAGEABLE = (
    "cudaMemcpyAsync to device, pageable",
    "cudaMemcpyAsync to host, pageable",
    "cudaMemcpy to device, pageable",
    "cudaMemcpy to host, pageable",
)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
NAMES = (
    *PAGEABLE,
    *WAITS,
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaMemcpyAsync",
    "cudaMemcpyAsync to device, pinned",
    "cudaMemcpyAsync to host, pinned",
    "cudaMemcpyAsync device to device",
    "cudaStreamBeginCapture",
    "cudaGraphLaunch",
    "launch",
    "plan",
    "violation",
    "note",
)
"""The counted calls: see tests/cuda/fake/README.md."""


class FakeGpu:
    """The libraries of tests/cuda/fake, which this process must have been started with. Raises OSError if it was not."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libfakecuda.so")
        self._library.fakecuda_used.restype = ctypes.c_size_t
        self._library.fakecuda_count.restype = ctypes.c_long

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self._library.fakecuda_used())

    def count(self, name: str) -> int:
        """How often a call was made, or a counter of ours went up."""
        return int(self._library.fakecuda_count(name.encode()))

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Yields a counter that has, after the block, the calls within it, without zeros."""
        before = {name: self.count(name) for name in NAMES}
        found: Counter[str] = Counter()
        yield found
        found.update({name: more for name in NAMES if (more := self.count(name) - before[name])})

    @contextmanager
    def memory(self, size: int) -> Iterator[None]:
        """Within the block the device has only `size` bytes."""
        self._library.fakecuda_set_memory(ctypes.c_size_t(size))
        try:
            yield
        finally:
            self._library.fakecuda_set_memory(ctypes.c_size_t(80 << 30))

    @contextmanager
    def failing(self, calls: str) -> Iterator[None]:
        """Within the block calls fail: "cudaMalloc:5:2" makes the fifth return 2, "-" in place of a number every one."""
        self._library.fakecuda_fail(calls.encode())
        try:
            yield
        finally:
            self._library.fakecuda_fail(b"")
