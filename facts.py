"""What a compile did, as plain facts: the report, the manifest and ``inspect`` all read these."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .capture.checkpoint import Checkpoint
from .codegen.cpp.emit import EMITTERS
from .ir import cache as kv
from .ir import plan as plans
from .ir.plan import DTYPE_BYTES, Device, Experts, Plan
from .ir.program import Program, Stage, module_path, shape
from .passes.base import Pass, calls, mill
from .passes.pipeline import PassResult
from .passes.quantize import Decision, Quantize, shares
from .recipe import Recipe


class Recorder:
    """Watches a compile; keeps the graph's text per stage, and one layer before and after."""

    def __init__(self, program: Program, checkpoint: Checkpoint | None) -> None:
        self.passes: list[PassResult] = []
        self.graphs: dict[str, str] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        self._name = program.name
        self._parameters = program.parameters
        self._original_bytes = (
            checkpoint.bytes
            if checkpoint
            else sum(program.weights.like(n).nbytes for n in program.used_weights())
        )
        self._expanded = 0
        self._before: dict[str, Any] = {}
        self._keep(program, Stage.ATEN)

    def after_pass(self, program: Program, result: PassResult) -> None:
        self.passes.append(result)
        if result.name == "fuse_router":
            # Attention is in its canonical form, and latents are not cached yet.
            self._expanded = sum(_kv_values(n) for n in calls(program, mill.attention))
        self._keep(program, program.stage)

    def _keep(self, program: Program, stage: Stage) -> None:
        name = stage.name.lower()
        ops = Counter(op_label(n) for n in program.graph.nodes if n.op == "call_function")
        self.stages[name] = {"nodes": len(program.graph.nodes), "ops": dict(ops.most_common())}
        self.graphs[name] = graph_text(program)
        if not self._before:
            self._before = layer_graph(program)

    def facts(
        self,
        program: Program,
        plans: Mapping[Device, Plan],
        passes: Sequence[Pass],
        recipe: Recipe,
        targets: list[str],
    ) -> dict[str, Any]:
        """Everything the report says; see README for the meaning of each key."""
        plan = next(iter(plans.values()))
        weights = {
            device: sum(_bytes(b) for b in p.buffers.values() if b.kind == "weight")
            for device, p in plans.items()
        }
        decisions = next((p.decisions for p in passes if isinstance(p, Quantize)), [])
        share: Counter[str] = Counter()
        for d in decisions:
            share[d.format] += d.parameters
        total = sum(share.values())
        kv_bytes = sum(c.row_bytes for c in plan.caches)
        return {
            "model": {
                "name": self._name, "layers": len(plan.caches), "vocab": plan.vocab,
                "positions": plan.positions,
            },
            "parameters": {
                "total": self._parameters, "active": self._parameters - idle_parameters(plan)
            },
            "bytes": {"weights": max(weights.values()), "original": self._original_bytes},
            "kv_bytes_per_token": kv_bytes,
            "kv_bytes_per_token_expanded": self._expanded * kv.FORMATS[recipe.kv],
            "weights_by_format": {f: n / total for f, n in sorted(share.items())},
            "quantized": _quantized(decisions),
            "formats": [
                {"weight": d.weight, "role": d.role, "format": d.format, "parameters": d.parameters,
                 "bytes": d.bytes} for d in decisions
            ],
            "kernels": _kernels(plan),
            "extern_steps": [{"op": s.spec.op, "where": s.where} for s in plan.extern_steps],  # type: ignore[union-attr]
            # Seconds differ from run to run; an artifact must not.
            "passes": [p.facts() for p in self.passes],
            "targets": targets,
            "peak_memory_bytes": max(
                weights[device] + p.arena_bytes + kv_bytes * p.positions
                for device, p in plans.items()
            ),
            "capacity": {"tokens": plan.capacity.tokens, "rows": plan.capacity.rows},
            "stages": self.stages,
            "layer": {"before": self._before, "after": layer_graph(program)},
        }  # fmt: skip


def idle_parameters(plan: Plan) -> int:
    """Parameters of routed experts that a token does not visit."""
    idle = 0
    for step in plan.steps:
        if isinstance(s := step.spec, Experts):
            per_expert = s.inter * s.hidden * (3 if s.gated else 2)
            idle += (s.experts - s.top_k) * per_expert
    return idle


