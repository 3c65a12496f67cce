"""Checkpoints that are quantized already: the numbers, and the bits where ours can hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenmill.capture.checkpoint import open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.errors import BadWeight, Unsupported
from tokenmill.ir import quant
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor

from .models import eager

# What a writer makes of a matrix: tensors by the last part of their names, and what they stand for.
Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]

HIDDEN, INTER = 256, 128


def words(values: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned integers as int32 words along ``dim``, bit by bit in plain Python's arithmetic."""
    per_word = 32 // bits
    values = values.movedim(dim, -1).long()
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % per_word))
    groups = values.unflatten(-1, (-1, per_word))
    if order is not None:
        groups = groups[..., list(order)]
    total = sum(groups[..., i] << (bits * i) for i in range(per_word))
    return torch.where(total >= 2**31, total - 2**32, total).int().movedim(-1, dim).contiguous()


def grouped(
    w: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``[N, K]`` from 0 on, zeros ``[N, G]`` and scales ``[N, G]``."""
    top, blocks = 2**bits - 1, w.unflatten(1, (-1, group))
    low, high = blocks.amin(-1), blocks.amax(-1)
    if symmetric:
        scale = (blocks.abs().amax(-1) / (top // 2)).to(dtype)
        zero = torch.full_like(low, 2 ** (bits - 1))
    else:
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top)
    q = (blocks / scale.float()[..., None]).round() + zero[..., None]
    return q.clamp(0, top).flatten(1).long(), zero.long(), scale


def value(q: Tensor, zero: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    return (q - zero[:, index]).float() * scale.float()[:, index]


def fp8(w: Tensor, dtype: torch.dtype = torch.float32) -> Written:
    n, k = w.shape
    fmt = quant.parse("fp8")
    scale = quant.scales(w, fmt)
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.log2().ceil())
    scale = scale.to(dtype)
    each = quant.spread(scale, fmt, (n, k))
    q = (w / each).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scale}, q.float() * each


def compressed(
    bits: int,
    group: int,
    symmetric: bool,
    shuffled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Writer:
    def write(w: Tensor) -> Written:
        n, k = w.shape
        width = group if group > 0 else k
        q, zero, scale = grouped(w, bits, width, symmetric, dtype)
        index = torch.arange(k) // width
        made = {"weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if shuffled:
            index = index[torch.randperm(k)]
            made["weight_g_idx"] = index.int()
        if not symmetric:
            made["weight_zero_point"] = words(zero, bits, 0)
        return made | {"weight_packed": words(q, bits, 1)}, value(q, zero, scale, index)

    return write


def plain_int8(w: Tensor) -> Written:
    q, zero, scale = grouped(w, 8, w.shape[1], True, torch.float32)
    index = torch.zeros(w.shape[1], dtype=torch.long)
    signed = (q - 128).to(torch.int8)
    return {"weight": signed, "weight_scale": scale}, value(q, zero, scale, index)


def channel_fp8(w: Tensor) -> Written:
    scale = w.abs().amax(1, keepdim=True) / 448
    q = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


def awq(w: Tensor) -> Written:
    q, zero, scale = grouped(w, 4, 32, False, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    made = {
        "qweight": words(q.T, 4, 1, order),
        "qzeros": words(zero.T, 4, 1, order),
        "scales": scale.T.contiguous(),
    }
    return made, value(q, zero, scale, torch.arange(w.shape[1]) // 32)


def gptq(bits: int, symmetric: bool, version: int, shuffled: bool = False) -> Writer:
    def write(w: Tensor) -> Written:
        dtype = torch.bfloat16 if symmetric else torch.float16
        q, zero, scale = grouped(w, bits, 64, symmetric, dtype)
        index = torch.arange(w.shape[1]) // 64
        if shuffled:
            index = index[torch.randperm(w.shape[1])]
        stored = (zero - 1) % 2**bits if version == 1 else zero
        made = {
            "qweight": words(q.T, bits, 0),
            "qzeros": words(stored.T, bits, 1),
            "scales": scale.T.contiguous(),
            "g_idx": index.int(),
        }
        return made, value(q, zero, scale, index)

    return write


def ct(kind: str, **how: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": how}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": 64}
# Per case: the config, the writer, and the format of ours that holds the same bits.
CASES: dict[str, tuple[dict[str, Any], Writer, str | None]] = {
    "fp8": (FP8, fp8, "fp8"),
    "fp8-bf16-scales": (FP8, lambda w: fp8(w, torch.bfloat16), "fp8"),
    "fp8-e8m0-scales": (FP8, lambda w: fp8(w, torch.float8_e8m0fnu), "fp8"),
    "ct-int4": (ct("pack-quantized", **INT4, group_size=32), compressed(4, 32, True), "int4-g32"),
    "ct-int4-fp16-scales": (
        ct("pack-quantized", **INT4, group_size=128), compressed(4, 128, True, dtype=torch.float16), None,
    ),
    "ct-int4-zeros": (ct("pack-quantized", **INT4, group_size=64), compressed(4, 64, False), None),
    "ct-int4-order": (ct("pack-quantized", **INT4, group_size=64), compressed(4, 64, True, True), None),
    "ct-int8": (ct("pack-quantized", num_bits=8, type="int"), compressed(8, -1, True), "int8"),
    "ct-plain-int8": (ct("int-quantized", num_bits=8, type="int"), plain_int8, "int8"),
    "ct-fp8": (ct("float-quantized", num_bits=8, type="float", strategy="channel"), channel_fp8, None),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, None),
    "gptq": (GPTQ4 | {"sym": True}, gptq(4, True, 1), "int4-g64"),
    "gptq-lies": (GPTQ4 | {"sym": True, "checkpoint_format": "gptq"}, gptq(4, True, 2), "int4-g64"),
    "gptq-zeros": (GPTQ4 | {"sym": False}, gptq(4, False, 1), None),
    "gptq-v2": (GPTQ4 | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq(4, False, 2, True), None),
    "gptq-8": (GPTQ4 | {"bits": 8, "sym": False}, gptq(8, False, 1), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4,
        moe_intermediate_size=INTER, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    path = tmp_path_factory.mktemp("models") / "plain"
    model.save_pretrained(path)
    return path


def rewritten(plain: Path, path: Path, how: dict[str, Any], write: Writer) -> tuple[Path, Path]:
    """A quantized copy, and a plain one of the numbers that it stands for."""
    tensors = load_file(plain / "model.safetensors")
    packed, meant = dict(tensors), dict(tensors)
    for name, w in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        del packed[name]
        made, meant[name] = write(w)
        packed |= {f"{name.removesuffix('weight')}{n}": t.contiguous() for n, t in made.items()}
    config = json.loads((plain / "config.json").read_text())
    for folder, content, extra in (
        ("packed", packed, {"quantization_config": how}),
        ("meant", meant, {}),
    ):
        (path / folder).mkdir()
        save_file(content, path / folder / "model.safetensors", {"format": "pt"})
        (path / folder / "config.json").write_text(json.dumps(config | extra))
    return path / "packed", path / "meant"


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_bits(case: str, plain: Path, tmp_path: Path) -> None:
    how, write, format = CASES[case]
    packed, meant = rewritten(plain, tmp_path, how, write)
    wanted = open_checkpoint(meant).load().state_dict()
    checkpoint = open_checkpoint(packed)
    streamed = checkpoint.stream()
    assert streamed.note == ""
    whole = checkpoint.load().state_dict()
    formats = set()
    for name, source in streamed.sources.items():
        torch.testing.assert_close(source.whole(), wanted[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(whole[name], source.whole())
        if source.member:
            assert torch.equal(source.member(2), source.whole()[2])
        if source.stored:
            found = next(iter(source.stored)).rpartition(".")[0]
            parts = {n.rpartition(".")[2]: s.whole() for n, s in source.stored.items()}
            fmt = quant.parse(found)
            again = quant.dequantize(parts, fmt, source.like.shape[-1])
            torch.testing.assert_close(again, wanted[name], rtol=1e-6, atol=1e-7)
            formats.add(found)
            likes = {n.rpartition(".")[2]: s.like for n, s in source.stored.items()}
            reference = quant.quantize(torch.zeros(source.like.shape), fmt)
            for part, like in likes.items():
                assert (like.shape, like.dtype) == (reference[part].shape, reference[part].dtype)
                assert (like.shape, like.dtype) == (parts[part].shape, parts[part].dtype)
    assert formats == ({format} if format else set())
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert bool(streamed.sources[experts].stored) is (format is not None)


def test_a_compile_keeps_the_bits(plain: Path, tmp_path: Path) -> None:
    packed, meant = rewritten(plain, tmp_path, FP8, lambda w: fp8(w, torch.bfloat16))
    streamed = open_checkpoint(packed).stream()
    program = capture_pretrained(streamed.model, "model", streamed.sources)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = eager(open_checkpoint(meant).load(), ids)
    assert (program.run(ids) - wanted).abs().max() / wanted.std() < 1e-4
    run_passes(program, pipeline(Recipe(weights="fp8", kv="fp32")))
    assert (program.run(ids) - wanted).abs().max() / wanted.std() < 0.05  # the head is in bf16
    stored = load_file(packed / "model.safetensors")
    experts = program.weights["model.layers.0.mlp.experts.gate_up_proj.fp8.q"]
    for i, name in enumerate(("gate_proj", "up_proj")):
        rows = experts[3, i * INTER : (i + 1) * INTER].view(torch.uint8)
        assert torch.equal(
            rows, stored[f"model.layers.0.mlp.experts.3.{name}.weight"].view(torch.uint8)
        )


def spoilt(change: Callable[[dict[str, Tensor]], None]) -> Writer:
    def write(w: Tensor) -> Written:
        made, meant = compressed(4, 32, True)(w)
        change(made)
        return made, meant

    return write


INT4_CONFIG = CASES["ct-int4"][0]
WRONG: dict[str, tuple[dict[str, Any], Writer, str]] = {
    "unknown": ({"quant_method": "bitsandbytes"}, fp8, "bitsandbytes"),
    "bits": (
        ct("pack-quantized", num_bits=8, type="int", group_size=32), compressed(4, 32, True), "4 bits",
    ),
    "group": (
        ct("pack-quantized", **INT4, group_size=64), compressed(4, 32, True), "groups of 64",
    ),
    "scales": (
        INT4_CONFIG, spoilt(lambda t: t.update(weight_scale=t["weight_scale"][1:])), "weight_scale is",
    ),
    "shape": (
        INT4_CONFIG, spoilt(lambda t: t.update(weight_shape=t["weight_shape"] + 8)), "words for",
    ),
    "words": (INT4_CONFIG, spoilt(lambda t: t.__delitem__("weight_packed")), "there is no weight"),
    "blocks": (FP8 | {"weight_block_size": [64, 64]}, fp8, "weight_scale_inv is"),
    "no scales": (FP8, lambda w: ({"weight": w.to(torch.float8_e4m3fn)}, w), "no scale"),
    "fmt": (FP8 | {"fmt": "e5m2"}, fp8, "e5m2"),
    "awq": ({"quant_method": "awq", "version": "gemv"}, awq, "gemv"),
    "gptq": (GPTQ4 | {"sym": True}, gptq(4, False, 1), "zero points differ"),
    "marlin": (GPTQ4 | {"checkpoint_format": "marlin"}, gptq(4, True, 1), "marlin"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_known_is_refused(case: str, plain: Path, tmp_path: Path) -> None:
    how, write, said = WRONG[case]
    packed, _ = rewritten(plain, tmp_path, how, write)
    with pytest.raises(Unsupported, match=said) as caught:
        open_checkpoint(packed).stream()
    assert "bf16 or fp32 checkpoint" in str(caught.value)


def test_a_scale_that_is_no_number(plain: Path, tmp_path: Path) -> None:
    def broken(w: Tensor) -> Written:
        made, meant = fp8(w, torch.float8_e8m0fnu)
        made["weight_scale_inv"].view(torch.uint8)[0, 0] = 255
        return made, meant

    packed, _ = rewritten(plain, tmp_path, FP8, broken)
    with pytest.raises(BadWeight, match="weight_scale_inv"):
        open_checkpoint(packed).stream()
