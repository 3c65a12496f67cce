"""What gpu.py measures: kernels by shape and format, who they are measured against, and how sizes count.

A suite is a plan of independent steps, built for some buckets only.  A case is one line of the result: one
contender on one problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from numpy.typing import NDArray
from tokenmill.ir import packing, quant
from tokenmill.ir.plan import (
    ABSORB_BELOW,
    Buffer,
    Capacity,
    Embed,
    Experts,
    KernelSpec,
    LatentAttend,
    Linear,
    Norm,
    Operand,
    Plan,
    Pointwise,
    Route,
    SelectRows,
    Step,
    operand_width,
)
from tokenmill.ir.router import RouterSpec
from tokenmill.passes.narrow import narrow
from tokenmill.runtime.batch import Batch

Kind: TypeAlias = Literal[
    "card", "check", "model", "gemm", "experts", "mla", "prompt", "end to end"
]
Parts: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

OURS = "ours "  # how the names of our contenders begin
PAGE = 64

# (N, K) of DeepSeek-V3's projections.
SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))
ROWS = (1, 16, 64, 512, 4096)
FORMATS = ("bf16", "fp8", "int4-g128")
POINTED, POINTED_ROWS = ("bf16", "fp8"), (512, 4096)  # also read by pointers, for comparison
GEMM_PEERS = ("cublas bf16", "scaled_mm fp8", "scaled_mm fp8 blocks")

# Experts, those that a token visits, hidden, inner width.
MIXTURES = {"deepseek-v3": (256, 8, 7168, 2048), "qwen3-30b": (128, 8, 2048, 768)}
TOKENS = (1, 8, 64, 512, 4096)
COMPILED_TOKENS = (1, 64, 512)

HEADS = (16, 128)
CONTEXTS = (1024, 4096, 32768)
SEQUENCES = (1, 32, 128)
LATENT_FORMATS = ("bf16", "int8", "fp8")
NOPE, ROPE, LATENT, VALUE = 128, 64, 512, 128
EXPANDED_MOST = 4 << 30  # bytes of keys and values of all heads

CHUNKS = (512, 4096)  # new tokens of a sequence
BEFORE = (0, 4096)  # and what of it is in the cache already
CHUNK_FORMATS = ("bf16", "fp8")
ABSORBED = "absorbed bf16"  # ours, if it did not expand

MODEL_FORMATS = ("bf16", "int4", "fp8")
MODEL_STEP, MODEL_ROWS, MODEL_PROMPT, MODEL_DECODED = 32, 4, 96, 16
END_FORMATS = ("bf16", "int4", "fp8")
END_PEERS = ("transformers eager bf16", "transformers compiled bf16")
PROMPT, DECODED, TOGETHER, LAYERS = 512, 32, 32, 27

_DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Case:
    """``contender`` on the problem ``what`` of ``size`` tokens; it may take ``seconds``.

    Ours are step ``step`` of the suite's plan; ``context`` are the keys of each sequence (mla), or those
    before its new tokens (prompt).
    """

    kind: Kind
    what: str
    contender: str
    size: int = 0
    suite: str = ""
    step: int = -1
    context: int = 0
    seconds: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.what}/{self.contender}" + (f"/{self.size}" if self.size else "")

    @property
    def ours(self) -> bool:
        return self.contender.startswith(OURS)


@dataclass(frozen=True)
class Suite:
    """Kernels to build for batches of ``buckets`` tokens; ``sequences`` at most, or as many as tokens.

    With ``pointers``, a program computes one tile of a large product and reads its operands by pointers,
    where it is usual that programs go from tile to tile and have tensor descriptors.
    """

    name: str
    specs: tuple[KernelSpec, ...]
    buckets: tuple[int, ...]
    positions: int = PAGE
    pointers: bool = False
    sequences: int = 0

    def plan(self) -> Plan:
        """A step per spec on buffers of its own, activations narrowed as in a model's plan."""
        most = max(self.buckets)
        capacity = Capacity(tokens=most, rows=self.sequences or most)
        return narrow(plan_of(self.specs, capacity, self.positions))


# --- suites -----------------------------------------------------------------------------------------


def gemm_suite() -> Suite:
    specs = tuple(Linear(n, k, fmt) for n, k in SHAPES for fmt in FORMATS)
    return Suite("gemm", specs, ROWS)


def pointers_suite() -> Suite:
    specs = tuple(Linear(n, k, fmt) for n, k in SHAPES for fmt in POINTED)
    return Suite("gemm-pointers", specs, POINTED_ROWS, pointers=True)


