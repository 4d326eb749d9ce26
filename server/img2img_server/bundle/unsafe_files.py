"""Refuses files that could run code when a model is loaded: pickles, code, and configurations that load code."""

from pathlib import Path

from img2img_server.bundle.files import odd_file, read_json, walk
from img2img_server.bundle.unsafe_configs import refuse_unsafe_config
from img2img_server.errors import BundleError

_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib")
"""Suffixes of files that diffusers and transformers would unpickle or import."""
INDEX = ".index."
"""Part of the names of weight indexes: `model.safetensors.index.json`, `model.bin.index.fp16.json`."""


def refuse_unsafe(bundle: Path) -> None:
    """Raises BundleError if the directory `bundle` has a pickle or code, a configuration that could load code, a pipe or a
    device, or a link that leads out of it.

    Loaders are called with options that forbid such files, but not all loaders pass the options on. Exported bundles have none.
    """
    if problem := odd_file(bundle):
        raise BundleError(problem)
    for folder, _, names in walk(bundle):
        for name in names:
            if name.lower().endswith(_SUFFIXES):
                raise BundleError(f"{Path(folder, name)} could run code and is not allowed in a bundle: remove it")
            if INDEX in name.lower():
                refuse_unsafe_parts(Path(folder, name))
            else:
                refuse_unsafe_config(Path(folder, name))


def refuse_unsafe_parts(path: Path) -> None:
    """Raises BundleError if the weight index `path` lists other files than safetensors beside it. diffusers and transformers read
    any listed file, as a pickle, even if they may use only safetensors."""
    try:
        parts = set(read_json(path)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path} cannot be read") from None
    for part in parts:
        if not (isinstance(part, str) and part.endswith(".safetensors") and part == Path(part).name):
            raise BundleError(f"{path} names {part!r}: only safetensors files beside it are read")
