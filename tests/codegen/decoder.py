"""A small decoder as a plan: both kinds of attention, experts, a tied-width head, one extern step."""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenmill.ir.cache import CacheSpec
from tokenmill.ir.plan import (
    Attend,
    Buffer,
    CacheWrite,
    Capacity,
    Embed,
    Experts,
    Extern,
    KernelSpec,
    LatentAttend,
    Linear,
    Norm,
    Operand,
    Plan,
    Pointwise,
    Rope,
    Route,
    Rows,
    SelectRows,
    Step,
)
from tokenmill.ir.router import RouterSpec
from tokenmill.passes.chain import join

from .harness import DTYPES, weights_of

VOCAB, HIDDEN, POSITIONS = 50, 40, 256
CAPACITY = Capacity(tokens=80, rows=4)
GQA = Attend(4, 2, 16, 16, 0.25, "int8", window=70)
MLA = LatentAttend(3, 12, 8, 24, 10, 0.22, "fp8", absorb_below=20)
ROUTE = Route(6, RouterSpec(2, "sigmoid", True, 2, 1, scale=2.0))
EXPERTS = Experts(6, 2, HIDDEN, 24, "int4-g32", "fp8", residual=True)
SQUARE = Extern("aten.square.default", ("x0",), '[[{"operand": "x0"}], {}]', "f32", (-1, HIDDEN))


class _Builder:
    """Collects steps; every activation has a buffer of its own."""

    def __init__(self) -> None:
        inputs = ("ids", "positions", "rows", "starts", "block_table")
        self.buffers = {n: Buffer(n, "input", "i32") for n in inputs}
        self.steps: list[Step] = []
        self.caches: list[CacheSpec] = []
        self.offset = 0

    def activation(self, name: str, width: int, rows: Rows = "tokens", dtype: str = "f32") -> str:
        self.buffers[name] = Buffer(name, "arena", dtype, rows, width, offset=self.offset)
        self.offset += -(-self.buffers[name].bytes(CAPACITY) // 64) * 64
        return name

    def step(
        self, where: str, spec: KernelSpec, rows: Rows = "tokens", **bind: str | Operand
    ) -> None:
        bound = {p: Operand(b) if isinstance(b, str) else b for p, b in bind.items()}
        for param in spec.params:
            if param == "cache":
                cache = replace(spec.cache, name=bound[param].buffer)
                if cache not in self.caches:
                    self.caches.append(cache)
                self.buffers[cache.name] = Buffer(cache.name, "cache", "u8", width=cache.row_bytes)
            elif param not in bound:
                dtype = weight_dtype(spec, param)
                self.buffers[f"{where}.{param}"] = Buffer(f"{where}.{param}", "weight", dtype)
                bound[param] = Operand(f"{where}.{param}")
        self.steps.append(Step(spec, bound, rows, where))


def weight_dtype(spec: KernelSpec, param: str) -> str:
    """What a plan calls the dtype of a weight."""
    weights = weights_of(spec, torch.Generator().manual_seed(0), "cuda")
    return next(name for name, dtype in DTYPES.items() if dtype == weights[param].dtype)


def decoder_plan() -> Plan:
    b = _Builder()
    act = b.activation
    angles = Embed(POSITIONS, 4, "fp32")
    b.step("embed", Embed(VOCAB, HIDDEN, "int8"), index="ids", out=act("x", HIDDEN))
    b.step("cos", angles, index="positions", out=act("cos", 4))
    b.step("sin", angles, index="positions", out=act("sin", 4))

    b.step("0.norm", Norm(HIDDEN, 1e-6), x="x", out=act("x0", HIDDEN))
    b.step("0.qkv", Linear(128, HIDDEN, "int8", bias=True), x="x0", out=act("qkv", 128))
    key = Operand("qkv", 64)
    b.step("0.q_rope", Rope(4, 16, 8), x="qkv", cos="cos", sin="sin", out="qkv")
    b.step("0.k_rope", Rope(2, 16, 8), x=key, cos="cos", sin="sin", out=key)
    write = CacheWrite(GQA.cache_format, GQA.cache.parts)
    b.step("0.write", write, p0=key, p1=Operand("qkv", 96), cache="cache0")
    b.step("0.attend", GQA, q="qkv", cache="cache0", out=act("a0", 64))
    add = Linear(HIDDEN, 64, "bf16", epilogue="acc0 + e0", extras=("row",))
    b.step("0.out", add, x="a0", e0="x", out=act("x1", HIDDEN))
    b.step("0.square", SQUARE, x0="x1", out=act("sq", HIDDEN))
    mixed = Pointwise(HIDDEN, "x0 + 0.1 * tanh(x1)", ("row", "row"))
    b.step("0.mix", mixed, x0="x1", x1="sq", out=act("x2", HIDDEN))

    b.step("1.norm", Norm(HIDDEN, 1e-6), x="x2", out=act("n1", HIDDEN))
    b.step("1.q", Linear(60, HIDDEN, "fp8"), x="n1", out=act("q1", 60))
    b.step("1.kv", Linear(32, HIDDEN, "fp32"), x="n1", out=act("kv1", 32))
    interleaved = Rope(3, 20, 8, 12, interleaved=True)
    b.step("1.q_rope", interleaved, x="q1", cos="cos", sin="sin", out="q1")
    k_pe = Operand("kv1", 24)
    b.step("1.k_rope", Rope(1, 8, 8, interleaved=True), x=k_pe, cos="cos", sin="sin", out=k_pe)
    b.step("1.c_norm", Norm(24, 1e-6), x="kv1", out=act("c1", 24))
    latent = CacheWrite(MLA.cache_format, MLA.cache.parts)
    b.step("1.write", latent, p0="c1", p1=k_pe, cache="cache1")
    b.steps[-4:] = join(b.steps[-4:])
    b.step("1.attend", MLA, q="q1", cache="cache1", out=act("a1", 30))
    b.step("1.out", Linear(HIDDEN, 30, "int4-g32"), x="a1", out=act("o1", HIDDEN))
    summed = Norm(HIDDEN, 1e-6, residual=True)
    b.step("1.norm2", summed, x="o1", residual="x2", sum=act("x3", HIDDEN), out=act("n2", HIDDEN))
    b.step("1.gate", Linear(6, HIDDEN, "fp32"), x="n2", out=act("logits6", 6))
    picked = {"ids": act("e_ids", 2, dtype="i32"), "weights": act("e_weights", 2)}
    b.step("1.route", ROUTE, logits="logits6", **picked)
    b.step("1.experts", EXPERTS, x="n2", residual="x3", **picked, out=act("x4", HIDDEN))

    last = act("last", HIDDEN, "rows")
    b.step("rows", SelectRows(HIDDEN), "rows", x="x4", index="rows", out=last)
    b.step("norm", Norm(HIDDEN, 1e-6, center=True, bias=True), "rows", x=last, out=last)
    b.step("head", Linear(VOCAB, HIDDEN, "int8"), "rows", x=last, out=act("out", VOCAB, "rows"))
    return Plan(
        b.buffers, tuple(b.steps), tuple(b.caches), CAPACITY, b.offset, "out", VOCAB, POSITIONS
    )
