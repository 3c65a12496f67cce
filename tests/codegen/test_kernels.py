"""Every kernel against its torch reference, on hostile shapes and ragged batches."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.cpp.target import TARGETS, CpuTarget, cpu_features, parse_target
from tokenmill.ir import cache, quant
from tokenmill.ir.cache import FORMATS, LARGEST, Batch, Part
from tokenmill.ir.expr import FUNCTIONS
from tokenmill.ir.plan import (
    Attend,
    CacheWrite,
    Embed,
    Experts,
    KernelSpec,
    LatentAttend,
    Linear,
    Norm,
    Pointwise,
    Rope,
    Route,
    SelectRows,
)
from tokenmill.ir.router import RouterSpec

from .emulated import EmulatedKernels, emulator
from .harness import CpuKernels, Kernels, batch_of, e4m3_ladder, inputs_of, used_bytes

SWIGLU = "silu(acc0) * acc1"
LINEARS = (
    *(Linear(130, 203, fmt) for fmt in quant.NAMES),
    *(Linear(33, 160, fmt) for fmt in ("int8", "fp8", "int4-g64")),
    *(Linear(5, 7, fmt) for fmt in ("bf16", "int4-g32")),
    Linear(40, 64, "fp8", bias=True, parts=2, epilogue=SWIGLU),
    Linear(31, 50, "int8", bias=True, epilogue="gelu(acc0) * e1 + e0", extras=("row", "channel")),
)
EXPERTS = (
    Experts(6, 2, 70, 45, "int4-g32", "int4-g32"),
    Experts(4, 3, 48, 64, "int8", "bf16", residual=True),
    Experts(3, 1, 130, 33, "fp32", "fp8", "square(relu(acc0))", gated=False),
    Experts(5, 4, 64, 130, "fp8", "int8", "min(acc0, 7.0) * sigmoid(1.702 * acc0) * (acc1 + 1.0)"),
    Experts(4, 2, 70, 45, "fp32", "fp32", residual=True, biased=True),
    Experts(6, 2, 40, 33, "int4-g32", "int8", "gelu(acc0)", gated=False, biased=True),
)
ATTENDS = (
    *(Attend(6, 2, 24, 20, 0.2, fmt) for fmt in ("fp32", "bf16", "int8")),
    Attend(4, 4, 16, 16, 0.25, "bf16", window=5, softcap=20.0),
    Attend(5, 1, 40, 33, 0.15, "int8", window=70, sinks=True),
    Attend(8, 2, 64, 32, 0.125, "bf16", window=600, sinks=True),
    Attend(6, 2, 24, 20, 0.2, "fp8"),
    Attend(5, 1, 40, 33, 0.15, "fp8", window=70, sinks=True),
    Attend(6, 2, 24, 20, 0.2, "fp32", slopes=True),
    Attend(4, 1, 40, 33, 0.15, "int8", window=70, sinks=True, slopes=True),
    # Of a token more rows than lanes in a kv head, or more in all than a job takes.
    Attend(34, 2, 16, 16, 0.25, "bf16", slopes=True),
    Attend(70, 70, 8, 12, 0.3, "fp32", softcap=20.0),
)
# Absorbed and expanded: up to 8 queries and more; always expanded; always absorbed.  Widths that are whole
# steps are read where the cache has them, others are decoded.
LATENTS = (
    *(
        LatentAttend(6, 20, 12, 40, 24, 0.2, fmt, absorb_below=9)
        for fmt in ("fp32", "bf16", "int8")
    ),
    LatentAttend(6, 20, 12, 40, 24, 0.2, "fp32", "fp32", absorb_below=9),
    LatentAttend(5, 32, 32, 64, 16, 0.1, "int8", "int8", absorb_below=9),
    LatentAttend(20, 70, 8, 130, 17, 0.1, "bf16", "fp32", absorb_below=1),
    LatentAttend(20, 70, 8, 130, 17, 0.1, "int8", "fp32", absorb_below=1000),
    LatentAttend(70, 24, 32, 64, 16, 0.15, "bf16", "int8", absorb_below=1000),
    LatentAttend(6, 20, 12, 40, 24, 0.2, "fp8", absorb_below=9),
    LatentAttend(3, 16, 6, 301, 16, 0.2, "fp8", "int8", absorb_below=1000),  # three scales, a gap
)
ROUTES = tuple(
    Route(experts, router)
    for experts, router in zip(
        (34, 34, 8, 34, 8, 34),
        (
            RouterSpec(2),
            RouterSpec(3, "sigmoid", True, 2, 1, renormalize=True, epsilon=1e-20, scale=2.5),
            RouterSpec(3, "softmax", False, 2, 1, "max", renormalize=False, scale=16.0),
            RouterSpec(4, "identity", True, after="softmax", renormalize=False),
            RouterSpec(1, "identity", after="sigmoid", renormalize=False),
            RouterSpec(2, "sqrt_softplus", True),
        ),
        strict=True,
    )
)
NORMS = (
    Norm(48, 1e-6),
    Norm(37, 1e-5, heads=3, residual=True),
    Norm(50, 1e-5, center=True, bias=True),
    Norm(19, 1e-5, heads=2, center=True, weight=False, residual=True),
)
ROPES = tuple(
    Rope(3, dim, rotary, offset, interleaved)
    for dim, rotary, offset in ((32, 32, 0), (24, 10, 7), (70, 66, 0))
    for interleaved in (False, True)
)
POINTWISES = (
    Pointwise(33, "(x0 - x1) / (2.0 + abs(x2)) - -x0 * (x1 + 1e-3)", ("row", "scalar", "channel")),
    Pointwise(1, "x0", ("row",)),
)
BINARY = {"add", "sub", "mul", "div", "min", "max"}
FUNCTION_KERNELS = {
    name: Pointwise(21, f"{name}(x0, x1)", ("row", "row"))
    if name in BINARY
    else Pointwise(21, f"{name}(x0)", ("row",))
    for name in FUNCTIONS
}
WRITES = (
    *(
        CacheWrite(fmt, parts)
        for fmt in FORMATS
        for parts in (
            (Part("latent", 37, 16), Part("rope", 6, 8)),
            (Part("key", 48, 16), Part("value", 40, 20)),
        )
    ),
    CacheWrite("fp8", (Part("latent", 37, 16), Part("rope", 6, 8, "bf16"))),
)
COPIES = (Embed(11, 37, "fp32"), Embed(11, 37, "bf16"), Embed(11, 37, "int8"), SelectRows(29))
# Out shares the buffer of an operand that is read element by element.
IN_PLACE: dict[KernelSpec, str] = {
    Rope(2, 32, 32): "x",
    Rope(2, 30, 20, 4, True): "x",
    Norm(48, 1e-3, heads=2): "x",
    Norm(48, 1e-3, residual=True): "residual",
    Pointwise(40, "silu(x0) + x1", ("row", "row")): "x1",
    Linear(47, 60, "bf16", epilogue="acc0 + e0", extras=("row",)): "e0",
    Experts(5, 2, 70, 45, "int4-g32", "fp8", residual=True): "residual",
}
SPECS: tuple[KernelSpec, ...] = (
    *LINEARS,
    *EXPERTS,
    *ATTENDS,
    *LATENTS,
    *ROUTES,
    *NORMS,
    *ROPES,
    *POINTWISES,
    *FUNCTION_KERNELS.values(),
    *WRITES,
    *COPIES,
    *IN_PLACE,
)
BATCHES = {
    "none": (),
    "an empty sequence": ((0, 0),),
    "one token": ((0, 1),),
    "decode": ((5, 1), (63, 1), (64, 1), (200, 1)),
    "five tokens": ((3, 5),),
    "a full page": ((0, 64),),
    "over a page boundary": ((60, 9), (0, 0), (127, 2)),
    "ragged": ((0, 70), (130, 1), (64, 33), (7, 3), (63, 2)),
    "many": ((100, 200),),
    "long": ((1030, 3), (250, 5)),
}


SCALED_WRITES = tuple(spec for spec in WRITES if spec.format in LARGEST)
# One or two of each kind, for the narrower vectors: the code differs in simd.h and weights.h only.
PORTABLE: tuple[KernelSpec, ...] = (
    *LINEARS[:7],
    *EXPERTS[2:],
    ATTENDS[0],
    *ATTENDS[2:5],
    ATTENDS[7],
    LATENTS[2],
    LATENTS[4],
    LATENTS[9],
    *SCALED_WRITES,
    COPIES[2],
    *ROUTES[1:3],
    NORMS[3],
    *ROPES[2:4],
    POINTWISES[0],
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[CpuKernels]:
    built = CpuKernels(SPECS, "cpu", IN_PLACE)
    yield built
    built.close()


def check(
    kernels: Kernels,
    spec: KernelSpec,
    sequences: tuple[tuple[int, int], ...],
    threads: int = 1,
    seed: int = 0,
) -> None:
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch, seed)
    got = kernels.run(spec, batch, inputs, threads)
    want = kernels.expected(spec, batch, inputs)
    for name, value in want.items():
        assert_close(spec, got[name], value)


def assert_close(spec: KernelSpec, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to the order of sums.  A kernel that rounds what it computed itself (experts between their
    products, attention to BF16) may round a few numbers otherwise than the reference does: then the error
    is bounded relative to a row's largest value.
    """
    assert got.shape == want.shape
    if not want.numel():
        return
    match spec:
        case Experts(down_format="fp32" | "fp8") | Attend(cache_format="fp32"):
            most, usual = 0.0, 0.0
        case LatentAttend(cache_format="fp32", up_format="fp32"):
            most, usual = 0.0, 0.0
        case Attend() | LatentAttend():
            most, usual = 2.0**-6, 2.0**-7
        case Experts():
            most, usual = 2.0**-8, 2.0**-13
        case _:
            most, usual = 0.0, 0.0
    if most:
        error = (got - want).abs().amax(-1) / want.abs().amax(-1)
        assert error.max() < most
        assert len(error) < 8 or error.median() < usual
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


