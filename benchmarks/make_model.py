"""Write the benchmarks' model: random weights in DeepSeek-V3's architecture, 1.3 billion parameters.

    python benchmarks/make_model.py DIRECTORY [--layers N]

The same shape as in published comparisons of CPU engines; deterministic.  The tokenizer is the bundled one,
so text prompts work; what comes out is noise.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "tiny_deepseek"


def config(layers: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        moe_intermediate_size=512,
        num_experts_per_tok=6,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(options.layers), dtype=torch.bfloat16)
    model.save_pretrained(options.directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, options.directory / name)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f}B parameters")


if __name__ == "__main__":
    main()