def experts_suite() -> Suite:
    """Of each mixture its router, then its experts in every format."""
    specs: list[KernelSpec] = []
    for experts, top_k, hidden, inter in MIXTURES.values():
        specs.append(Route(experts, RouterSpec(top_k)))
        specs += [Experts(experts, top_k, hidden, inter, fmt, fmt) for fmt in FORMATS]
    return Suite("experts", tuple(specs), TOKENS)


def latent_spec(heads: int, fmt: str) -> LatentAttend:
    scale, below = (NOPE + ROPE) ** -0.5, ABSORB_BELOW["cuda"]
    return LatentAttend(heads, NOPE, ROPE, LATENT, VALUE, scale, fmt, absorb_below=below)


def mla_suite() -> Suite:
    specs = tuple(latent_spec(heads, fmt) for heads in HEADS for fmt in LATENT_FORMATS)
    return Suite("mla", specs, SEQUENCES, max(CONTEXTS))


def prompt_suite() -> Suite:
    """Of each number of heads all formats, then one that absorbs whatever comes."""
    specs: list[KernelSpec] = []
    for heads in HEADS:
        specs += [latent_spec(heads, fmt) for fmt in CHUNK_FORMATS]
        specs.append(replace(latent_spec(heads, "bf16"), absorb_below=1 + max(CHUNKS)))
    return Suite("prompt", tuple(specs), CHUNKS, max(BEFORE) + max(CHUNKS), sequences=64)


SUITES = {
    suite.name: suite
    for suite in (gemm_suite(), pointers_suite(), experts_suite(), mla_suite(), prompt_suite())
}


