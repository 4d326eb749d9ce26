"""Refuses files that could run code when a model is loaded: pickles, code, and configurations that load code or other models.

diffusers and transformers turn any key of these files into an attribute, and some keys name code. With the package `kernels`
installed, transformers before 5.3 downloads and runs the repository in `_attn_implementation_internal`, even if trust_remote_code
is False (CVE-2026-4372); `flash_attention_2`, `mxfp4` and an adapter's base model download from the hub, too. So this is an
allowlist: the private keys, the values of keys that select code, and a rule that no other value names a file or a repository.
Standard library only: the exporter checks a checkpoint before heavy imports.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from img2img_server.bundle.component_config import CONFIG_NAME, refuse_wrong_fields
from img2img_server.bundle.files import odd_file, read_json, walk
from img2img_server.bundle.tokenizer_files import TOKENIZER, refuse_tables
from img2img_server.errors import BundleError

_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib")
"""Suffixes of files that diffusers and transformers would unpickle or import."""
INDEX = ".index."
"""Part of the names of weight indexes: `model.safetensors.index.json`, `model.bin.index.fp16.json`."""

_DATA = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "manifest.json"})
"""Files that are not configurations: a tokenizer's tables, whose keys are words, and the bundle's own manifest."""

_MOST_NUMBER = 2**25
"""Largest integer in a configuration: image sizes of Qwen's processors reach 25 million."""
_MOST_STEPS, _MOST_TOKENS, _NO_LIMIT = 100_000, 2**20, 10**20
"""Schedulers make tables with a row per timestep, and tokenizers pad to their maximum length; transformers writes a number above
_NO_LIMIT if a tokenizer has no maximum."""

_Rule = Callable[[Any], bool]
_WORD = re.compile(r"(?!.*--)[^/\\\x00-\x1f]*")
"""Not a path, a repository, or transformers' combination `owner/name--module.Class`."""
_IDENTIFIER = re.compile(r"[A-Za-z]\w*", re.ASCII)
_CHATGLM = re.compile(r"Auto\w+|\w+_chatglm\.ChatGLM\w+", re.ASCII)
"""Kolors' checkpoints name the original modules of classes that diffusers now contains and uses instead."""


def _any_of(*values: object) -> _Rule:
    return lambda value: any(value is one or (isinstance(one, str) and value == one) for one in values)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _strings(pattern: re.Pattern[str]) -> _Rule:
    """Whether all strings in a value match, including the keys of its objects."""
    return lambda value: (
        pattern.fullmatch(value) is not None
        if isinstance(value, str)
        else not isinstance(value, list | tuple) or all(map(_strings(pattern), value))
    )


def _numbers(value: Any) -> bool:
    """Whether a value has only numbers, such as the sizes of convolution kernels."""
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
"""The allowed keys with a leading underscore, and their values."""

_SELECTING: tuple[tuple[re.Pattern[str], _Rule, str], ...] = (
    (re.compile("cacheimplementation"), _words, "only a single word is allowed"),
    (
        re.compile(r".*implementation.*|.*impl"),
        _attention,
        "only 'eager' and 'sdpa' are allowed; other implementations are downloaded from the hub",
    ),
    (
        re.compile(r".*att(entio)?n.*backend.*"),
        _any_of(None, "native"),
        "other backends than 'native' are downloaded from the hub",
    ),
    (re.compile(r".*kernel.*"), _numbers, "only sizes of kernels are allowed; kernels with code are downloaded from the hub"),
    (re.compile(r"automap(ping)?"), _strings(_CHATGLM), "code of a model is never run"),
    (re.compile(r"custom.*|.*remotecode.*"), _off, "code of a model is never run"),
    (
        re.compile(r"quantizationconfig|compressionconfig|sparsityconfig|quantmethod"),
        _off,
        "quantized weights are not supported: use fp32, fp16 or bf16",
    ),
    (re.compile(r"usepretrainedbackbone"), _off, "weights of other models are not loaded"),
    (re.compile(r".+nameorpath"), _off, "other models are not loaded"),
)
"""Keys that select code or models, in the form of `_plain`, their allowed values, and the reason. The first match counts."""

