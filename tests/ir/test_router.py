"""The router reference against the routers of the transformers library."""

from __future__ import annotations

import pytest
import torch
from tokenmill.ir.router import RouterSpec, route

LOGITS = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 2


def by_expert(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    order = ids.long().argsort(-1)
    return ids.long().gather(-1, order), weights.gather(-1, order)


def assert_same(found: tuple, wanted: tuple) -> None:
    found, wanted = by_expert(*found), by_expert(*wanted)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def test_deepseek_v3() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=5, n_group=4, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))
        router.e_score_correction_bias.normal_(std=0.2)
        _, weights, ids = router(LOGITS)
    spec = RouterSpec(5, "sigmoid", True, 4, 2, "top2", epsilon=1e-20, scale=2.5)
    assert_same(route(LOGITS, router.e_score_correction_bias, spec), (ids, weights))


@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_topk(renormalize: bool) -> None:
    weights, ids = LOGITS.softmax(-1).topk(4, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    assert_same(route(LOGITS, None, RouterSpec(4, renormalize=renormalize)), (ids, weights))


def test_topk_then_softmax_is_renormalised_softmax() -> None:
    after = RouterSpec(4, "identity", after="softmax", renormalize=False)
    assert_same(route(LOGITS, None, after), route(LOGITS, None, RouterSpec(4)))


def test_topk_then_sigmoid() -> None:
    """Llama 4."""
    values, ids = LOGITS.topk(1, -1)
    spec = RouterSpec(1, "identity", after="sigmoid", renormalize=False)
    assert_same(route(LOGITS, None, spec), (ids, values.sigmoid()))


def test_group_limited_by_the_best() -> None:
    """DeepSeek-V2."""
    scores = LOGITS.softmax(-1)
    groups = scores.view(-1, 4, 4).amax(-1).topk(2, -1).indices
    kept = torch.zeros(len(scores), 4).scatter_(1, groups, 1).repeat_interleave(4, 1)
    weights, ids = (scores * kept).topk(6, -1)
    spec = RouterSpec(6, groups=4, top_groups=2, group_score="max", renormalize=False, scale=16.0)
    assert_same(route(LOGITS, None, spec), (ids, weights * 16))


def test_sqrt_softplus() -> None:
    """DeepSeek-V4."""
    scores = torch.nn.functional.softplus(LOGITS).sqrt()
    weights, ids = scores.topk(3, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    assert_same(route(LOGITS, None, RouterSpec(3, "sqrt_softplus")), (ids, weights))


def test_no_tokens() -> None:
    ids, weights = route(LOGITS[:0], None, RouterSpec(4))
    assert ids.shape == weights.shape == (0, 4)
