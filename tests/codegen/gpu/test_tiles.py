"""Sizes of kernels: the rule, what was measured, and what is worth measuring, on every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.codegen.text import symbols
from tokenmill.codegen.triton import tiles
from tokenmill.codegen.triton.attend import Tile
from tokenmill.codegen.triton.build import MAX_REGISTERS, Binary, compiler
from tokenmill.codegen.triton.emit import EMITTERS, Schedule, emit
from tokenmill.codegen.triton.launch import Bucket
from tokenmill.codegen.triton.target import TARGETS, GpuTarget, parse_target
from tokenmill.codegen.triton.tiles import Gemm, Problem, Tiles, Walk
from tokenmill.errors import BadRecipe, KernelBuildFailed
from tokenmill.ir import quant
from tokenmill.ir.plan import Attend, Experts, KernelSpec, LatentAttend, Linear

from .test_build import Emitted

FORMATS = [quant.parse(name) for name in quant.NAMES]
problems = st.builds(
    Problem,
    m=st.integers(1, 5000),
    n=st.integers(1, 30000),
    k=st.integers(1, 20000),
    format=st.sampled_from(FORMATS),
    parts=st.sampled_from((1, 2)),
    batch=st.sampled_from((1, 8, 256)),
    x_bytes=st.sampled_from((2, 4)),
    splittable=st.booleans(),
    tiled=st.booleans(),
)
targets = st.sampled_from(list(TARGETS.values()))


def check(target: GpuTarget, problem: Problem, tile: Gemm) -> None:
    """Its operands are in shared memory, its sums in registers, and no split is without inputs."""
    fmt, span = problem.format, tile.span(problem.k)
    assert span * (tile.splits - 1) < problem.k <= span * tile.splits
    assert span % tile.block_k == 0
    assert tile.splits == 1 or span >= tiles.LEAST_INPUTS - tile.block_k
    assert tile.splits == 1 or problem.splittable
    assert tile.block_k == 128 if fmt.group else 128 % tile.block_k == 0
    assert all(size & (size - 1) == 0 for size in (tile.block_m, tile.block_n, tile.warps))
    x, w = tile.block_m * problem.x_bytes, problem.parts * tile.block_n * fmt.bits // 8
    assert (tile.stages - 1) * tile.block_k * (x + w) <= target.shared_bytes
    assert problem.parts * tile.block_m * tile.block_n <= 128 * 32 * tile.warps
    assert tile.splits == 1 or not tile.persistent
    assert tile.persistent or not tile.flatten
    assert not tile.descriptors or (problem.tiled and target.capability >= 90)
    if fmt.group and target.capability == 100:  # 512 columns of tensor memory, for two sets of sums
        assert problem.parts * tile.block_m <= 2 * fmt.group


@settings(max_examples=200, deadline=None, derandomize=True)
@given(target=targets, problem=problems)
def test_any_tile_is_sound(target: GpuTarget, problem: Problem) -> None:
    check(target, problem, tiles.rule(target, problem))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(target=targets, problem=problems)
def test_any_option_is_sound(target: GpuTarget, problem: Problem) -> None:
    rule = tiles.rule(target, problem)
    found = tiles.options(target, problem, rule)
    assert found[0] == rule
    assert found == tiles.options(target, problem, rule)
    assert len(set(found)) == len(found) <= tiles.OPTIONS_MOST
    for tile in found:
        check(target, problem, tile)


@pytest.mark.parametrize("target", TARGETS)
def test_there_is_much_to_choose(target: str) -> None:
    for m in (1, 64, 512):
        problem = Problem(m, 4096, 7168, quant.parse("bf16"))
        rule = tiles.rule(TARGETS[target], problem)
        found = tiles.options(TARGETS[target], problem, rule)
        assert len(found) == tiles.OPTIONS_MOST
        for name in ("block_n", "block_k", "splits", "warps", "stages", *["block_m"] * (m > 16)):
            assert len({getattr(tile, name) for tile in found}) > 1, name


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_descriptors_and_persistent_programs_are_worth_a_try_with_and_without(target: str) -> None:
    problem = Problem(4096, 4096, 7168, quant.parse("bf16"), tiled=True)
    rule = tiles.rule(TARGETS[target], problem)
    assert rule.descriptors
    found = tiles.options(TARGETS[target], problem, rule)
    assert {tile.descriptors for tile in found} == {True, False}
    once = replace(rule, flatten=False, persistent=0)
    assert once in found


# --- tables -----------------------------------------------------------------------------------------


def test_measured_tiles_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"block_m": 32, "block_n": 64, "block_k": 64, "splits": 3, "stages": 5}
    shipped = {"a_kernel": {"16": measured, "32": measured}}
    monkeypatch.setattr(tiles, "_shipped", lambda name: shipped)
    target, problem = TARGETS["sm_90"], Problem(16, 128, 4096, quant.parse("bf16"))
    assert tiles.gemm(Tiles(target), "a_kernel", 16, problem) == Gemm(**measured)
    assert tiles.gemm(Tiles(target), "a_kernel", 8, problem) == tiles.rule(target, problem)
    mine = Tiles(target, {"a_kernel": {"16": measured | {"warps": 8}}})
    assert tiles.gemm(mine, "a_kernel", 16, problem) == Gemm(**measured, warps=8)
    assert tiles.gemm(mine, "a_kernel", 32, problem) == Gemm(**measured)


@pytest.mark.parametrize("name", TARGETS)
def test_measured_descriptors_are_there_where_they_can_be(name: str) -> None:
    measured = {"block_m": 64, "block_n": 64, "block_k": 64, "persistent": 2, "descriptors": True}
    known = Tiles(TARGETS[name], {"a_kernel": {"16": measured}})
    for tiled in (False, True):
        problem = Problem(16, 128, 4096, quant.parse("bf16"), tiled=tiled)
        wanted = tiled and name in ("sm_90", "sm_100", "sm_120")
        found = tiles.gemm(known, "a_kernel", 16, problem)
        assert found == Gemm(**measured | {"descriptors": wanted})


def test_groups_of_inputs_stay_whole() -> None:
    table = {"a_kernel": {"16": {"block_m": 16, "block_n": 64, "block_k": 64}}}
    problem = Problem(16, 128, 4096, quant.parse("int4-g32"))
    with pytest.raises(BadRecipe, match=r"a_kernel, 16: block_k is 64, and its format needs"):
        tiles.gemm(Tiles(TARGETS["sm_90"], table), "a_kernel", 16, problem)


def test_the_tables_that_are_shipped_are_sound() -> None:
    for target in TARGETS:
        file = Path(tiles.__file__).with_name("tiles") / f"{target}.json"
        table = json.loads(file.read_text())
        assert table["target"] == target
        tiles.check_table(target, table["tiles"])


# --- kernels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked(Tiles):
    """Tiles that remember the options of each choice."""

    options: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def choose(self, kernel: str, rows: int, rule: Any, options: Callable[[], list[Any]]) -> Any:
        self.options[kernel, rows] = options()
        return super().choose(kernel, rows, rule, options)


SPECS: tuple[KernelSpec, ...] = (
    Linear(512, 1024, "fp8"),
    Experts(16, 2, 512, 256, "int4-g32", "int4-g32"),
    Attend(8, 2, 128, 128, 1.0, "bf16"),
    LatentAttend(16, 128, 64, 512, 128, 1.0, "fp8"),
)
NAMES = (
    ("linear_n512_k1024_fp8",),
    ("experts_e16_top2_h512_i256_int4_g32", "experts_e16_top2_h512_i256_int4_g32_finish"),
    ("attend_h8_kv2_d128_v128_bf16",),
    ("latent_attend_h16_n128_r64_l512_v128_fp8",),
)


class Sized:
    """Launches of SPECS for a target, with what a table says."""

    def __init__(self, target: str) -> None:
        kernels = Emitted(SPECS, target, column=0)
        self.plan, self.target = kernels.plan, parse_target(target)
        self.names = symbols(self.plan, EMITTERS)
        self.schedule = Schedule(self.plan, Tiles(self.target), self.names)

    def group(self, spec: KernelSpec, tokens: int, told: Tiles) -> int:
        step = next(step for step in self.plan.steps if step.spec == spec)
        return self.schedule.launch(step, Bucket(tokens, tokens, tokens), told)

    def options(self, spec: KernelSpec, tokens: int) -> dict[tuple[str, int], list[Any]]:
        asked = Asked(self.target)
        self.group(spec, tokens, asked)
        return asked.options

    def constants(self, index: int) -> list[dict[str, Any]]:
        entries = {entry["name"]: entry for entry in self.schedule.entries}
        return [entries[launch["binary"]]["constants"] for launch in self.schedule.group(index)]


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_with_sizes_ask_for_them(target: str) -> None:
    sized = Sized(target)
    for spec, names in zip(SPECS, NAMES, strict=True):
        assert [*sized.options(spec, 1)] == [(name, 1) for name in names]
        for tokens in (1, 200):
            for (_, rows), options in sized.options(spec, tokens).items():
                assert rows == tokens
                assert len(options) > 1
    assert [name for name, _ in sized.options(SPECS[1], 200)] == [
        f"{NAMES[1][0]}_sorted_up",
        f"{NAMES[1][0]}_sorted_down",
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("spec", SPECS[2:], ids=str)
def test_any_walk_is_sound(target: str, tokens: int, spec: Any) -> None:
    sized = Sized(target)
    ((options),) = sized.options(spec, tokens).values()
    width = 128 + 128 if isinstance(spec, Attend) else 512 + 64
    held = 128 if isinstance(spec, Attend) else 512 + 64
    columns = 128 if isinstance(spec, Attend) else 512
    bytes_ = 2 if spec.cache_format == "bf16" else 1
    for walk in options:
        assert walk.block in (16, 32, 64)
        assert walk.rows * columns <= 128 * 32 * walk.warps
        assert walk.rows * held * 2 + walk.block * width * bytes_ <= sized.target.shared_bytes
        index = sized.group(
            spec, tokens, Tiles(sized.target, {sized.names[spec]: {str(tokens): vars(walk)}})
        )
        found = next(c for c in sized.constants(index) if "QUERIES" in c)
        assert (found["ROWS"], found["BLOCK"], found["SPLITS"]) == (
            walk.rows,
            walk.block,
            walk.splits,
        )
        assert found["QUERIES"] == Tile.of(walk.rows, 4 if isinstance(spec, Attend) else 16).queries


def test_both_products_of_experts_sort_the_same_tiles() -> None:
    sized, spec = Sized("sm_90"), SPECS[1]
    up, down = (f"{NAMES[1][0]}_sorted_{which}" for which in ("up", "down"))
    rule = sized.constants(sized.group(spec, 200, Tiles(sized.target)))
    entry = {"block_m": 16, "block_n": 64, "block_k": 128}
    assert rule[1]["BLOCK_M"] == rule[2]["BLOCK_M"] == 64
    table = {up: {"200": entry}}
    found = sized.constants(sized.group(spec, 200, Tiles(sized.target, table)))
    assert [c["BLOCK_M"] for c in found[:3]] == [16, 16, 16]
    # An entry that was measured beside other sorted tiles does not count.
    alone = sized.constants(sized.group(spec, 200, Tiles(sized.target, {down: {"200": entry}})))
    assert alone == rule
    table |= {down: {"200": entry | {"block_n": 32}}}
    found = sized.constants(sized.group(spec, 200, Tiles(sized.target, table)))
    assert (found[1]["BLOCK_N"], found[2]["BLOCK_N"]) == (64, 32)


# --- binaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_options_compile(target: str, tmp_path: Path) -> None:
    sized = Sized(target)
    spec, name = SPECS[2], NAMES[2][0]
    walks = sized.options(spec, 1)[name, 1]
    assert [f.name for f in fields(Walk)] == ["rows", "block", "splits", "warps", "stages"]
    for walk in walks[1:3]:
        sized.group(spec, 1, Tiles(sized.target, {name: {"1": vars(walk)}}))
    name = NAMES[0][0]
    for tile in sized.options(SPECS[0], 1)[name, 1][1:4]:
        sized.group(SPECS[0], 1, Tiles(sized.target, {name: {"1": vars(tile)}}))
    entries = [e for e in sized.schedule.entries if "join" not in e["function"]]
    assert len(entries) == 2 + 5  # the rule's, and options
    files = emit(sized.plan, sized.target)
    with compiler(tmp_path, files, sized.target, len(entries)) as compiled:
        for entry, made in zip(entries, compiled(entries), strict=True):
            assert isinstance(made, Binary), made
            assert made.shared_bytes <= sized.target.shared_bytes
            assert made.registers <= MAX_REGISTERS
            assert made.local_bytes <= 64, entry
            assert made.tensor_cores
            assert (tmp_path / f"{entry['name']}.ptx").is_file()


def test_a_compile_that_takes_too_long_or_crashes_costs_itself_only(tmp_path: Path) -> None:
    sized = Sized("sm_90")
    sized.group(SPECS[0], 1, Tiles(sized.target))
    (good,) = sized.schedule.entries
    files = emit(sized.plan, sized.target) | {
        "slow_kernels.py": "import time\ntime.sleep(60)",
        "crash_kernels.py": "import os\nos._exit(7)",
    }
    slow, crash = ({**good, "name": n, "file": f"{n}_kernels.py"} for n in ("slow", "crash"))
    with compiler(tmp_path, files, sized.target, 1, limit=20.0) as compiled:
        found = list(compiled([crash, good, slow, good]))
    assert isinstance(found[0], KernelBuildFailed)
    assert "status 7" in found[0].message
    assert isinstance(found[2], KernelBuildFailed)
    assert "status -9" in found[2].message
    assert isinstance(found[1], Binary)
    assert found[3] == found[1]
