"""Write a large checkpoint: random weights in the shape of DeepSeek-V2-Lite, 15.7 billion parameters in bf16.

    python benchmarks/make_large.py DIRECTORY [--layers N]

31 GB in shards of 4 GB, written tensor by tensor, so that it takes little memory; deterministic.  Fewer
layers make a smaller one.  The tokenizer is the bundled one, so text prompts work; what comes out is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DeepseekV2Config

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "tiny_deepseek"
SHARD_BYTES = 4 << 30
Shapes = dict[str, tuple[int, ...]]


def config(layers: int) -> DeepseekV2Config:
    return DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"],
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        n_shared_experts=2,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def tensors(c: DeepseekV2Config) -> Shapes:
    """Names and shapes of all tensors, as the published checkpoint has them."""
    shapes: Shapes = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_hidden_layers):
        dense = layer < c.first_k_dense_replace
        parts = _attention(c) | (_mlp(c, "mlp", c.intermediate_size) if dense else _experts(c))
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (c.hidden_size,)
    shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def _attention(c: DeepseekV2Config) -> Shapes:
    heads, hidden, latent = c.num_attention_heads, c.hidden_size, c.kv_lora_rank
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), hidden),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + c.qk_rope_head_dim, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), latent),
        "self_attn.o_proj.weight": (hidden, heads * c.v_head_dim),
        "post_attention_layernorm.weight": (hidden,),
    }


def _experts(c: DeepseekV2Config) -> Shapes:
    shapes: Shapes = {"mlp.gate.weight": (c.n_routed_experts, c.hidden_size)}
    for expert in range(c.n_routed_experts):
        shapes |= _mlp(c, f"mlp.experts.{expert}", c.moe_intermediate_size)
    return shapes | _mlp(c, "mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)


def _mlp(c: DeepseekV2Config, prefix: str, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, c.hidden_size),
        f"{prefix}.up_proj.weight": (inner, c.hidden_size),
        f"{prefix}.down_proj.weight": (c.hidden_size, inner),
    }


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that depend on the name alone: norms near one, the rest so that activations keep their size."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    random = torch.randn(shape, generator=rng)
    if len(shape) == 1:
        return (1 + 0.1 * random).bfloat16()
    return random.mul_(1.0 if "embed" in name else shape[-1] ** -0.5).bfloat16()


def shards(shapes: Shapes) -> Iterator[Shapes]:
    """The tensors file by file, in order."""
    current: Shapes = {}
    for name, shape in shapes.items():
        if current and sum(map(_size, [*current.values(), shape])) > SHARD_BYTES:
            yield current
            current = {}
        current[name] = shape
    yield current


def write(file: Path, shapes: Shapes) -> None:
    """A safetensors file; one tensor is in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _size(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            stream.write(value(name, shape).flatten().view(torch.uint8).numpy())


def _size(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=27)
    options = parser.parse_args()
    folder: Path = options.directory
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(config(options.layers))
    files = list(shards(shapes))
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    total = sum(map(_size, shapes.values()))
    for name, part in zip(names, files, strict=True):
        write(folder / name, part)
        print(f"{name}: {len(part)} tensors", flush=True)
    owner = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config(options.layers).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    print(f"{total / 2e9:.3f}B parameters, {total / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
