"""What a compile did, as plain facts: the report, the manifest and ``inspect`` all read these."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .bench import step_bytes
from .capture.checkpoint import Checkpoint
from .codegen.cpp.emit import EMITTERS
from .codegen.triton.emit import SCHEDULE
from .ir import cache as kv
from .ir import plan as plans
from .ir.plan import DTYPE_BYTES, Device, Experts, Plan
from .ir.program import Program, Stage, module_path, shape
from .passes.base import Pass, calls, mill
from .passes.latent_kv import LatentKV
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
            checkpoint.bytes_of(program.parameters)
            if checkpoint
            else sum(program.weights.like(n).nbytes for n in program.used_weights())
        )
        self._expanded = 0
        self._attention: dict[str, _Attention] = {}
        self._inputs: dict[str, int] = {}  # values that go into a converted attention
        self._before: dict[str, Any] = {}
        self._keep(program, Stage.ATEN)

    def after_pass(self, program: Program, result: PassResult, last: bool = True) -> None:
        """``last``: no pass after this one leaves the program in the stage in which it is now."""
        self.passes.append(result)
        if result.name == "fuse_router":
            # Attention is in its canonical form, and latents are not cached yet.
            attention = list(calls(program, mill.attention))
            self._expanded = sum(_kv_values(n) for n in attention)
            self._attention = {module_path(n): _Attention.of(n) for n in attention}
        if result.name == LatentKV.name:
            latents = calls(program, mill.latent_attention)
            self._inputs = {module_path(n): int(shape(n.args[1].args[0])[-1]) for n in latents}
        if last:
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
        quantize = next((p for p in passes if isinstance(p, Quantize)), Quantize())
        decisions = quantize.decisions
        share: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        for d in decisions:
            share[d.format] += d.parameters
            stored[d.format] += d.bytes
        total = sum(share.values()) or 1
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
            "bytes_by_format": dict(sorted(stored.items())),
            "quantized": _quantized(decisions) | {"idle_rules": quantize.idle},
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
            "memory": memory(max(weights.values()), plan.arena_bytes, kv_bytes, plan.positions),
            "capacity": {"tokens": plan.capacity.tokens, "rows": plan.capacity.rows},
            "stages": self.stages,
            "layer": {"before": self._before, "after": layer_graph(program)},
        }  # fmt: skip

    def converted(
        self, found: Mapping[str, Any], facts: Mapping[str, Any], plan: Plan, recipe: Recipe
    ) -> dict[str, Any]:
        """What LatentKV ``found``, with what it is worth: bytes per token, contexts, what decoding costs.

        Before is a model with the same formats whose attention keeps its keys and values.  It is reckoned,
        not compiled: its weights have as many bytes per parameter as those of the compiled one, by role.
        """
        rates = _bytes_per_parameter(facts["formats"])
        saved, more = 0, 0.0
        flop_before, flop_after = 0, 0
        for layer in found["layers"]:
            attention, rank, rotary = self._attention[layer["path"]], layer["rank"], layer["rotary"]
            latent = plans.latent_cache("", recipe.kv, rank, rotary)
            saved += attention.row_bytes(recipe.kv) - latent.row_bytes
            parameters = attention.added(self._inputs[layer["path"]], rank, rotary)
            more += sum(rates.get(role, 0.0) * count for role, count in parameters.items())
            flop_before += 2 * attention.heads * (attention.width + attention.value)
            flop_after += 2 * attention.heads * (rank + rotary + rank)
        added = round(more)
        row = facts["kv_bytes_per_token"]
        held, arena = facts["bytes"]["weights"], plan.arena_bytes
        stored = plans.dump(plan)
        decode = []
        for context in CONTEXTS:
            read = step_bytes(stored, 1, context)
            after = read["weights"] + read["cache"]
            before = after - added + saved * context
            decode.append(
                {"context": context, "before": before, "after": after,
                 "flop_before": flop_before * context, "flop_after": flop_after * context}
            )  # fmt: skip
        return {
            **found,
            "bytes_before": row + saved, "bytes_after": row, "weight_bytes_added": added,
            "contexts": [
                {"memory_bytes": memory, "before": _fitting(memory - arena - held + added, row + saved),
                 "after": _fitting(memory - arena - held, row)} for memory in MEMORIES
            ],
            "decode": decode,
        }  # fmt: skip


@dataclass(frozen=True)
class _Attention:
    """The shapes of an attention with keys and values per head."""

    heads: int
    groups: int
    width: int
    value: int

    @classmethod
    def of(cls, node: fx.Node) -> _Attention:
        q, k, v = (shape(a) for a in node.args[:3])
        return cls(int(q[-2]), int(k[-2]), int(k[-1]), int(v[-1]))

    def row_bytes(self, format: str) -> int:
        return plans.gqa_cache("", format, self.groups, self.width, self.value).row_bytes

    def added(self, inputs: int, rank: int, rotary: int) -> dict[str, int]:
        """How many parameters more the latent one has, by role."""
        cached = self.groups * (self.width + self.value)
        rows = self.heads * rotary + rotary + rank - cached
        return {
            "linear": rows * inputs,
            "latent_up": self.heads * (self.width + self.value) * rank,
        }


def _bytes_per_parameter(formats: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    stored: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for fact in formats:
        stored[fact["role"]] += fact["bytes"]
        parameters[fact["role"]] += fact["parameters"]
    return {role: stored[role] / count for role, count in parameters.items() if count}


def _fitting(room: int, row: int) -> int:
    """Tokens whose caches fit."""
    return max(0, room // row) if row else 0


# Of what latent attention changes: memories in bytes, and tokens that a sequence has already.
MEMORIES = tuple(gigabytes * 10**9 for gigabytes in (16, 24, 48, 80))
CONTEXTS = (512, 4096, 32768, 131072)

# GB (1e9 bytes) of the cards that are sold.
CARDS = (24, 48, 80, 96, 141, 192)


def memory(weights: int, arena: int, row: int, positions: int) -> dict[str, Any]:
    """What a compiled model takes, and how many cards of a size hold it with how many tokens of cache.

    ``row`` is the cache's size per token.  An artifact runs on one device; more ``cards`` than one stand for
    an even split of weights and cache, with activations on each, and nothing lost to the split.  ``context``
    is the longest sequence, at most ``positions`` long, and ``tokens`` what the cache of all sequences holds.
    """
    rows = []
    for gigabytes in CARDS:
        room = gigabytes * 10**9 - arena
        if room <= 0:
            continue
        cards = max(1, -(-(weights + row) // room))
        tokens = (cards * room - weights) // row if row else 0
        rows.append({
            "card_bytes": gigabytes * 10**9, "cards": cards, "tokens": tokens,
            "context": min(tokens, positions), "weight_bytes_per_card": -(-weights // cards),
        })  # fmt: skip
    return {"weights": weights, "activations": arena, "cards": rows}


def emitted(plan: Plan, sources: Mapping[str, str]) -> dict[str, int]:
    """How many kernels a target has, in how much text; on a GPU, in how many binaries."""
    count = sum(not isinstance(spec, plans.Extern) for spec in plan.specs)
    found = {"kernels": count, "files": len(sources), "bytes": sum(map(len, sources.values()))}
    if schedule := sources.get(SCHEDULE):
        found["binaries"] = len(json.loads(schedule)["binaries"])
    return found


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
