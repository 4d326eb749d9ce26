"""Fixtures of the tests on fake CUDA libraries. Only `scripts/test --cuda` collects this folder."""

from collections.abc import Iterator

import pytest
import torch
from fake_gpu import FakeGpu


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """The fake GPU. After each test nothing may have happened that a real one would not forgive."""
    found = FakeGpu()
    assert torch.cuda.is_available(), "the fake CUDA libraries are not in use: run scripts/test --cuda"
    before = found.count("violation")
    yield found
    assert found.count("violation") == before