PER_BATCH = (
    *LINEARS,
    *EXPERTS,
    *ATTENDS,
    *LATENTS,
    *ROUTES,
    *NORMS,
    *ROPES,
    *POINTWISES,
    *COPIES[:3],
)


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("spec", PER_BATCH, ids=str)
def test_matches_reference(
    kernels: CpuKernels, spec: KernelSpec, sequences: tuple[tuple[int, int], ...]
) -> None:
    check(kernels, spec, sequences)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 targets")
@pytest.mark.parametrize("target", ["cpu-x86-64-v3", "cpu-x86-64"])
def test_narrower_targets_match_too(target: str) -> None:
    if not cpu_features().issuperset(parse_target(target).features):
        pytest.skip(f"this machine does not run {target}")
    built = CpuKernels(PORTABLE, target)
    assert built.library.tm_isa().decode() == target.removeprefix("cpu-")
    for spec in PORTABLE:
        for name in ("none", "decode", "ragged"):
            check(built, spec, BATCHES[name])
    for spec in SCALED_WRITES:
        check_written(built, spec, BATCHES["ragged"])
    check_rounding(built)


FOREIGN = [t for t in TARGETS.values() if t.machine != platform.machine()]


@pytest.mark.parametrize("target", FOREIGN, ids=lambda target: target.name)
def test_other_machines_match_too(target: CpuTarget) -> None:
    if not emulator(target):
        pytest.skip(f"it takes qemu-{target.machine} and ziglang")
    built = EmulatedKernels(SPECS, target.name, IN_PLACE)
    for spec in PER_BATCH:
        for name in ("none", "decode", "ragged"):
            check(built, spec, BATCHES[name], threads=2)
    for spec in SCALED_WRITES:
        check_written(built, spec, BATCHES["ragged"])
    check_rounding(built)
    built.close()


