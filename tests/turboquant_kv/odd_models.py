"""Small random models of architectures whose batches mlx-lm computes wrongly, or cannot compute."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import afm7, gpt_bigcode, llama4, ministral3
from tests.turboquant_kv.small_models import VOCAB

CHUNK = 16  # tokens that a chunked attention layer sees


def _evaluated(model: Any) -> Any:
    model.eval()
    mx.eval(model.parameters())
    return model


def reusing(seed: int = 0) -> Any:
    """Layers that attend over another one's keys (AFM): a shorter row takes the padded length for its position."""
    mx.random.seed(seed)
    args = afm7.ModelArgs(
        model_type="afm7",
        vocab_size=VOCAB,
        hidden_dim=256,
        num_layers=4,
        num_kv_reuse_layers=2,
        num_heads=4,
        num_kv_heads=2,
    )
    return _evaluated(afm7.Model(args))


def absolute(seed: int = 0) -> Any:
    """Learned positions (GPT BigCode): they are looked up for one length."""
    mx.random.seed(seed)
    args = gpt_bigcode.ModelArgs(
        model_type="gpt_bigcode",
        n_embd=256,
        n_layer=2,
        n_inner=256,
        n_head=4,
        n_positions=1024,
        layer_norm_epsilon=1e-5,
        vocab_size=VOCAB,
    )
    return _evaluated(gpt_bigcode.Model(args))


def chunked(seed: int = 0) -> Any:
    """Attention within chunks in three of four layers (Llama 4, inside its multimodal wrapper)."""
    mx.random.seed(seed)
    text = {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": CHUNK,
        "head_dim": 64,
        "hidden_size": 128,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_qk_norm": True,
        "vocab_size": VOCAB,
    }
    return _evaluated(llama4.Model(llama4.ModelArgs(text_config=text, model_type="llama4")))


EVERY_KIND = {"reusing": reusing, "absolute": absolute, "chunked": chunked}


def tempered(seed: int = 0) -> Any:
    """Rotary layers whose queries are longer far from the beginning, as Ministral 3's."""
    mx.random.seed(seed)
    args = ministral3.ModelArgs(
        model_type="ministral3",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        vocab_size=256,
        rope_parameters={
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8192,
        },
    )
    return _evaluated(ministral3.Model(args))
