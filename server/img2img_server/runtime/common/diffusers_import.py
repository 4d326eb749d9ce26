"""Imports diffusers without PyTorch's compiler, whose import takes longer than all of diffusers that a server of graphs needs.

`diffusers.utils` imports `torch._dynamo` for one decorator of its models in PyTorch, and replaces that by one that does nothing
if the import fails. The compiler can still be imported afterwards. Modules that are imported at a server's start take diffusers'
names from here; its pipelines and models are imported when they are needed.
"""

import sys

_COMPILER = "torch._dynamo"

if "diffusers" not in sys.modules and _COMPILER not in sys.modules:
    import torch  # noqa: F401 - it is not imported within the block below

    sys.modules[_COMPILER] = None  # type: ignore[assignment] # makes its import fail
    try:
        import diffusers
    finally:
        del sys.modules[_COMPILER]

import diffusers  # noqa: E402
from diffusers.configuration_utils import FrozenDict  # noqa: E402
from diffusers.image_processor import VaeImageProcessor  # noqa: E402
from diffusers.utils import PIL_INTERPOLATION  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

__all__ = ["PIL_INTERPOLATION", "FrozenDict", "VaeImageProcessor", "diffusers", "randn_tensor"]
