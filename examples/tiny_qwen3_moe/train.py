"""Trains `tiny_qwen3_moe`: grouped-query attention with q/k norms and a softmax-routed MoE.

python examples/tiny_qwen3_moe/train.py --minutes 55
python examples/tiny_qwen3_moe/train.py --evaluate
"""

import sys
from pathlib import Path

from transformers import Qwen3MoeConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from _training import Recipe, run  # noqa: E402

PEAK_LEARNING_RATE = 3e-3


def config() -> Qwen3MoeConfig:
    """Every layer is a mixture of experts, as in the Qwen3 MoE models."""
    return Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
    )


if __name__ == "__main__":
    run(
        Recipe(HERE, config(), PEAK_LEARNING_RATE, router_aux_loss=True),
        description=__doc__,
    )