SEQUENCES = st.lists(
    st.tuples(st.sampled_from((0, 1, 63, 64, 65, 130)), st.integers(0, 40)), max_size=5
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sequences=SEQUENCES, threads=st.integers(1, 3), seed=st.integers(0, 9))
@pytest.mark.parametrize("spec", [ATTENDS[4], LATENTS[1], EXPERTS[1], LINEARS[5]], ids=str)
def test_matches_reference_on_any_batch(
    kernels: CpuKernels,
    spec: KernelSpec,
    sequences: list[tuple[int, int]],
    threads: int,
    seed: int,
) -> None:
    check(kernels, spec, tuple(sequences), threads, seed)


# Decoding: some tokens of each sequence, as many as leave lanes to keys in some heads and not in others.
FEW = st.lists(
    st.tuples(st.sampled_from((0, 1, 15, 63, 64, 127, 128, 300)), st.integers(0, 6)), max_size=4
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sequences=FEW, prompt=st.integers(0, 40), threads=st.integers(1, 3), seed=st.integers(0, 9))
@pytest.mark.parametrize("spec", ATTENDS, ids=str)
def test_attention_of_few_rows_matches_reference(
    kernels: CpuKernels,
    spec: Attend,
    sequences: list[tuple[int, int]],
    prompt: int,
    threads: int,
    seed: int,
) -> None:
    check(kernels, spec, (*sequences, (7, prompt)), threads, seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_the_tables(kernels: CpuKernels, name: str) -> None:
    special = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1e-3,
        -1e-3,
        1.0,
        -1.0,
        5.0,
        -5.0,
        30.0,
        -30.0,
        87.0,
        -87.0,
    ]
    a = torch.tensor([*special, -104.0, 200.0, -200.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    a = torch.stack([a, *torch.linspace(-12.0, 12.0, 11 * 21).view(11, 21)])
    b = a.roll(5, 0).roll(3, 1)
    spec = FUNCTION_KERNELS[name]
    batch = batch_of((0, len(a)))
    inputs = {"x0": a, "x1": b} if name in BINARY else {"x0": a}
    got = kernels.run(spec, batch, inputs)["out"]
    want = kernels.expected(spec, batch, inputs)["out"]
    if name.startswith("gelu"):  # x (1 + erf x) cancels for negative x, in torch too
        got, want = got.where(a.isfinite(), 0.0), want.where(a.isfinite(), 0.0)
    atol = 1e-6 if name.startswith("gelu") else 1e-7
    torch.testing.assert_close(got, want, rtol=2e-6, atol=atol, equal_nan=True)


def check_written(
    kernels: Kernels, spec: CacheWrite, sequences: tuple[tuple[int, int], ...]
) -> None:
    """Every bit is the reference's, but for the gaps that align what follows."""
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch)
    if inputs and len(batch.positions):
        inputs["p0"][0] = 0.0  # an all-zero tile has scale 0
    got = kernels.cache_of(spec)
    got.fill_(7)
    want = got.clone()
    kernels.run(spec, batch, inputs)
    cache.write(spec.cache, want, batch, list(inputs.values()))
    assert torch.equal(got.where(used_bytes(spec.cache), 0), want.where(used_bytes(spec.cache), 0))


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("spec", WRITES, ids=str)
def test_cache_rows_are_the_references(
    kernels: CpuKernels, spec: CacheWrite, sequences: tuple[tuple[int, int], ...]
) -> None:
    check_written(kernels, spec, sequences)


def check_rounding(kernels: Kernels) -> None:
    """Numbers of E4M3, those halfway between two, and their neighbours, in a tile with scale 1."""
    spec = SCALED_WRITES[-1]
    values = e4m3_ladder()
    rows = values.view(-1, 15)
    p0 = torch.zeros(len(rows), spec.parts[0].width)
    p0[:, 0], p0[:, 1:16] = 448.0, rows
    batch = batch_of((0, len(rows)))
    kernels.run(spec, batch, {"p0": p0, "p1": torch.zeros(len(rows), spec.parts[1].width)})
    at = torch.arange(len(rows))
    pages = batch.block_table[0, at // cache.PAGE].long()
    got = kernels.cache_of(spec)[pages, at % cache.PAGE, 1:16]
    assert torch.equal(got, rows.to(torch.float8_e4m3fn).view(torch.uint8))


def test_fp8_cache_rounds_like_torch(kernels: CpuKernels) -> None:
    check_rounding(kernels)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 15])
