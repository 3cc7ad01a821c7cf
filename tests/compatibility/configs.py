"""Tiny configurations of every model type of the installed mlx-lm: sizes by field name, and what a type needs besides.

A type's fields are those of its ModelArgs. Each that stands in SIZES gets the value there, whatever its default is;
others keep their defaults. TYPES adds to that, type by type. A new type with a field that neither names has no
configuration, which `config_of` says.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx_lm.models

VOCAB = 8192  # the embedded model's, whose tokenizer is used
MAX_CONTEXT = 2048
NUM_LAYERS = 4
WINDOW = 32  # tokens of a sliding window, far fewer than the prompts have

Config = dict[str, Any]

# Heads of 64 dimensions where a type lets its configuration say so.
# All experts are chosen: with fewer, rounding would now and then choose another one.
SIZES: Config = {
    # width and depth
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "num_vocab": VOCAB,
    **dict.fromkeys(("hidden_size", "hidden_dim", "n_embd", "model_dim", "d_model"), 256),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_groups", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), 64),
    **dict.fromkeys(("kv_channels", "hidden_size_per_head", "query_pre_attn_scalar"), 64),
    **dict.fromkeys(("intermediate_size", "ff_intermediate_size", "ffn_hidden_size", "n_inner"), 128),
    **dict.fromkeys(("intermediate_size_mlp", "block_dim", "block_ff_dim", "shared_intermediate_size"), 256),
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "ffn_dim_divisor": 64,
    "hidden_size_per_layer_input": 32,
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"), MAX_CONTEXT),
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    "rotary_dim": 32,
    "rope_scaling": None,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    "sliding_window_pattern": 2,
    # norms, biases and scales
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("attention_bias", "mlp_bias", "conv_bias", "use_bias", "post_norm"), False),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "use_conv_bias", "norm_topk_prob", "tie_word_embeddings"), True),
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.0),
    **dict.fromkeys(("scale_depth", "scale_emb", "routed_scaling_factor"), 1.0),
    "dim_model_base": 256,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 4),
    "top_k_experts": 4,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("share_expert_dim", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_freq", "expert_layer_offset"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "mlp_only_layers": [],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # latent attention
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    **dict.fromkeys(("index_head_dim", "index_topk"), 64),
    "index_n_heads": 2,
    # convolutions and recurrent states
    **dict.fromkeys(("conv_kernel", "conv1d_width", "mamba_d_conv", "linear_conv_kernel_dim"), 4),
    "conv_L_cache": 3,
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 8),
    "linear_num_key_heads": 4,
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 64),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    "mamba_proj_bias": False,
    "mamba_expand": 2,
    "time_step_rank": 16,
}


@dataclasses.dataclass(frozen=True)
class Inner:
    """The configuration inside another: of a type's `args` class, with what it needs besides."""

    model_type: str
    args: str = "ModelArgs"
    own: Config = dataclasses.field(default_factory=dict)


SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
RECURRENT_AND_FULL = ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)
LLAMA_4_ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": MAX_CONTEXT,
}
ROPE_BY_LAYER = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in SLIDING_AND_FULL[:2]}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 1.0}
KIMI_LAYERS = {
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
HYBRID_QWEN: Config = {"rope_parameters": {"type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25}}

# What a type's ModelArgs need besides SIZES, or in place of them.
TYPES: dict[str, Config] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": SLIDING_AND_FULL},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2, "tie_word_embeddings": False},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 1},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 4},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "greedy"},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": SLIDING_AND_FULL, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 512},
    "gear": {"layer_types": SLIDING_AND_FULL},
    "gemma3": {"text_config": Inner("gemma3_text")},
    "gemma3n": {"text_config": Inner("gemma3n", "TextConfig")},
    "gemma4": {"text_config": Inner("gemma4_text")},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": SLIDING_AND_FULL},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (NUM_LAYERS // 2), "mamba_conv_bias": True},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2},
    "kimi_k25": {"text_config": Inner("deepseek_v3")},
    "kimi_k3": {
        "text_config": Inner(
            "kimi_k3",
            "TextArgs",
            {"linear_attn_config": KIMI_LAYERS, "activation_situ_beta": 4.0, "attn_res_block_size": 2},
        )
    },
    "kimi_linear": {"linear_attn_config": KIMI_LAYERS},
    "kimi_vl": {"text_config": Inner("kimi_vl", "TextArgs")},
    "laguna": {"layer_types": SLIDING_AND_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "lfm2-vl": {"text_config": Inner("lfm2")},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2), "use_expert_bias": True},
    "llama4": {
        "text_config": Inner(
            "llama4",
            "TextArgs",
            {"attention_chunk_size": WINDOW, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
        )
    },
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 1,
    },
    "mamba2": {"time_step_limit": [0.0, 100.0], "num_heads": 8},
    "mellum": {"layer_types": SLIDING_AND_FULL, "rope_parameters": ROPE_BY_LAYER},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm": {"tie_word_embeddings": False},  # mlx-lm makes weights for a head in any case
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": MAX_CONTEXT}},
    "minimax_m3_vl": {"text_config": Inner("minimax_m3_vl", "TextArgs", {"moe_layer_freq": [0, 1, 1, 1]})},
    "ministral3": {"rope_parameters": LLAMA_4_ROPE, "layer_types": SLIDING_AND_FULL},
    "mistral3": {"text_config": Inner("ministral3")},
    "mistral4": {"rope_parameters": LLAMA_4_ROPE},
    "muse_spark": {
        "text_config": Inner(
            "muse_spark",
            "TextArgs",
            {
                "post_norm_eps": 1e-5,
                "rope_parameters": {"rope_theta": 10000.0},
                "layer_rope_theta": [10000.0, 0, 10000.0, 0],
                "layer_types": SLIDING_AND_FULL,
                "final_logit_softcapping": 20.0,
                "output_multiplier": 1.0,
                "moe_hidden_size": 256,
                "num_shared_experts": 0,
            },
        )
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * (NUM_LAYERS - 1)
        + [{"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}}]
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "M", "*"], "num_hidden_layers": 5},
    "olmo_hybrid": {"layer_types": RECURRENT_AND_FULL, "linear_allow_neg_eigval": True},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0] * 4},
    # Its code writes to the logits of tokens up to 100,351, and with a smaller vocabulary into other memory.
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "vocab_size": 100_352},
    "pixtral": {"text_config": Inner("llama")},
    "plamo": {"n_shared_head": 2},
    "qwen2_vl": {"text_config": Inner("qwen2")},
    "qwen3_5": {"text_config": Inner("qwen3_5", "TextModelArgs", {**HYBRID_QWEN, "num_experts": 0})},
    "qwen3_5_moe": {"text_config": Inner("qwen3_5", "TextModelArgs", HYBRID_QWEN)},
    "qwen3_vl": {"text_config": Inner("qwen3")},
    "qwen3_vl_moe": {"text_config": Inner("qwen3_moe", own={"tie_word_embeddings": False})},  # as published
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv7": dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 16),
    "spark2_5": {"rope_parameters": ROPE_BY_LAYER, "layer_types": SLIDING_AND_FULL},
    "stablelm": {"use_qkv_bias": True},
}
# What a published config.json has for transformers, which reads it with the tokenizer, and mlx-lm's ModelArgs do not.
BESIDES: dict[str, Config] = {"exaone4": {"layer_types": SLIDING_AND_FULL}}
GEMMA_3N: Config = {
    "num_kv_shared_layers": 0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "layer_types": SLIDING_AND_FULL,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 16,
}
TYPES["gemma3n"] = {"text_config": Inner("gemma3n", "TextConfig", GEMMA_3N)}


def model_types() -> list[str]:
    """Of the installed mlx-lm: its modules with a model."""
    names = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if name in NOT_IMPORTABLE or hasattr(_module(name), "Model")]


# Their modules end the process on import unless another package is there.
NOT_IMPORTABLE = ("olmo",)
# No random weights can be had for them.
NOT_TRIED = {"prism_hadamard_qwen35": "its weights come as 2-bit packs, which random ones cannot stand for"}


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


def config_of(model_type: str) -> Config:
    """A config.json of that type. Raises LookupError for a field that nothing here names."""
    if model_type in NOT_IMPORTABLE:
        return {"model_type": model_type}
    config = _filled(_module(model_type).ModelArgs, model_type, TYPES.get(model_type, {}))
    return {**BESIDES.get(model_type, {}), **config}


def _filled(args: Any, model_type: str, own: Config) -> Config:
    config: Config = {"model_type": model_type}
    for field in dataclasses.fields(args):
        if field.name in own:
            config[field.name] = _resolved(own[field.name])
        elif field.name in SIZES:
            config[field.name] = SIZES[field.name]
        elif field.name != "model_type" and _is_required(field):
            raise LookupError(f"{model_type}: no value for {field.name}")
    return config


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _resolved(value: Any) -> Any:
    if not isinstance(value, Inner):
        return value
    own = value.own if value.args != "ModelArgs" else {**TYPES.get(value.model_type, {}), **value.own}
    return _filled(getattr(_module(value.model_type), value.args), value.model_type, own)
