"""What a model runs on: the processor, the GPU, and the versions of the libraries. Measured times belong to these."""

import platform
from pathlib import Path

import onnxruntime
import torch


def machine(information: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The processor, the GPU if there is one, and the versions of ONNX Runtime, torch and Python. `information` is what Linux
    says of the processor."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {"cpu": names[0] if names else platform.processor(), "cores": str(len(names))}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "python": platform.python_version()}
