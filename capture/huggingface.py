"""Capture a transformers model through the library's own extension points.

One opaque op per attention (``ALL_ATTENTION_FUNCTIONS``) and one per experts block
(``ALL_EXPERTS_FUNCTIONS``); projections, norms, RoPE and routing stay visible around them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..ir import expr, ops
from ..ir.program import Program
from .module import capture
from .shards import Source

_NAME = "tokenmill"
_UNTOLD = -1  # instead of a window, where a model says nothing of it
# Keyword arguments of an attention call that say nothing about what it computes.
_NEUTRAL = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "dropout",
    "training",
}
_ATTENTIONS = {
    ops.OPS["attention"].overload,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
}
_GATED = [f"{fn}(acc0) * acc1" for fn in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")]
_GATED.append("square(relu(acc0)) * acc1")
_PLAIN = [g.removesuffix(" * acc1") for g in _GATED]
# Gates with constants: those of gpt-oss, and SwiGLU between limits.
_LIMITED = (
    "(max(min(acc1, {a}), -{a}) + 1.0) * min(acc0, {a}) * sigmoid({b} * min(acc0, {a}))",
    "silu(min(acc0, {a})) * max(min(acc1, {a}), -{a})",
)


def capture_pretrained(
    model: Any, name: str, sources: Mapping[str, Source] | None = None
) -> Program:
    """Trace a ``PreTrainedModel`` with a language-model head, in fp32; see :func:`.module.capture`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # No mask function is registered under this name, so masks arrive as None and the op is causal.
    config = model.config.get_text_config()
    _refuse_value_dependent_rope(config)
    for module in model.modules():
        # Frequencies are those that it was made with, so it need not ask for the length.
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"
    windows: list[int] = []
    ALL_ATTENTION_FUNCTIONS.register(_NAME, partial(_attention, windows))
    # Models that do not use the interface keep their own code, which passes read, and its masks.
    model.set_attn_implementation(_NAME if _uses_interface(model) else "eager")
    if blocks := [m for m in model.modules() if hasattr(m, "is_concatenated")]:
        # Found before tracing, where activations can still be run on numbers.
        activations = {id(m): _activation(m) for m in blocks}
        ALL_EXPERTS_FUNCTIONS.register(_NAME, partial(_experts, activations))
        model.set_experts_implementation(_NAME)
    with _masks_noted(model, windows):
        program = capture(
            model,
            call=lambda m, ids, positions: m(
                input_ids=ids, position_ids=positions, use_cache=False
            ),
            takes_positions=True,
            max_positions=_positions(config),
            name=name,
            sources=sources,
        )
    if not any(n.target in _ATTENTIONS for n in program.graph.nodes):
        raise Unsupported(
            reason=f"there is no attention in {type(model).__name__}",
            where=type(model).__module__,
            advice="only decoders whose tokens meet in attention can be compiled",
        )
    return program


def _uses_interface(model: Any) -> bool:
    """Whether attention modules look their function up in the library's registry."""
    sources = {sys.modules.get(type(m).__module__) for m in model.modules()}
    return any(hasattr(s, "ALL_ATTENTION_FUNCTIONS") for s in sources if s is not None)


@contextmanager
def _masks_noted(model: Any, windows: list[int]) -> Iterator[None]:
    """Meanwhile every mask that the model's code asks for adds its window to ``windows``, 0 if it has none.

    Some models tell attention of a window by the mask alone.
    """

    def noting(make: Callable[..., Any], windowed: bool) -> Callable[..., Any]:
        def made(config: Any, *args: Any, **options: Any) -> Any:
            windows.append(int(getattr(config, "sliding_window", None) or 0) if windowed else 0)
            return make(config, *args, **options)

        return made

    makers = {"create_causal_mask": False, "create_sliding_window_causal_mask": True}
    found = [
        (source, name, getattr(source, name))
        for source in {sys.modules.get(type(m).__module__) for m in model.modules()}
        for name in makers
        if hasattr(source, name)
    ]
    for source, name, make in found:
        setattr(source, name, noting(make, makers[name]))
    try:
        yield
    finally:
        for source, name, make in found:
            setattr(source, name, make)


