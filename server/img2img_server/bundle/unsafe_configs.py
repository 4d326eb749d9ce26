"""What the configurations of a model may do: give numbers, switches and plain words.

diffusers and transformers make attributes of the keys in these files, whatever the keys are, and some keys name code. With the
package `kernels` installed, transformers before 5.3 downloads and runs the repository that `_attn_implementation_internal` names,
though trust_remote_code is False (CVE-2026-4372); `flash_attention_2`, `mxfp4` and an adapter's base model lead to the hub, too.
So this is a list of what is allowed: which private keys exist, which values a key that selects code may have, and that no other
value names a file or a repository. Standard library only: the exporter checks a checkpoint before anything heavy is imported.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from img2img_server.bundle.files import read_json
from img2img_server.bundle.tokenizer_files import TOKENIZER, refuse_tables
from img2img_server.errors import BundleError

_DATA = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "manifest.json"})
"""Files that are not configurations: a tokenizer's tables, whose keys are words, and the bundle's own manifest."""

_MOST_NUMBER = 2**25
"""The largest whole number in a configuration: sizes of images for Qwen's processors reach 25 million."""
_MOST_STEPS, _MOST_TOKENS, _NO_LIMIT = 100_000, 2**20, 10**20
"""Schedulers make tables with as many rows as there are timesteps, and tokenizers pad to their greatest length; transformers
writes a number above the last one where a tokenizer has no such length."""

_Rule = Callable[[Any], bool]
_WORD = re.compile(r"(?!.*--)[^/\\\x00-\x1f]*")
"""Neither a path nor a repository, nor both in transformers' form `owner/name--module.Class`."""
_IDENTIFIER = re.compile(r"[A-Za-z]\w*", re.ASCII)
_CHATGLM = re.compile(r"Auto\w+|\w+_chatglm\.ChatGLM\w+", re.ASCII)
"""Kolors' checkpoints still name where the classes come from that diffusers has of its own, and uses in their place."""


def _any_of(*values: object) -> _Rule:
    return lambda value: any(value is one or (isinstance(one, str) and value == one) for one in values)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _strings(pattern: re.Pattern[str]) -> _Rule:
    """Whether all strings in a value match, the keys of its objects, too."""
    return lambda value: (
        pattern.fullmatch(value) is not None
        if isinstance(value, str)
        else not isinstance(value, list | tuple) or all(map(_strings(pattern), value))
    )


def _numbers(value: Any) -> bool:
    """Sizes of convolution kernels are."""
    if isinstance(value, list):
        return all(map(_numbers, value))
    return value is None or (isinstance(value, int | float) and value is not True)


_words = _strings(_WORD)
_attention = _any_of(None, "eager", "sdpa")
_switch = _any_of(None, True, False)
_off = _any_of(None, False)

_PRIVATE: dict[str, _Rule] = {
    "__type": _any_of("AddedToken"),
    "_attn_implementation": _attention,
    "_attn_implementation_autoset": _switch,
    "_class_name": lambda value: isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None,
    "_commit_hash": _words,
    "_diffusers_version": _words,
    "_flash_attn_2_enabled": _off,
    "_from_model_config": _switch,
    "_ignore_files": _strings(re.compile(".*")),
    "_name_or_path": _text,
    "_use_default_values": _words,
    "_valid_processor_keys": _words,
}
"""Every key with a leading underscore that a configuration may have, and its values."""

