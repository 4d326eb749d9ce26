"""Finds the part of a text that a model's tokenizers truncate, which diffusers does without a warning to the caller."""

import copy
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from img2img_server.engine.request import RequestWarning
from img2img_server.runtime.common.clip_tokenizer import LightCLIPTokenizer
from img2img_server.runtime.common.pipe import call_parameters

_CODE = "PROMPT_TRUNCATED"
_MOST_KNOWN = 256
_UNLIMITED = 10**6
_OWN_LIMITS = {"Kandinsky3Img2ImgPipeline": 128}
"""Token limits that are constants in a pipeline's code (diffusers 0.39), by class."""
_CHATS = frozenset({"ZImageImg2ImgPipeline"})
"""Classes that truncate the text after it was inserted into a chat template."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """A pipeline's tokenizer, and its maximum number of tokens, special tokens included."""

    name: str
    tokenizer: Any
    limit: int

    def dropped(self, text: str) -> str:
        """The truncated end of a text, as decoded by the tokenizer; "" if nothing is truncated."""
        tokens = self.tokenizer(text, verbose=False).input_ids
        if len(tokens) <= self.limit:
            return ""
        end = int(tokens[-1] == self.tokenizer.eos_token_id)  # An end token is kept.
        text = str(self.tokenizer.decode(tokens[self.limit - end : len(tokens) - end]))
        # CLIP's end-of-word mark, which a copied tokenizer of transformers 5 leaves in the text.
        return text.replace("</w>", " ").strip()


class Truncation:
    """Finds what the tokenizers of a diffusers pipeline truncate. Thread-safe.

    It uses copies of the tokenizers, because truncation is a state of a tokenizer, and the pipeline sets it on another thread.
    """

    def __init__(self, pipe: Any) -> None:
        found = {name: part for name, part in pipe.components.items() if _is_tokenizer(part)}
        limits = {name: _limit(pipe, part) for name, part in found.items()}
        self._readers = [
            _Reader(name, copy.deepcopy(part), limits[name]) for name, part in found.items() if limits[name] < _UNLIMITED
        ]
        self._known: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def warnings(self, texts: Mapping[str, str]) -> tuple[RequestWarning, ...]:
        """Warnings about `texts`, which are keyed by field name."""
        return tuple(RequestWarning(field, found, _CODE) for field, text in texts.items() for found in self._cached(text))

    def _cached(self, text: str) -> tuple[str, ...]:
        with self._lock:
            if text not in self._known:
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[text] = self._find(text)
            return self._known[text]

    def _find(self, text: str) -> tuple[str, ...]:
        cuts: dict[tuple[str, int], list[str]] = {}
        whole = []
        for reader in self._readers:
            if dropped := reader.dropped(text):
                cuts.setdefault((dropped, reader.limit), []).append(reader.name)
            else:
                whole.append(reader.name)
        rest = f" ({' and '.join(whole)} read all of it)" if whole else ""
        return tuple(
            f"the text is longer than the {limit} tokens of the model's {' and '.join(names)}{rest}; ignored: {dropped}"
            for (dropped, limit), names in cuts.items()
        )


def _is_tokenizer(part: Any) -> bool:
    if isinstance(part, LightCLIPTokenizer):
        return True
    # Without transformers in the process nothing is of its classes.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(part, transformers.PreTrainedTokenizerBase)


def _limit(pipe: Any, tokenizer: Any) -> int:
    """Maximum number of tokens of a text in this pipeline class (diffusers 0.39)."""
    if "CLIP" not in type(tokenizer).__name__:
        parameter = call_parameters(pipe).get("max_sequence_length")
        asked = None if parameter is None else parameter.default
        if limit := _OWN_LIMITS.get(type(pipe).__name__, asked):
            return int(limit) - _template_tokens(pipe, tokenizer)
    return int(tokenizer.model_max_length)


def _template_tokens(pipe: Any, tokenizer: Any) -> int:
    """Number of tokens that the pipeline's template takes before the text."""
    dropped = 0  # Qwen-Image removes this many template tokens after encoding.
    if type(pipe).__name__ in _CHATS:
        chat = [{"role": "user", "content": "{}"}]
        template = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    else:
        template = getattr(pipe, "prompt_template_encode", "{}")
        dropped = getattr(pipe, "prompt_template_encode_start_idx", 0)
    before = template.partition("{}")[0]
    return len(tokenizer(before).input_ids) - dropped if before else 0
