"""A tiny Kolors: SDXL's UNet with a ChatGLM as text encoder, whose tokenizer diffusers runs with sentencepiece."""

import io
import string
from importlib import import_module
from pathlib import Path

from diffusers import EulerDiscreteScheduler
from tiny_parts import BETAS, TEXT_WIDTH, unet, vae


def kolors(directory: Path) -> None:
    """Like Kolors: one large text encoder, and size conditioning as SDXL has it. Needs sentencepiece."""
    # Where sentencepiece is missing, so are these classes.
    from diffusers import KolorsPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    vocabulary = _save_letters(directory / "tokenizer")
    text_encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=3,
            # Nine special tokens come after the letters.
            padded_vocab_size=vocabulary + 9,
            hidden_size=TEXT_WIDTH,
            ffn_hidden_size=64,
            kv_channels=8,
            num_attention_heads=4,
            seq_length=256,
            add_qkv_bias=True,
            multi_query_attention=True,
            multi_query_group_num=2,
            post_layer_norm=True,
            original_rope=True,
        ),
        empty_init=False,
    ).eval()
    for name, weight in text_encoder.named_parameters():
        if "layernorm" in name:  # diffusers leaves them as the memory was
            weight.fill_(1.0)
    predictor = unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 8 * 6,
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="text_proj",
    )
    KolorsPipeline(
        vae=vae(0.13025),
        text_encoder=text_encoder,
        tokenizer=ChatGLMTokenizer(str(directory / "tokenizer" / "tokenizer.model")),
        unet=predictor,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(directory, safe_serialization=True)


def _save_letters(directory: Path) -> int:
    """Saves a sentencepiece model of ASCII letters into `directory`, and returns its number of pieces."""
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    size = len(string.printable.split()[0]) + 4
    import_module("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(string.printable.split()[0])]),
        model_writer=model,
        model_type="char",
        vocab_size=size,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return size
