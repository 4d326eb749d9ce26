"""How many threads a model's call should have, and what memory is left: in machines and containers made of files."""

import os
from pathlib import Path

import pytest
from img2img_server.runtime.common import cpu


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
    return root


def _siblings(*cores_: str) -> dict[str, str]:
    """A machine's topology: the logical cores of each physical one, as in "0,4"."""
    numbers = {number: core for core in cores_ for number in core.replace("-", ",").split(",")}
    return {f"sys/devices/system/cpu/cpu{number}/topology/core_cpus_list": core for number, core in numbers.items()}


V2, V1 = "proc/self/cgroup", "sys/fs/cgroup/cpu,cpuacct"
FOUR = _siblings("0,4", "1,5", "2,6", "3,7")


@pytest.mark.parametrize(
    ("files", "mask", "expected"),
    [
        pytest.param(FOUR, range(8), 4, id="hyperthreads share a core"),
        pytest.param(FOUR, {0, 4}, 1, id="both threads of one core are allowed"),
        pytest.param(FOUR, {0, 1, 6}, 3, id="the mask leaves three cores"),
        pytest.param({}, {0, 1}, 2, id="a kernel that does not tell of its topology"),
        pytest.param(FOUR | {V2: "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, range(8), 4, id="no quota"),
        pytest.param(FOUR | {V2: "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, range(8), 2, id="a container's quota"),
        pytest.param(FOUR | {V2: "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, range(8), 2, id="two cores and a half"),
        pytest.param(FOUR | {V2: "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, range(8), 1, id="half a core"),
        pytest.param(
            FOUR
            | {V2: "0::/pods/a", "sys/fs/cgroup/pods/cpu.max": "300000 100000", "sys/fs/cgroup/pods/a/cpu.max": "max 100000"},
            range(8),
            3,
            id="a quota of the group around it",
        ),
        pytest.param(
            FOUR | {V2: "4:cpu,cpuacct:/docker/1", f"{V1}/cpu.cfs_quota_us": "200000", f"{V1}/cpu.cfs_period_us": "100000"},
            range(8),
            2,
            id="version 1, its path that of the host",
        ),
        pytest.param(
            FOUR | {V2: "4:cpu,cpuacct:/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
            range(8),
            4,
            id="version 1 without a quota",
        ),
        pytest.param(
            FOUR | {V2: "5:cpuset:/\n4:cpu:/\n0::/", "sys/fs/cgroup/unified/cpu.max": "100000 100000"}, range(8), 1, id="both"
        ),
    ],
)
def test_thread_count_is_the_number_of_usable_physical_cores(
    files: dict[str, str], mask: set[int], expected: int, tmp_path: Path
) -> None:
    assert cpu.count(_machine(tmp_path, files), set(mask)) == expected


def test_core_count_of_this_machine_is_within_its_affinity() -> None:
    assert 1 <= cpu.count() <= len(os.sched_getaffinity(0))


def test_available_memory_is_limited_by_the_container(tmp_path: Path) -> None:
    assert cpu.available_memory(tmp_path) == float("inf")
    machine = {"proc/meminfo": "MemTotal:  10 kB\nMemAvailable:      8 kB", V2: "0::/a"}
    assert cpu.available_memory(_machine(tmp_path, machine)) == 8192
    group = {"sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "2000"}
    assert cpu.available_memory(_machine(tmp_path, group)) == 3000
    assert cpu.available_memory(_machine(tmp_path, {"sys/fs/cgroup/a/memory.max": "max"})) == 8192
    assert 0 < cpu.available_memory() < 2**50


def test_total_memory_is_limited_by_the_container(tmp_path: Path) -> None:
    assert cpu.total_memory(tmp_path) == float("inf")
    machine = {"proc/meminfo": "MemTotal:  10 kB\nMemAvailable:      8 kB", V2: "0::/a/b"}
    assert cpu.total_memory(_machine(tmp_path, machine)) == 10240
    assert cpu.total_memory(_machine(tmp_path, {"sys/fs/cgroup/a/memory.max": "max"})) == 10240
    assert cpu.total_memory(_machine(tmp_path, {"sys/fs/cgroup/a/b/memory.max": "9000"})) == 9000
    assert cpu.total_memory(_machine(tmp_path, {"sys/fs/cgroup/a/memory.max": "5000"})) == 5000, "a group around its own"
    assert cpu.available_memory() <= cpu.total_memory() < 2**50
