"""The order of the passes, and the runner that times, verifies and checks them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import BadRecipe, IllegalProgram, WrongRewrite
from ..ir.legal import verify
from ..ir.program import Program, Runner, where
from ..recipe import Recipe, UserPass, load_module
from .balance import Balance
from .base import Pass
from .calibrate import Calibrate
from .canonicalize import Canonicalize, FoldWeights, SplitLinears
from .compress_kv import CompressKV
from .fuse_dequantize import FuseDequantize
from .fuse_epilogue import FuseEpilogue
from .fuse_experts import FuseExperts
from .fuse_gated import FuseGated
from .fuse_linear import FuseLinear
from .fuse_norm import FuseNorm
from .fuse_pointwise import FusePointwise
from .fuse_residual import FuseResidual
from .fuse_residual_norm import FuseResidualNorm
from .fuse_router import FuseRouter
from .heal_scales import HealScales
from .hoist_views import HoistViews
from .insert_cache import InsertCache
from .latent_kv import LatentKV
from .lift_attention import LiftAttention
from .lift_rope import LiftRope
from .merge_linears import MergeLinears
from .prove_tokens import ProveTokens
from .quantize import Quantize
from .rotate import Rotate
from .select_rows import SelectRows
from .share_common import ShareCommon
from .tabulate import Tabulate
from .workspace import Workspace

# A lossy pass changes numbers; past this relative error it changes the model.
LOSSY_LIMIT = 0.5
_SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Fit:
    """What passes are fitted to: sequences of token ids ``[T]``, where their work is kept, who hears of it.

    ``text`` is what weights are rounded for, ``healing`` what they are trained on, and ``held`` what is kept
    from training, to judge it.  Without text nothing is fitted, which is how a dry run says what would become
    of a model.
    """

    text: Sequence[Tensor] = ()
    healing: Sequence[Tensor] = ()
    held: Sequence[Tensor] = ()
    workspace: Workspace | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


def pipeline(recipe: Recipe, fit: Fit = Fit(), after: str | None = None) -> list[Pass]:
    """Every pass from a traced graph to one that can be lowered, in order; or those ``after`` one of them."""
    passes: list[Pass] = [
        Canonicalize(),
        FoldWeights(),
        ShareCommon(),
        Tabulate(),
        SplitLinears(),
        FuseNorm(),
        LiftAttention(),
        LiftRope(),
        FuseExperts(),
        FuseRouter(),
        CompressKV(),
        ProveTokens(),
        SelectRows(),
        *_latent(recipe, fit),
        *([Rotate(recipe=recipe)] if recipe.rotate else []),  # while linear maps stand alone
        InsertCache(format=recipe.kv),
        FuseLinear(),
        HoistViews(),
        FusePointwise(),
        FuseGated(),
        FuseResidual(),  # before the shared expert's epilogue takes the add
        FuseEpilogue(),
        MergeLinears(recipe=recipe),  # takes only maps with nothing fused into them
        FuseResidualNorm(),
        *([Balance(recipe=recipe, text=fit.text)] if recipe.balance else []),  # weights as stored
        Quantize(recipe=recipe),
        *_calibration(recipe, fit),
        FuseDequantize(),
    ]
    for index, user in enumerate(recipe.passes):
        _insert(passes, user, f"passes[{index}]")
    optional = {p.name for p in (Calibrate, Rotate, Balance, LatentKV, HealScales)}
    known = {p.name for p in passes} | optional
    if unknown := [name for name in recipe.disable if name not in known]:
        raise BadRecipe(
            where="disable", reason=f"there is no pass {unknown[0]!r}",
            advice=f"passes: {', '.join(sorted(known))}",
        )  # fmt: skip
    if needed := [p.name for p in passes if p.produces is not None and p.name in recipe.disable]:
        raise BadRecipe(
            where="disable", reason=f"what comes after {needed[0]!r} needs it",
            advice="leave it in; passes that only make the model faster can be disabled",
        )  # fmt: skip
    begin = 0 if after is None else 1 + [p.name for p in passes].index(after)
    return [p for p in passes[begin:] if p.name not in recipe.disable]


def _latent(recipe: Recipe, fit: Fit) -> list[Pass]:
    if recipe.conversion is None:
        return []
    return [LatentKV(recipe.conversion, fit.healing, fit.held, fit.workspace, fit.progress)]


def _insert(passes: list[Pass], user: UserPass, where: str) -> None:
    """Add a pass of the user's own beside the one that it names."""
    names, beside = [p.name for p in passes], user.before or user.after
    if beside not in names:
        field = "before" if user.before else "after"
        raise BadRecipe(
            where=f"{where}.{field}", reason=f"there is no pass {beside!r}",
            advice=f"passes: {', '.join(names)}",
        )  # fmt: skip
    made = _made(user, where)
    if made.name in names:
        raise BadRecipe(
            where=f"{where}.use", reason=f"there is a pass {made.name!r} already",
            advice="give the class another `name`",
        )  # fmt: skip
    passes.insert(names.index(beside) + (user.before is None), made)


def _made(user: UserPass, where: str) -> Pass:
    module, _, path = user.use.partition(":")
    found: Any = load_module(module, f"{where}.use")
    for name in path.split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise BadRecipe(
            where=f"{where}.use", reason=f"{user.use!r} is not a subclass of Pass",
            advice="write it as module:Class; see examples/extend",
        )  # fmt: skip
    try:
        return found(**user.options)
    except TypeError as error:
        raise BadRecipe(
            where=f"{where}.options", reason=str(error), advice=f"they are the fields of {user.use}"
        ) from error


