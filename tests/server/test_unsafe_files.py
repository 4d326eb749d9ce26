"""Configurations that could load code are refused at any nesting and spelling; those of real models pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from img2img_export.build import export_model
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_server.bundle.manifest import Manifest, Source, Verification
from img2img_server.bundle.unsafe_files import refuse_unsafe_config
from img2img_server.errors import BundleError
from img2img_server.runtime import loader
from img2img_server.runtime.execution import Execution
from tiny_models import BUILDERS

REFUSED: list[tuple[str, Any]] = [
    ("_attn_implementation_internal", "evil/kernel"),
    ("_attn_implementation_internal", "eager"),
    ("_attn_implementation", "evil/kernel@main:run"),
    ("_attn_implementation", "flash_attention_2"),
    ("_attn_implementation", {"": "evil/kernel"}),
    ("attn_implementation", "flash_attention_3"),
    ("attn_implementation", {"text_config": "evil/kernel"}),
    ("ATTN_Implementation", "kernels-community/flash-attn"),
    ("attn-implementation", "paged|evil/kernel"),
    ("attnImplementation", "flash_attention_2"),
    (" _attn_implementation_internal", "evil/kernel"),
    ("_ATTN_IMPLEMENTATION_INTERNAL", "evil/kernel"),
    ("_attn_implementation_intern\u0430l", "evil/kernel"),
    ("\uff3fattn_implementation_internal", "evil/kernel"),
    ("_experts_implementation", "evil/kernel"),
    ("experts_implementation", "deepgemm"),
    ("attn_impl", "triton"),
    ("attention_backend", "flash_hub"),
    ("_attention_backend", "flash_hub"),
    ("use_kernels", True),
    ("kernel_config", {"RMSNorm": "evil/layers:RMSNorm"}),
    ("hub_kernel", "evil"),
    ("auto_map", {"AutoModel": "modeling_evil.Evil"}),
    ("auto_map", {"AutoTokenizer": ["evil/repo--tokenization_chatglm.ChatGLMTokenizer", None]}),
    ("auto_map", "evil.Evil"),
    ("AutoMap", {"AutoConfig": "configuration_evil.Evil"}),
    ("auto_mapping", {"base_model_class": "Evil", "parent_library": "os"}),
    ("custom_pipeline", "evil"),
    ("custom_pipelines", {"evil": {"impl": "evil.Pipeline"}}),
    ("custom_generate", "evil"),
    ("trust_remote_code", True),
    ("quantization_config", {"quant_method": "mxfp4"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("compression_config", {"quant_method": "compressed-tensors"}),
    ("base_model_name_or_path", "gpt2"),
    ("pretrained_model_name_or_path", "evil"),
    ("use_pretrained_backbone", True),
    ("backbone", "evil/backbone"),
    ("vocab_file", "../../secret"),
    ("vocab_file", "C:\\secret"),
    ("hidden_act", "evil--activation"),
    ("anything", ["plain", "evil/repo"]),
    ("_class_name", ["my_pipeline", "Evil"]),
    ("_class_name", "evil.module.Evil"),
    ("_unknown", 1),
    ("__class__", "Evil"),
    ("__type", "Evil"),
]
REFUSED_KEYS = [(key, value) for key, value in REFUSED if key not in ("vocab_file", "hidden_act", "anything", "backbone")]
"""Without keys of which only the value is refused: in a token's text it is harmless."""
NESTINGS: list[Callable[[dict[str, Any]], Any]] = [
    lambda config: config,
    lambda config: {"text_config": config},
    lambda config: {"vision_config": {"deeper": [1, [config]]}},
    lambda config: {"bos_token": config},
    lambda config: {"id2label": {"0": config}},
    lambda config: {"task_specific_params": [[{"any": config}]]},
]
ALLOWED: list[tuple[str, Any]] = [
    ("_attn_implementation", "sdpa"),
    ("_attn_implementation_autoset", True),
    ("attn_implementation", None),
    ("_name_or_path", "openai/clip-vit-large-patch14"),
    ("_class_name", "UNet2DConditionModel"),
    ("_diffusers_version", "0.6.0.dev0"),
    ("quantization_config", None),
    ("cache_implementation", "hybrid"),
    ("conv_kernel", [10, 3]),
    ("kernel_size", 3),
    ("id2label", {"0": "either/or", "1": "_"}),
    ("bos_token", {"__type": "AddedToken", "content": "</s>"}),
    ("additional_special_tokens", ["<a/>"]),
    ("chat_template", "{% for m in messages %}{{ m }}/{% endfor %}"),
    ("task_specific_params", {"translation": {"prefix": "translate English/German: "}}),
    ("special_tokens_map_file", "/home/somebody/special_tokens_map.json"),
    (
        "auto_map",
        {"AutoModel": "modeling_chatglm.ChatGLMModel", "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    ),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]}),
    ("transformers_version", "4.57.6"),
    ("backend", "tokenizers"),
    ("beta_schedule", "scaled_linear"),
]


def written(path: Path, config: Any) -> Path:
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("key", "value"), REFUSED)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "Tokenizer_Config.JSON"])
def test_key_that_can_load_code_is_refused(key: str, value: Any, name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, {"hidden_size": 8, key: value})
    with pytest.raises(BundleError) as error:
        refuse_unsafe_config(path)
    assert str(error.value).startswith(f"{path}: the key '")
    assert ascii(key)[1:-1] in str(error.value).encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("nest", NESTINGS)
