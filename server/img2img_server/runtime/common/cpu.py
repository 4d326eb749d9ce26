"""The machine: processor, libraries, CPU threads for model calls, and available memory.

Most interfaces report all 64 cores of a host to a container that may use two. The real limits are read from the kernel: the
affinity mask, the control group's quota (version 2 or 1), and the core topology.
"""

import os
import platform
from collections.abc import Iterator, Set
from pathlib import Path

import onnxruntime
import torch

_ISAS_WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of oneDNN's environment variable that exclude instructions for bfloat16."""


def count(root: Path = Path("/"), mask: Set[int] | None = None) -> int:
    """The number of physical cores in the affinity `mask` (default: this process's), bounded by the quota; at least 1.

    Two hyperthreads of a core count once, as in ONNX Runtime: one thread of matrix products keeps the core's arithmetic units
    busy. `root` is the folder that contains proc and sys.
    """
    allowed = os.sched_getaffinity(0) if mask is None else mask
    cores = {_siblings(root, number) for number in allowed}
    # A fraction of a core is rounded down: the other threads would wait for a thread that has only half a core.
    return max(1, int(min(len(cores), _quota(root))))


def _siblings(root: Path, number: int) -> str:
    """Identifies the physical core of a logical one; the logical one itself if the kernel does not say, as in many VMs."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(number)


def total_memory(root: Path = Path("/")) -> float:
    """Maximum memory of this process in bytes: the smaller of the machine's and the control group's (version 2) limit.

    Infinite if neither is known.
    """
    bounds = [bound for group in _groups(root, "") if (bound := _read(group / "memory.max")).isdigit()]
    return min([_meminfo(root, "MemTotal"), *map(float, bounds)])


def available_memory(root: Path = Path("/")) -> float:
    """Memory that this process can still allocate, in bytes: the smaller of the machine's and the control group's (version 2).

    Infinite if neither is known.
    """
    left = _meminfo(root, "MemAvailable")
    for group in _groups(root, ""):
        most, used = _read(group / "memory.max"), _read(group / "memory.current")
        if most.isdigit() and used.isdigit():
            left = min(left, float(int(most) - int(used)))
    return left


def _meminfo(root: Path, name: str) -> float:
    """One value of /proc/meminfo in bytes; infinite if it is missing."""
    lines = _read(root / "proc/meminfo").splitlines()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), float("inf"))


def _quota(root: Path) -> float:
    """CPU quota of this process's control groups, in cores; infinite if there is none."""
    return min((_bound(group) for group in (*_groups(root, ""), *_groups(root, "cpu"))), default=float("inf"))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups and their parents: version 2's for "", version 1's for a controller."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        names = ["", "unified"] if controller == "" else [controllers, controller]
        for mount in (root / "sys/fs/cgroup" / name for name in names):
            # In a container the path may be the host's; then the mount itself is the container's group.
            group = mount / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _bound(group: Path) -> float:
    """CPU quota of one control group, in cores. Version 2 has one file ("max 100000" or "150000 100000"), version 1 two."""
    fields = _read(group / "cpu.max").split() or [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) == 0:
        return float("inf")
    return int(fields[0]) / int(fields[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def multiplies_bfloat16(information: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions that multiply bfloat16 (AVX512_BF16, AMX), and oneDNN, the library of PyTorch and
    OpenVINO, may use them. Others convert it, which is slower than float32."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISAS_WITHOUT_BFLOAT16:
        return False
    return not flags(information).isdisjoint({"avx512_bf16", "amx_bf16"})


def sums_int8_exactly(information: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU sums products of int8 in 32 bits (VNNI). Other x86 CPUs sum pairs of them in 16 bits, which overflow."""
    return not flags(information).isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"})


def flags(information: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The CPU's features by the kernel's names; empty if it does not say."""
    try:
        lines = information.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def machine(information: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The processor, the GPU if there is one, and the versions of ONNX Runtime, torch and Python, by name."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "cores": str(len(names))}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "python": platform.python_version()}
