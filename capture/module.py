"""Export a module to a Program at ``Stage.ATEN``."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import Unsupported
from ..ir.program import Program, Stage, Weights
from ..ir.program import where as location
from . import stamp
from .branches import Watched, not_empty
from .shards import Source

# Shape checks that export leaves in the graph: the token-independence proof covers what they guard.
_CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}
_OWN = ("tokenmill.capture.", "tokenmill.ir.")  # modules whose frames are not the user's code
# Prints a stack trace for what is raised as well, and is said in one error here.
_ECHO = logging.getLogger("torch._subclasses.fake_tensor")
_EXAMPLE_TOKENS = 7
_BRANCH_LENGTHS = (1, 2, 9)


class _Call(nn.Module):
    """Gives every model one signature: (ids [1, T], positions [1, T] if it takes them) -> logits."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        out = (
            self.call(self.model, ids)
            if positions is None
            else self.call(self.model, ids, positions)
        )
        logits = getattr(out, "logits", out)
        return logits[0] if isinstance(logits, tuple) else logits


def capture(
    model: nn.Module,
    *,
    call: Callable[..., Any] = lambda model, ids: model(ids),
    takes_positions: bool = False,
    example: Tensor | None = None,
    max_positions: int,
    name: str = "model",
    sources: Mapping[str, Source] | None = None,
) -> Program:
    """Trace ``call(model, ids[, positions]) -> logits [1, T, V]`` with symbolic T.

    ``sources`` tell where weights are read that the model does not hold: its parameters of those names are
    fake tensors.  None is read here.

    Raises Unsupported, with the place in the model, if the module cannot be exported that way.
    """
    if example is None and max_positions < 3:
        raise Unsupported(
            reason=f"a sequence of at most {max_positions} tokens",
            where="max_position_embeddings of config.json, or the max_positions argument",
            advice="give it 3 tokens or more",
        )
    ids = torch.arange(min(_EXAMPLE_TOKENS, max_positions))[None] if example is None else example
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 3:
        raise Unsupported(
            reason=f"example ids have shape {tuple(ids.shape)}",
            where="the example_ids argument",
            advice="pass token ids of shape [1, T] with T of at least 3",
        )
    _require_fp32(model)
    tokens = Dim("tokens", min=1, max=max_positions)
    inputs = (ids, torch.arange(ids.shape[1])[None]) if takes_positions else (ids,)
    with torch.no_grad(), warnings.catch_warnings():
        # Raised inside torch.export about its own tree specs.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        wrapped, dynamic = _Call(model.eval(), call), tuple({1: tokens} for _ in inputs)
        kinds = stamp.kinds(wrapped, inputs)
        inputs = tuple(_like_parameters(model, value) for value in inputs)

        def traced(kinds: Sequence[stamp.Kind]) -> Program:
            with stamp.marked(wrapped, kinds) as hidden, not_empty() as watched:
                exported = _export(wrapped, inputs, dynamic, watched)
            program = _to_program(exported, hidden, max_positions, name, sources or {})
            if watched.flags or (watched.sizes and not sources):
                _check_branches(program, None if sources else wrapped, len(inputs), watched)
            return program

        try:
            return traced(kinds)
        except (stamp.NotStamped, Unsupported):
            if not kinds:
                raise
        return traced([])


def _require_fp32(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise Unsupported(
                reason=f"the model computes in {str(value.dtype).removeprefix('torch.')}",
                where=name,
                advice="pass model.float(): the recipe says in which formats weights are stored",
            )


def _check_branches(
    program: Program, wrapped: nn.Module | None, inputs: int, watched: Watched
) -> None:
    """Refuse branches on whether there are tokens if they do more than to skip work for none.

    A model that cannot be run, as its weights are not there, is given no credit.
    """
    rng = torch.Generator().manual_seed(0)
    for length in _BRANCH_LENGTHS:
        length = min(length, program.positions)
        ids = torch.randint(0, program.vocab, (length,), generator=rng)
        given = (ids[None], torch.arange(length)[None])[:inputs]
        wanted = None if wrapped is None else wrapped(*given)[0]
        if wanted is None or not torch.allclose(
            program.run(ids), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        ):
            raise Unsupported(
                reason="the code branches on whether there are such tokens, to do more than skip work",
                where=(watched.flags + watched.sizes)[0],
                advice="write it so that it also computes the right thing without tokens",
            )


def _like_parameters(model: nn.Module, value: Tensor) -> Tensor:
    """The value as a fake tensor if the model's parameters are fake, for they must be of one kind."""
    first = next((p for p in model.parameters() if isinstance(p, FakeTensor)), None)
    return value if first is None else first.fake_mode.from_tensor(value)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any, watched: Watched
) -> ExportedProgram:
    _ECHO.disabled = True
    try:
        # Non-strict only: dynamo has been seen to fold a class test to the wrong constant.
        # The empty table functionalizes and keeps linear and attention whole.
        return torch.export.export(
            module, inputs, dynamic_shapes=dynamic, strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        ).run_decompositions({})  # fmt: skip
    except Unsupported:  # by what stands for a part of the model while it is traced
        raise
    except Exception as error:
        text = str(error)
        raise Unsupported(
            reason=f"the model cannot be traced with a variable number of tokens: {_gist(text)}",
            where=_user_frame(error) or next(iter(watched.fixed), "torch.export"),
            advice=_export_advice(text),
        ) from error
    finally:
        _ECHO.disabled = False