_SELECTING: tuple[tuple[re.Pattern[str], _Rule, str], ...] = (
    (re.compile("cacheimplementation"), _words, "it is one word"),
    (
        re.compile(r".*implementation.*|.*impl"),
        _attention,
        "only 'eager' and 'sdpa' run, other implementations come from the hub",
    ),
    (re.compile(r".*att(entio)?n.*backend.*"), _any_of(None, "native"), "other backends than 'native' come from the hub"),
    (re.compile(r".*kernel.*"), _numbers, "only sizes of kernels are read, code of kernels comes from the hub"),
    (re.compile(r"automap(ping)?"), _strings(_CHATGLM), "code that a model brings is never run"),
    (re.compile(r"custom.*|.*remotecode.*"), _off, "code that a model brings is never run"),
    (
        re.compile(r"quantizationconfig|compressionconfig|sparsityconfig|quantmethod"),
        _off,
        "quantized weights are not read: use fp32, fp16 or bf16",
    ),
    (re.compile(r"usepretrainedbackbone"), _off, "weights of other models are not loaded"),
    (re.compile(r".+nameorpath"), _off, "other models are not loaded in its place"),
)
"""Keys that select what is loaded or run, as `_plain` writes them, their values, and why no others. The first match counts."""

_FREE = re.compile(
    r"name_or_path|chat_template|(.+_)?tokens?|added_tokens_decoder|(.+_)?special_tokens|special_tokens_map_file"
    r"|task_specific_params|prefix|content"
)
"""Keys of texts that are data only, also in lists and objects."""
_TABLES = ("id2label", "label2id")
"""Keys of tables between numbers and labels, which are any text."""


def refuse_unsafe_config(path: Path) -> None:
    """Raises BundleError, which names the file and the key, if the configuration at `path` has what none may have.

    The tables of a tokenizer are held to tokenizer_files.py; other files whose name does not end in .json pass.
    """
    try:
        refuse_tables(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is refused: {error}; get the tokenizer's files from the model that it was made from") from None
    if not path.name.lower().endswith(".json") or path.name in _DATA or TOKENIZER.fullmatch(path.name):
        return
    is_index = path.name == "model_index.json"
    try:
        found = read_json(path, pairs=_Pairs)
        problem = next(_problems(found, (), _strings(_IDENTIFIER) if is_index else _words), None)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if problem:
        where, reason = problem
        raise BundleError(f"{path}: the key {'.'.join(where)!r} is not allowed as it is: {reason}")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as all its keys and values: those of a repeated key, too."""


def _problems(value: Any, where: tuple[str, ...], allowed: _Rule) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys, outer ones first, that are not allowed, and why. `allowed` says which strings may stand where no rule is."""
    if isinstance(value, _Pairs):
        for key, inner in value:
            yield from _of_key(key, inner, (*where, key), allowed)
    elif isinstance(value, list):
        for one in value:
            yield from _problems(one, where, allowed)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > _most(where[-1] if where else "", value):
        yield where, f"{str(value)[:40]} is larger than any size that a model has"
    elif isinstance(value, str) and not allowed(value):
        yield where, f"{value[:80]!r} may name a file, a repository or a module"


def _most(key: str, value: int) -> int:
    """The largest number that a key may have."""
    if key.endswith("timesteps"):
        return _MOST_STEPS
    if key.endswith("max_length"):
        return _MOST_TOKENS if value < _NO_LIMIT else value
    return _MOST_NUMBER


def _of_key(key: str, value: Any, where: tuple[str, ...], allowed: _Rule) -> Iterator[tuple[tuple[str, ...], str]]:
    if not key.isascii():
        yield where, "keys are ASCII"
    elif key.strip().startswith("_"):
        if not _PRIVATE.get(key, lambda _: False)(value):
            yield where, f"{json.dumps(value)[:80]} is not among the values of private keys that are known to be harmless"
    elif found := next((item for item in _SELECTING if item[0].fullmatch(_plain(key))), None):
        if not found[1](value):
            yield where, f"it is {json.dumps(value)[:80]}; {found[2]}"
    elif not (key in _TABLES and isinstance(value, _Pairs) and all(isinstance(inner, str | int) for _, inner in value)):
        yield from _problems(value, where, _text if _FREE.fullmatch(key) else allowed)


def _plain(key: str) -> str:
    """Letters and digits in lower case: `attn-Implementation` is as good as `attn_implementation`."""
    return re.sub(r"[\W_]", "", key.lower())
