"""CLIP's tokenizer by the library `tokenizers` alone: transformers, which wraps it, takes a second of CPU to import."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.bundle.files import read_json

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
"""transformers' classes that `read` may stand in for."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_RULES = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "</w>",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""The rules that transformers' class sets for every CLIP tokenizer, in place of those in its tokenizer.json."""

_LATER = re.compile(r"_\d+$")
"""Ends the names of the further tokens of a textual inversion, which diffusers inserts into texts."""
_MOST_TOKENS = 10**6
"""transformers' number for tokenizers without a limit is at least this."""


class LightCLIPTokenizer:
    """A CLIP tokenizer. It has no state: several threads may use it, and copies are the same object.

    `model_max_length` is the number of tokens of a text that the model reads, with the first and the last one.
    """

    def __init__(self, tokenizer: Any, model_max_length: int, eos_token_id: int, pad_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

    def __call__(self, text: str, verbose: bool = False) -> SimpleNamespace:
        """All tokens of a text as `input_ids`, as transformers' tokenizers return them."""
        return SimpleNamespace(input_ids=self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def padded(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens [n, T] that the model reads of n texts, and 1 for each of a text, 0 for one that fills up."""
        most = self.model_max_length
        rows = [item.ids for item in self._tokenizer.encode_batch(list(texts))]
        rows = [ids if len(ids) <= most else [*ids[: most - 1], self.eos_token_id] for ids in rows]
        ids = torch.tensor([[*row, *[self.pad_token_id] * (most - len(row))] for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows])

    def __deepcopy__(self, known: object) -> "LightCLIPTokenizer":
        return self


def read(folder: Path) -> LightCLIPTokenizer | None:
    """The tokenizer whose files are in `folder`. None if transformers would make anything else of them than their tokenizer.json
    says, or if they are invalid."""
    import tokenizers

    try:
        table, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        special = folder / "special_tokens_map.json"
        tokens = _special_tokens(config, read_json(special) if special.is_file() else {})
        added: dict[str, Any] = {item["content"]: item["id"] for item in table["added_tokens"]}
        most = config["model_max_length"]
        # transformers adds special tokens that are missing among the added ones, which changes how texts are split.
        start, end, pad = (added[tokens[name]] for name in ("bos", "eos", "pad"))
        expected = _RULES | {
            "post_processor": {
                "type": "RobertaProcessing", "sep": [tokens["eos"], end], "cls": [tokens["bos"], start],
                "trim_offsets": False, "add_prefix_space": False,
            }
        }  # fmt: skip
        model = _MODEL | {"unk_token": tokens["unk"]}
        is_known = (
            all(table.get(name) == rule for name, rule in expected.items())
            and all(table["model"].get(name) == value for name, value in model.items())
            and (tokens["bos"], tokens["eos"]) == (_START, _END)
            and all(isinstance(number, int) for number in (start, end, pad, added[tokens["unk"]], most))
            and 2 < most < _MOST_TOKENS
            and not any(_LATER.search(name) for name in added)
            and {item["content"] for item in config.get("added_tokens_decoder", {}).values()} <= added.keys()
            and not (folder / "added_tokens.json").exists()
            and {config.get(name, "right") for name in ("padding_side", "truncation_side")} == {"right"}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_known:
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - all that the library raises for an invalid file
        return None
    # A tokenizer that was saved after a call has that call's settings in its file. transformers sets them in every call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return LightCLIPTokenizer(tokenizer, most, end, pad)


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, of tokenizer_config.json and of special_tokens_map.json. Raises ValueError if these differ."""
    found = {}
    for name, usual in (("bos", _START), ("eos", _END), ("pad", _END), ("unk", _END)):
        given = {_content(source[f"{name}_token"]) for source in (config, older) if f"{name}_token" in source}
        if len(given) > 1:
            raise ValueError(f"two different {name} tokens")
        found[name] = given.pop() if given else usual
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)
