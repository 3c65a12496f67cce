"""What config.json says of a quantized checkpoint, so that loaders know each module's format.

Formats of modules are told by regular expressions over the names that files have.  Loaders take the first
that matches, and transformers takes that of routed experts from the first group that speaks of experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ..ir import quant

Convention: TypeAlias = Literal["compressed-tensors", "fp8"]
W8A8 = "w8a8"  # INT8 whose inputs are rounded to INT8 too, a scheme of checkpoints alone
# Fields that engines ask for; to transformers they are constants, so it does not write them.
_FOR_ENGINES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_narrow(scheme: str) -> bool:
    """Whether modules of a format, or of :data:`W8A8`, count as quantized."""
    return scheme == W8A8 or quant.parse(scheme).bits < 16


def convention(formats: Iterable[str], of_experts: Iterable[str]) -> Convention:
    """DeepSeek's own where all that is quantized is FP8, and experts are: transformers loads no other.

    >>> convention(["fp8", "bf16"], ["fp8"]), convention(["int8", "int4-g32"], ["int4-g32"])
    ('fp8', 'compressed-tensors')
    """
    narrow = {f for f in formats if is_narrow(f)}
    return "fp8" if narrow == {"fp8"} and "fp8" in of_experts else "compressed-tensors"


def for_engines(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what serving engines need to know besides."""
    return _FOR_ENGINES.get(str(config.get("model_type")), {}) | dict(config)


def scale_name(chosen: Convention) -> str:
    """What the scales of FP8 blocks are called."""
    return "weight_scale_inv" if chosen == "fp8" else "weight_scale"


def quantization_config(
    chosen: Convention, modules: Mapping[str, str], experts: Sequence[str]
) -> dict[str, Any] | None:
    """The entry of config.json, None if nothing is quantized.

    ``modules`` gives the format of every linear map by the name of its module, or :data:`W8A8`; ``experts``
    are those of them that are routed to.
    """
    narrow = {m: f for m, f in modules.items() if is_narrow(f)}
    if not narrow:
        return None
    if chosen == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [quant.FP8_BLOCK, quant.FP8_BLOCK],
            "modules_to_not_convert": sorted(modules.keys() - narrow.keys()),
        }
    routed = set(experts)
    # Whatever holds routed experts comes first.
    formats = sorted(set(narrow.values()), key=lambda f: (f not in {modules[e] for e in routed}, f))
    groups = {
        f"group_{i}": {"targets": targets(modules, f, routed), **_scheme(f)}
        for i, f in enumerate(formats)
    }
    kinds = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [
            t
            for f in sorted(set(modules.values()))
            if not is_narrow(f)
            for t in targets(modules, f, routed)
        ],
    }


def _scheme(format: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    inputs: dict[str, Any] = {"num_bits": 8, "symmetric": True, "dynamic": True}
    if format == "fp8":
        block = quant.FP8_BLOCK
        weights |= {
            "num_bits": 8,
            "type": "float",
            "strategy": "block",
            "block_structure": [block, block],
        }
        # Engines multiply FP8 by FP8: inputs are rounded as they come, in groups as wide as the blocks.
        inputs |= {"type": "float", "strategy": "group", "group_size": block}
        return {"weights": weights, "input_activations": inputs, "format": "float-quantized"}
    if format == W8A8:
        weights |= {"num_bits": 8, "type": "int", "strategy": "channel"}
        inputs |= {"type": "int", "strategy": "token"}
        return {"weights": weights, "input_activations": inputs, "format": "int-quantized"}
    fmt = quant.parse(format)
    how = {"strategy": "group", "group_size": fmt.group} if fmt.group else {"strategy": "channel"}
    weights |= {"num_bits": fmt.bits, "type": "int", **how}
    return {"weights": weights, "input_activations": None, "format": "pack-quantized"}


def targets(modules: Mapping[str, str], format: str, first: Iterable[str] = ()) -> list[str]:
    """Expressions for the modules of one format, and for no others; those of ``first`` before the rest.

    >>> formats = {"model.layers.0.q": "int8", "model.layers.1.q": "int8", "model.layers.0.k": "bf16"}
    >>> targets(formats | {"model.layers.1.k": "int8", "lm_head": "bf16"}, "int8")
    ['re:.*layers\\\\.\\\\d+\\\\.q$', 're:.*layers\\\\.1\\\\.k$']
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        alike[_NUMBER.sub("#", module)].append(module)
    early = {_NUMBER.sub("#", module) for module in first}
    found: list[str] = []
    for shape in sorted(alike, key=lambda s: s not in early):
        names = alike[shape]
        wanted = [n for n in names if modules[n] == format]
        if len(wanted) == len(names):
            found.append(_expression(shape, []))
        elif wanted:
            found += _some(shape, wanted, set(names) - set(wanted))
    return found


def _some(shape: str, wanted: Sequence[str], others: set[str]) -> list[str]:
    """Expressions that tell modules by their first number, the layer's, if that is enough."""
    layers = {n: m[0] for n in (*wanted, *others) if (m := _NUMBER.search(n)) is not None}
    mine = sorted({int(layers[n]) for n in wanted})
    if mine and not set(mine) & {int(layers[n]) for n in others}:
        return [_expression(shape, mine)]
    return [_expression(name, []) for name in wanted]


def _expression(shape: str, layers: Sequence[int]) -> str:
    """One for a name with # in place of numbers; of the first of these, those in ``layers`` if any."""
    escaped = re.escape(shape.removeprefix("model.")).replace(r"\#", "#")
    if layers:
        choice = str(layers[0]) if len(layers) == 1 else f"({'|'.join(map(str, layers))})"
        escaped = escaped.replace("#", choice, 1)
    return "re:.*" + escaped.replace("#", r"\d+") + "$"
