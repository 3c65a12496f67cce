from itertools import pairwise

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir.plan import Buffer, Capacity, Operand, Plan, Pointwise, Step
from tokenmill.passes.memory import interference, lifetimes, memory

from .build import decoder
from .test_lower import compiled


def chain(widths: list[int], reads: list[int]) -> Plan:
    """Buffer ``i`` is computed from buffer ``reads[i]``, which comes before it."""
    buffers = {"ids": Buffer("ids", "input", "i32")}
    steps = []
    for i, (width, read) in enumerate(zip(widths, reads, strict=True)):
        buffers[f"b{i}"] = Buffer(f"b{i}", "arena", "f32", "tokens", width)
        source = "ids" if i == 0 else f"b{read % i}"
        bind = {"x0": Operand(source), "out": Operand(f"b{i}")}
        steps.append(Step(Pointwise(width, "x0", ("row",)), bind, "tokens"))
    output = f"b{len(widths) - 1}"
    return Plan(buffers, tuple(steps), (), Capacity(3, 1), 0, output, 1, 1)


plans = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1000)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(plans)
def test_no_two_live_buffers_overlap(drawn: list[tuple[int, int]]) -> None:
    plan = memory(chain([w for w, _ in drawn], [r for _, r in drawn]))
    spans = lifetimes(plan)
    ranges = {name: range(plan.buffers[name].offset, _end(plan, name)) for name in spans}
    for step in range(len(plan.steps)):
        live = sorted(
            (ranges[n] for n, (first, last) in spans.items() if first <= step <= last),
            key=lambda r: r.start,
        )
        assert all(a.stop <= b.start for a, b in pairwise(live))
    assert all(r.start % 64 == 0 and r.stop <= plan.arena_bytes for r in ranges.values())
    report = plan.meta["arena"]
    assert report["live"] <= report["bytes"] == plan.arena_bytes <= report["unshared"]


def _end(plan: Plan, name: str) -> int:
    buffer = plan.buffers[name]
    return buffer.offset + buffer.bytes(plan.capacity)


def test_a_chain_needs_two_buffers() -> None:
    plan = memory(chain([16] * 10, list(range(-1, 9))))
    assert plan.arena_bytes == 2 * 16 * 4 * 3
    assert plan.meta["arena"]["unshared"] == 10 * 16 * 4 * 3


def test_buffers_that_live_at_once_are_neighbours() -> None:
    graph = interference({"a": (0, 2), "b": (1, 3), "c": (2, 2), "d": (3, 4)})
    assert set(map(frozenset, graph.edges)) == {
        frozenset(pair) for pair in ("ab", "ac", "bc", "bd")
    }
    assert max(map(len, nx.find_cliques(graph))) == 3


def test_the_output_outlives_the_last_step() -> None:
    plan = chain([4, 4, 4], [0, 0, 0])
    assert lifetimes(plan)["b2"] == (2, 3)


def test_buffers_that_nobody_touches_are_dropped() -> None:
    plan = chain([4], [0])
    plan.buffers["idle"] = Buffer("idle", "arena", "f32", "tokens", 4)
    assert "idle" not in memory(plan).buffers


def test_a_decoder_shares_most_of_its_memory() -> None:
    arena = compiled(decoder()).meta["arena"]
    assert arena["bytes"] == arena["live"] < arena["unshared"] / 3


def test_the_same_plan_twice() -> None:
    assert memory(compiled(decoder())) == memory(compiled(decoder()))
