"""A search spends its budget where it buys most, and never more than it was given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.console import search_view
from tokenmill.errors import BadRequest, BudgetTooSmall
from tokenmill.ir import quant
from tokenmill.ir.program import Program
from tokenmill.passes.base import calls, mill
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.passes.quantize import Quantize
from tokenmill.recipe import CACHE_FORMATS, Budget, Recipe, Rule
from tokenmill.search import Found, search, split
from tokenmill.search.choose import least, loss, path, stored, total
from tokenmill.search.measure import Yardstick, batch, divergence, run
from tokenmill.search.sensitivity import Sensitivity, Walk
from tokenmill.search.units import CACHE, Candidate, Unit, find_units
from torch import Tensor

from .models import VOCAB, pretrained

Prepare = Callable[[Recipe], Program]


def preparing(program: Program) -> Prepare:
    """Runs the passes once per cache format and patterns; names of single weights change nothing there."""
    done: dict[Any, Program] = {}

    def prepare(recipe: Recipe) -> Program:
        patterns = [r for r in recipe.rules if r.role or "*" in r.match]
        if (key := (recipe.kv, str(patterns))) not in done:
            passes = pipeline(recipe)
            names = [one.name for one in passes]
            done[key] = program.copy()
            run_passes(done[key], passes[: names.index("quantize")])
        return done[key].copy()

    return prepare


def texts(count: int, length: int, vocab: int = VOCAB) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (length,), generator=random) for _ in range(count)]


@pytest.fixture(scope="module")
def deepseek() -> Prepare:
    return preparing(capture_pretrained(pretrained("deepseek_v3"), "deepseek"))


@pytest.fixture(scope="module")
def llama() -> Prepare:
    """Its head is its embedding."""
    return preparing(capture_pretrained(pretrained("llama"), "llama"))


@pytest.fixture(scope="module")
def found(deepseek: Prepare) -> Found:
    return search(deepseek, Recipe(budget={"max_loss": "kl=0.002"}), texts(12, 24))


def units_of(prepare: Prepare, recipe: Recipe, context: int = 10) -> list[Unit]:
    sizes = {"bf16": 100, "int8": 60}
    return find_units(prepare(recipe), recipe, sizes, context)


# --- what can be chosen ---------------------------------------------------------------------------


def test_units_are_all_weights_once_with_the_formats_of_their_roles(deepseek: Prepare) -> None:
    recipe = Recipe()
    units = units_of(deepseek, recipe)
    program = deepseek(recipe)
    run_passes(program, [quantize := Quantize(recipe=recipe)])
    assert sum(u.parameters for u in units if u.role != "norm") == sum(
        d.parameters for d in quantize.decisions if d.role != "norm"
    )
    formats = {u.role: {c.format for c in u.candidates} for u in units}
    assert formats["expert"] == formats["linear"] == formats["head"] == set(quant.NAMES)
    assert "int4-g32" not in formats["latent_up"]
    assert formats["router"] == formats["norm"] == {"fp32"}
    assert {u.role for u in units if not u.searched} == {"router", "norm", "positions", CACHE}


def test_bytes_are_those_that_the_artifact_stores(deepseek: Prepare) -> None:
    for weights in ("fp32", "int8", "int4-g64"):
        rules = [
            Rule(match=f"role:{role}", format=weights) for role in ("expert", "linear", "head")
        ]
        recipe = Recipe(rules=rules)
        program = deepseek(recipe)
        run_passes(program, [quantize := Quantize(recipe=recipe)])
        decided = {d.weight: d.bytes for d in quantize.decisions}
        for unit in units_of(deepseek, recipe):
            if unit.role in ("expert", "linear", "head"):
                (only,) = unit.candidates
                assert only.stored == sum(decided[name] for name in unit.names)


def test_a_token_reads_one_row_and_its_own_experts(deepseek: Prepare) -> None:
    units = units_of(deepseek, Recipe(), context=7)
    share = {u.role: u.candidates[0].read / max(u.candidates[0].stored, 1) for u in units}
    assert share["embedding"] == pytest.approx(1 / VOCAB)
    assert share["expert"] == pytest.approx(3 / 8)
    assert share["linear"] == 1
    assert {c.format: c.read for c in units[-1].candidates} == {"int8": 420, "bf16": 700}


def test_what_a_rule_names_is_fixed(deepseek: Prepare) -> None:
    rules = [
        Rule(match="*.experts.down_proj", format="int8"),
        Rule(match="role:head", format="bf16"),
    ]
    for unit in units_of(deepseek, Recipe(rules=rules)):
        named = unit.role == "head" or any(o.endswith("experts.down_proj") for o in unit.originals)
        if named:
            assert len(unit.candidates) == 1
            assert not unit.searched


def test_weights_of_one_parameter_get_one_format(llama: Prepare) -> None:
    (tied,) = (u for u in units_of(llama, Recipe()) if "embedding" in u.role)
    assert tied.role == "embedding and head"
    assert "int4-g32" not in {c.format for c in tied.candidates}
    assert tied.candidates[0].read == pytest.approx(tied.candidates[0].stored * (1 + 1 / VOCAB))


def test_rules_name_what_can_be_merged_and_one_of_what_is_stacked() -> None:
    unit = Unit(("w",), ("a.0.weight", "a.1.weight"), "linear", 1, ())
    assert unit.named == unit.originals
    assert replace(unit, role="expert").named == ("a.0.weight",)


# --- what it loses --------------------------------------------------------------------------------


def test_sequences_that_run_together_do_not_see_each_other(deepseek: Prepare) -> None:
    program = deepseek(Recipe(kv="fp32"))
    sequences = [ids[:n] for ids, n in zip(texts(4, 150), (1, 64, 65, 150), strict=True)]
    assert batch([1, 64, 65, 150]).block_table.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [2, 3, 0],
        [4, 5, 6],
    ]
    for ids, logits in zip(sequences, run(program, sequences).split([1, 64, 65, 150]), strict=True):
        torch.testing.assert_close(logits, program.run(ids), rtol=1e-4, atol=1e-4)


def test_a_fork_is_the_whole_program_with_other_weights(deepseek: Prepare) -> None:
    program = deepseek(Recipe(kv="fp32"))
    sequences = texts(2, 20)
    plain = run(program, sequences)
    weights = [n for n in program.used_weights() if program.weights.like(n).dim() > 1]
    names = [n for n in weights if "down_proj" in n or "w_uk" in n or "embed" in n]
    walk = Walk(program, sequences)
    readers = {name: next(n for n in walk.nodes if n.target == name).users for name in names}
    checked = 0
    for node in walk.nodes:
        for name in names:
            if node is min(readers[name], key=walk.nodes.index):
                other = program.weights[name] * 1.1
                changed = program.copy()
                changed.weights.derive(f"{name}!", lambda w: w * 1.1, name)
                for weight in changed.graph.nodes:
                    weight.target = f"{name}!" if weight.target == name else weight.target
                torch.testing.assert_close(walk.fork({name: other}), run(changed, sequences))
                checked += 1
        walk.advance()
    assert checked == len(names) > 4
    torch.testing.assert_close(walk.env[walk.nodes[-1]][0].flatten(0, -2), plain)


def test_divergence_keeps_small_differences() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    other = logits + 1e-3 * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    p, q = (t.double().log_softmax(-1) for t in (logits, other))
    exact = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(divergence(logits, other).double(), exact, rtol=1e-3, atol=0)
    assert divergence(logits, logits).abs().max() == 0


def test_the_yardstick_gives_what_plain_sums_give(deepseek: Prepare) -> None:
    original, recipe = deepseek(Recipe(kv="fp32")), Recipe(weights="int4")
    other = deepseek(recipe)
    run_passes(other, [Quantize(recipe=recipe)])
    text = [ids[:n] for ids, n in zip(texts(3, 40), (40, 17, 2), strict=True)]
    rises, divergences = [], []
    for ids in text:
        p, q = (program.run(ids)[:-1].double().log_softmax(-1) for program in (original, other))
        rises.append((p - q)[range(len(ids) - 1), ids[1:]])
        divergences.append((p.exp() * (p - q)).sum(-1))
    measured = Yardstick(original, text).loss(other)
    assert measured.tokens == 39 + 16 + 1
    assert measured.rise == pytest.approx(float(torch.cat(rises).mean()), rel=1e-4)
    assert measured.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert measured.rise_error > 0
    assert Yardstick(original, text).loss(original).kl == 0


def test_finer_formats_lose_less_and_lossless_ones_nothing(deepseek: Prepare) -> None:
    program = deepseek(Recipe(kv="fp32"))
    caches = {kv: deepseek(Recipe(kv=kv)) for kv in ("bf16", "int8")}
    units = units_of(deepseek, Recipe())
    heard: list[tuple[int, int]] = []
    sensitivity = Sensitivity(program, caches, units, 0.0, lambda *at: heard.append(at))
    measured = sensitivity.measure(texts(8, 24))
    assert heard[0] == (0, sum(len(u.candidates) for u in units))
    assert 0 < sensitivity.forks < heard[0][1]
    for unit in measured:
        losses = [c.loss for c in unit.candidates]
        assert losses == sorted(losses, reverse=True)
        if unit.searched:
            assert losses[-1] == 0
            assert losses[0] > 0


def test_a_harmless_format_ends_the_measuring(deepseek: Prepare) -> None:
    program, units = deepseek(Recipe(kv="fp32")), units_of(deepseek, Recipe())[:-1]
    measured = Sensitivity(program, {}, units, budget=1e9).measure(texts(2, 12))
    assert all(len(unit.candidates) == 1 for unit in measured)


# --- choosing -------------------------------------------------------------------------------------

_candidates = st.lists(
    st.builds(
        lambda size, lost: Candidate("x", size, size, float(size), lost),
        st.integers(1, 50),
        st.floats(0, 10),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_candidates, min_size=1, max_size=5), st.floats(0, 40))
def test_a_choice_is_within_its_limit_and_near_the_best(
    options: list[list[Candidate]], limit: float
) -> None:
    fitting = [c for c in itertools.product(*options) if total(c, loss) <= limit]
    choice = least(options, stored, loss, limit)
    if not fitting:
        assert choice is None or total(choice, loss) <= limit + 1e-9
        return
    if choice is None:  # sums in another order, at the very limit
        assert min(total(c, loss) for c in fitting) >= limit - 1e-9
        return
    assert total(choice, loss) <= limit + 1e-9
    best = min(total(c, stored) for c in fitting)
    steps = (max(c.stored for c in o) - min(c.stored for c in o) for o in options)
    assert best <= total(choice, stored) <= best + max(steps)


@settings(deadline=None)
@given(st.lists(_candidates, min_size=1, max_size=5))
def test_the_path_goes_from_the_cheapest_to_the_finest(options: list[list[Candidate]]) -> None:
    choices = list(path(options, stored, loss))
    sizes, losses = ([total(c, m) for c in choices] for m in (stored, loss))
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert sizes[0] == sum(min(c.stored for c in o) for o in options)
    assert losses[-1] == pytest.approx(sum(min(c.loss for c in o) for o in options))
    slopes = [
        (a - b) / (t - s) for a, b, s, t in zip(losses, losses[1:], sizes, sizes[1:], strict=False)
    ]
    assert all(a >= b - 1e-6 * max(1, a) for a, b in itertools.pairwise(slopes))


# --- the search -----------------------------------------------------------------------------------


def test_the_recipe_that_is_found_makes_what_was_measured(deepseek: Prepare, found: Found) -> None:
    recipe = found.recipe
    assert recipe.budget is None
    assert Recipe.model_validate(recipe.dump()).dump() == recipe.dump()
    program = deepseek(recipe)
    run_passes(program, [quantize := Quantize(recipe=recipe)])
    (tables,) = (u for u in units_of(deepseek, recipe) if u.role == "positions")
    stored = sum(d.bytes for d in quantize.decisions)
    assert found.facts["choice"]["bytes"] == stored + tables.candidates[0].stored
    bits = 8 * stored / sum(d.parameters for d in quantize.decisions)
    assert found.facts["choice"]["bits_per_weight"] == pytest.approx(bits, rel=1e-3)
    formats = {o: d.format for d in quantize.decisions for o in d.originals if d.role != "norm"}
    for unit in found.facts["units"]:
        for name in unit["weights"]:
            assert formats[name] == unit["chosen"]
    parts = split(texts(12, 24), 256)
    measured = Yardstick(deepseek(Recipe(kv="fp32")), parts.judging).loss(program)
    assert found.facts["judged"]["kl"] == pytest.approx(measured.kl, rel=1e-3)


def test_the_budget_is_kept_and_used(found: Found) -> None:
    facts = found.facts
    assert facts["met"]
    assert facts["over"] == 0
    judged = facts["judged"]
    assert judged["kl"] + judged["kl_error"] <= 0.002
    measured = facts["measured"]
    (chosen,) = (m for m in measured if m["chosen"])
    assert chosen["bytes"] == facts["choice"]["bytes"]
    assert all(not m["within"] for m in measured if m["bytes"] < chosen["bytes"])
    smallest, finest = facts["frontier"][0], facts["frontier"][-1]
    assert smallest["bytes"] < chosen["bytes"] < finest["bytes"]
    assert smallest["predicted"] > finest["predicted"]


def test_facts_are_json_and_say_nothing_of_time(deepseek: Prepare, found: Found) -> None:
    again = search(deepseek, Recipe(budget={"max_loss": "kl=0.002"}), texts(12, 24))
    assert json.dumps(again.facts, allow_nan=False) == json.dumps(found.facts)
    assert again.recipe.dump() == found.recipe.dump()
    assert "seconds" not in json.dumps(found.facts)
    assert found.seconds > 0


def test_a_loose_budget_takes_the_smallest_at_once(deepseek: Prepare) -> None:
    found = search(deepseek, Recipe(budget={"max_loss": "100000%"}), texts(12, 16))
    assert len(found.facts["measured"]) == 1
    assert found.facts["choice"]["bytes"] == found.facts["frontier"][0]["bytes"]


def test_a_budget_that_cannot_be_met_gives_the_best_and_says_by_how_much(
    deepseek: Prepare,
) -> None:
    rules = [Rule(match="role:expert", format="int4")]
    recipe = Recipe(kv="bf16", rules=rules, budget={"max_loss": "kl=0.00001"})
    found = search(deepseek, recipe, texts(12, 16))
    facts = found.facts
    assert not facts["met"]
    assert facts["over"] == pytest.approx(
        facts["judged"]["kl"] + 2 * facts["judged"]["kl_error"] - 1e-5, rel=1e-2
    )
    assert found.recipe.rules[0] == rules[0]
    free = [u for u in facts["units"] if u["searched"] and u["role"] != "expert"]
    assert max(u["candidates"][-1]["loss"] for u in free) < 1e-7
    assert "is not met" in str(search_view(facts)[1])


def test_no_loss_at_all_is_a_budget_too(deepseek: Prepare) -> None:
    found = search(deepseek, Recipe(kv="fp32", budget={"max_loss": "0%"}), texts(12, 8))
    assert found.facts["met"]
    assert found.facts["judged"]["rise"] == 0


def test_memory_holds_weights_and_cache(deepseek: Prepare) -> None:
    text = texts(12, 16)
    sizes = units_of(deepseek, Recipe())
    least_held = sum(min(c.held for c in u.candidates) for u in sizes if u.role != CACHE)
    memory = 2 * least_held
    recipe = Recipe(budget={"memory": f"{memory}B", "context": 64})
    facts = search(deepseek, recipe, text).facts
    assert facts["choice"]["held_bytes"] <= memory
    assert facts["choice"]["held_bytes"] > 0.9 * memory
    longer = recipe.model_copy(update={"budget": Budget(memory=f"{memory}B", context=300)})
    tight = search(deepseek, longer, text).facts
    assert tight["choice"]["bytes"] < facts["choice"]["bytes"]
    assert tight["choice"]["predicted"] > facts["choice"]["predicted"]


def test_memory_that_is_too_small_says_what_is_needed(deepseek: Prepare) -> None:
    recipe = Recipe(budget={"memory": "10kB", "context": 64})
    with pytest.raises(BudgetTooSmall, match=r"10,000 bytes.*64 tokens need \d\d,\d\d\d") as caught:
        search(deepseek, recipe, texts(12, 16))
    needed = caught.value.facts["needed"]
    fitting = recipe.model_copy(update={"budget": Budget(memory=f"{needed}B", context=64)})
    assert search(deepseek, fitting, texts(12, 16)).facts["choice"]["held_bytes"] == needed


def test_both_budgets_hold_or_memory_alone(deepseek: Prepare) -> None:
    text = texts(12, 24)
    budget = {"max_loss": "kl=0.002", "context": 64, "objective": "speed"}
    free = search(deepseek, Recipe(budget=budget), text).facts["choice"]
    memory = int(0.97 * free["held_bytes"])
    both = search(deepseek, Recipe(budget=budget | {"memory": f"{memory}B"}), text).facts
    assert both["choice"]["held_bytes"] <= memory
    if both["met"]:
        assert both["choice"]["read_bytes"] >= free["read_bytes"]


def test_speed_counts_what_a_token_reads(deepseek: Prepare) -> None:
    text, loss = texts(12, 24), {"max_loss": "kl=0.002", "context": 10_000}
    small, fast = (
        search(deepseek, Recipe(budget=loss | {"objective": goal}), text)
        for goal in ("size", "speed")
    )
    assert fast.facts["choice"]["read_bytes"] <= small.facts["choice"]["read_bytes"]
    assert (small.recipe.kv, fast.recipe.kv) == ("bf16", "int8")
    assert all(rule.format != "fp8" for rule in fast.recipe.rules)


def test_better_rounding_is_used_where_choices_are_judged(deepseek: Prepare) -> None:
    def perfect(program: Program) -> None:
        for node in calls(program, mill.dequantize):
            (source,) = program.weights.sources(node.args[0][0].target)
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(program.weight(source))

    recipe = Recipe(kv="fp32", budget={"max_loss": "kl=0.001"})
    plain, better = (search(deepseek, recipe, texts(12, 16), None, how) for how in (None, perfect))
    assert better.facts["choice"]["bytes"] == better.facts["frontier"][0]["bytes"]
    assert better.facts["choice"]["bytes"] < plain.facts["choice"]["bytes"]
    assert better.facts["unseen"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kv", CACHE_FORMATS)
def test_a_cache_that_was_asked_for_stays(llama: Prepare, kv: Any) -> None:
    found = search(llama, Recipe(kv=kv, budget={"max_loss": "kl=0.1"}), texts(12, 6))
    assert found.recipe.kv == kv


@pytest.mark.parametrize("text", [[], [torch.arange(2)], [torch.zeros(1, dtype=torch.int64)] * 40])
def test_a_short_text_is_refused(llama: Prepare, text: Sequence[Tensor]) -> None:
    with pytest.raises(BadRequest, match="too short"):
        search(llama, Recipe(budget={"max_loss": "1%"}), text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 700), max_size=40))
def test_parts_share_no_token(lengths: list[int]) -> None:
    ends = list(itertools.accumulate(lengths))
    text = [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    try:
        parts = split(text, 256)
    except BadRequest:
        assert sum(lengths) < 48 or sum(n > 1 for n in lengths) < 12
        return
    taken = torch.cat([ids for part in parts for ids in part])
    assert len(taken.unique()) == len(taken)
    assert all(len(part) > 1 and all(1 < len(ids) <= 256 for ids in part) for part in parts)
