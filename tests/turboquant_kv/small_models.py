"""Small random models of several architectures, built from mlx-lm's own model code."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import baichuan_m1, falcon_h1, gemma2, gemma3_text, gpt_oss, lfm2, qwen2

VOCAB = 256
COMMON = {"hidden_size": 64, "vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4}


def _evaluated(model: Any, seed: int) -> Any:
    mx.random.seed(seed)
    mx.eval(model.parameters())
    return model


def dense(seed: int = 0, num_layers: int = 2) -> Any:
    """Full attention with GQA: every layer is compressed. Head dim 64."""
    mx.random.seed(seed)
    args = qwen2.ModelArgs(
        model_type="qwen2",
        **{**COMMON, "hidden_size": 256, "num_hidden_layers": num_layers},
        num_key_value_heads=2,
        intermediate_size=128,
        rms_norm_eps=1e-6,
    )
    return _evaluated(qwen2.Model(args), seed)


def sliding(seed: int = 0) -> Any:
    """Sliding-window layers between full ones (rings beside compressed caches)."""
    mx.random.seed(seed)
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        **{**COMMON, "num_hidden_layers": 3},
        head_dim=64,
        num_key_value_heads=2,
        intermediate_size=128,
        query_pre_attn_scalar=64,
        sliding_window=24,
        sliding_window_pattern=3,
    )
    return _evaluated(gemma3_text.Model(args), seed)


def recurrent(seed: int = 0) -> Any:
    """Short convolutions with state beside attention layers."""
    mx.random.seed(seed)
    args = lfm2.ModelArgs(
        model_type="lfm2",
        **{**COMMON, "hidden_size": 256, "num_hidden_layers": 3},
        num_key_value_heads=2,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=256,
        block_ff_dim=256,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
    )
    return _evaluated(lfm2.Model(args), seed)


def with_sinks(seed: int = 0) -> Any:
    """Learned attention sinks, alternating sliding and full attention, mixture of experts."""
    mx.random.seed(seed)
    args = gpt_oss.ModelArgs(
        model_type="gpt_oss",
        **COMMON,
        head_dim=64,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=2,
        num_experts_per_tok=2,  # all of them: choosing would turn a tiny difference into another expert
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_scaling=None,
    )
    model = gpt_oss.Model(args)
    for layer in model.model.layers:
        layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    return _evaluated(model, seed)


def capped(seed: int = 0, head_dim: int = 64, num_kv_heads: int = 2) -> Any:
    """Attention scores with a cap that they reach, and a cap of the logits."""
    mx.random.seed(seed)
    args = gemma2.ModelArgs(
        model_type="gemma2",
        **COMMON,
        head_dim=head_dim,
        num_key_value_heads=num_kv_heads,
        intermediate_size=128,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=head_dim / 16,
        attn_logit_softcapping=2.0,
    )
    return _evaluated(gemma2.Model(args), seed)


def side_by_side(seed: int = 0) -> Any:
    """Attention beside a state-space model in every layer, whose caches sit in one CacheList."""
    mx.random.seed(seed)
    args = falcon_h1.ModelArgs(
        **COMMON,
        head_dim=64,
        num_key_value_heads=2,
        intermediate_size=64,
        mamba_d_ssm=64,
        mamba_d_head=16,
        mamba_n_heads=4,
        mamba_d_state=16,
        rope_theta=10000.0,
    )
    return _evaluated(falcon_h1.Model(args), seed)


def convolved(seed: int = 0) -> Any:
    """Keys and values that depend on the token before, kept in a CacheList beside full attention and a ring."""
    mx.random.seed(seed)
    args = baichuan_m1.ModelArgs(
        **{**COMMON, "hidden_size": 256, "num_hidden_layers": 3},
        num_key_value_heads=2,
        intermediate_size=128,
        rope_theta=10000.0,
        sliding_window=24,
        sliding_window_layers=[1],
        conv_window=2,
        rms_norm_eps=1e-6,
    )
    model = baichuan_m1.Model(args)
    for layer in model.model.layers:  # zeros as they are made
        for name in ("conv_k", "conv_v"):
            setattr(layer.self_attn, name, mx.random.normal(getattr(layer.self_attn, name).shape))
    return _evaluated(model, seed)


EVERY_KIND = {
    "dense": dense,
    "sliding": sliding,
    "recurrent": recurrent,
    "with_sinks": with_sinks,
    "side_by_side": side_by_side,
    "convolved": convolved,
    "capped": capped,
}
ALL_COMPRESSED = ("dense", "capped")
"""Kinds without rings and recurrent state."""
