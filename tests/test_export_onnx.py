"""ONNX exports, run by onnxruntime and compared with the program that they came from."""

from __future__ import annotations

import hashlib
import json
import operator
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill import Recipe, errors
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.cli import app
from tokenmill.ir import expr, ops, quant
from tokenmill.ir.plan import gqa_cache
from tokenmill.ir.program import Program, Weights
from tokenmill.ir.router import SCORES, RouterSpec
from tokenmill.ir.router import route as route_reference
from tokenmill.passes.pipeline import pipeline, run_passes
from torch import Tensor
from typer.testing import CliRunner

from .models import hand_written, pretrained
from .passes.build import Builder, decoder

onnx_ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from tokenmill.export import onnx  # noqa: E402
from tokenmill.export._onnx_check import compare, placement  # noqa: E402
from tokenmill.export._onnx_experts import Block, experts, is_positive, route  # noqa: E402
from tokenmill.export._onnx_graph import Graph  # noqa: E402
from tokenmill.export._onnx_pointwise import evaluate  # noqa: E402
from tokenmill.export._onnx_weights import Matrix, dense, gather, multiply, store  # noqa: E402

aten, mill = torch.ops.aten, torch.ops.tokenmill
ROOT = Path(__file__).resolve().parent.parent
EXACT = 3e-6  # relative; onnxruntime sums in another order


def quiet(what: str, done: int, total: int) -> None:
    pass


def written(program: Program, folder: Path, rounded: bool = False) -> dict[str, Any]:
    return onnx._write(program, folder, False, rounded, quiet)


def errors_of(program: Program, folder: Path) -> dict[str, float]:
    written(program, folder)
    return compare(folder / "model.onnx", program, "cpu").errors


def placed(folder: Path) -> Mapping[str, int]:
    """How many nodes of each op a step runs."""
    return placement(folder / "model.onnx", "cpu", folder)["nodes"]["CPUExecutionProvider"]


# --- whole models ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def captured(name: str) -> Program:
    if name == "hand_written":
        return capture(hand_written(), max_positions=256)
    return capture_pretrained(pretrained(name), name)


@pytest.mark.parametrize(
    ("name", "weights", "kv", "kernels"),
    [
        ("deepseek_v3", "int4", "bf16", {"QMoE", "MatMulNBits", "RotaryEmbedding"}),
        ("deepseek_v3", "int8", "fp8", {"QMoE", "MatMulNBits"}),
        ("deepseek_v3", "bf16", "fp32", {"MoE", "MatMul"}),
        ("deepseek_v2", "int4-g128", "int8", {"QMoE"}),
        ("qwen3_moe", "int4-g64", "fp32", {"QMoE"}),
        ("qwen3_moe", "fp8", "bf16", {"MoE"}),
        ("mixtral", "int4", "bf16", {"QMoE"}),
        ("mixtral", "fp32", "fp32", {"MoE"}),
        ("llama", "int8", "bf16", {"MatMulNBits"}),
        ("llama", "fp32", "fp32", {"MatMul"}),
        ("hand_written", "int4", "fp32", {"QMoE", "LayerNormalization"}),
        ("hand_written", "bf16", "bf16", {"MoE"}),
    ],
)
def test_a_model_in_every_way_of_running_it(
    name: str, weights: str, kv: str, kernels: set[str], tmp_path: Path
) -> None:
    program = captured(name).copy()
    run_passes(program, pipeline(Recipe(weights=weights, kv=kv)))  # type: ignore[arg-type]
    facts = written(program, tmp_path)
    found = compare(tmp_path / "model.onnx", program, "cpu")
    assert set(found.errors) == {
        "prompt", "decoding", "one token", "batch of two, 0", "batch of two, 1",
    }  # fmt: skip
    assert max(found.errors.values()) < EXACT, found.errors
    assert (found.cache == 0) == (kv == "fp32")
    assert kernels <= set(placed(tmp_path))
    assert not [note for note in facts["notes"] if "loop" in note]


