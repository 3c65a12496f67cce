"""The report is one file, complete, deterministic, and nothing in a model can become markup."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
from tokenmill.console import facts_view
from tokenmill.drawing import layout
from tokenmill.report import render


def _side(*chains: str) -> dict[str, Any]:
    """A drawing's graph from chains such as "x norm q": each word a node, each step an edge."""
    pairs = [(a, b) for chain in chains for a, b in pairwise(chain.split())]
    names = dict.fromkeys(word for chain in chains for word in chain.split())
    kinds = {"norm": "norm", "q": "linear", "attend": "attention"}
    nodes = [
        {"id": n, "label": n, "kind": kinds.get(n, "pointwise"), "where": f"model.layers.1.{n}"}
        for n in names
    ]
    return {"nodes": nodes, "edges": [list(pair) for pair in pairs]}


@pytest.fixture
def facts() -> dict[str, Any]:
    return {
        "model": {"name": "tiny <b>deepseek</b>", "layers": 4, "vocab": 2048, "positions": 1024},
        "parameters": {"total": 9_363_456, "active": 3_105_000},
        "bytes": {"weights": 6_100_000, "original": 18_724_160},
        "kv_bytes_per_token": 640,
        "kv_bytes_per_token_expanded": 5120,
        "weights_by_format": {"int4-g32": 0.71, "int8": 0.19, "bf16": 0.1},
        "quantized": {"share": 0.9, "expected": 0.9, "bits": 5.4, "escaped": []},
        "formats": [
            {"weight": f"model.layers.{i}.mlp.experts.gate_up", "role": "expert",
             "format": "int4-g32", "parameters": 100_000, "bytes": 56_250}
            for i in (1, 2, 3)
        ],
        "kernels": [
            {"symbol": "linear_0", "kind": "linear", "steps": 4, "spec": {"n": 64, "k": 32}},
        ],
        "extern_steps": [],
        "passes": [
            {"name": "fuse_experts", "summary": "Fuse routed experts.", "matches": 3,
             "seconds": 0.04, "error": 2.1e-7, "tolerance": 1e-4, "exact": True,
             "nodes_before": 214, "nodes_after": 160, "notes": []},
            {"name": "quantize", "summary": "Give every weight its format.", "matches": 31,
             "seconds": 1.2, "error": None, "tolerance": None, "exact": False,
             "nodes_before": 160, "nodes_after": 160, "notes": ["3 experts never routed to"]},
        ],
        "targets": ["cpu-x86-64-v3"],
        "peak_memory_bytes": 31_000_000,
        "capacity": {"tokens": 512, "rows": 64},
        "stages": {},
        "layer": {
            "before": _side("x pow mean rsqrt mul norm q attend add", "x mul", "x add"),
            "after": _side("x norm q attend add", "x add"),
        },
    }  # fmt: skip


