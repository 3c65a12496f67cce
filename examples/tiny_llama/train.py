"""Trains `tiny_llama`: a dense Llama with multi-head attention and tied embeddings.

python examples/tiny_llama/train.py --minutes 38 --without-tests
python examples/tiny_llama/train.py --evaluate
"""

import sys
from pathlib import Path

from transformers import LlamaConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from _training import Recipe, run  # noqa: E402

PEAK_LEARNING_RATE = 3e-3


def config() -> LlamaConfig:
    """Every query head has keys and values of its own."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


if __name__ == "__main__":
    run(Recipe(HERE, config(), PEAK_LEARNING_RATE), description=__doc__)