def test_a_difference_is_seen(tmp_path: Path) -> None:
    program = fused(decoder())
    written(program, tmp_path)
    name = next(n for n in program.used_weights() if "layers.0.mlp.down_proj.weight" in n)
    value = program.weights[name]
    program.weights.settle(name, lambda: value * 1.01)
    found = compare(tmp_path / "model.onnx", program, "cpu")
    assert min(found.errors.values()) > 1e-4


@pytest.mark.parametrize("latent", [True, False])
def test_programs_written_by_hand(latent: bool, tmp_path: Path) -> None:
    program = fused(decoder(latent))
    assert max(errors_of(program, tmp_path).values()) < EXACT


def fused(program: Program) -> Program:
    """Past the passes that come after caches are there."""
    passes = pipeline(Recipe(weights="fp32"))
    names = [p.name for p in passes]
    run_passes(program, passes[names.index("insert_cache") + 1 :])
    return program


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"window": 5},
        {"softcap": 1.5},
        {"sinks": True},
        {"slopes": True},
        {"window": 40, "softcap": 0.7, "sinks": True, "slopes": True},
    ],
)
def test_attention_of_every_kind(how: dict[str, Any], tmp_path: Path) -> None:
    """4 query heads, 2 key heads of 4, values of 3."""
    b = Builder()
    x = b.embed()
    widths = {"q": (4, 4), "k": (2, 4), "v": (2, 3)}
    q, k, v = (b.view(b.linear(x, n, h * w), 1, -1, h, w) for n, (h, w) in widths.items())
    cache = b.cache(gqa_cache("cache.0", "fp32", 2, 4, 3))
    sinks = b.weight("sinks", 4) if how.get("sinks") else None
    extra = {"slopes": b.weight("slopes", 4)} if how.get("slopes") else {}
    numbers = (0.9, how.get("window", 0), how.get("softcap", 0.0), "fp32")
    batch = (b.positions, b.starts, b.table)
    out = b(mill.cached_attention.default, q, k, v, sinks, cache, *batch, *numbers, **extra)
    program = fused(b.finish(b.view(out, 1, -1, 12)))
    assert max(errors_of(program, tmp_path).values()) < EXACT


# --- small graphs ---------------------------------------------------------------------------------


