"""Which part of a text a model's tokenizers drop: each reads so many tokens, and diffusers cuts the rest off without a word."""

import copy
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from img2img_server.engine.request import RequestWarning

_CODE = "PROMPT_TRUNCATED"
_MOST_KNOWN = 256
_UNLIMITED = 10**6
_OWN_LIMITS = {"Kandinsky3Img2ImgPipeline": 128}
"""Classes whose limit is a constant in the code (diffusers 0.39)."""
_CHATS = frozenset({"ZImageImg2ImgPipeline"})
"""Classes that cut the text after they have put it into the chat's template."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tokenizer of a pipeline and the most tokens, special ones among them, that it gives to its text encoder."""

    name: str
    tokenizer: Any
    limit: int

    def dropped(self, text: str) -> str:
        """The end of a text that is not read, as the tokenizer spells it."""
        tokens = self.tokenizer(text, verbose=False).input_ids
        if len(tokens) <= self.limit:
            return ""
        end = int(tokens[-1] == self.tokenizer.eos_token_id)  # It is kept where there is one.
        text = str(self.tokenizer.decode(tokens[self.limit - end : len(tokens) - end]))
        # CLIP's mark of a word's end: a tokenizer of transformers 5 that was copied leaves it.
        return text.replace("</w>", " ").strip()


class Truncation:
    """Finds what the tokenizers of a diffusers pipeline drop. Any thread may ask.

    It has tokenizers of its own: one that cuts in one thread must not be asked to read everything in another.
    """

    def __init__(self, pipe: Any) -> None:
        found = {name: part for name, part in pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}
        limits = {name: _limit(pipe, part) for name, part in found.items()}
        self._readers = [
            _Reader(name, copy.deepcopy(part), limits[name]) for name, part in found.items() if limits[name] < _UNLIMITED
        ]
        self._known: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def warnings(self, texts: Mapping[str, str]) -> tuple[RequestWarning, ...]:
        """Warnings about these texts, keyed by the name of their field."""
        return tuple(RequestWarning(field, said, _CODE) for field, text in texts.items() for said in self._said(text))

    def _said(self, text: str) -> tuple[str, ...]:
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
            f"the text is longer than the {limit} tokens of the model's {' and '.join(names)}{rest}, dropped was: {dropped}"
            for (dropped, limit), names in cuts.items()
        )


def _limit(pipe: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of a text, as the pipeline's class cuts them (diffusers 0.39)."""
    if "CLIP" not in type(tokenizer).__name__:
        parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
        asked = None if parameter is None else parameter.default
        if limit := _OWN_LIMITS.get(type(pipe).__name__, asked):
            return int(limit) - _template_tokens(pipe, tokenizer)
    return int(tokenizer.model_max_length)


def _template_tokens(pipe: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of these tokens the template takes that the pipeline puts before a text."""
    dropped = 0  # Qwen-Image drops the template's again, as many as its own tokenizer makes of it.
    if type(pipe).__name__ in _CHATS:
        chat = [{"role": "user", "content": "{}"}]
        template = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    else:
        template = getattr(pipe, "prompt_template_encode", "{}")
        dropped = getattr(pipe, "prompt_template_encode_start_idx", 0)
    before = template.partition("{}")[0]
    return len(tokenizer(before).input_ids) - dropped if before else 0
