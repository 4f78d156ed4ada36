"""Tiny random pipelines of diffusers in folders, with text encoders and tokenizers that need no network."""

from pathlib import Path

import torch

SIDE = {"num_attention_heads": 2, "attention_head_dim": 32}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def byte_tokenizer(folder: Path):
    """Qwen's tokenizer without merges: a token a byte."""
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: i for i, symbol in enumerate(bytes_to_symbols())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def hunyuan15(folder: Path, seed: int = 0) -> Path:
    import diffusers
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(folder)
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    glyphs = T5Config(vocab_size=384, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            **SIDE, rope_axes_dim=(8, 12, 12), in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1,
            text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8, task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(glyphs),
        tokenizer_2=ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def hunyuan(folder: Path, seed: int = 0) -> Path:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(folder)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    letters = [*bytes_to_symbols(), *(f"{symbol}</w>" for symbol in bytes_to_symbols())]
    vocabulary = {symbol: i for i, symbol in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    pooled = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=vocabulary["<|endoftext|>"], projection_dim=16,
    )  # fmt: skip
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(text),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            **SIDE, rope_axes_dim=(8, 12, 12), in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(pooled),
        tokenizer_2=CLIPTokenizer(vocab=vocabulary, merges=[]),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def bytes_to_symbols() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def wan(folder: Path, seed: int = 0) -> Path:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(folder)
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        transformer=diffusers.WanTransformer3DModel(
            **SIDE | {"attention_head_dim": 36}, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64,
            num_layers=2,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 1.0, 0.5],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
