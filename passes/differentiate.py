"""Running a Program so that gradients flow: what training needs, and nothing else does.

Dialect ops are registered without a derivative.  Here each runs as its reference, which is plain torch, or as
something that computes the same in less time and keeps less for the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir.ops import OPS
from ..ir.program import Program, Runner
from .base import mill

_BLOCK = 128  # queries that attend together: scores that stay in the cache, and few that are masked


class Differentiable(Runner):
    """Runs a program on whole sequences, without a cache; ``weights`` by name may require gradients.

    Tokens of all sequences go through the graph side by side and meet in attention only, so tokens must be
    proven independent.  Where a cache is inserted, a sequence attends to itself all the same, in the
    precision in which it is computed.  It runs where ``weights`` lie.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        super().__init__(program.graph, weights)
        self._inputs = [n.target for n in program.graph.nodes if n.op == "placeholder"]
        self._lengths: list[int] = []
        self._functions = {op.overload: op.reference for op in OPS.values()} | {
            mill.rms_norm.default: _rms_norm,
            mill.attention.default: self._attention,
            mill.latent_attention.default: self._latent_attention,
            mill.cached_attention.default: self._cached_attention,
            mill.cached_latent_attention.default: self._cached_latent_attention,
        }

    def logits(self, sequences: Sequence[Tensor]) -> Tensor:
        """``[sum of T, V]`` in fp32 of sequences of token ids ``[T]``, one after the other."""
        self._lengths = [len(ids) for ids in sequences]
        ids = torch.cat(list(sequences))
        positions = torch.cat([torch.arange(n, device=ids.device) for n in self._lengths])
        rows = torch.arange(len(ids), device=ids.device)
        inputs = {"ids": ids[None], "positions": positions[None], "rows": rows}
        # Caches, and what finds a place in them, are not looked at.
        out = self.run(*map(inputs.get, self._inputs))
        logits = out[0] if isinstance(out, tuple) else out
        return logits.reshape(-1, logits.shape[-1]).float()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        function = self._functions.get(target)
        return (
            function(*args, **kwargs) if function else super().call_function(target, args, kwargs)
        )

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int,
        softcap: float, slopes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        queries, keys, values = (
            t.reshape(-1, *t.shape[-2:]).split(self._lengths) for t in (q, k, v)
        )
        each = [
            causal(*one, sinks, scale, window, softcap, slopes)
            for one in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(each).reshape(*q.shape[:-1], v.shape[-1])

    def _latent_attention(
        self, q: Tensor, latent: Tensor, k_rope: Tensor, w_uk: list[Tensor], w_uv: list[Tensor],
        format: str, scale: float,
    ) -> Tensor:  # fmt: skip
        """Expanded, as the op's reference: ``k = [w_uk c, k_rope]``, ``v = w_uv c``."""
        (up,), (down,), heads = w_uk, w_uv, q.shape[-2]
        c = latent.flatten(0, -2)
        keys, values = (F.linear(c, w.flatten(0, 1)).unflatten(-1, (heads, -1)) for w in (up, down))
        shared = k_rope.flatten(0, -2)[:, None].expand(-1, heads, -1)
        return self._attention(
            q, torch.cat((keys, shared.to(keys.dtype)), -1), values, None, scale, 0, 0.0
        )  # fmt: skip

    def _cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *rest: Any
    ) -> Tensor:
        _, _, _, _, scale, window, softcap, _, *slopes = rest
        return self._attention(q, k, v, sinks, scale, window, softcap, *slopes)

    def _cached_latent_attention(
        self, q: Tensor, latent: Tensor, k_rope: Tensor, w_uk: list[Tensor], w_uv: list[Tensor],
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        _, _, _, _, format, scale, _ = rest
        return self._latent_attention(q, latent, k_rope, w_uk, w_uv, format, scale)


def causal(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float,
    slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`..ir.ops.attention` of one sequence ``[T, H | Hkv, D | Dv]``, block by block of queries."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    q, k, v = ((q * scale).transpose(0, 1), k.permute(1, 2, 0), v.transpose(0, 1))
    if torch.is_autocast_enabled(q.device.type):  # here once, and not again in every block
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    return torch.cat(
        [
            _block(q, k, v, at, sinks, window, softcap, slopes)
            for at in range(0, q.shape[1], _BLOCK)
        ],
        1,
    ).transpose(0, 1)


def _block(
    q: Tensor, k: Tensor, v: Tensor, lo: int, sinks: Tensor | None, window: int, softcap: float,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Queries ``lo..`` of ``q [H, T, D]`` over the keys ``k [H, D, T]`` that any of them sees."""
    hi = min(lo + _BLOCK, q.shape[1])
    first = max(0, lo - window + 1) if window else 0
    scores = q[:, lo:hi] @ k[..., first:hi]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        key, query = (torch.arange(a, b, device=q.device) for a, b in ((first, hi), (lo, hi)))
        scores = scores + slopes[:, None, None] * (key - query[:, None])
    seen = torch.ones(hi - lo, hi - first, dtype=torch.bool, device=q.device).tril(lo - first)
    if window:
        seen = seen.triu(lo - first - window + 1)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, hi - lo, 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(v.dtype) @ v[:, first:hi]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps)
