"""Routers: which experts a token visits, and with what weights, as data.

One declarative spec and one reference cover every router of the field: Mixtral, Qwen, DeepSeek-V2/V3,
GLM, gpt-oss, Llama 4.  Sources: the DeepSeek-V2 and V3 reports; the transformers library.

>>> v3 = RouterSpec(top_k=1, score="sigmoid", bias=True, scale=2.5)
>>> ids, weights = route(torch.tensor([[0.0, 1.0]]), torch.tensor([9.0, 0.0]), v3)
>>> ids.tolist(), weights.tolist()  # the bias chooses, the unbiased score weighs (here renormalised)
([[0]], [[2.5]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda x: F.softplus(x).sqrt(),
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class RouterSpec:
    """How logits ``[T, E]`` become ``top_k`` experts and weights.

    ``score`` maps logits to scores.  With ``bias`` a vector [E] is added for the *choice* only.  With
    ``groups > 1`` the experts form equal groups, of which the best ``top_groups`` stay eligible; a group's
    score is the sum of its two best (``top2``) or its best (``max``).  Weights are the chosen unbiased
    scores, mapped by ``after`` (``softmax`` over the chosen, say), divided by their sum + ``epsilon`` if
    ``renormalize``, times ``scale``.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "identity"] = "softmax"
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    after: Literal["identity", "softmax", "sigmoid"] = "identity"
    renormalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0


def route(logits: Tensor, bias: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """``logits [T, E]`` -> expert ids int32 ``[T, top_k]``, best first, and weights fp32 ``[T, top_k]``."""
    scores = SCORES[spec.score](logits.float())
    choice = scores + bias if bias is not None else scores
    if spec.groups > 1:
        grouped = choice.unflatten(-1, (spec.groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        if spec.group_score == "max":
            best = grouped.amax(-1)
        kept = torch.zeros_like(best).scatter_(-1, best.topk(spec.top_groups, -1).indices, 1.0)
        choice = grouped.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
    ids = choice.topk(spec.top_k, -1).indices
    weights = SCORES[spec.after](scores.gather(-1, ids))
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.epsilon)
    return ids.int(), weights * spec.scale
