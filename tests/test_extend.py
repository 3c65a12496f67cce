"""What users add from outside: passes, patterns, kernels, formats."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenmill
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill import Recipe, api, codegen, extend
from tokenmill.capture.module import capture
from tokenmill.codegen import custom
from tokenmill.codegen.cpp.target import TARGETS, cpu_features, host_target
from tokenmill.errors import (
    BadExtension,
    BadPattern,
    BadRecipe,
    ExtensionMissing,
    IllegalProgram,
    NotLowered,
    TokenMixing,
    WrongRewrite,
)
from tokenmill.ir import packing, quant
from tokenmill.ir.plan import Custom, Experts, Linear, Shaped, dump_spec, load_spec
from tokenmill.ir.program import Program, Stage
from tokenmill.passes.lower import lower
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.passes.rounding import gptq
from torch import Tensor, nn

from .codegen.gpu.interpreter import Interpreted
from .codegen.harness import CpuKernels, batch_of, inputs_of

aten, mill = torch.ops.aten, torch.ops.tokenmill
FORMATS = [
    extend.register_format(book)
    for book in (
        extend.Codebook("test-two", values=(-1.0, 1.0), group=32),
        extend.Codebook(
            "test-ternary", values=(-1.0, 0.0, 1.0), group=64, fit=lambda g: g.abs().mean(-1)
        ),
        extend.Codebook("test-sixteen", values=tuple(i / 8 for i in range(-8, 8)), group=32),
        extend.Codebook("test-six-bits", values=tuple(range(-31, 32)), group=64),
    )
]  # fmt: skip
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "extend"


class Plain(nn.Module):
    """Embedding, ``middle``, head: nothing that takes long to compile."""

    def __init__(self, middle: nn.Module, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Embedding(40, width), middle, nn.Linear(width, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)))


class Apply(nn.Module):
    def __init__(self, function: Any, **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def captured(function: Any, width: int = 32, **weights: Tensor) -> Program:
    return capture(Plain(Apply(function, **weights), width).eval(), max_positions=64)


def passed(program: Program, recipe: Recipe, upto: str = "fuse_dequantize", **how: Any) -> Any:
    passes = pipeline(recipe)
    names = [p.name for p in passes]
    return {r.name: r for r in run_passes(program, passes[: names.index(upto) + 1], **how)}


# --- formats ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=40, unique=True),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 100)),
    group=st.sampled_from([32, 64]),
)
def test_codes_come_back(values: list[float], shape: tuple[int, int, int], group: int) -> None:
    book = quant.Codebook("test", values=tuple(sorted(values)), group=group)
    assert len(values) <= 2**book.bits < 2 * max(len(values), 2)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = quant.quantize(w, book)
    assert sum(p.nbytes for p in parts.values()) == shape[0] * book.bytes(*shape[1:])
    packed = packing.pack(parts, book)
    again = packing.unpack(packed, book, *shape[1:])
    assert all(torch.equal(again[name], part) for name, part in parts.items())
    # Every weight became one of the values next to it.
    steps = quant.divisors(parts["scale"], book, w.shape)
    found = quant.dequantize(parts, book, shape[-1])
    best = (w[..., None] / steps[..., None] - torch.tensor(book.values)).abs().amin(
        -1
    ) * steps.abs()
    used = (quant.spread(parts["scale"], book, w.shape) != 0) & (steps > 0)
    torch.testing.assert_close((found - w).abs()[used], best[used], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"values": (1.0,)}, "2 to 256"),
        ({"values": (1.0, 0.0)}, "rise"),
        ({"values": (0.0, math.inf)}, "finite"),
        ({"group": 48}, "multiple of 32"),
        ({"name": "int8"}, "exists already"),
        ({"name": "int4"}, "cannot be a format's name"),
        ({"name": "Q 4"}, "cannot be a format's name"),
        ({"name": "test-two", "values": (0.0, 1.0)}, "another one"),
    ],
)
def test_a_bad_format_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises((BadExtension, ValueError), match=reason):
        extend.register_format(
            extend.Codebook(**{"name": "bad", "values": (-1.0, 1.0), "group": 32, **fields})
        )
    with pytest.raises(BadRecipe):
        Recipe(weights="bad")


def test_a_recipe_knows_a_registered_format_and_still_finds_typos() -> None:
    assert extend.register_format(FORMATS[0]) is FORMATS[0]  # a module may be imported twice
    recipe = Recipe(weights="test-two")
    assert recipe.format_for(["a"], "expert") == recipe.format_for(["a"], "linear") == "test-two"
    assert recipe.format_for(["a"], "head") == "bf16"
    with pytest.raises(BadRecipe, match=r"(?s)unknown value 'test-tow'.*test-two.*extensions"):
        Recipe(weights="test-tow")
    with pytest.raises(BadRecipe, match="role latent_up may be"):
        Recipe(rules=[{"match": "role:latent_up", "format": "test-two"}])


def test_gptq_rounds_to_a_codebook() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 96, generator=rng), torch.randn(400, 96, generator=rng).cumsum(1)
    for book in FORMATS[2:]:
        lost = [
            (x @ (quant.dequantize(parts, book, 96) - w).T).norm()
            for parts in (gptq(w, x.T @ x, book), quant.quantize(w, book))
        ]
        assert lost[0] < 0.7 * lost[1]


def _targets() -> list[str]:
    """The best of this machine, one with another width of vectors, and the plainest."""
    here = cpu_features()
    names = dict.fromkeys((host_target().name, "cpu-x86-64-v3", "cpu-x86-64"))
    return [n for n in names if here.issuperset(TARGETS[n].features)]


@pytest.mark.parametrize("target", _targets())
def test_kernels_read_codebooks(target: str) -> None:
    specs = [
        *(Linear(35, 70 + i, book.name) for i, book in enumerate(FORMATS)),
        Linear(20, 33, "test-six-bits", parts=2, epilogue="silu(acc0) * acc1"),
        Experts(4, 2, 40, 24, "test-ternary", "test-six-bits"),
    ]
    kernels = CpuKernels(specs, target)
    for spec in specs:
        for batch in (batch_of((0, 1)), batch_of((0, 21))):
            inputs = inputs_of(kernels, spec, batch)
            got = kernels.run(spec, batch, inputs, threads=2)["out"]
            wanted = kernels.expected(spec, batch, inputs)["out"]
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
    kernels.close()


def test_a_gpu_reads_what_the_codes_stand_for() -> None:
    program = capture(Plain(nn.Linear(32, 32)).eval(), max_positions=64)
    passed(program, Recipe(weights="test-six-bits"))
    plan = lower(program, device="cuda")
    assert {s.format for s in plan.specs if isinstance(s, Linear)} == {"bf16"}
    name = "middle.weight.test-six-bits"
    parts = {p: program.weights[f"{name}.{p}"] for p in ("q", "scale")}
    wanted = quant.dequantize(parts, FORMATS[3], 32).bfloat16()
    assert torch.equal(program.weights[f"{name}.q.bf16"], wanted)
    assert f"{name}.q.bf16" in plan.buffers
    formats = {s.format for s in lower(program).specs if isinstance(s, Linear)}
    assert "test-six-bits" in formats  # the CPU's plan is as before


# --- kernels ----------------------------------------------------------------------------------------

CPP = """
for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
  for (int h = 0; h < X_WIDTH; h += X_LAST) {
    float total = 0;
    for (int i = 0; i < X_LAST; i++) total += __builtin_fabsf(x[r][h + i]);
    for (int i = 0; i < X_LAST; i++)
    {
      const float value = SIGNED ? x[r][h + i] : __builtin_fabsf(x[r][h + i]);
      out[r][h + i] = value * gain[i] / (total + EPS) + y[r][h + i];
    }
  }