@pytest.mark.parametrize("spec", [SCALED_WRITES[0], SCALED_WRITES[-1]], ids=str)
def test_what_is_not_finite_makes_its_tile_so(
    kernels: CpuKernels, spec: CacheWrite, column: int, bad: float
) -> None:
    batch = batch_of((0, 1))
    parts = [torch.ones(1, part.width) for part in spec.parts]
    parts[0][0, column] = bad
    kernels.run(spec, batch, {f"p{i}": part for i, part in enumerate(parts)})
    rows = kernels.cache_of(spec)[batch.block_table[0, 0].long(), :1]
    back = cache.decode(spec.cache, rows)[0]
    assert not back[0, :16].isfinite().any()
    assert torch.equal(back[0, 16:], torch.ones(spec.parts[0].width - 16))


def test_bf16_cache_rounds_like_torch(kernels: CpuKernels) -> None:
    spec = next(w for w in WRITES if w.format == "bf16")
    batch = batch_of((0, 1))
    odd = [1.00390625, 1.01171875, -1.00390625, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40]
    p0 = torch.tensor(odd * 6)[None, : spec.parts[0].width]
    p1 = torch.zeros(1, spec.parts[1].width)
    kernels.run(spec, batch, {"p0": p0, "p1": p1})
    rows = kernels.cache_of(spec)[batch.block_table[0, 0].long(), :1]
    torch.testing.assert_close(
        cache.decode(spec.cache, rows)[0], p0.bfloat16().float(), equal_nan=True
    )


