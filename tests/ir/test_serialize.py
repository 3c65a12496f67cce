"""A program written down and read again, over the weights that its plans store."""

from __future__ import annotations

import copy
import json
import operator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenmill
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill import Recipe, api, errors
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.ir import packing, quant, serialize, stored
from tokenmill.ir.plan import Device
from tokenmill.ir.program import Program, module_path, where
from tokenmill.passes.lower import lower
from tokenmill.passes.pipeline import pipeline, run_passes
from torch import Tensor, fx

from ..models import hand_written, pretrained
from ..passes.build import Builder, decoder

IDS = [(5 * i + 1) % 90 for i in range(70)]  # more than a page


@lru_cache(maxsize=1)
def captured(name: str) -> Program:
    if name == "hand_written":
        return capture(hand_written(), max_positions=256)
    return capture_pretrained(pretrained(name), name)


def fused(name: str, weights: str) -> Program:
    program = captured(name).copy()
    run_passes(program, pipeline(Recipe(weights=weights)))  # type: ignore[arg-type]
    return program


def written(program: Program) -> dict[str, Any]:
    return json.loads(json.dumps(serialize.dump(program), allow_nan=False))


def stored_by_plan(program: Program, device: Device) -> dict[str, Tensor]:
    lowered = program.copy()
    buffers = lower(lowered, device=device).buffers.values()
    return {b.name: lowered.weights[b.name] for b in buffers if b.kind == "weight"}


CASES = [
    *((name, "int4") for name in ("deepseek_v3", "llama")),
    *(("hand_written", format) for format in ("fp32", "int8", "fp8")),
]


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_what_is_read_computes_what_was_written(name: str, weights: str) -> None:
    program = fused(name, weights)
    data, wanted = written(program), program.run(IDS)
    for device in ("cpu", "cuda"):
        twin = stored.load(data, stored_by_plan(program, device))  # type: ignore[arg-type]
        assert torch.equal(twin.run(IDS), wanted), device
    assert written(twin) == data
    assert (twin.caches, twin.stage, twin.parameters) == (
        program.caches, program.stage, program.parameters,
    )  # fmt: skip
    for old, new in zip(calls(program), calls(twin), strict=True):
        assert shapes(new) == shapes(old)
        assert module_path(new) == module_path(old)


def calls(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


def shapes(node: fx.Node) -> Any:
    """Sizes and dtype, any symbol being the count of tokens."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return "T"
    values = value if isinstance(value, tuple | list) else [value]
    return [([s if isinstance(s, int) else "T" for s in v.shape], v.dtype) for v in values]


def test_places_say_the_file_and_the_line_but_no_directory() -> None:
    traced = fused("hand_written", "bf16")
    data = written(traced)
    sources = [source for _, source, _ in data["places"] if source]
    assert sources
    assert all(s.startswith('File "') and "/" not in s.split('"')[1] for s in sources)
    program = serialize.load(data, traced.weights)
    norm = next(n for n in calls(program) if n.target is torch.ops.tokenmill.layer_norm.default)
    assert where(norm).startswith('blocks.0.norm1, File "normalization.py", line ')


def test_arguments_that_json_cannot_say() -> None:
    b = Builder()
    x = b.linear(b.embed(), "up", 6)
    x = b(torch.ops.aten._to_copy.default, x, dtype=torch.float32, device=torch.device("cpu"))
    x = b(torch.ops.aten.clone.default, x, memory_format=torch.contiguous_format)
    x = b(torch.ops.aten.clamp.default, x, -float("inf"), 0.5)
    parts = b(torch.ops.aten.split_with_sizes.default, x, [2, 4], -1)
    x = b(torch.ops.aten.relu.default, b(operator.getitem, parts, 1))
    program = b.finish(x)
    twin = serialize.load(written(program), program.weights)
    assert torch.equal(twin.run([1, 2, 3]), program.run([1, 2, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=9), "version 9"),
        (lambda d: d["nodes"][-1].update(op="aten.nothing.default"), "no op 'aten.nothing"),
        (lambda d: d["nodes"][-1].update(op="load_library.x"), "no op 'load_library"),
        (lambda d: d["weights"]["norm"].update(shape=[3]), "norm"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    program = decoder()
    data = copy.deepcopy(written(program))
    change(data)
    with pytest.raises(ValueError, match=message):
        serialize.load(data, program.weights)


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(quant.NAMES),
    lead=st.lists(st.integers(1, 3), max_size=1),
    n=st.integers(1, 40),
    k=st.integers(1, 140),
    parts=st.sampled_from((1, 2)),
    seed=st.integers(0, 99),
)
def test_panels_are_undone(
    fmt: str, lead: list[int], n: int, k: int, parts: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    if fmt == "fp8" and parts == 2:
        n = 128  # where a block of scales would belong to both
    weight = torch.randn(*lead, parts * n, k, generator=rng)
    whole = quant.quantize(weight, quant.parse(fmt))
    for part, value in whole.items():
        packed = packing.pack_part(part, value, quant.parse(fmt), parts * n, parts)
        use = stored.Use(part, fmt, n, k, parts)
        name = f"w.{stored.panels(parts, False)}"
        reader = stored.find("w", value.to("meta"), use, {name: packed})
        assert reader is not None
        same(reader.whole(), value)
        for i in range(lead[0] if lead else 0):
            same(reader.member(i), value[i])


def same(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize(
    ("sizes", "row"), [((6,), (2, 6)), ((1, 1, 6), (6,)), ((2, 1), (2, 6)), ((1,), (4,))]
)
def test_a_weight_that_was_broadcast(sizes: tuple[int, ...], row: tuple[int, ...]) -> None:
    weight = torch.randn(sizes)
    wide = weight.reshape(weight.shape[max(len(sizes) - len(row), 0) :]).expand(row).reshape(-1)
    reader = stored.find("b", weight.to("meta"), None, {f"b.{stored.over(row)}": wide})
    assert reader is not None
    assert torch.equal(reader.whole(), weight)


# --- in an artifact -------------------------------------------------------------------------------


def test_an_artifact_opens_as_the_program_it_came_from(int4_artifact: Path) -> None:
    program = api.open_program(int4_artifact)
    with tokenmill.load(int4_artifact) as session:
        found = torch.from_numpy(session.logits(IDS))
    wanted = program.run(IDS)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    config = json.loads((int4_artifact / "source" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"


def test_an_artifact_of_an_older_version(int4_artifact: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(api, "PROGRAM", "not-there.json")
    with pytest.raises(errors.ArtifactTooOld, match="compile the model again"):
        api.open_program(int4_artifact)