def run(g: Graph, results: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The named results of a graph, in fp32."""
    for name, value in results.items():
        g.output(g.cast(value, torch.float32), name, [])
    model = g.model()
    for output in model.graph.outputs:
        output.shape = None
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    names = list(results)
    found = session.run(names, {n: x.numpy() for n, x in inputs.items()})
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm().clamp(min=1e-20))


@pytest.mark.parametrize("name", expr.FUNCTIONS)
def test_functions(name: str) -> None:
    x = torch.linspace(0.1, 3.0, 12).reshape(3, 4)
    x = x if name in ("log", "sqrt", "rsqrt", "div") else x - 1.5
    both = name in ("add", "sub", "mul", "div", "min", "max")
    source = f"{name}(x0, x1) * 2.0 - x0" if both else f"{name}(x0) + x1"
    operands = {"x0": x, "x1": x.flip(0)}
    g = Graph("g")
    values = {n: g.input(n, torch.float32, [3, 4]) for n in operands}
    found = run(g, {"y": evaluate(g, source, values)}, operands)["y"]
    assert error(found, expr.evaluate(expr.parse(source), operands)) < 1e-6


def matrix(weight: Tensor, format: str, name: str = "w") -> Matrix:
    fmt = quant.parse(format)
    parts = quant.quantize(weight, fmt)
    names = {part: f"{name}.{part}" for part in fmt.parts}
    weights = Weights({names[part]: value for part, value in parts.items()})
    *lead, n, k = weight.shape
    return Matrix(tuple(names.values()), format, tuple(lead), n, k, weights)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(quant.NAMES),
    n=st.integers(1, 140),
    k=st.integers(1, 270),
    tokens=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_maps_and_tables(
    format: str, n: int, k: int, tokens: int, bias: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    m = matrix(torch.randn(n, k, generator=rng), format)
    x, index = torch.randn(1, tokens, k, generator=rng), torch.randint(n, (tokens,), generator=rng)
    g = Graph("g")
    given_x, given_index = g.input("x", torch.float32, x.shape), g.input("i", torch.int64, [tokens])
    offset = torch.randn(n, generator=rng)
    added = g.weight("b", lambda: offset, torch.float32, [n]) if bias else None
    results = {
        "y": multiply(g, given_x, m, store(g, m), added),
        "rows": gather(g, given_index, m),
        "all": dense(g, m),
    }
    found = run(g, results, {"x": x, "i": index})
    want = torch.nn.functional.linear(x, m.values(), offset if bias else None)
    assert error(found["y"], want) < 1e-6
    assert torch.equal(found["rows"], m.values()[index])
    assert torch.equal(found["all"], m.values())


@settings(max_examples=60, deadline=None)
@given(
    spec=st.builds(
        RouterSpec,
        top_k=st.integers(1, 4),
        score=st.sampled_from(sorted(SCORES)),
        bias=st.booleans(),
        groups=st.sampled_from((1, 2, 4)),
        top_groups=st.integers(1, 2),
        group_score=st.sampled_from(("top2", "max")),
        after=st.sampled_from(("identity", "softmax", "sigmoid")),
        renormalize=st.booleans(),
        epsilon=st.sampled_from((0.0, 1e-20, 0.5)),
        scale=st.sampled_from((1.0, 2.5)),
    ),
    tokens=st.integers(1, 6),
    rank=st.sampled_from((2, 3)),
    seed=st.integers(0, 99),
)
def test_routers(spec: RouterSpec, tokens: int, rank: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    count = 16  # so that even one group of four holds the chosen
    logits = torch.randn(*[1] * (rank - 2), tokens, count, generator=rng)
    bias = torch.randn(count, generator=rng) if spec.bias else None
    g = Graph("g")
    x = g.input("x", torch.float32, logits.shape)
    offset = None if bias is None else g.weight("b", lambda: bias, torch.float32, [count])
    ids, weights = route(g, x, offset, spec, count, rank)
    found = run(g, {"ids": ids, "weights": weights}, {"x": logits})
    want_ids, want = route_reference(logits, bias, spec)
    assert torch.equal(found["ids"], want_ids.float())
    torch.testing.assert_close(found["weights"], want, rtol=2e-5, atol=1e-6)


ACTIVATIONS = {  # with the form that experts of one format take
    "silu(acc0) * acc1": True,
    "acc1 * silu(acc0)": True,
    "gelu(acc0) * acc1": True,
    "relu(acc0)": False,
    "square(relu(acc0))": False,
    "gelu_tanh(acc0)": False,
}


@settings(max_examples=60, deadline=None)
@given(
    up=st.sampled_from(quant.NAMES),
    down=st.one_of(st.none(), st.sampled_from(quant.NAMES)),
    hidden=st.sampled_from((16, 64, 96, 20)),
    inter=st.integers(1, 70),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    positive=st.booleans(),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_experts(
    up: str, down: str | None, hidden: int, inter: int, activation: str, positive: bool,
    tokens: int, seed: int,
) -> None:  # fmt: skip
    """Any two formats, sizes that blocks do not divide, weights of either sign where that is allowed."""
    rng = torch.Generator().manual_seed(seed)
    gated, count, top_k = ACTIVATIONS[activation], 5, 2
    wide = torch.randn(count, inter * (2 if gated else 1), hidden, generator=rng) * 0.3
    block = Block(
        matrix(wide, up, "up"),
        matrix(torch.randn(count, hidden, inter, generator=rng) * 0.3, down or up, "down"),
        activation, gated, top_k, positive,
    )  # fmt: skip
    x = torch.randn(tokens, hidden, generator=rng)
    ids = torch.stack([torch.randperm(count, generator=rng)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k, generator=rng) - (0.0 if positive else 0.5)
    g = Graph("g")
    inputs = {"x": x, "ids": ids, "weights": weights}
    given_x, given_ids, given_weights = (g.input(n, t.dtype, t.shape) for n, t in inputs.items())
    y = experts(g, block, given_x, given_ids, given_weights, half=False)
    found = run(g, {"y": y}, inputs)["y"]
    parts = [[m.part(p) for p in m.spec.parts] for m in (block.up, block.down)]
    want = ops.experts(x, ids, weights, *parts, None, up, down or up, activation, gated)
    assert error(found, want) < 1e-4, block.form


@pytest.mark.parametrize("format", ["int4-g32", "int8", "bf16"])
def test_experts_in_half_precision(format: str) -> None:
    """What is written for GPUs runs on a CPU too, as far as that has kernels for fp16."""
    rng = torch.Generator().manual_seed(0)
    block = Block(
        matrix(torch.randn(4, 64, 32, generator=rng) * 0.2, format, "up"),
        matrix(torch.randn(4, 32, 32, generator=rng) * 0.2, format, "down"),
        "silu(acc0) * acc1", True, 2, True,
    )  # fmt: skip
    g = Graph("g")
    inputs = {
        "x": torch.randn(3, 32, generator=rng),
        "ids": torch.tensor([[0, 3], [1, 2], [2, 0]], dtype=torch.int32),
        "weights": torch.rand(3, 2, generator=rng),
    }
    y = experts(g, block, *(g.input(n, t.dtype, t.shape) for n, t in inputs.items()), half=True)
    if block.form == "MoE":
        pytest.skip("a CPU has no such kernel")
    parts = [[m.part(p) for p in m.spec.parts] for m in (block.up, block.down)]
    want = ops.experts(*inputs.values(), *parts, None, format, format, "silu(acc0) * acc1", True)
    assert error(run(g, {"y": y}, inputs)["y"], want) < 5e-3


def test_which_weights_of_routers_are_positive() -> None:
    assert is_positive(RouterSpec(2, "sigmoid", bias=True))
    assert is_positive(RouterSpec(2, "identity", after="softmax"))
    assert not is_positive(RouterSpec(2, "identity"))
    assert not is_positive(None)


# --- what else a graph may hold -------------------------------------------------------------------

VIEWS: dict[str, Callable[[Builder, Any], Any]] = {
    "split": lambda b, x: b(aten.add.Tensor, *_pieces(b, b(aten.split_with_sizes.default, x, [4, 4], -1))),
    "chunk": lambda b, x: b(aten.mul.Tensor, *_pieces(b, b(aten.chunk.default, x, 2, -1))),
    "unbind": lambda b, x: b(
        aten.sub.Tensor, *_pieces(b, b(aten.unbind.int, b.view(x, 1, -1, 2, 4), 2)), alpha=2
    ),
    "cat": lambda b, x: b(aten.cat.default, [x, b.cut(x, 2, 6)], -1),
    "permute": lambda b, x: b.view(
        b(aten.permute.default, b.view(x, 1, -1, 2, 4), [0, 1, 3, 2]), 1, -1, 8
    ),
    "transpose": lambda b, x: b(aten.transpose.int, b(aten.transpose.int, x, 1, -1), -1, 1),
    "select": lambda b, x: b(aten.select.int, b.view(x, 1, -1, 2, 4), 2, 1),
    "squeeze": lambda b, x: b(aten.squeeze.dim, b(aten.unsqueeze.default, x, 2), 2),
    "expand": lambda b, x: b(aten.expand.default, b.cut(x, 0, 1), [-1, -1, 5]),
    "cast": lambda b, x: b(aten._to_copy.default, x, dtype=torch.float32),
    "arithmetic": lambda b, x: b(
        aten.div.Tensor, b(aten.mul.Tensor, x, 3.0), b(aten.add.Tensor, b(aten.exp.default, x), 2)
    ),
    "softmax": lambda b, x: b(aten._softmax.default, x, -1, False),
    "mean": lambda b, x: b(
        aten.sub.Tensor, x, b(aten.mean.dim, b(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    ),
    "cumsum": lambda b, x: b(aten.cumsum.default, x, -1),
    "clamp": lambda b, x: b(aten.clamp.default, x, -0.5, 0.25),
    "gelu": lambda b, x: b(aten.gelu.default, x, approximate="tanh"),
    "layer_norm": lambda b, x: b(mill.layer_norm.default, x, None, None, 1e-5),
    "rope": lambda b, x: b.view(
        b(mill.rope.default, b.view(x, 1, -1, 2, 4), *b.angles(1), 1, True), 1, -1, 8
    ),
}  # fmt: skip


def _pieces(b: Builder, parts: Any) -> list[Any]:
    return [b(operator.getitem, parts, i) for i in range(2)]


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_arithmetic(name: str, tmp_path: Path) -> None:
    b = Builder()
    program = fused(b.finish(VIEWS[name](b, b.embed())))
    assert max(errors_of(program, tmp_path).values()) < EXACT


def test_an_op_without_a_form_is_refused_with_its_place(tmp_path: Path) -> None:
    b = Builder()
    b.path = "layers.3.strange"
    program = fused(b.finish(b(aten.erfinv.default, b(aten.tanh.default, b.embed()))))
    with pytest.raises(errors.Unsupported, match=r"erfinv[\s\S]*layers\.3\.strange"):
        written(program, tmp_path)


# --- the directory --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(int4_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "onnx"
    args = ["export", str(int4_artifact), "--format", "onnx", "-o", str(path), "--json"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    manifest = json.loads((path / "export.json").read_text())
    assert json.loads(done.stdout) == manifest
    return path


def test_the_manifest_vouches_for_every_file(exported: Path) -> None:
    manifest = json.loads((exported / "export.json").read_text())
    files = {f.name: f for f in exported.iterdir() if f.name != "export.json"}
    assert (
        set(files) == set(manifest["files"]) >= {"model.onnx", "model.onnx.data", "tokenizer.json"}
    )
    for name, fact in manifest["files"].items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == fact["sha256"]
    checks = manifest["checks"]["arithmetic"]
    assert max(checks["fp32"]["relative_errors"].values()) < EXACT
    assert max(checks["int8"]["relative_errors"].values()) < checks["int8"]["tolerance"]
    assert manifest["checks"]["left_to_cpu"] == []
    assert manifest["inputs"]["past_key_values.0.latent"]["shape"][:2] == ["batch", "past"]
    assert manifest["opsets"] == {"ai.onnx": 23, "com.microsoft": 1}


def test_two_exports_are_the_same_bytes(
    exported: Path, int4_artifact: Path, tmp_path: Path
) -> None:
    onnx.export(int4_artifact, tmp_path / "again")
    files = sorted(f.name for f in exported.iterdir() if f.name != "export.json")
    assert files == sorted(
        f.name for f in (tmp_path / "again").iterdir() if f.name != "export.json"
    )
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_loop_of_the_examples(exported: Path) -> None:
    script = ROOT / "examples" / "onnx_generate.py"
    command = [sys.executable, str(script), str(exported), "def main():", "--max-new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("def main():")
    assert len(done.stdout.strip()) > len("def main():") + 5


def test_a_wrong_export_leaves_nothing(
    int4_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenmill.export import _onnx_attention

    monkeypatch.setattr(_onnx_attention, "HIDDEN", -1.0)  # keys of the future are seen
    with pytest.raises(errors.ExportDiffers, match="relative error"):
        onnx.export(int4_artifact, tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(exported: Path, int4_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.OutputExists):
        onnx.export(int4_artifact, exported)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(errors.OutputForeign):
        onnx.export(int4_artifact, foreign, force=True)
    assert (foreign / "notes.txt").read_text() == "keep"


def test_a_missing_package_is_named(
    int4_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.MissingExtra, match=r"tokenmill\[onnx\]"):
        onnx.export(int4_artifact, tmp_path / "x")


def test_a_provider_that_is_not_there(int4_artifact: Path, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(errors.BadRequest, match="onnxruntime-gpu"):
        onnx.export(int4_artifact, tmp_path / "x", provider="cuda")
