"""Capture a transformers model through the library's own extension points.

One opaque op per attention (``ALL_ATTENTION_FUNCTIONS``) and one per experts block
(``ALL_EXPERTS_FUNCTIONS``); projections, norms, RoPE and routing stay visible around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..ir import expr, ops
from ..ir.program import Program
from .module import capture
from .shards import Source

_NAME = "tokenmill"
# Keyword arguments of an attention call that say nothing about what it computes.
_NEUTRAL = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "dropout",
    "training",
}
_GATED = [f"{fn}(acc0) * acc1" for fn in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")]
_GATED.append("square(relu(acc0)) * acc1")
_PLAIN = [g.removesuffix(" * acc1") for g in _GATED]


def capture_pretrained(
    model: Any, name: str, sources: Mapping[str, Source] | None = None
) -> Program:
    """Trace a ``PreTrainedModel`` with a language-model head, in fp32; see :func:`.module.capture`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # No mask function is registered under this name, so masks arrive as None and the op is causal.
    config = model.config.get_text_config()
    _refuse_value_dependent_rope(config)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    if blocks := [m for m in model.modules() if hasattr(m, "is_concatenated")]:
        # Found before tracing, where activations can still be run on numbers.
        activations = {id(m): _activation(m) for m in blocks}
        ALL_EXPERTS_FUNCTIONS.register(_NAME, partial(_experts, activations))
        model.set_experts_implementation(_NAME)
    program = capture(
        model,
        call=lambda m, ids, positions: m(input_ids=ids, position_ids=positions, use_cache=False),
        takes_positions=True,
        max_positions=config.max_position_embeddings,
        name=name,
        sources=sources,
    )
    attentions = sum(n.target is ops.OPS["attention"].overload for n in program.graph.nodes)
    if attentions == 0:
        raise Unsupported(
            reason=f"{type(model).__name__} does not use the library's attention interface",
            where=type(model).__module__,
            advice="pass the model as an nn.Module with example ids instead of a checkpoint",
        )
    return program


def _refuse_value_dependent_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    kinds = {str(r.get("rope_type")) for r in (rope, *nested)}
    if bad := kinds & {"dynamic", "longrope"}:
        raise Unsupported(
            reason=f"RoPE of type {sorted(bad)[0]!r} chooses its frequencies by the sequence's length",
            where="config.json: rope_parameters",
            advice="set rope_type to 'yarn', 'llama3', 'linear' or 'default'",
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface: q, k, v ``[1, H, T, D]`` in, ``[1, T, H, D]`` out."""
    unknown = sorted(
        k for k, v in rest.items() if k not in _NEUTRAL and v is not None and v is not False
    )
    kind = _layer_type(module)
    if attention_mask is not None or not getattr(module, "is_causal", True):
        _refuse(module, "attention that is not plainly causal", "only decoders can be compiled")
    if unknown:
        _refuse(module, f"attention with {', '.join(unknown)}", "report this model")
    if kind not in ("full_attention", "sliding_attention") or (
        kind == "sliding_attention" and not sliding_window
    ):
        _refuse(module, f"attention of type {kind!r}", "report this model")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = torch.ops.tokenmill.attention(
        q, k, v, s_aux, float(scale), int(sliding_window or 0), float(softcap or 0.0)
    )
    return out, None


def _layer_type(module: Any) -> str:
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds and index is not None else "full_attention"


def _experts(
    activations: Mapping[int, str], module: Any, x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """The library's experts interface, any of its weight layouts."""
    if module.has_bias or getattr(module, "has_post_expert_norm", False):
        _refuse(module, "experts with biases or norms inside", "report this model")
    gate_up = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if module.has_gate and not module.is_concatenated:
        gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
    activation = activations[id(module)]
    return torch.ops.tokenmill.experts(
        x, ids, weights, [gate_up], [down], None, "fp32", "fp32", activation, module.has_gate
    )


@torch.no_grad()
def _activation(module: Any) -> str:
    """The expression that agrees with the module's activation on sample values."""
    sample = torch.linspace(-4.0, 4.0, 66).roll(17).reshape(1, 66)
    halves = sample.chunk(2 if module.has_gate else 1, -1)
    if module.has_gate:
        joint = sample if module.is_concatenated else torch.stack(halves, -1).flatten(-2)
        wanted, candidates = module._apply_gate(joint), _GATED
    else:
        wanted, candidates = module.act_fn(sample), _PLAIN
    operands = {f"acc{i}": h for i, h in enumerate(halves)}
    for candidate in candidates:
        if torch.allclose(expr.evaluate(expr.parse(candidate), operands), wanted, atol=1e-6):
            return candidate
    _refuse(module, "an expert activation that is not in the table", "report this model")


def _refuse(module: nn.Module, what: str, advice: str) -> NoReturn:
    index = getattr(module, "layer_idx", None)
    place = type(module).__name__ + (f", layer {index}" if index is not None else "")
    raise Unsupported(reason=what, where=place, advice=advice)