def test_select_rows(kernels: CpuKernels) -> None:
    spec = COPIES[3]
    batch = batch_of((0, 9))
    inputs = {"x": torch.randn(9, spec.width)}
    for rows in ([], [8], [0, 8, 3, 3]):
        at = torch.tensor(rows, dtype=torch.int32)
        got = kernels.run(spec, batch, inputs, rows=at)["out"]
        assert torch.equal(got, inputs["x"][at.long()])


@pytest.mark.parametrize("spec", EXPERTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_all_tokens_on_the_same_experts(kernels: CpuKernels, spec: Experts, tokens: int) -> None:
    batch = batch_of((0, tokens))
    inputs = inputs_of(kernels, spec, batch)
    inputs["ids"][:] = torch.arange(spec.top_k).flip(0) + spec.experts - spec.top_k
    got = kernels.run(spec, batch, inputs)["out"]
    assert_close(spec, got, kernels.expected(spec, batch, inputs)["out"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", LINEARS[:7], ids=str)
def test_what_is_not_finite_stays_so_in_its_row(
    kernels: CpuKernels, spec: Linear, bad: float
) -> None:
    """Rounding activations must not turn it into a number."""
    batch = batch_of((0, 3))
    inputs = inputs_of(kernels, spec, batch)
    whole = kernels.run(spec, batch, inputs)["out"]
    inputs["x"][1, 7] = bad
    got = kernels.run(spec, batch, inputs)["out"]
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], whole[[0, 2]])


def test_weights_of_idle_experts_are_not_read(kernels: CpuKernels) -> None:
    """Idle experts hold NaN; a kernel that multiplied by zero would show it."""
    spec = EXPERTS[1]
    weights = kernels.weights[kernels.index(spec)]
    batch = batch_of((0, 12))
    inputs = inputs_of(kernels, spec, batch)
    inputs["ids"][:] = torch.tensor([0, 3, 2])
    saved = {name: weights[name].clone() for name in ("gate_up_scale", "down_w")}
    for name in saved:
        weights[name][1] = torch.nan
    got = kernels.run(spec, batch, inputs)["out"]
    for name, value in saved.items():
        weights[name].copy_(value)
    assert_close(spec, got, kernels.expected(spec, batch, inputs)["out"])


@pytest.mark.parametrize("tokens", [1, 4, 90])
@pytest.mark.parametrize("spec", IN_PLACE, ids=str)
def test_out_may_be_an_operand(kernels: CpuKernels, spec: KernelSpec, tokens: int) -> None:
    check(kernels, spec, ((0, tokens),))


@pytest.mark.parametrize("spec", [s for s in PER_BATCH if not isinstance(s, Embed)], ids=str)
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_bit(kernels: CpuKernels, spec: KernelSpec, threads: int) -> None:
    batch = batch_of((0, 70), (130, 1), (64, 33), (7, 3), (63, 2))
    inputs = inputs_of(kernels, spec, batch)
    alone = kernels.run(spec, batch, inputs, threads=1)
    together = kernels.run(spec, batch, inputs, threads=threads)
    for name, value in alone.items():
        assert torch.equal(value, together[name])


@pytest.mark.parametrize("spec", [*LINEARS, *EXPERTS, *NORMS, *ROUTES, *ATTENDS, *LATENTS], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_token_has_the_same_bits_alone_and_in_a_batch(
    kernels: CpuKernels, spec: KernelSpec, size: int
) -> None:
    """Also: a prompt has the same bits whole and in pieces (within one algorithm of latent attention)."""
    new = 8 if isinstance(spec, LatentAttend) and spec.absorb_below == 9 else 77
    whole = batch_of((100, new))
    inputs = inputs_of(kernels, spec, whole)
    want = kernels.run(spec, whole, inputs)
    for at in range(0, new - size, max(1, new // 6)):
        piece = Batch(
            whole.positions[at : at + size],
            torch.tensor([0, size], dtype=torch.int32),
            whole.block_table,
        )
        part = {name: value[at : at + size] for name, value in inputs.items()}
        got = kernels.run(spec, piece, part)
        for name, value in got.items():
            assert torch.equal(value, want[name][at : at + size])


ATTENTIONS = (*ATTENDS, *LATENTS)


@pytest.mark.parametrize("spec", ATTENTIONS, ids=str)
@pytest.mark.parametrize("sequences", [((1100, 40),), ((1050, 1), (3, 1)), ((1535, 1),)], ids=str)
def test_splitting_keys_between_threads_does_not_change_a_bit(
    kernels: CpuKernels, spec: Attend | LatentAttend, sequences: tuple[tuple[int, int], ...]
) -> None:
    """Two threads share spans of keys, five single blocks, one walks all."""
    batch = batch_of(*sequences)
    inputs = inputs_of(kernels, spec, batch)
    want = kernels.expected(spec, batch, inputs)["out"]
    alone = kernels.run(spec, batch, inputs)["out"]
    assert_close(spec, alone, want)
    for threads in (2, 5):
        assert torch.equal(kernels.run(spec, batch, inputs, threads)["out"], alone)


@pytest.mark.parametrize("spec", ATTENTIONS, ids=str)
def test_a_long_prompt_has_the_same_bits_in_pieces(
    kernels: CpuKernels, spec: Attend | LatentAttend
) -> None:
    cut = 8 if isinstance(spec, LatentAttend) and spec.absorb_below == 9 else 90
    whole = batch_of((1000, cut))
    inputs = inputs_of(kernels, spec, whole)
    want = kernels.run(spec, whole, inputs)["out"]
    for lo, hi in ((0, 1), (1, 3), (3, cut - 1), (cut - 1, cut)):
        piece = Batch(
            whole.positions[lo:hi],
            torch.tensor([0, hi - lo], dtype=torch.int32),
            whole.block_table,
        )
        part = {name: value[lo:hi] for name, value in inputs.items()}
        got = kernels.run(spec, piece, part, threads=3)["out"]
        assert torch.equal(got, want[lo:hi])