_FREE = re.compile(
    r"name_or_path|chat_template|(.+_)?tokens?|added_tokens_decoder|(.+_)?special_tokens|special_tokens_map_file"
    r"|task_specific_params|prefix|content"
)
"""Keys whose texts are only data, also in lists and objects."""
_TABLES = ("id2label", "label2id")
"""Keys of tables between numbers and labels. Labels may be any text."""


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
        parts = dict.fromkeys(read_json(path)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read as a weight index ({error!r}): download it again") from None
    for part in parts:
        if not (isinstance(part, str) and part.endswith(".safetensors") and part == Path(part).name):
            raise BundleError(f"{path} names {part!r}: only safetensors files beside it are read")


def refuse_unsafe_config(path: Path) -> None:
    """Raises BundleError with the file and the key if the configuration at `path` has a key or value that is not allowed.

    Checks a tokenizer's tables by `refuse_tables`. Other files whose names do not end in .json pass.
    """
    try:
        refuse_tables(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is refused: {error}; use the tokenizer files of the original model") from None
    if not path.name.lower().endswith(".json") or path.name in _DATA or TOKENIZER.fullmatch(path.name):
        return
    is_index = path.name == "model_index.json"
    try:
        found = read_json(path, pairs=_Pairs)
        problem = next(_problems(found, (), _strings(_IDENTIFIER) if is_index else _words), None)
        content = read_json(path) if path.name == CONFIG_NAME else None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if problem:
        where, reason = problem
        raise BundleError(f"{path}: the key {'.'.join(where)!r} is refused: {reason}")
    refuse_wrong_fields(content, path)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of its keys and values, including repeated keys."""


def _problems(value: Any, where: tuple[str, ...], allowed: _Rule) -> Iterator[tuple[tuple[str, ...], str]]:
    """The disallowed keys, each as a path from the outermost key, and the reasons. `allowed` checks strings without a rule."""
    if isinstance(value, _Pairs):
        for key, inner in value:
            yield from _of_key(key, inner, (*where, key), allowed)
    elif isinstance(value, list):
        for one in value:
            yield from _problems(one, where, allowed)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > _most(where[-1] if where else "", value):
        yield where, f"{str(value)[:40]} is larger than any size of a model"
    elif isinstance(value, str) and not allowed(value):
        yield where, f"{value[:80]!r} may name a file, a repository or a module"


def _most(key: str, value: int) -> int:
    """The largest value of a key."""
    if key.endswith("timesteps"):
        return _MOST_STEPS
    if key.endswith("max_length"):
        return _MOST_TOKENS if value < _NO_LIMIT else value
    return _MOST_NUMBER


def _of_key(key: str, value: Any, where: tuple[str, ...], allowed: _Rule) -> Iterator[tuple[tuple[str, ...], str]]:
    if not key.isascii():
        yield where, "keys must be ASCII"
    elif key.strip().startswith("_"):
        if not _PRIVATE.get(key, lambda _: False)(value):
            yield where, f"{json.dumps(value)[:80]} is not a known value of this private key"
    elif found := next((item for item in _SELECTING if item[0].fullmatch(_plain(key))), None):
        if not found[1](value):
            yield where, f"it is {json.dumps(value)[:80]}; {found[2]}"
    elif not (key in _TABLES and isinstance(value, _Pairs) and all(isinstance(inner, str | int) for _, inner in value)):
        yield from _problems(value, where, _text if _FREE.fullmatch(key) else allowed)


def _plain(key: str) -> str:
    """Reduces a key to lowercase letters and digits: `attn-Implementation` and `attn_implementation` are the same key."""
    return re.sub(r"[\W_]", "", key.lower())
