"""Small models of every supported kind, with weights large enough that errors show."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCAB = 256
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GQA = _COMMON | {"num_key_value_heads": 2}
_MLA = _COMMON | {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
}
CONFIGS: dict[str, Any] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **_MLA, q_lora_rank=32, routed_scaling_factor=2.5, rope_parameters=_YARN
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **_MLA, q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=1.5
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GQA, head_dim=24, num_experts=8, moe_intermediate_size=24, num_experts_per_tok=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=40
    ),
    "llama": lambda: transformers.LlamaConfig(**_GQA, tie_word_embeddings=True),
}


_SCALED = _YARN | {
    "max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 0.5,
}
# Others than those that everything is tested with: what each brings that they do not.
_MORE: dict[str, Any] = {
    # addmm, learned positions
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256
    ),
    # attention of its own under a mask that the library makes, ALiBi
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    # layer norm spelled out
    "cohere": lambda: transformers.CohereConfig(**_GQA),
    # norms after the rotation
    "hunyuan_v1_dense": lambda: transformers.HunYuanDenseV1Config(**_GQA, head_dim=16),
    # sinks, biased experts, interleaved and clamped gates
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GQA, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=40
    ),
    # top-1 that weighs inputs, queries scaled by position
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **_GQA, head_dim=16, intermediate_size_mlp=96, num_local_experts=6, num_experts_per_tok=1,
        no_rope_layers=[1, 0], interleave_moe_layer_step=1, floor_scale=16, attn_scale=0.3,
    ),
    # a window that only the mask tells of, in one layer
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_GQA, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=40,
        max_window_layers=1,
    ),
    # latents of another family
    "mistral4": lambda: transformers.Mistral4Config(
        **_MLA | {"qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1}, q_lora_rank=32,
        rope_parameters=_SCALED,
    ),
}  # fmt: skip
# name -> (whether it has latent attention, how many blocks of experts)
FAMILIES: dict[str, tuple[bool, int]] = {
    **dict.fromkeys(_MORE, (False, 0)),
    "gpt_oss": (False, 2),
    "llama4_text": (False, 2),
    "qwen2_moe": (False, 2),
    "mistral4": (True, 1),
}


def _build(config: Any) -> Any:
    kind = getattr(transformers, type(config).__name__.replace("Config", "ForCausalLM"), None)
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM.from_config(config) if known else kind(config)


def pretrained(name: str) -> Any:
    """A random transformers model; every router tensor matters."""
    torch.manual_seed(0)
    model = _build((CONFIGS | _MORE)[name]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if "correction_bias" in key:
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def eager(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits ``[T, V]`` of the untouched model."""
    with torch.no_grad():
        out = copy.deepcopy(model)(torch.tensor([ids]))
    return getattr(out, "logits", out)[0]


class Expert(nn.Module):
    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate, self.up = (
            nn.Linear(hidden, inter, bias=False),
            nn.Linear(hidden, inter, bias=False),
        )
        self.down = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """A loop over experts with where and index_add, as people write it."""

    def __init__(self, hidden: int, inter: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inter) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.reshape(x.shape)


class Attention(nn.Module):
    """Fused QKV, interleaved rotation, repeated keys, scaled_dot_product_attention."""

    def __init__(self, hidden: int, heads: int, heads_kv: int) -> None:
        super().__init__()
        self.heads, self.heads_kv, self.dim = heads, heads_kv, hidden // heads
        self.qkv = nn.Linear(hidden, (heads + 2 * heads_kv) * self.dim)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        sizes = [self.heads * self.dim, self.heads_kv * self.dim, self.heads_kv * self.dim]
        q, k, v = (
            t.view(batch, tokens, -1, self.dim).transpose(1, 2)
            for t in self.qkv(x).split(sizes, -1)
        )
        q, k = (rotate(t, cos, sin) for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.heads_kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class HandWritten(nn.Module):
    """A decoder that owes nothing to transformers."""

    def __init__(
        self, vocab: int = 97, hidden: int = 64, heads: int = 4, positions: int = 256
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(hidden),
                    "attention": Attention(hidden, heads, 2),
                    "norm2": nn.RMSNorm(hidden),
                    "moe": MoE(hidden, 40, 6, 2),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab)
        steps = torch.arange(0, hidden // heads, 2) / (hidden // heads)
        angles = torch.outer(torch.arange(positions), 10000.0**-steps)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x, tokens = self.embed(ids), ids.shape[1]
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x), cos, sin)
            x = x + block["moe"](block["norm2"](x))
        return self.head(self.norm(x))


def hand_written() -> HandWritten:
    torch.manual_seed(0)
    return HandWritten().eval()
