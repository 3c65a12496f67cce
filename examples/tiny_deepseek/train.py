"""Trains `tiny_deepseek`: every hard part of the DeepSeek-V3 architecture in 9 million weights.

python examples/tiny_deepseek/train.py --minutes 55
python examples/tiny_deepseek/train.py --evaluate
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from _training import AfterStep, Recipe, run  # noqa: E402

PEAK_LEARNING_RATE = 3e-3
BIAS_UPDATE_RATE = 2e-3


def config() -> DeepseekV3Config:
    """Multi-head latent attention, a grouped sigmoid router, a shared expert, YaRN positions.

    `mscale` and `mscale_all_dim` differ, so that both of YaRN's corrections are other than 1: the
    one on the rotary tables and the one on the softmax scale.
    """
    return DeepseekV3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
        bos_token_id=0,
        eos_token_id=0,
    )


def balance_experts(model: PreTrainedModel) -> AfterStep:
    """Balances the routers without a loss, as DeepSeek-V3 does.

    After each step an expert that got less than the mean load has its selection bias raised by a
    fixed amount, and one that got more has it lowered.  The amount falls with the learning rate,
    so that the biases settle together with the weights.
    """
    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]

    def count(router: nn.Module, _: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen = output[2].flatten()
        router.load.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=router.load.dtype))

    for router in routers:
        router.register_buffer("load", torch.zeros(router.num_experts), persistent=False)
        router.register_forward_hook(count)

    @torch.no_grad()
    def update(rate: float) -> None:
        for router in routers:
            error = router.load.mean() - router.load
            router.e_score_correction_bias += BIAS_UPDATE_RATE * rate * error.sign()
            router.load.zero_()

    return update


if __name__ == "__main__":
    run(
        Recipe(HERE, config(), PEAK_LEARNING_RATE, prepare=balance_experts),
        description=__doc__,
    )