class _Reader(HTMLParser):
    """Collects every attribute that could fetch something, the tags, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_it_is_one_file_without_scripts_or_outside_resources(facts: dict[str, Any]) -> None:
    page = render(facts, {"step.cpp": "int main() { return 1 < 2; }"})
    reader = _Reader(page)
    assert reader.links == []
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_it_names_every_pass_kernel_and_source(facts: dict[str, Any]) -> None:
    text = " ".join(_Reader(render(facts, {"step.cpp": "int tm_abi_version(void);"})).texts)
    for expected in (
        "fuse_experts", "214 → 160", "2.1e-07", "not checked", "3 experts never routed to",
        "linear_0", "n=64, k=32", "step.cpp", "int tm_abi_version(void);", "model.layers.*.mlp",
        "18.7 MB", "8.0x smaller", "Before: 9 operations", "After: 5 operations",
    ):  # fmt: skip
        assert expected in text


def test_names_and_sources_are_text_never_markup(facts: dict[str, Any]) -> None:
    page = render(facts, {"a.cpp": "</pre><script>alert(1)</script>"})
    assert "<script>" not in page
    assert "<b>" not in page
    assert "tiny <b>deepseek</b>" in _Reader(page).texts


def test_the_same_facts_give_the_same_bytes(facts: dict[str, Any]) -> None:
    assert render(facts, {}) == render(facts, {})


def test_extern_steps_are_listed(facts: dict[str, Any]) -> None:
    facts["extern_steps"] = [{"op": "aten.cumsum.default", "where": "model.layers.0.odd"}]
    texts = _Reader(render(facts, {})).texts
    assert "aten.cumsum.default" in texts
    assert "model.layers.0.odd" in texts


def test_weights_that_escaped_quantization_are_listed(facts: dict[str, Any]) -> None:
    assert "Quantized: 90.0% of the parameters (expected 90.0%)" in render(facts, {})
    assert "Stays in fp32" not in render(facts, {})
    escape = {"weight": "model.mix", "wanted": "int8", "format": "fp32", "parameters": 256,
              "reason": "aten.matmul.default at model reads it"}  # fmt: skip
    facts["quantized"] = {"share": 0.85, "expected": 0.9, "bits": 5.9, "escaped": [escape]}
    texts = _Reader(render(facts, {})).texts
    assert {"model.mix", "int8", escape["reason"]} <= set(texts)


def test_a_search_is_shown_with_its_curve_points_and_losses(facts: dict[str, Any]) -> None:
    assert "Formats within a budget" not in render(facts, {})
    facts["search"] = _search_facts(nats=0.00995)
    reader = _Reader(page := render(facts, {}))
    assert page.count("<circle") == 2
    assert reader.links == []
    assert "url(" not in page
    for expected in (
        "within <1%>", "budget: 1", "5.76 MB, 4.93 bits per weight: perplexity +0.92% ± 0.29%",
        "taken", "too much", "With cache of 4,096 tokens", "lm_head.weight", "0.0219", " and 1 more",
    ):  # fmt: skip
        assert any(expected in text for text in reader.texts), expected
    assert 'class="curve"' in page


@pytest.mark.parametrize("measure", ["perplexity", "kl"])
def test_a_search_with_one_point_and_no_limit_is_shown(facts: dict[str, Any], measure: str) -> None:
    found = _search_facts(nats=None)
    found["budget"]["measure"] = measure
    found["measured"] = [
        found["measured"][0] | {"rise": 0.0, "rise_error": 0.0, "kl": 0.0, "kl_error": 0.0}
    ]
    page = render(facts | {"search": found | {"frontier": found["frontier"][:1]}}, {})
    assert page.count("<circle") == 1
    assert "nan" not in page
    assert "budget: " not in page


def test_kv_compression_is_shown_with_its_steps_curve_and_bounds(facts: dict[str, Any]) -> None:
    assert "KV compression" not in render(facts | {"kv_compress": None}, {})
    found = facts | {"kv_compress": _conversion_facts()}
    page = render(found, {})
    reader = _Reader(page)
    assert reader.links == []
    assert page.count("<circle") == 3
    assert page.count('<g class="chosen">') == 1
    for expected in (
        "their caches hold 288 values per token, not 512", "take 640 B per token, not 1.09 kB: 1.7x",
        "2 other caches", "scale and turn", "-0.0000% ± 0.0000%", "+8.33% ± 0.60%", "+0.60% ± 0.20%",
        "for 9.9 minutes, on 81,920 tokens", "Diverged after 9.9 minutes", "10.0 minutes: KL 5 ± 0.4",
        "at most 1,024", "14,285,714", "24,390,243", "131,072", "1.65x", "Both are reckoned", "3.9x",
        "320 kB more than before", "are past this model's positions", "model.layers.1.<attention>",
        "2 layers, 96 to 112 latents per token",
    ):  # fmt: skip
        assert any(expected in text for text in reader.texts), expected
    assert "flex:112" in page
    assert "<attention>" not in page
    assert "perplexity after each step: scale and turn -0.00% (KL 4.2e-13), " in _console(found)
    assert "KV compression: 1.09 kB -> 640 B per token (1.7x smaller)" in _console(found)


def test_a_conversion_that_was_not_measured_is_shown(facts: dict[str, Any]) -> None:
    whole = _conversion_facts()
    dry = {k: v for k, v in whole.items() if k not in ("steps", "healing", "fold")}
    found = facts | {"kv_compress": dry}
    texts = _Reader(page := render(found, {})).texts
    assert "Nothing was measured: a dry run converts shapes only." in texts
    assert "Healing" not in texts
    assert "<circle" not in page
    assert "not measured" in _console(found)


@pytest.mark.parametrize("curve", [[], [[0.0, 99, 0.0, math.inf, 0.0, math.inf]]])
def test_a_healing_without_a_curve_is_shown(facts: dict[str, Any], curve: list[Any]) -> None:
    found = _conversion_facts()
    found["healing"] = found["healing"] | {
        "curve": curve,
        "ending": "",
        "tokens": 0,
        "unit": "minutes",
        "used": 0.0,
    }
    for step in found["steps"]:
        step |= {"rise_error": math.inf, "kl_error": math.inf}
    page = render(facts | {"kv_compress": found}, {})
    assert "for 0.0 minutes, on 0 tokens." in page
    assert "<circle" not in page
    assert "inf" not in " ".join(_Reader(page).texts).split()


def _console(facts: dict[str, Any]) -> str:
    shown = facts | {"calibration": None, "search": None}
    return "\n".join(text for text in facts_view(shown) if isinstance(text, str))


def test_healed_scales_are_shown(facts: dict[str, Any]) -> None:
    healing = {
        "tokens": 4096, "used": 2, "unit": "steps", "ending": "",
        "curve": [[0, 500, 0.003, 0.001, 0.0018, 0.0002], [2, 500, 0.002, 0.001, 0.0012, 0.0001]],
    }  # fmt: skip
    page = render(facts | {"heal_scales": healing}, {})
    assert "fewer than 8 bits learned from the original for 2 steps, on 4,096 tokens" in page
    assert page.count('<g class="chosen">') == 1
    assert "2 steps: KL 1.2 ± 0.1, perplexity +0.20% ± 0.10%" in page
    assert "Healing" not in render(facts | {"heal_scales": None}, {})
    said = _console(facts | {"heal_scales": healing})
    assert "scales healed for 2 steps, 4,096 tokens: KL 0.0018 -> 0.0012 on text held back" in said


def _conversion_facts() -> dict[str, Any]:
    def step(name: str, rise: float, error: float, kl: float) -> dict[str, Any]:
        return {"step": name, "exact": name == "scale and turn", "tokens": 4088, "rise": rise,
                "perplexity_increase_percent": 100 * math.expm1(rise), "rise_error": error, "kl": kl,
                "kl_error": kl / 10}  # fmt: skip

    return {
        "steps": [
            step("scale and turn", -7.2e-9, 1.4e-8, 4.2e-13), step("keep 32 rotary", 0.03, 0.004, 0.025),
            step("factorise", 0.08, 0.006, 0.075), step("heal", 0.006, 0.002, 0.005),
        ],
        "healing": {
            "tokens": 81_920, "unit": "minutes", "used": 9.9,
            "ending": "diverged after 9.9 minutes and ended there",
            "curve": [[0.0, 5621, 0.08, 0.006, 0.075, 0.0075], [5.0, 5621, 0.01, 0.003, 0.011, 0.001],
                      [10.0, 5621, 0.006, 0.002, 0.005, 0.0004]],
        },
        "layers": [
            {"path": f"model.layers.{i}.<attention>", "rank": rank, "rotary": 40, "before": 256}
            for i, rank in enumerate((96, 112))
        ],
        "values_before": 512, "values_after": 288, "fold": 2, "kept": [],
        "bytes_before": 1088, "bytes_after": 640, "weight_bytes_added": 320_000,
        "contexts": [{"memory_bytes": 16 * 10**9, "before": 14_285_714, "after": 24_390_243}],
        "decode": [{"context": c, "before": 5_780_000 + 1088 * c, "after": 6_100_000 + 640 * c,
                    "flop_before": 2048 * c, "flop_after": 7936 * c}
                   for c in (512, 131_072)],
    }  # fmt: skip


def _search_facts(nats: float | None) -> dict[str, Any]:
    point = {"bytes": 5_757_760, "bits_per_weight": 4.93, "held_bytes": 9_034_560, "kv": "bf16",
             "read_bytes": 5_553_472, "cost": 5_757_760, "predicted": 0.0164}  # fmt: skip
    finer = point | {"bytes": 6_093_312, "cost": 6_093_312, "predicted": 0.0061}
    loss = {"tokens": 6132, "perplexity_percent": 0.9236, "rise": 0.009194, "rise_error": 0.00287,
            "kl": 0.0094, "kl_error": 0.00035}  # fmt: skip
    units = [
        {"weights": ["lm_head.weight", "x"], "role": "head", "parameters": 10, "searched": True,
         "chosen": "int8", "candidates": [{"format": "int8", "bytes": 11, "loss": 2.19e-5}]},
        {"weights": [], "role": "cache", "parameters": 0, "searched": False, "chosen": "bf16",
         "candidates": [{"format": "bf16", "bytes": 99, "loss": 1e-4}]},
    ]  # fmt: skip
    return {
        "budget": {"max_loss": "1%", "context": 4096, "nats": nats, "measure": "perplexity"},
        "met": True, "verdict": "The loss is within <1%>.", "cost": "weights", "forks": 215,
        "units": units, "frontier": [point, finer, finer | {"cost": 17_000_000, "predicted": 0.0}],
        "measured": [
            point | loss | {"within": False, "chosen": False},
            finer | loss | {"rise": 0.004, "within": True, "chosen": True},
        ],
    }  # fmt: skip


def test_a_model_without_a_layer_to_draw(facts: dict[str, Any]) -> None:
    facts["layer"] = {"before": _side(), "after": _side()}
    assert "Before: 0 operations" in render(facts, {})


@pytest.mark.parametrize("seed", range(5))
def test_boxes_of_a_row_never_overlap_and_edges_run_down(seed: int) -> None:
    edges = nx.gnp_random_graph(24, 0.15, seed=seed, directed=True).edges
    graph = nx.DiGraph((a, b) for a, b in edges if a < b)
    width = {node: 30.0 + 7 * (node % 5) for node in graph}
    placed = layout(graph, width)
    for row in placed.rows:
        boxes = [
            (placed.x[n] - width[n] / 2, placed.x[n] + width[n] / 2) for n in row if n in width
        ]
        assert all(left[1] < right[0] for left, right in pairwise(boxes))
    rank = {node: i for i, row in enumerate(placed.rows) for node in row}
    for route in placed.routes:
        assert [rank[n] for n in route] == list(range(rank[route[0]], rank[route[-1]] + 1))
