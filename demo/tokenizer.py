"""The demo model's tokenizer: byte-level BPE, trained on the captions, written in CLIP's file format."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def _train_merges(captions: Iterable[str], merge_count: int) -> list[tuple[str, str]]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False, False, False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Equally frequent pairs are merged in the order of their ids. Bytes that end a word would get theirs in the order in which a
    # hash table lists the words, which differs from run to run.
    trainer = trainers.BpeTrainer(
        vocab_size=merge_count + 2 * len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[byte + "</w>" for byte in alphabet],
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(str(left), str(right)) for left, right in merges]


def train_tokenizer(captions: Iterable[str], directory: Path, merge_count: int = 1000) -> CLIPTokenizer:
    """Train on captions, write vocab.json and merges.txt to a directory and return the tokenizer read back from it.

    The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word, the merges, start and end of text.
    Any text can be encoded, since every byte has a token.
    """
    merges = _train_merges(captions, merge_count)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    tokens += list(dict.fromkeys(left + right for left, right in merges if left + right not in tokens))
    tokens += [START, END]
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    vocabulary_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    vocabulary_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary_file), str(merges_file), model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(directory)
    return tokenizer
