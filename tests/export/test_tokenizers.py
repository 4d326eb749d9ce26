"""Tokenizers as checkpoints have them: transformers converts a T5's spiece.model, which is all that many have."""

import io
import json
import shutil
import string
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import transformers
from img2img_export.build import export_model
from img2img_export.options import ExportOptions
from img2img_server.bundle.manifest import check_bundle
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from short_exports import cut_short


def test_a_t5_with_only_a_sentencepiece_model_is_exported_and_served(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """sentencepiece's messages need a protobuf that is no older than their generator."""
    source = Path(shutil.copytree(tiny_model("sd3"), tmp_path / "sd3"))
    shutil.rmtree(source / "tokenizer_3")
    (source / "tokenizer_3").mkdir()
    model = io.BytesIO()
    letters = string.ascii_letters + string.digits
    import_module("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters)]), model_writer=model, model_type="char", vocab_size=len(letters) + 4,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (source / "tokenizer_3" / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 77, "extra_ids": 0}
    (source / "tokenizer_3" / "tokenizer_config.json").write_text(json.dumps(config))

    with cut_short():
        made = export_model(ExportOptions(source=str(source), output=tmp_path / "out"))

    check_bundle(made.path, made.manifest)
    assert made.manifest.backend == "onnx"
    load_pipeline(made.path, made.manifest, Execution("cpu"))
    ids = transformers.AutoTokenizer.from_pretrained(made.path / "tokenizer_3", local_files_only=True)("lake")["input_ids"]
    assert len(set(ids)) > 4, "every letter has a token of its own"