def _calibration(recipe: Recipe, fit: Fit) -> list[Pass]:
    passes: list[Pass] = []
    if recipe.rounding != "rtn" and fit.text:
        passes.append(Calibrate(fit.text, recipe.rounding, fit.workspace, fit.progress))
    if recipe.heal_scales is not None and fit.healing:
        passes.append(
            HealScales(recipe.heal_scales, fit.healing, fit.held, fit.workspace, fit.progress)
        )
    return passes


def before_quantization(
    program: Program, recipe: Recipe, fit: Fit, after: str | None = None
) -> Program:
    """A copy of a program, with all passes run that come between the pass ``after`` and Quantize."""
    program, passes = program.copy(), pipeline(recipe, fit, after)
    names = [one.name for one in passes]
    run_passes(program, passes[: names.index(Quantize.name)])
    return program


@dataclass
class PassResult:
    """What a pass did; ``error`` is the relative error on sample tokens when checked."""

    name: str
    summary: str
    matches: int
    seconds: float
    exact: bool
    tolerance: float | None
    nodes_before: int
    nodes_after: int
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    check: bool = False,
    observe: Callable[[Program, PassResult], None] = lambda program, result: None,
) -> list[PassResult]:
    """Run the passes in place; each is verified and, with ``check``, executed before and after.

    Raises IllegalProgram for a malformed or illegal result, WrongRewrite for one that computes something
    else.  ``observe`` sees the program after every pass.
    """
    results: list[PassResult] = []
    for one in passes:
        results.append(_run_one(program, one, check))
        observe(program, results[-1])
    return results


def _run_one(program: Program, one: Pass, check: bool) -> PassResult:
    before = program.copy() if check else program
    nodes = len(program.graph.nodes)
    start = time.perf_counter()
    matches = one.run(program)
    if not type(one).__module__.startswith(f"{__package__}."):
        _infer_shapes(program, one)
    seconds = time.perf_counter() - start
    if one.produces is not None:
        program.stage = one.produces
    verify(program, one.name)
    result = PassResult(
        one.name, one.summary, matches, seconds, one.tolerance is not None, one.tolerance,
        nodes, len(program.graph.nodes), notes=list(getattr(one, "notes", ())),
    )  # fmt: skip
    if check:
        result.error = _compare(before, program, one)
    return result


def _infer_shapes(program: Program, one: Pass) -> None:
    """Shapes of all nodes anew, which passes of users need not keep right."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            node.meta["val"] = program.infer(node)
        except Exception as error:
            raise IllegalProgram(
                pass_name=one.name, reason=f"shapes do not fit: {error}", node=node.format_node()
            ) from error


# --- the capture itself -----------------------------------------------------------------------------

_CAPTURE_LENGTHS = (1, 5, 24)


def eager_samples(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(ids, logits) of the eager model at a few lengths; capture changes how some models run."""
    samples = []
    for length in _CAPTURE_LENGTHS:
        ids = torch.arange(length) % 7
        with torch.no_grad():
            out = model(ids[None])
        samples.append((ids, getattr(out, "logits", out)[0]))
    return samples


def check_capture(
    program: Program, samples: Sequence[tuple[Tensor, Tensor]], seconds: float
) -> PassResult:
    """The capture's line in the report; raises WrongRewrite if the graph is not the eager model."""
    nodes = len(program.graph.nodes)
    summary = "trace the model into an ATen graph with a symbolic number of tokens"
    result = PassResult("capture", summary, 1, seconds, True, Pass.tolerance, 0, nodes)
    if samples:
        errors = [relative_error(wanted, program.run(ids)) for ids, wanted in samples]
        result.error = max(errors)
        if not result.error <= (Pass.tolerance or 0):
            raise WrongRewrite(
                pass_name="capture", error=result.error, tolerance=Pass.tolerance, node="logits"
            )
    return result


# --- translation validation -------------------------------------------------------------------------


def _compare(before: Program, after: Program, one: Pass) -> float:
    """The relative error between the logits of two programs; raises WrongRewrite past the tolerance."""
    tokens = min(_SAMPLE_TOKENS, before.positions)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, before.vocab, (tokens,), generator=rng)
    expected, actual = _trace(before, ids), _trace(after, ids)
    limit = LOSSY_LIMIT if one.tolerance is None else one.tolerance
    error = relative_error(expected.logits, actual.logits)
    if not error <= limit:
        raise WrongRewrite(
            pass_name=one.name, error=error, tolerance=limit,
            node=_first_difference(expected, actual, limit),
        )  # fmt: skip
    return error


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """||actual - expected|| / ||expected||; inf if the shapes differ."""
    if expected.shape != actual.shape:
        return float("inf")
    norm = expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((actual - expected).norm() / norm)


@dataclass
class _Trace:
    logits: Tensor
    values: dict[fx.Node, Tensor]


class _Recorder(Runner):
    """Keeps every tensor that the graph computes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph, program.weights)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.values[n] = value
        return value


def _trace(program: Program, ids: Tensor) -> _Trace:
    recorder = _Recorder(program)
    return _Trace(program.run(ids, runner=recorder), recorder.values)


def _first_difference(expected: _Trace, actual: _Trace, limit: float) -> str:
    """The first node of the new graph whose value under its old name was another; else the newest one."""
    old = {n.name: v for n, v in expected.values.items()}
    fresh = [n for n in actual.values if n.name not in old]
    for node, value in actual.values.items():
        twin = old.get(node.name)
        if twin is None or twin.shape != value.shape or not value.is_floating_point():
            continue
        if not relative_error(twin.float(), value.float()) <= limit:
            culprit = next((n for n in node.all_input_nodes if n in fresh), node)
            return f"{culprit.name} ({where(culprit)})"
    at = fresh[-1] if fresh else next(reversed(actual.values))
    return f"{at.name} ({where(at)})"
