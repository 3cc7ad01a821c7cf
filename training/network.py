"""The network in PyTorch, with mlx-lm's (and transformers') `qwen2` parameter names, and its two loss functions.

It owns CONFIG, the config.json of the model. The optimizer and the run are train.py's.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from training import data

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "attention_dropout": 0.0,
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 1024, "vocab_size": data.VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": data.MAX_LENGTH, "tie_word_embeddings": True, "use_cache": True,
    "use_sliding_window": False, "initializer_range": 0.02, "torch_dtype": "bfloat16",
}  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, CONFIG["rms_norm_eps"]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        size, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
        self.q_proj = nn.Linear(size, self.heads * head)
        self.k_proj = nn.Linear(size, self.kv_heads * head)
        self.v_proj = nn.Linear(size, self.kv_heads * head)
        self.o_proj = nn.Linear(self.heads * head, size, bias=False)

    def forward(self, x, rope, mask):
        batch, length, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2), rope)
        k = rotate(self.k_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2), rope)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        if isinstance(mask, torch.Tensor):  # without a GPU
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c["hidden_size"]), RMSNorm(c["hidden_size"])
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x, rope, mask):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"])


class Qwen2(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.model = Body(c)
        head = c["hidden_size"] // c["num_attention_heads"]
        frequencies = c["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        angles = torch.outer(torch.arange(c["max_position_embeddings"], dtype=torch.float64), frequencies)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c["num_hidden_layers"]) if small else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, mask):
        x = self.model.embed_tokens(ids)
        rope = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def rotate(x, rope):
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def token_losses(model, ids, targets, mask, device):
    with torch.autocast(device, torch.bfloat16):
        logits = model(ids, mask)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def losses_and_hits(model, ids, targets, mask, device):
    with torch.autocast(device, torch.bfloat16):
        logits = model(ids, mask)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return losses, logits.argmax(-1) == targets