def _quantized(decisions: Sequence[Decision]) -> dict[str, Any]:
    """How much is stored in fewer than 16 bits, next to how much the recipe wants so."""
    stored, expected = shares(decisions)
    bits = 8 * sum(d.bytes for d in decisions) / (sum(d.parameters for d in decisions) or 1)
    escaped = [
        {"weight": d.weight, "format": d.format, "wanted": d.wanted, "parameters": d.parameters,
         "reason": d.escaped} for d in decisions if d.escaped
    ]  # fmt: skip
    return {"share": stored, "expected": expected, "bits": bits, "escaped": escaped}


def _kv_values(attention: fx.Node) -> int:
    """Values per token that a cache of plain keys and values would hold."""
    _, k, v = attention.args[:3]
    return int(shape(k)[-2]) * (int(shape(k)[-1]) + int(shape(v)[-1]))


def _bytes(buffer: plans.Buffer) -> int:
    count = DTYPE_BYTES[buffer.dtype]
    for size in buffer.shape:
        count *= size
    return count


def _kernels(plan: Plan) -> list[dict[str, Any]]:
    uses = Counter(s.spec for s in plan.steps)
    return [
        {
            "symbol": EMITTERS[spec.kind].symbol(spec),
            "kind": spec.kind,
            "steps": n,
            "spec": plans.dump_spec(spec),
        }
        for spec, n in uses.items()
        if not isinstance(spec, plans.Extern)
    ]


# --- graphs as text and drawings ---------------------------------------------------------------------

_KINDS = {
    "attention": "attention", "latent_attention": "attention", "cached_attention": "attention",
    "cached_latent_attention": "attention", "scaled_dot_product_attention": "attention",
    "linear": "linear", "experts": "experts", "route": "router", "topk": "router", "rope": "rope",
    "rms_norm": "norm", "layer_norm": "norm", "add_rms_norm": "norm", "embed": "embedding",
    "reshape": "move", "view": "move", "transpose": "move", "expand": "move", "slice": "move",
    "split_with_sizes": "move", "cat": "move", "getitem": "move", "unsqueeze": "move", "clone": "move",
    "copy": "move", "slice_scatter": "move", "new_empty": "move", "select_rows": "move",
}  # fmt: skip
_LAYER = re.compile(r"^(?P<list>(?:.*\.)?[A-Za-z_]\w*)\.(?P<index>\d+)(?:\.|$)")


def op_label(node: fx.Node) -> str:
    """``linear``, ``rms_norm``: the op without namespace and overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return (
        packet.__name__
        if packet is not None
        else getattr(node.target, "__name__", str(node.target))
    )


def graph_text(program: Program) -> str:
    """One line per node: name, op, arguments, shape, and where it comes from in the user's model."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        value = node.meta.get("val")
        size = f"{tuple(value.shape)}".replace("'", "") if isinstance(value, Tensor) else ""
        if node.op == "output":
            lines.append(f"return {_argument(node.args)}")
        elif node.op == "placeholder":
            lines.append(f"{node.name} = input {size}")
        else:
            arguments = ", ".join(_argument(a) for a in node.args)
            place = module_path(node)
            comment = f"  # {place}" if place else ""
            lines.append(f"{node.name} = {op_label(node)}({arguments}) {size}{comment}")
    return "\n".join(lines) + "\n"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    return repr(value)


def layer_graph(program: Program) -> dict[str, Any]:
    """Nodes and edges of the last layer of the model's longest list of layers."""
    places = {n: module_path(n) for n in program.graph.nodes if n.op == "call_function"}
    found = [m for p in places.values() if (m := _LAYER.match(p))]
    if not found:
        return {"nodes": [], "edges": []}
    longest = Counter(m["list"] for m in found).most_common(1)[0][0]
    last = max(int(m["index"]) for m in found if m["list"] == longest)
    prefix = f"{longest}.{last}"
    inside = [
        n for n, p in places.items()
        if f"{p}.".startswith(f"{prefix}.") and isinstance(n.meta.get("val"), Tensor | tuple | list)
    ]  # fmt: skip
    kept = set(inside)
    return {
        "nodes": [
            {"id": n.name, "label": op_label(n), "kind": _KINDS.get(op_label(n), "pointwise"),
             "where": places[n].removeprefix(prefix).lstrip(".")} for n in inside
        ],
        "edges": [[a.name, n.name] for n in inside for a in n.all_input_nodes if a in kept],
    }  # fmt: skip
