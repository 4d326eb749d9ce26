"""The fake CUDA libraries themselves: memory, failures on demand, captures, violations."""

import ctypes

import pytest
from fake_gpu import FakeGpu

SIZE = 1 << 20
DEVICE, HOST = 1, 2
"""Directions of a copy: to there."""
CAPTURE_FORBIDS, CAPTURE_LOST, NO_MEMORY = 900, 901, 2


class Runtime:
    """CUDA's runtime by its C functions."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcudart.so.13")

    def allocate(self, size: int) -> tuple[int, ctypes.c_void_p]:
        found = ctypes.c_void_p()
        return self.library.cudaMalloc(ctypes.byref(found), ctypes.c_size_t(size)), found

    def copy(self, to: object, source: object, size: int, direction: int) -> int:
        return int(self.library.cudaMemcpy(to, source, ctypes.c_size_t(size), direction))

    def made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        assert getattr(self.library, name)(ctypes.byref(found), *arguments) == 0
        return found


@pytest.fixture
def cuda() -> Runtime:
    return Runtime()


@pytest.fixture
def fake() -> FakeGpu:
    """Without the check of `gpu`, since violations are tested here."""
    return FakeGpu()


def test_memory_keeps_copied_data_and_is_freed(cuda: Runtime, fake: FakeGpu) -> None:
    before = fake.used
    code, memory = cuda.allocate(SIZE)
    assert code == 0
    assert fake.used > before
    data, back = ctypes.create_string_buffer(b"x" * SIZE, SIZE), ctypes.create_string_buffer(SIZE)
    assert cuda.copy(memory, data, SIZE, DEVICE) == 0
    assert cuda.copy(back, memory, SIZE, HOST) == 0
    assert back.raw == data.raw
    assert cuda.library.cudaFree(memory) == 0
    assert fake.used == before


def test_copies_beyond_memory_and_double_frees_are_violations(cuda: Runtime, fake: FakeGpu) -> None:
    _, memory = cuda.allocate(SIZE)
    assert memory.value is not None
    with fake.counting() as counts:
        beyond = ctypes.c_void_p(memory.value + (1 << 30))
        assert cuda.copy(ctypes.create_string_buffer(1), beyond, 1, HOST) != 0
        assert cuda.library.cudaFree(memory) == 0
        assert cuda.library.cudaFree(memory) != 0
    assert counts["violation"] == 2


def test_allocations_fail_when_memory_is_used_up_and_on_demand(cuda: Runtime, fake: FakeGpu) -> None:
    with fake.memory(fake.used + 8 * SIZE):
        assert cuda.allocate(16 * SIZE)[0] == NO_MEMORY
    assert cuda.library.cudaGetLastError() == NO_MEMORY
    assert cuda.library.cudaGetLastError() == 0
    with fake.failing("cudaMalloc:2:2"):
        assert [cuda.allocate(1)[0] for _ in range(3)] == [0, NO_MEMORY, 0]
    cuda.library.cudaGetLastError()


def test_a_recorded_copy_runs_at_each_launch_only(cuda: Runtime, fake: FakeGpu) -> None:
    stream = cuda.made("cudaStreamCreateWithFlags", 1)
    _, memory = cuda.allocate(SIZE)
    back, graph = ctypes.create_string_buffer(SIZE), ctypes.c_void_p()
    cuda.library.cudaMemset(memory, 0, ctypes.c_size_t(SIZE))
    assert cuda.library.cudaStreamBeginCapture(stream, 0) == 0
    assert cuda.library.cudaMemsetAsync(memory, 7, ctypes.c_size_t(SIZE), stream) == 0
    assert cuda.library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    launch = cuda.made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    cuda.copy(back, memory, SIZE, HOST)
    assert back.raw[0] == 0
    assert cuda.library.cudaGraphLaunch(launch, stream) == 0
    assert cuda.library.cudaStreamSynchronize(stream) == 0
    cuda.copy(back, memory, SIZE, HOST)
    assert back.raw[0] == 7


def test_an_allocation_while_a_stream_is_captured_ends_the_capture(cuda: Runtime, fake: FakeGpu) -> None:
    stream, graph = cuda.made("cudaStreamCreateWithFlags", 1), ctypes.c_void_p()
    with fake.counting() as counts:
        assert cuda.library.cudaStreamBeginCapture(stream, 0) == 0
        assert cuda.allocate(1)[0] == CAPTURE_FORBIDS
        assert cuda.library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == CAPTURE_LOST
    assert graph.value is None
    assert counts["violation"] == 1
    cuda.library.cudaGetLastError()
