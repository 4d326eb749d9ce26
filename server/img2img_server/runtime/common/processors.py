"""transformers' processors of texts and images, in an environment that lacks what their videos need."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

_VIDEOS = "video_processor"


def loadable(kind: Any) -> Any:
    """The class that loads in place of `kind`, a component's class.

    Processors of transformers such as Qwen2VLProcessor handle videos, too, and that part needs torchvision. Image-to-image
    pipelines give them none, so if torchvision is missing, the class is one without that part, of the same name.
    Raises ImportError for a class that transformers does not have without it.
    """
    if not isinstance(kind, type) or not kind.__module__.startswith("transformers.") or _is_tokenizer(kind):
        return kind
    if importlib.util.find_spec("torchvision") is not None:
        return kind
    # Imported here: it takes seconds, and a bundle of graphs has tokenizers only.
    from transformers import ProcessorMixin
    from transformers.utils.import_utils import DummyObject

    if isinstance(kind, DummyObject) and "torchvision" in kind._backends:
        raise ImportError(f"{kind.__name__} needs torchvision, which is not installed: install it")
    parts: list[str] = cast(Any, kind).get_attributes() if issubclass(kind, ProcessorMixin) else []
    if _VIDEOS not in parts:
        return kind
    names = [name for name in parts if name != _VIDEOS]
    attributes = {"__module__": kind.__module__, "get_attributes": classmethod(lambda cls: names)}
    return type(kind.__name__, (kind,), attributes)


def _is_tokenizer(kind: type) -> bool:
    from transformers import PreTrainedTokenizerBase

    return issubclass(kind, PreTrainedTokenizerBase)


def processors(directory: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The components that diffusers would not load from `directory` here, by name. `kinds` are the classes of all.

    Raises ImportError if one does not load without the missing package, and transformers' errors for damaged files.
    """
    found = {name: loadable(kind) for name, kind in kinds.items()}
    return {
        name: kind.from_pretrained(directory / name, local_files_only=True, trust_remote_code=False)
        for name, kind in found.items()
        if kind is not kinds[name]
    }