@pytest.mark.parametrize(("key", "value"), REFUSED_KEYS)
def test_unsafe_key_is_found_at_any_nesting(key: str, value: Any, nest: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        refuse_unsafe_config(written(tmp_path / "config.json", nest({key: value})))


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_settings_of_common_checkpoints_pass(key: str, value: Any, tmp_path: Path) -> None:
    for nest in NESTINGS:
        refuse_unsafe_config(written(tmp_path / "config.json", nest({key: value})))


def test_every_occurrence_of_a_repeated_key_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for first, second in (("null", '"evil/kernel"'), ('"evil/kernel"', "null")):
        path.write_text(f'{{"attn_implementation": {first}, "attn_implementation": {second}}}')
        with pytest.raises(BundleError, match="attn_implementation"):
            refuse_unsafe_config(path)


@pytest.mark.parametrize("entry", [["evil.module", "Evil"], ["../evil", "Evil"], ["os", "path.x"], {"library": "a/b"}, "evil.py"])
def test_model_index_entries_must_be_identifiers(entry: Any, tmp_path: Path) -> None:
    good = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": [None, None],
    }
    refuse_unsafe_config(written(tmp_path / "model_index.json", {**good, "force_zeros_for_empty_prompt": True}))
    with pytest.raises(BundleError, match="'unet"):
        refuse_unsafe_config(written(tmp_path / "model_index.json", {**good, "unet": entry}))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' * 5_000, "\x00"])
def test_a_damaged_configuration_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BundleError, match="cannot be read"):
        refuse_unsafe_config(path)


def test_tokenizer_tables_are_not_checked_for_unsafe_keys(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt"):
        refuse_unsafe_config(written(tmp_path / name, {"_attn_implementation_internal": 1, "a/b": "c/d"}))


@pytest.mark.parametrize(
    "where", ["text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
)
def test_export_and_server_refuse_a_checkpoint_with_an_unsafe_key(
    where: str, tmp_path: Path, tiny_model: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd1"), model)
    path = model / where
    path.write_text(json.dumps({**json.loads(path.read_text()), "_attn_implementation_internal": "evil/kernel"}))
    with pytest.raises(ExportError, match="_attn_implementation_internal"):
        export_model(ExportOptions(source=str(model), output=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
    manifest = Manifest(
        source=Source(repo_id="tiny"), pipeline_class="StableDiffusionImg2ImgPipeline", family="stable-diffusion",
        backend="torch", components=(), files={}, tools={}, verification=Verification(passed=True),
    )  # fmt: skip
    with pytest.raises(BundleError, match=f"{where}.*_attn_implementation_internal"):
        loader.load_pipeline(model, manifest, Execution(provider="cpu", arithmetic="fp32", threads=1))
    assert "kernels" not in "".join(capfd.readouterr()), "transformers' advice to install them"


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_configurations_that_diffusers_and_transformers_write_pass(name: str, tiny_model: Callable[[str], Path]) -> None:
    paths = list(tiny_model(name).rglob("*.json"))
    assert len(paths) > 3
    for path in paths:
        if ".index." not in path.name:
            refuse_unsafe_config(path)


def test_the_demo_model_passes() -> None:
    for path in (REPOSITORY / "demo" / "model").rglob("*.json"):
        refuse_unsafe_config(path)
