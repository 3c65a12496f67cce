"""Captured graphs compute what the eager models compute, through every pass and down to the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenmill import optimize
from tokenmill.capture.checkpoint import open_checkpoint
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.errors import BadRequest, Unsupported
from tokenmill.ir.ops import load_router
from tokenmill.ir.program import Program
from tokenmill.ir.router import RouterSpec
from tokenmill.passes.lower import lower
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor, nn

from .models import CONFIGS, VOCAB, eager, hand_written, pretrained

LENGTHS = (1, 2, 9, 70)
EXACT = Recipe(weights="fp32", kv="fp32")


def tokens(length: int, vocab: int = VOCAB) -> list[int]:
    rng = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab, (length,), generator=rng).tolist()


def assert_same(program: Program, model: nn.Module, vocab: int = VOCAB) -> None:
    for length in LENGTHS:
        ids = tokens(length, vocab)
        wanted = eager(model, ids)
        error = (program.run(ids) - wanted).abs().max() / wanted.std()
        assert error < 1e-4, f"{length} tokens: {error}"


@pytest.fixture(scope="module", params=[*CONFIGS, "hand_written"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, nn.Module, Program, dict[str, int]]:
    """(name, eager model, program after all passes, matches per pass), every pass checked.

    Those of transformers are streamed from many shards; test_architectures has them in memory.
    """
    if request.param == "hand_written":
        model: nn.Module = hand_written()
        program = capture(model, max_positions=256)
    else:
        model = pretrained(request.param)
        path = tmp_path_factory.mktemp("checkpoints") / request.param
        model.save_pretrained(path, max_shard_size="60KB")
        streamed = open_checkpoint(path).stream()
        assert streamed.sources, streamed.note
        program = capture_pretrained(streamed.model, request.param, streamed.sources)
    assert_same(program, model, program.vocab)
    results = run_passes(program, pipeline(EXACT), check=True)
    return request.param, model, program, {r.name: r.matches for r in results}


def test_every_pass_keeps_the_model(
    compiled: tuple[str, nn.Module, Program, dict[str, int]],
) -> None:
    _, model, program, _ = compiled
    assert_same(program, model, program.vocab)


def test_nothing_is_left_to_torch(compiled: tuple[str, nn.Module, Program, dict[str, int]]) -> None:
    assert lower(compiled[2]).extern_steps == []


def test_attention_has_its_canonical_form(
    compiled: tuple[str, nn.Module, Program, dict[str, int]],
) -> None:
    name, _, program, matches = compiled
    widths = {
        "deepseek_v3": 32 + 8, "deepseek_v2": 32 + 8, "qwen3_moe": 2 * 2 * 24, "mixtral": 2 * 2 * 16,
        "llama": 2 * 2 * 16, "hand_written": 2 * 2 * 16,
    }  # fmt: skip
    assert [c.width for c in program.caches] == [widths[name]] * 2
    assert matches["compress_kv"] == (2 if name.startswith("deepseek") else 0)
    assert matches["lift_rope"] == 4


def test_routers_are_recognised(compiled: tuple[str, nn.Module, Program, dict[str, int]]) -> None:
    name, _, program, _ = compiled
    found = [
        load_router(n.args[2])
        for n in program.graph.nodes
        if n.target is torch.ops.tokenmill.route.default
    ]
    wanted = {
        "deepseek_v3": [RouterSpec(3, "sigmoid", True, 4, 2, "top2", epsilon=1e-20, scale=2.5)],
        "deepseek_v2": [RouterSpec(3, "softmax", False, 4, 2, "max", renormalize=False, scale=1.5)],
        "qwen3_moe": [RouterSpec(2, "softmax", renormalize=False)] * 2,
        "mixtral": [RouterSpec(2, "softmax")] * 2,
        "llama": [],
        "hand_written": [RouterSpec(2, "softmax")] * 2,
    }
    # Renormalised softmax scores are the softmax of the chosen logits: two spellings of one router.
    twin = RouterSpec(2, "identity", after="softmax", renormalize=False)
    assert [wanted[name][0] if f == twin else f for f in found] == wanted[name]


class _Branches(nn.Module):
    """Branches on values: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if x.sum() > 0:
            x = x + 1
        return self.head(x)


def test_untraceable_code_is_named() -> None:
    with pytest.raises(Unsupported, match=r"test_capture.py:\d+") as caught:
        capture(_Branches(), max_positions=32)
    assert "torch.where" in str(caught.value)


class _Pooled(_Branches):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


def test_wrong_output_shape_is_refused() -> None:
    with pytest.raises(Unsupported, match="returns"):
        capture(_Pooled(), max_positions=32)


def test_tied_weights_are_one() -> None:
    program = capture_pretrained(pretrained("llama"), "llama")
    used = program.used_weights()
    assert sum("embed" in n or "lm_head" in n for n in used) == 1


def test_positions_bound_by_the_config() -> None:
    assert capture_pretrained(pretrained("llama"), "llama").positions == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_that_does_not_compute_in_fp32_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match=r"computes in \w+\n  where: embed") as caught:
        capture(hand_written().to(dtype), max_positions=256)
    assert "model.float()" in caught.value.advice


def test_short_sequences() -> None:
    model = hand_written()
    program = capture(model, max_positions=4)
    ids = tokens(4, program.vocab)
    torch.testing.assert_close(program.run(ids), eager(model, ids))
    with pytest.raises(Unsupported, match="at most 2 tokens"):
        capture(model, max_positions=2)
    model = pretrained("llama")
    model.config.max_position_embeddings = 0
    with pytest.raises(Unsupported, match="at most 0 tokens"):
        capture_pretrained(model, "llama")


def test_what_cannot_be_a_model() -> None:
    with pytest.raises(BadRequest, match="a model that is a NoneType"):
        optimize(None, dry_run=True)  # type: ignore[arg-type]


def test_a_recipe_may_be_a_dict() -> None:
    recipe: Any = {"weights": "int8"}
    compiled = optimize(hand_written(), recipe=recipe, dry_run=True, max_positions=256)
    assert compiled.recipe == Recipe(weights="int8")