def _gist(text: str) -> str:
    """The first sentence of an exporter's message that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].split(" For more information")[0][:300] if lines else "no message"


def _user_frame(error: BaseException) -> str:
    """The innermost frame of the user's own code in the traceback."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if (
            "/torch/" not in file
            and not file.startswith("<")
            and not trace.tb_frame.f_globals.get("__name__", "").startswith(_OWN)
        ):
            found = f"{file}:{trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found


def _export_advice(text: str) -> str:
    if re.search(r"data-dependent|GuardOnDataDependent|Could not guard", text):
        return (
            "the code branches on tensor values there: write it without Python ints from tensors "
            "(torch.where and index_add_ over experts trace well), or register it as one custom op"
        )
    if re.search(r"[Ss]pecialized|[Ss]pecializations|Constraints violated", text):
        return (
            "the code fixes the number of tokens there: take sizes from x.shape (not len(x)), and write "
            "recurrences over the sequence as attention or leave them out"
        )
    return "make the module traceable by torch.export, or register the part as one custom op"


def _to_program(
    exported: ExportedProgram,
    hidden: Mapping[str, Tensor],
    max_positions: int,
    name: str,
    sources: Mapping[str, Source],
) -> Program:
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    given = {**exported.state_dict, **exported.constants, **hidden}
    weights, owner = _weights(given, sources)
    put_away = (n for n, value in hidden.items() if isinstance(value, nn.Parameter))
    parameters = [*exported.graph_signature.parameters, *put_away]
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    users = iter(("ids", "positions"))
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                values[node] = graph.placeholder(next(users))
            else:
                values[node] = graph.create_node("get_attr", owner[spec.target or spec.arg.name])
        elif node.target in _CHECKS:
            continue
        elif node.op == "output":
            graph.output(values[node.args[0][0]])
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
        if node in values:
            values[node].meta = {
                k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")
            }
    graph = stamp.expand(graph, owner, set(exported.constants))
    _drop_checks(graph)
    logits = graph.output_node().args[0].meta["val"]
    program = Program(
        graph, weights, vocab=int(logits.shape[-1]), positions=max_positions, name=name,
        stage=Stage.ATEN, parameters=_count(parameters, weights, owner),
    )  # fmt: skip
    _ensure_positions(program)
    _refuse_unbacked_output(program)
    return program


def _weights(
    given: Mapping[str, Any], sources: Mapping[str, Source]
) -> tuple[Weights, dict[str, str]]:
    """Weights under the names the user knows; ``owner`` maps every traced name to its weight.

    Tied parameters arrive under several names and become one weight.
    """
    weights = Weights({})
    owner: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    for traced, value in given.items():
        if not isinstance(value, Tensor):
            continue
        tensor = value.detach()
        name = traced.removeprefix("model.")
        source = sources.get(name)
        key: Hashable = id(source)
        if source is None:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.is_meta or not tensor.numel():
                key = name
        if key in seen:
            owner[traced] = seen[key]
            continue
        if source is None:
            weights.add(name, tensor)
        else:
            weights.read(name, source.like, source.whole, source.member)
            for part, stored in source.stored.items():
                weights.read(f"{name}.{part}", stored.like, stored.whole, stored.member)
        owner[traced] = seen[key] = name
    return weights, owner


def _count(parameters: Sequence[str], weights: Weights, owner: dict[str, str]) -> int:
    """Numbers in the model's parameters, buffers not among them."""
    names = {owner[p] for p in parameters}
    return sum(weights.like(n).numel() for n in names)


def _drop_checks(graph: fx.Graph) -> None:
    """Erase the size arithmetic that only fed the checks."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)


def _ensure_positions(program: Program) -> None:
    """A model that counts its own positions gets the input too; a pass makes it use it."""
    if any(n.op == "placeholder" and n.target == "positions" for n in program.graph.nodes):
        return
    ids = program.input("ids")
    with program.graph.inserting_after(ids):
        node = program.graph.placeholder("positions")
    node.meta["val"] = ids.meta["val"].clone()


def _refuse_unbacked_output(program: Program) -> None:
    value = program.output.args[0].meta["val"]
    ids = program.input("ids").meta["val"]
    if value.dim() != 3 or str(value.shape[1]) != str(ids.shape[1]):
        raise Unsupported(
            reason=f"the model returns {tuple(value.shape)} for ids {tuple(ids.shape)}",
            where=location(program.output.args[0]),
            advice="return logits of shape [1, T, vocabulary]",
        )