def plan_of(specs: Sequence[KernelSpec], capacity: Capacity, positions: int) -> Plan:
    buffers = {n: Buffer(n, "input", "i32") for n in ("ids", "rows")}
    caches, steps, offset = [], [], 0
    for i, spec in enumerate(specs):
        weights, bind = weight_parts(spec), {}
        rows: Literal["tokens", "rows"] = "rows" if isinstance(spec, SelectRows) else "tokens"
        for param in spec.params:
            name = f"{i}.{param}"
            if param == "index":
                name = "rows" if isinstance(spec, SelectRows) else "ids"
            elif param in weights:
                shape, dtype = weights[param]
                buffers[name] = Buffer(name, "weight", _DTYPES[dtype], shape=shape)
            elif param == "cache":
                caches.append(replace(spec.cache, name=name))
                buffers[name] = Buffer(name, "cache", "u8", width=spec.cache.row_bytes)
            else:
                width = operand_width(spec, param)
                dtype = "i32" if param == "ids" else "f32"
                buffers[name] = Buffer(name, "arena", dtype, rows, width, offset=offset)
                offset += -(-buffers[name].bytes(capacity) // 256) * 256
            bind[param] = Operand(name)
        steps.append(Step(spec, bind, rows, f"case {i}"))
    return Plan(
        buffers, tuple(steps), tuple(caches), capacity, offset, "", 1, positions, device="cuda"
    )


def weight_parts(spec: KernelSpec) -> Parts:
    """Shapes and dtypes of a kernel's weights, in the order of a GPU."""
    match spec:
        case Embed():
            return matrix(spec.format, spec.vocab, spec.width)
        case Norm():
            wanted = {"weight": spec.weight, "bias": spec.bias}
            return {name: ((spec.width,), torch.float32) for name, there in wanted.items() if there}
        case Linear():
            rows = spec.parts * spec.n
            extras = [f"e{i}" for i, kind in enumerate(spec.extras) if kind == "channel"]
            vectors = {"bias": rows} if spec.bias else {}
            vectors |= dict.fromkeys(extras, spec.n)
            return matrix(spec.format, rows, spec.k) | {
                name: ((size,), torch.float32) for name, size in vectors.items()
            }
        case Pointwise():
            channels = [f"x{i}" for i, kind in enumerate(spec.inputs) if kind == "channel"]
            return dict.fromkeys(channels, ((spec.width,), torch.float32))
        case LatentAttend():
            up = matrix(spec.up_format, spec.heads, spec.nope, spec.latent, prefix="w_uk_")
            return up | matrix(spec.up_format, spec.heads, spec.value, spec.latent, prefix="w_uv_")
        case Experts():
            rows = (2 if spec.gated else 1) * spec.inter
            up = (spec.experts, rows, spec.hidden)
            down = (spec.experts, spec.hidden, spec.inter)
            return matrix(spec.gate_up_format, *up, prefix="gate_up_") | matrix(
                spec.down_format, *down, prefix="down_"
            )
    return {}


def matrix(fmt: str, *shape: int, prefix: str = "") -> Parts:
    """The parts of a weight ``[..., n, k]``.

    >>> matrix("int4-g128", 256, 512)["q"]
    ((256, 256), torch.uint8)
    """
    form = quant.parse(fmt)
    parts = quant.quantize(torch.empty(shape, device="meta"), form)
    if form.group:
        parts["q"] = packing.pack_halves(parts["q"])
    return {prefix + name: (tuple(part.shape), part.dtype) for name, part in parts.items()}


# --- cases ------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """All but the checks of single kernels, which the built directory lists; the most important first."""
    return [
        Case("card", "peaks", "torch", seconds=10),
        *(Case("model", "tiny_deepseek", OURS + fmt, seconds=8) for fmt in MODEL_FORMATS),
        *gemm_cases(),
        *experts_cases(),
        *mla_cases(),
        *prompt_cases(),
        *end_cases(),
        *compiled_cases(),
    ]


def gemm_cases() -> Iterator[Case]:
    for i, (n, k) in enumerate(SHAPES):
        for j, fmt in enumerate(FORMATS):
            for rows in ROWS:
                step = i * len(FORMATS) + j
                yield Case("gemm", f"{n}x{k}", OURS + fmt, rows, "gemm", step)
        for j, fmt in enumerate(POINTED):
            for rows in POINTED_ROWS:
                step, name = i * len(POINTED) + j, f"{OURS}{fmt} pointers"
                yield Case("gemm", f"{n}x{k}", name, rows, "gemm-pointers", step)
        for peer in GEMM_PEERS:
            yield from (Case("gemm", f"{n}x{k}", peer, rows) for rows in ROWS)


def experts_cases() -> Iterator[Case]:
    for i, mixture in enumerate(MIXTURES):
        for j, fmt in enumerate(FORMATS):
            step = i * (1 + len(FORMATS)) + 1 + j
            for tokens in TOKENS:
                yield Case("experts", mixture, OURS + fmt, tokens, "experts", step, seconds=2)
        for tokens in TOKENS:
            yield Case("experts", mixture, "grouped_mm bf16", tokens, seconds=2)


def compiled_cases() -> Iterator[Case]:
    for mixture in MIXTURES:
        for tokens in COMPILED_TOKENS:
            yield Case("experts", mixture, "compiled grouped_mm bf16", tokens, seconds=25)


def mla_cases() -> Iterator[Case]:
    for heads in HEADS:
        for context in CONTEXTS:
            what = f"{heads} heads, {context}"
            for fmt in LATENT_FORMATS:
                step = HEADS.index(heads) * len(LATENT_FORMATS) + LATENT_FORMATS.index(fmt)
                for batch in SEQUENCES:
                    yield Case("mla", what, OURS + fmt, batch, "mla", step, context)
            for batch in SEQUENCES:
                yield Case("mla", what, "absorbed bf16", batch, context=context)
                if 2 * batch * heads * context * (NOPE + ROPE + VALUE) < EXPANDED_MOST:
                    yield Case("mla", what, "expanded sdpa bf16", batch, context=context)


def prompt_cases() -> Iterator[Case]:
    contenders = (*CHUNK_FORMATS, ABSORBED)
    for i, heads in enumerate(HEADS):
        for before in BEFORE:
            what = f"{heads} heads, after {before}"
            for j, contender in enumerate(contenders):
                for chunk in CHUNKS:
                    step = i * len(contenders) + j
                    yield Case("prompt", what, OURS + contender, chunk, "prompt", step, before, 2)
            if not before:
                yield from (Case("prompt", what, "expanded sdpa bf16", chunk) for chunk in CHUNKS)


def end_cases() -> Iterator[Case]:
    for fmt in END_FORMATS:
        yield Case("end to end", "deepseek-v2-lite", OURS + fmt, suite=f"end-{fmt}", seconds=40)
    for peer in END_PEERS:
        yield Case("end to end", "deepseek-v2-lite", peer, seconds=60)


def lite_config(layers: int = LAYERS) -> dict[str, object]:
    """DeepSeek-V2-Lite's shape, as a transformers configuration."""
    return {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }


def model_batches(ids: NDArray[Any]) -> list[Batch]:
    """The prompt in pieces, then token by token; logits of the last tokens of each step."""
    pages = list(range(-(-len(ids) // PAGE)))
    sizes = [MODEL_STEP] * (MODEL_PROMPT // MODEL_STEP) + [1] * (len(ids) - MODEL_PROMPT)
    batches, at = [], 0
    for size in sizes:
        rows = list(range(max(0, size - MODEL_ROWS), size))
        batches.append(Batch.of([(ids[at : at + size].tolist(), at, pages)], rows))
        at += size
    return batches
