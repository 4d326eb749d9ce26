"""What has no place in a bundle: pickles, code, and configurations that lead to code. Loading a model must not run its files."""

from pathlib import Path

from img2img_server.bundle.files import odd_file, read_json, walk
from img2img_server.bundle.unsafe_configs import refuse_unsafe_config
from img2img_server.errors import BundleError

_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib")
"""Of files that diffusers and transformers would read as pickles or import."""
INDEX = ".index."
"""Of lists of a model's files: `model.safetensors.index.json`, `model.bin.index.fp16.json`."""


def refuse_unsafe(bundle: Path) -> None:
    """Raises BundleError if the directory `bundle` has a pickle or code, a configuration that may lead to code
    (unsafe_configs.py), a pipe or a device, or a link that leads out of it.

    Loaders are told not to read them, but they load one another, and not all obey. No bundle of the exporter's has any.
    """
    if problem := odd_file(bundle):
        raise BundleError(problem)
    for folder, _, names in walk(bundle):
        for name in names:
            if name.lower().endswith(_SUFFIXES):
                raise BundleError(f"{Path(folder, name)} could run code when it is read: such files have no place in a bundle")
            if INDEX in name.lower():
                refuse_unsafe_parts(Path(folder, name))
            else:
                refuse_unsafe_config(Path(folder, name))


def refuse_unsafe_parts(path: Path) -> None:
    """Raises BundleError where the list `path` of a model's parts has others than safetensors beside it: told to read these
    alone, diffusers and transformers read all the same whatever is listed, as a pickle."""
    try:
        parts = set(read_json(path)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path} cannot be read") from None
    for part in parts:
        if not (isinstance(part, str) and part.endswith(".safetensors") and part == Path(part).name):
            raise BundleError(f"{path} names {part!r}: only safetensors beside it are read")
