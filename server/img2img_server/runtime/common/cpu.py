"""The machine: its processor and libraries, the CPU threads a model's call should have, and the memory that is left.

Most interfaces report 64 cores to a container that may use two of them. The real bounds are read from the kernel: the affinity
mask, the quota of the control group (version 2 or 1), and the topology of the cores.
"""

import os
import platform
from collections.abc import Iterator, Set
from pathlib import Path

import onnxruntime
import torch


def count(root: Path = Path("/"), mask: Set[int] | None = None) -> int:
    """Threads that share nothing: physical cores within the affinity `mask` (this process's own), bounded by the quota.

    Two hyperthreads of a core count once, as ONNX Runtime counts by itself: one thread of matrix products keeps the core's
    arithmetic units busy. At least 1. `root` is where /proc and /sys are.
    """
    allowed = os.sched_getaffinity(0) if mask is None else mask
    cores = {_siblings(root, number) for number in allowed}
    # Half a core's time more does not pay for one more thread, which the others would wait for.
    return max(1, int(min(len(cores), _quota(root))))


def _siblings(root: Path, number: int) -> str:
    """Names the physical core of a logical one; each is its own where the kernel does not tell, as in many virtual machines."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(number)


def total_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may take at most: the machine's, or its control group's of version 2, if those are fewer.

    Infinite if neither is known.
    """
    bounds = [bound for group in _groups(root, "") if (bound := _read(group / "memory.max")).isdigit()]
    return min([_meminfo(root, "MemTotal"), *map(float, bounds)])


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still take: what the machine has left, or its control group of version 2, if that is less.

    Infinite where neither is known.
    """
    left = _meminfo(root, "MemAvailable")
    for group in _groups(root, ""):
        most, used = _read(group / "memory.max"), _read(group / "memory.current")
        if most.isdigit() and used.isdigit():
            left = min(left, float(int(most) - int(used)))
    return left


def _meminfo(root: Path, name: str) -> float:
    """Bytes of one line of /proc/meminfo, infinite if it is not there."""
    lines = _read(root / "proc/meminfo").splitlines()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), float("inf"))


def _quota(root: Path) -> float:
    """Cores' worth of time that the control groups of this process allow, infinite where nothing bounds it."""
    return min((_bound(group) for group in (*_groups(root, ""), *_groups(root, "cpu"))), default=float("inf"))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, and of those around them: version 2's for "", version 1's for a controller."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        names = ["", "unified"] if controller == "" else [controllers, controller]
        for mount in (root / "sys/fs/cgroup" / name for name in names):
            # Inside a container the path may be that outside of it: then the mount itself is the container's group.
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _bound(group: Path) -> float:
    """The bound of one control group. Version 2 has "max 100000" or "150000 100000" in a file, version 1 two files."""
    fields = _read(group / "cpu.max").split() or [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) == 0:
        return float("inf")
    return int(fields[0]) / int(fields[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def machine(information: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The processor, the GPU if there is one, and the versions of ONNX Runtime, torch and Python. `information` is what Linux
    says of the processor."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "cores": str(len(names))}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "python": platform.python_version()}
