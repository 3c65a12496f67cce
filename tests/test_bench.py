"""What a measurement says, and the bytes that it counts; never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenmill import bench
from tokenmill.cli import app
from tokenmill.errors import BadRequest, MissingExtra, PromptTooLong
from tokenmill.runtime import Artifact, Session
from tokenmill.runtime.layout import Layout
from typer.testing import CliRunner, Result

WORK = ("--prompt", "24", "--tokens", "4", "--repeat", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.ReadBandwidth, "BYTES", 1 << 20)
    monkeypatch.setattr(bench.ReadBandwidth, "BYTES_PER_THREAD", 1 << 20)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="tokenmill")


# --- kernel by kernel ---------------------------------------------------------------------------


def test_every_step_of_the_plan_is_timed_under_its_kernel(int4_artifact: Path) -> None:
    result = _run(int4_artifact, "--steps", "--prompt", 24, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    plan = Artifact.open(int4_artifact).plan
    for phase, tokens in (("prefill", 24), ("decode", 1)):
        kernels = json.loads(result.stdout)[phase]
        assert sum(kernel["calls"] for kernel in kernels) == len(plan["steps"])
        assert [k["seconds"] for k in kernels] == sorted(
            (k["seconds"] for k in kernels), reverse=True
        )
        assert all(kernel["seconds"] > 0 for kernel in kernels)
        weights = bench.step_bytes(plan, tokens, 24)["weights"]
        assert sum(kernel["weight_bytes"] for kernel in kernels) == pytest.approx(weights, rel=0.01)


def test_people_get_a_table_of_kernels(int4_artifact: Path) -> None:
    shown = _run(int4_artifact, "--steps", "--prompt", 8, "--threads", 1).output
    assert "prefill, " in shown
    assert "decode, " in shown
    assert "latent_attend" in shown


# --- the answer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(int4_artifact: Path, tiny_deepseek: Path) -> dict[str, Any]:
    options = ("--batch", 3, "--against", tiny_deepseek, "--json")
    threads = torch.get_num_threads()
    result = _run(int4_artifact, *WORK, *options)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def test_it_says_where_and_what_was_measured(found: dict[str, Any], int4_artifact: Path) -> None:
    assert found["hardware"]["processor"]
    assert found["hardware"]["cores"] >= found["threads"] == 1
    assert found["date"].count("-") == 2
    assert found["artifact"]["path"] == str(int4_artifact)
    assert found["artifact"]["weights"] == "int4-g32"
    assert found["workload"] == {"prompt": 24, "tokens": 4, "rounds": 2, "seed": 0}


@pytest.mark.parametrize("name", ["prefill", "decode", "batched"])
def test_medians_lie_in_their_spread_and_ratios_follow(found: dict[str, Any], name: str) -> None:
    ours, theirs = found[name], found["against"][name]
    for speed in (ours, theirs):
        lowest, highest = speed["spread"]
        assert 0 < lowest <= speed["tokens_per_s"] <= highest
    assert found["speedup"][name] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])


@pytest.mark.parametrize(("name", "sequences"), [("decode", 1), ("batched", 3)])
def test_traffic_is_bytes_times_steps(found: dict[str, Any], name: str, sequences: int) -> None:
    speed = found[name]
    assert speed.get("sequences", 1) == sequences
    steps = speed["tokens_per_s"] / sequences
    assert speed["gb_per_s"] == pytest.approx(sum(speed["bytes_per_step"].values()) * steps / 1e9)
    assert speed["fraction"] == pytest.approx(speed["gb_per_s"] / found["bandwidth"]["gb_per_s"])


def test_a_batch_reads_more_than_one_and_less_than_each_alone(found: dict[str, Any]) -> None:
    one, three = (found[name]["bytes_per_step"] for name in ("decode", "batched"))
    assert one["weights"] < three["weights"] < 3 * one["weights"]
    assert 3 * one["cache"] <= three["cache"]


def test_a_fresh_process_holds_more_than_what_is_packed(
    found: dict[str, Any], int4_artifact: Path
) -> None:
    memory = found["memory"]
    plan = json.loads((int4_artifact / "plan.json").read_text())
    layout = Layout.parse(plan)
    stored = sum(weight.nbytes for weight in layout.weights)
    assert memory["packed_bytes"] == stored + 28 * layout.bytes_per_token
    assert memory["peak_bytes"] > memory["packed_bytes"]
    assert memory["ratio"] == pytest.approx(memory["peak_bytes"] / memory["packed_bytes"])
    assert 0 < found["load"]["open_s"] < found["load"]["first_token_s"]
    assert found["load"]["first_token_s"] < found["load"]["process_s"]


def test_people_get_a_table(int4_artifact: Path) -> None:
    result = _run(int4_artifact, *WORK)
    assert result.exit_code == 0, result.output
    for expected in ("prefill 24", "decode 4 after 24", "of bandwidth", "peak memory"):
        assert expected in result.stdout
    assert "sequences" not in result.stdout


# --- bytes ----------------------------------------------------------------------------------------


def _plan(head: str) -> dict[str, Any]:
    """An embedding [100, 8], a linear map 8 x 8, 2 of 4 experts, a head 100 x 8; two caches."""
    weights = {"table": ("bf16", [100, 8]), "head": ("bf16", [100, 8]), "w": ("i8", [8, 8]),
               "scale": ("f32", [8]), "up": ("u8", [4, 16, 4]), "down": ("u8", [4, 8, 4])}  # fmt: skip
    buffers = [
        {"name": name, "kind": "weight", "dtype": dtype, "shape": shape}
        for name, (dtype, shape) in weights.items()
        if name != "head" or name == head
    ]
    out = {"name": "out", "kind": "arena", "dtype": "f32", "rows": "rows", "width": 100}
    specs = [
        {"kind": "embed"}, {"kind": "linear"}, {"kind": "attend", "window": 6},
        {"kind": "attend", "window": 0}, {"kind": "experts", "experts": 4, "top_k": 2},
    ]  # fmt: skip
    steps = [
        (0, ["table", "out"]),
        (1, ["w", "scale", "out"]),
        (2, ["cache.0", "out"]),
        (3, ["cache.1", "out"]),
        (4, ["up", "down", "out"]),
        (1, [head, "out"]),
    ]
    return {
        "version": 1, "vocab": 100, "positions": 64, "meta": {}, "output": "out", "arena_bytes": 1600,
        "capacity": {"tokens": 8, "rows": 4}, "buffers": [*buffers, {**out, "offset": 0}],
        "caches": [{"name": "cache.0", "row_bytes": 10}, {"name": "cache.1", "row_bytes": 20}],
        "specs": specs,
        "steps": [{"spec": s, "bind": {n: [n, 0] for n in names}} for s, names in steps],
    }  # fmt: skip


def test_bytes_of_a_step_by_hand() -> None:
    # One row of the embedding, all of the linear map and of the head, half of the experts.
    one = {"weights": 16 + (64 + 32) + 1600 + (256 + 128) // 2, "cache": 10 * 6 + 20 * 9}
    assert bench.step_bytes(_plan("head"), sequences=1, context=9) == one
    # Two tokens miss an expert with probability 1/4.
    two = {"weights": 32 + 96 + 1600 + 384 * 3 // 4, "cache": 2 * (10 * 6 + 20 * 9)}
    assert bench.step_bytes(_plan("head"), sequences=2, context=9) == two
    # A short context is all within the window.
    assert bench.step_bytes(_plan("head"), sequences=1, context=4.5)["cache"] == 135


def test_a_tied_embedding_is_read_once() -> None:
    tied = bench.step_bytes(_plan("table"), sequences=1, context=9)
    assert tied["weights"] == 96 + 1600 + 192


# --- the workload ---------------------------------------------------------------------------------


def test_all_sequences_decode_while_the_clock_runs(int4_artifact: Path) -> None:
    with Session(int4_artifact, threads=1) as session:
        layout = Layout.parse(session.artifact.plan)
        work = bench.Workload.draw(layout, sequences=4, prompt=300, tokens=3)
        first, again = (bench._Artifact(session).run(work) for _ in range(2))
    assert first.tokens == again.tokens == 12
    # Three steps of 512 hold the prompts; when the last is done the others are 2, 1 and 1 ahead.
    assert first.context == again.context == 300 + (2 + 1 + 1 + 0) / 4 + (1 + 2 + 3) / 3


def test_prompts_are_random_and_the_same_each_time(int4_artifact: Path) -> None:
    layout = Layout.parse(json.loads((int4_artifact / "plan.json").read_text()))
    one, two = (bench.Workload.draw(layout, 2, prompt=64, tokens=8) for _ in range(2))
    assert (one.prompts == two.prompts).all()
    assert (one.prompts[0] != one.prompts[1]).any()
    assert len(set(one.prompts[0].tolist())) > 32


def test_measuring_needs_no_torch() -> None:
    code = "import sys, tokenmill.bench; print({'torch', 'rich', 'typer'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


# --- what cannot be measured ----------------------------------------------------------------------


def test_workloads_that_do_not_fit_the_model(int4_artifact: Path) -> None:
    with pytest.raises(PromptTooLong, match="has 2000 tokens, with 100 to generate"):
        bench.bench(int4_artifact, prompt=2000, tokens=100)
    with pytest.raises(BadRequest, match="65 sequences at once, where a step carries 1 to 64"):
        bench.bench(int4_artifact, batch=65)
    with pytest.raises(BadRequest, match="nothing to measure"):
        bench.bench(int4_artifact, repeat=0)


def test_an_original_that_cannot_be_run(
    int4_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run(int4_artifact, *WORK, "--against", tmp_path / "none", "--json")
    assert result.exit_code == 2
    assert "no model directory" in json.loads(result.stdout)["error"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match="torch is needed for comparing with the original"):
        bench.Eager(tmp_path, vocab=8, threads=1)


def test_an_original_of_another_vocabulary(tiny_deepseek: Path) -> None:
    with pytest.raises(BadRequest, match="the original has 2048 token ids and the artifact 8"):
        bench.Eager(tiny_deepseek, vocab=8, threads=1)