"""
TRITON = """
heads = cols // X_LAST
x = tl.load(x_ptr + row * X_PITCH + cols, cols < X_WIDTH, 0.0).to(tl.float32)
y = tl.load(y_ptr + row * Y_PITCH + cols, cols < X_WIDTH, 0.0).to(tl.float32)
gain = tl.load(gain_ptr + cols % X_LAST)
total = tl.sum(tl.where(heads[None, :] == heads[:, None], tl.abs(x)[None, :], 0.0), 1)
value = (x if SIGNED else tl.abs(x)) * gain / (total + EPS) + y
tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < X_WIDTH)
"""


@extend.kernel(
    "test_share(Tensor x, Tensor gain, Tensor y, float eps, bool signed=True) -> Tensor",
    cpp=CPP,
    triton=TRITON,
)
def share(x: Tensor, gain: Tensor, y: Tensor, eps: float, signed: bool = True) -> Tensor:
    """x / (sum |x| + eps) * gain + y, per head"""
    return (x if signed else x.abs()) / (x.abs().sum(-1, keepdim=True) + eps) * gain + y


@extend.kernel("test_mixing(Tensor x) -> Tensor", cpp="return;")
def mixing(x: Tensor) -> Tensor:
    """Rows add up, which no kernel of rows can do."""
    return x.cumsum(-2)


@extend.kernel("test_ranks(Tensor x) -> Tensor", cpp="return;")
def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1)


def _spec(heads: int, dim: int, signed: bool) -> Custom:
    row = (heads, dim)
    operands = (
        Shaped("x", row, "f32"),
        Shaped("gain", (dim,), "f32", True),
        Shaped("y", row, "f32"),
    )
    return Custom("test_share", operands, (("eps", 0.5), ("signed", signed)), row)


SPECS = [_spec(1, 7, True), _spec(3, 19, False)]


@pytest.fixture(scope="module", params=["cpu", "sm_90"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Any]:
    on_cpu = request.param == "cpu"
    made = CpuKernels(SPECS) if on_cpu else Interpreted(SPECS, "sm_90")
    yield made
    if on_cpu:
        made.close()


@pytest.mark.parametrize("spec", SPECS, ids=["one", "heads"])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_a_kernel_is_its_reference(kernels: Any, spec: Custom, tokens: int) -> None:
    batch = batch_of((0, tokens))
    inputs = inputs_of(kernels, spec, batch)
    got = kernels.run(spec, batch, inputs)["out"]
    wanted = kernels.expected(spec, batch, inputs)["out"]
    error = 1e-5 if kernels.device == "cpu" else 1e-2  # where activations are bf16
    torch.testing.assert_close(got.float(), wanted, atol=error, rtol=error)


def test_a_spec_is_the_same_in_a_plan() -> None:
    for spec in SPECS:
        assert load_spec(dump_spec(spec)) == spec


def test_an_op_with_defaults_and_a_weight_lowers() -> None:
    program = captured(lambda x, gain: share(x, gain, x, 0.25), gain=torch.rand(32))
    passed(program, Recipe(weights="fp32"))
    found = [s for s in lower(program).specs if isinstance(s, Custom)]
    row = Shaped("x", (32,), "f32"), Shaped("gain", (32,), "f32", True), Shaped("y", (32,), "f32")
    assert found == [Custom("test_share", row, (("eps", 0.25), ("signed", True)), (32,))]


@pytest.mark.parametrize(
    ("function", "error", "reason"),
    [
        (lambda x: mixing(x), TokenMixing, "test_mixing"),
        (lambda x: ranks(x) * 1.0, NotLowered, "float32"),
    ],
    ids=["mixing", "integers"],
)
def test_what_no_kernel_can_be_is_refused(function: Any, error: Any, reason: str) -> None:
    program = captured(function)
    passed(program, Recipe(weights="fp32"))
    with pytest.raises(error, match=reason):
        lower(program)


def test_a_target_without_a_template_is_refused() -> None:
    program = captured(lambda x: mixing(x))
    plan = lower_without_proof(program)
    with pytest.raises(BadExtension, match=r"(?s)test_mixing.*no triton template.*triton="):
        codegen.emit(plan, "sm_90")


def lower_without_proof(program: Program) -> Any:
    passed(program, Recipe(weights="fp32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenmill.passes.lower_kernels._takes_rows_alone", lambda spec: True)
        return lower(program, device="cuda")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("test_share(Tensor x) -> Tensor", "already"),
        ("linear(Tensor x) -> Tensor", "already"),
        ("test_new(Tensor x -> Tensor", "expected"),
        ("test_new(Tensor x) -> (Tensor, Tensor)", "does not fit"),
        ("test_new(Tensor out) -> Tensor", "does not fit"),
    ],
)
def test_a_bad_schema_is_refused(schema: str, reason: str) -> None:
    with pytest.raises(BadExtension, match=reason):
        extend.kernel(schema)(lambda x: x)
    assert "test_new" not in custom.TEMPLATES


def test_verify_needs_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain(Apply(lambda x, gain: share(x, gain, x, 0.25), gain=torch.rand(32))).eval()
    recipe = Recipe(rules=[{"match": "role:head", "format": "test-six-bits"}])
    path = tokenmill.optimize(model, tmp_path / "model", recipe=recipe).path
    assert path is not None
    assert api.verify(path)["reproducible"]
    with tokenmill.load(path) as session:
        wanted = model(torch.tensor([[1, 2, 3]]))[0].detach().numpy()
        assert abs(session.logits([1, 2, 3]) - wanted).max() < 0.1

    (tmp_path / "again.py").write_text(
        "from tokenmill.codegen import custom\nfrom tokenmill.codegen.custom import Templates\n"
        "from tokenmill.tests_of_extend import CPP, TRITON\n"
        "custom.TEMPLATES['test_share'] = Templates(CPP, TRITON)\n"
    )
    module = type(sys)("tokenmill.tests_of_extend")
    module.CPP, module.TRITON = CPP, TRITON  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(custom.TEMPLATES, "test_share")
    with pytest.raises(ExtensionMissing, match=r"(?s)kernel 'test_share'.*--extension"):
        api.verify(path)
    with pytest.raises(BadRecipe, match="no module 'again'"):
        api.verify(path, extensions=["again"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert api.verify(path, extensions=["again"])["reproducible"]
    monkeypatch.delitem(quant._FORMATS, "test-six-bits")
    with pytest.raises(ExtensionMissing, match="format 'test-six-bits'"):
        api.verify(path)


# --- passes -----------------------------------------------------------------------------------------


@dataclass
class Louder(extend.Pass):
    """x W^T => x (factor W)^T, for the head"""

    factor: float = 2.0

    name = "louder"

    def run(self, program: Program) -> int:
        node = list(extend.calls(program, mill.linear))[-1]
        weight = node.args[1][0].target
        name = program.weights.fresh(f"{weight}.louder")
        program.weights.derive(name, lambda w: w * self.factor, weight)
        with program.graph.inserting_before(node):
            node.args = (node.args[0], [program.weight(name)], *node.args[2:])
        return 1


class Harmless(Louder):
    """x W^T => x (1 W)^T"""

    name = "harmless"

    def run(self, program: Program) -> int:
        self.factor = 1.0
        return super().run(program)


class Careless(extend.Pass):
    """x => x[:5], and whoever reads it is left alone"""

    name = "careless"

    def run(self, program: Program) -> int:
        node = next(iter(extend.calls(program, aten.relu)))
        with program.graph.inserting_before(node):
            cut = program.call(aten.slice.Tensor, node.args[0], 2, 0, 5)
        node.args = (cut,)
        return 1


def test_a_pass_runs_where_it_was_put_and_is_checked() -> None:
    mine = [
        extend.use(Louder, before="quantize", factor=1.0),
        extend.use(Harmless, after="louder"),
    ]
    recipe = Recipe(weights="fp32", passes=mine)
    names = [p.name for p in pipeline(recipe)]
    assert names[names.index("quantize") - 2 : names.index("quantize")] == ["louder", "harmless"]
    assert "louder" not in [
        p.name for p in pipeline(recipe.model_copy(update={"disable": ["louder"]}))
    ]
    program = captured(torch.relu)
    results = passed(program, recipe, check=True)
    assert results["louder"].matches == 1
    assert results["louder"].error == 0
    assert Recipe.model_validate(recipe.dump()).dump() == recipe.dump()


def test_a_wrong_pass_is_found() -> None:
    recipe = Recipe(weights="fp32", passes=[extend.use(Louder, before="quantize")])
    with pytest.raises(WrongRewrite, match="'louder' changed what the model computes"):
        passed(captured(torch.relu), recipe, check=True)
    recipe = Recipe(weights="fp32", passes=[extend.use(Careless, before="fuse_norm")])
    with pytest.raises(IllegalProgram, match="after pass 'careless': shapes do not fit"):
        passed(captured(torch.relu), recipe)


LOUDER = f"{__name__}:Louder"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"use": "nowhere:X", "before": "quantize"}, r"passes\[0\].use: there is no module.*PYTHONPATH"),
        ({"use": "math:pi", "before": "quantize"}, "is not a subclass of Pass"),
        ({"use": LOUDER, "before": "quantise"}, r"passes\[0\].before: there is no pass 'quantise'"),
        ({"use": LOUDER, "after": "rotate"}, r"passes\[0\].after: there is no pass 'rotate'"),
        ({"use": LOUDER, "before": "quantize", "options": {"by": 2}}, r"passes\[0\].options: .*'by'"),
        ({"use": LOUDER}, r"passes\[0\]: needs one of before and after"),
        ({"use": LOUDER, "before": "quantize", "after": "quantize"}, "needs one of"),
        ({"use": "Louder", "before": "quantize"}, r"passes\[0\].use: "),
        ({"before": "quantize"}, r"passes\[0\].use: missing.*needs `use`"),
        ({"use": "a:B", "befor": "quantize"}, r"unknown field.*known fields: use, before, after, options"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_named(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecipe, match=f"(?s){reason}"):
        pipeline(Recipe.model_validate({"passes": [entry]}))


def test_a_name_is_taken_once() -> None:
    mine = extend.use(Louder, before="quantize")
    with pytest.raises(BadRecipe, match="there is a pass 'louder' already"):
        pipeline(Recipe(passes=[mine, mine]))


def test_a_recipe_file_imports_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extension.py").write_text("1 / 0\n")
    (tmp_path / "recipe.yaml").write_text(
        "extensions: [my_format]\nrules: [{match: 'role:expert', format: nf4}]\n"
        "passes: [{use: 'my_pass:FewerExperts', before: quantize, options: {top_k: 2}}]\n"
    )
    for folder in (EXAMPLES, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.format_for(["a"], "expert") == "nf4"
    (mine,) = (p for p in pipeline(recipe) if p.name == "fewer_experts")
    assert vars(mine) == {"top_k": 2}
    for name, reason in (("nowhere", "no module"), ("broken_extension", "ZeroDivisionError")):
        (tmp_path / "bad.yaml").write_text(f"extensions: [{name}]\n")
        with pytest.raises(BadRecipe, match=rf"bad.yaml, extensions\[0\]: .*{reason}"):
            Recipe.load(tmp_path / "bad.yaml")


# --- patterns ---------------------------------------------------------------------------------------


class Squares(extend.Pattern):
    """(x + c) * w * (x + c) => square(x + c) * w"""

    name = "squares"
    weights = ("w",)

    def example(self) -> tuple[Any, ...]:
        return torch.randn(1, 3, 8), torch.randn(8), 0.125

    def find(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return (x + c) * w * (x + c)

    def put(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return (x + c).square() * (w + 0 * w.exp())

    def accept(self, x: Any, w: Any, c: Any) -> bool:
        return c > 0


def _matches(function: Any, pattern: type[extend.Pattern] = Squares, **how: Any) -> int:
    program = captured(function, w=torch.rand(32))
    recipe = Recipe(weights="fp32", passes=[extend.use(pattern, after="split_linears")])
    before = program.run([1, 2, 3])
    found = passed(program, recipe, pattern.name, check=True)[pattern.name].matches
    torch.testing.assert_close(program.run([1, 2, 3]), before, atol=1e-4, rtol=1e-4)
    if found and pattern is Squares:
        assert list(extend.calls(program, aten.square))
        assert not list(extend.calls(program, aten.exp))  # of weights alone: computed at build time
    return found


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, w: (x + 3.0) * w * (x + 3.0), 1),
        (lambda x, w: (3.0 + x) * (w * (x + 3.0)), 1),  # factors in any order
        (lambda x, w: (x + 3.0) * w * (x + 4.0), 0),  # one number is one number
        (lambda x, w: (x + 3.0) * x * (x + 3.0), 0),  # no weight
        (lambda x, w: (x - 3.0) * w * (x - 3.0), 0),
        (lambda x, w: (x + -3.0) * w * (x + -3.0), 0),  # not accepted
        (lambda x, w: (y := (x + 3.0) * w) * (x + 3.0) + y, 0),  # the middle is used elsewhere
        (lambda x, w: (y := (x + 3.0) * w * (x + 3.0)) + (y + 1.0) * w * (y + 1.0), 2),
    ],
)
def test_a_pattern_matches_what_it_means(function: Any, found: int) -> None:
    assert _matches(function) == found


class Reshaped(extend.Pattern):
    """relu of heads => relu"""

    name = "reshaped"

    def example(self) -> tuple[Any, ...]:
        return (torch.randn(1, 3, 8),)

    def find(self, x: Tensor) -> Tensor:
        return x.reshape(1, 3, 2, 4).relu().flatten(2)

    def put(self, x: Tensor) -> Tensor:
        return x.relu()


def test_sizes_of_reshapes_do_not_count() -> None:
    def heads(x: Tensor, w: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], 4, 8).relu().flatten(2) * w

    assert _matches(heads, Reshaped) == 1


class Wrong(Squares):
    name = "wrong"

    def put(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return (x + c).square() * w * 1.01


class Narrower(Squares):
    name = "narrower"

    def put(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return ((x + c).square() * w)[..., :4]


class Unequal(Squares):
    name = "unequal"

    def put(self, x: Tensor) -> Tensor:
        return x


class Branching(Squares):
    name = "branching"

    def find(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return x if x.sum() > 0 else w


class Nothing(Squares):
    name = "nothing"

    def find(self, x: Tensor, w: Tensor, c: float) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (Wrong, "put differs from what was found, by a relative error of 0.01"),
        (Narrower, "put differs"),
        (Unequal, "put has 1 parameters, and example gives 3"),
        (Branching, "find cannot be traced"),
        (Nothing, "find computes nothing"),
    ],
)
def test_a_bad_pattern_is_refused(pattern: type[extend.Pattern], reason: str) -> None:
    with pytest.raises(BadPattern, match=reason):
        _matches(lambda x, w: (x + 3.0) * w * (x + 3.0), pattern)


def test_the_stage_is_kept() -> None:
    program = captured(lambda x, w: F.silu(x) * w, w=torch.rand(32))
    passed(program, Recipe(passes=[extend.use(Squares, before="fuse_norm")]), "squares")
    assert program.stage is Stage.CANONICAL