def _positions(config: Any) -> int:
    """The most tokens of a sequence; where a config has no limit, that of a usual training run."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [value for name in names if (value := getattr(config, name, None)) is not None]
    return int(found[0]) if found else 2048


def _refuse_value_dependent_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    kinds = {str(r.get("rope_type")) for r in (rope, *nested)}
    if _is_one_for_all(config, rope):
        kinds.remove("longrope")
    if bad := kinds & {"dynamic", "longrope"}:
        raise Unsupported(
            reason=f"RoPE of type {sorted(bad)[0]!r} chooses its frequencies by the sequence's length",
            where="config.json: rope_parameters",
            advice="set rope_type to 'yarn', 'llama3', 'linear' or 'default'",
        )


def _is_one_for_all(config: Any, rope: Mapping[str, Any]) -> bool:
    """Whether a rotation that could depend on the length is the same for all that the model knows."""
    short, long = rope.get("short_factor"), rope.get("long_factor")
    known = int(rope.get("original_max_position_embeddings") or 0)
    return rope.get("rope_type") == "longrope" and (short == long or known >= _positions(config))


def _attention(
    windows: list[int],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = _UNTOLD,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The library's attention interface: q, k, v ``[1, H, T, D]`` in, ``[1, T, H, D]`` out.

    ``windows`` are those of the masks that the model has made.
    """
    unknown = sorted(
        k for k, v in rest.items() if k not in _NEUTRAL and v is not None and v is not False
    )
    kind = _layer_type(module)
    if attention_mask is not None or not getattr(module, "is_causal", True):
        _refuse(module, "attention that is not plainly causal", "only decoders can be compiled")
    if unknown:
        _refuse(module, f"attention with {', '.join(unknown)}", "report this model")
    if (
        kind == "chunked_attention"
        and _positions(module.config) <= module.config.attention_chunk_size
    ):
        kind = "full_attention"
    if kind == "chunked_attention":
        size = module.config.attention_chunk_size
        advice = f"shorten max_position_embeddings in config.json to the chunk's {size} tokens"
        _refuse(module, "attention in chunks of the sequence", advice)
    if sliding_window in (None, 0, _UNTOLD):
        found = _windows_of_masks(windows, kind)
        if len(found) > 1 and sliding_window == _UNTOLD:
            _refuse(module, "attention that does not tell its window", "report this model")
        sliding_window = found.pop() if len(found) == 1 else 0
    kind = kind or "full_attention"
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


def _layer_type(module: Any) -> str | None:
    """What the config says of a layer's attention, if it does."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds and index is not None else None


def _windows_of_masks(windows: list[int], kind: str | None) -> set[int]:
    """Those of the masks that may be for a layer of this kind; 0 is the window of a mask without one."""
    if kind == "full_attention":
        return {0}
    return {window for window in windows if window or kind is None}


def _experts(
    activations: Mapping[int, str], module: Any, x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """The library's experts interface, any of its weight layouts."""
    if getattr(module, "has_post_expert_norm", False):
        _refuse(module, "experts with norms inside", "report this model")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = getattr(module, first), module.down_proj
    biases = [getattr(module, f"{n}_bias") for n in (first, "down_proj")] if module.has_bias else []
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if module.has_gate and not module.is_concatenated:
        gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
        biases[:1] = [torch.cat((b[:, 0::2], b[:, 1::2]), 1) for b in biases[:1]]
    activation = activations[id(module)]
    return torch.ops.tokenmill.experts(
        x, ids, weights, [gate_up], [down], None, "fp32", "fp32", activation, module.has_gate,
        *biases,
    )  # fmt: skip


@torch.no_grad()
def _activation(module: Any) -> str:
    """The expression that agrees with the module's activation on sample values."""
    sample = torch.linspace(-12.0, 12.0, 198).roll(71).reshape(1, 198)
    halves = sample.chunk(2 if module.has_gate else 1, -1)
    if module.has_gate:
        joint = sample if module.is_concatenated else torch.stack(halves, -1).flatten(-2)
        wanted, candidates = module._apply_gate(joint), [*_GATED, *_limited(module)]
    else:
        wanted, candidates = module.act_fn(sample), _PLAIN
    operands = {f"acc{i}": h for i, h in enumerate(halves)}
    for candidate in candidates:
        if torch.allclose(expr.evaluate(expr.parse(candidate), operands), wanted, atol=1e-5):
            return candidate
    _refuse(module, "an expert activation that is not in the table", "report this model")


def _limited(module: Any) -> list[str]:
    """Gates with the module's own numbers for constants."""
    numbers = [float(v) for v in vars(module).values() if isinstance(v, float)]
    pairs = product(dict.fromkeys(numbers), repeat=2)
    return [form.format(a=a, b=b) for a, b in pairs for form in _LIMITED]


def _refuse(module: nn.Module, what: str, advice: str) -> NoReturn:
    index = getattr(module, "layer_idx", None)
    place = type(module).__name__ + (f", layer {index}" if index is not None else "")
    raise Unsupported(reason=what, where=place, advice=advice)
