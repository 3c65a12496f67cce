"""Models that no pass was written for: compiled with their experts fused, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenmill import Recipe, optimize
from tokenmill.capture.huggingface import _attention, capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.errors import TokenmillError, Unsupported
from tokenmill.ir.program import Program
from tokenmill.passes.lower import lower
from tokenmill.passes.pipeline import Fit, pipeline, relative_error, run_passes
from torch import nn

from .models import FAMILIES, eager, pretrained
from .test_architectures import EXACT, assert_logits
from .test_capture import tokens
from .zoo import COMPILED, DENSE, EXPERT, POSITIONS, REFUSED, VOCAB

LENGTHS = (1, 2, 50)


def compiled(model: nn.Module, recipe: Recipe = EXACT) -> Program:
    program = capture(model, max_positions=POSITIONS)
    run_passes(program, pipeline(recipe))
    return program


def assert_same(program: Program, model: nn.Module) -> None:
    for length in LENGTHS:
        ids = tokens(length, program.vocab)
        wanted = eager(model, ids)
        error = (program.run(ids) - wanted).abs().max() / wanted.std()
        assert error < 1e-4, f"{length} tokens: {error}"


def count(program: Program, op: str) -> int:
    packet = getattr(torch.ops.tokenmill, op)
    return sum(getattr(n.target, "overloadpacket", None) is packet for n in program.graph.nodes)


@pytest.mark.parametrize("name", DENSE)
def test_attention_and_blocks(name: str) -> None:
    model = DENSE[name]()
    program = compiled(model)
    assert_same(program, model)
    assert count(program, "cached_attention") == len(model.blocks)
    assert lower(program).extern_steps == []


@pytest.mark.parametrize("name", EXPERT)
def test_experts_are_fused(name: str) -> None:
    model = EXPERT[name]()
    program = compiled(model)
    assert_same(program, model)
    assert count(program, "experts") == 1
    assert count(program, "route") >= 1
    assert lower(program).extern_steps == []


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_a_remedy(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(TokenmillError, match=reason) as caught:
        compiled(build())
    assert "zoo.py" in caught.value.message
    assert len(caught.value.advice) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name: str) -> None:
    model = pretrained(name)
    program = capture_pretrained(pretrained(name), name)
    run_passes(program, pipeline(EXACT))
    assert_same(program, model)
    latent, experts = FAMILIES[name]
    attentions = "cached_latent_attention" if latent else "cached_attention"
    assert count(program, attentions) == len(program.caches) == 2
    assert count(program, "experts") == experts
    assert lower(program).extern_steps == []


def test_a_window_that_only_the_mask_tells_of() -> None:
    """In layers of which the config says nothing: they have the one mask that the model makes."""
    config = transformers.PhimoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, sliding_window=9,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    program = capture_pretrained(copy.deepcopy(model), "phimoe")
    assert_same(program, model)


def test_a_window_that_nothing_tells_of_is_refused() -> None:
    """The model has masks with one and without, and says of no layer which it takes."""
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(Unsupported, match="does not tell its window"):
        _attention([0, 9], nn.Module(), x, x, x, None)


@pytest.mark.parametrize("name", COMPILED)
def test_the_artifact_computes_it_too(name: str, tmp_path: Path) -> None:
    build = COMPILED[name]
    optimize(build(), tmp_path / name, recipe=EXACT, max_positions=POSITIONS)
    assert_logits(tmp_path / name, build(), lengths=(1, 3, 65, 100))


@pytest.mark.parametrize("how", [{}, {"rotate": True}, {"rounding": "gptq"}, {"balance": True}])
def test_quantized_experts_keep_their_biases(how: dict[str, Any]) -> None:
    model = EXPERT["BiasedStack"]()
    program = capture(model, max_positions=POSITIONS)
    fit = Fit([torch.tensor(tokens(60, VOCAB))])
    run_passes(program, pipeline(Recipe(weights="int8", kv="bf16", **how), fit))
    ids = tokens(50, VOCAB)
    assert relative_error(eager(model, ids), program.run(ids)) < 0.05


class Always(nn.Module):
    """Branches on whether any token is 0, to do something else then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if (ids == 0).any():
            x = x + 1
        return self.head(x)


class Fixed(nn.Module):
    """Takes the number of tokens for a Python int."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)[0]
        return self.head(x + torch.zeros(len(x), 8))[None]


def test_code_that_fixes_the_length_is_named() -> None:
    with pytest.raises(TokenmillError, match=r"test_zoo.py:\d+") as caught:
        capture(Fixed(), max_positions=32)
    assert "x.shape" in caught.value.advice


def test_branches_that_do_more_than_skip_are_refused() -> None:
    with pytest.raises(TokenmillError, match=r"test_zoo.py:\d+") as caught:
        capture(Always(), max_positions=32)
    assert "branches" in caught.value.message


def test_a_window_longer_than_a_probe_is_seen() -> None:
    class Long(DENSE["windowed"]().blocks[0]["attention"].__class__):  # type: ignore[misc, name-defined]
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < 110)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model = DENSE["windowed"]()
    model.blocks[0]["attention"] = Long()
    program = compiled(model.eval())
    (node,) = [n for n in program.graph.nodes if "cached_attention" in str(n.target)]
    assert node.args[9] == 110
