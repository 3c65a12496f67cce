"""Tuning on a stand-in for a card: the interpreter runs its kernels, and its clock says what it is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenmill import api, codegen, errors, tune
from tokenmill.cli import app
from tokenmill.codegen.triton import tiles
from tokenmill.codegen.triton.build import Binary
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.errors import KernelBuildFailed
from tokenmill.recipe import Recipe, TileTable
from tokenmill.runtime import Artifact
from tokenmill.runtime.batch import Batch
from tokenmill.runtime.cache import pages_for
from tokenmill.runtime.gpu import GpuExecutor
from tokenmill.runtime.schedule import Bucket
from typer.testing import CliRunner

from . import models
from .codegen.gpu.interpreter import load_sources
from .runtime.interpreted import InterpretedDevice

SECONDS = 1e-4  # of every launch, unless a test knows better
NEEDS_NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
Entry = dict[str, Any]
Says = Callable[[Entry], bool]


def never(entry: Entry) -> bool:
    return False


class Card(InterpretedDevice):
    """Takes what ``stub`` builds: binaries that are ``fast``, and some that do nothing, or ``fail``."""

    def __init__(self, fast: Says = never, idle: Says = never, fail: Says = never) -> None:
        super().__init__(total=1 << 28)
        self.fast, self.idle, self.fail = fast, idle, fail
        self.entries: list[Entry] = []

    def load(self, file: Path, image: str, binary: Any) -> Any:
        if not binary.name.startswith("tuned."):
            return super().load(file, image, binary)
        entry = json.loads(file.read_text()) | {"tuned": True}
        return entry, MODULES[entry["file"]]

    def launcher(self, kernel: Any, launch: Any, addresses: Any) -> Any:
        work = super().launcher(kernel, launch, addresses)

        def run() -> None:
            self.entries.append(kernel[0])
            if "tuned" in kernel[0] and self.fail(kernel[0]):
                raise self.failures[0]("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
            if "tuned" not in kernel[0] or not self.idle(kernel[0]):
                work()

        return run

    def record(self, work: Any) -> Any:
        self.entries.clear()
        graph = super().record(work)
        tuned = [entry for entry in self.entries if "tuned" in entry]

        def replay() -> None:
            if not tuned:  # what is only timed need not run again
                graph()

        replay.seconds = sum(SECONDS / (1 + self.fast(e)) for e in tuned)  # type: ignore[attr-defined]
        return replay

    def time(self, works: Any) -> list[float]:
        return [getattr(work, "seconds", SECONDS) for work in works]


MODULES: dict[str, Any] = {}
UNBUILDABLE: list[Says] = []


@contextlib.contextmanager
def stub(root: Path, files: Any, target: Any, jobs: int, limit: float) -> Iterator[Any]:
    """Instead of a compiler: binaries that are their entries of the schedule."""
    MODULES.update(load_sources(files))

    def compiled(entries: Any) -> Iterator[Any]:
        for entry in entries:
            if any(says(entry) for says in UNBUILDABLE):
                yield KernelBuildFailed(
                    function=entry["function"], file=entry["file"], target="sm_90", log="no"
                )
                continue
            (root / f"{entry['name']}.cubin").write_text(json.dumps(entry))
            yield Binary(
                kernel=entry["function"], threads=32 * entry["warps"], shared_bytes=0, scratch=[],
                registers=0, local_bytes=0, tensor_memory=0, tensor_cores=[], waits=True,
                ptx="8.7", ptx_target="sm_90a", cuda="12.9",
            )  # fmt: skip

    yield compiled


def named(files: Any, target: Any, progress: Any) -> codegen.Built:
    """Instead of what a compiler builds: files that InterpretedDevice knows."""
    if not target.name.startswith("sm_"):
        return codegen.build(files, target, progress)
    entries = json.loads(files["schedule.json"])["binaries"]
    made = {
        e["name"]: {
            "kernel": e["function"], "threads": 32 * e["warps"], "shared_bytes": 0, "scratch": [],
            "ptx_target": "sm_90a", "cuda": "12.9",
        }
        for e in entries
    }  # fmt: skip
    binaries = {"version": 1, "target": target.name, "binaries": made}
    images = {
        f"{e['name']}.{image}": f"{image} of {e['function']}".encode()
        for e in entries
        for image in ("cubin", "ptx")
    }
    return codegen.Built(images | {"binaries.json": json.dumps(binaries).encode()})


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "build", named)
        patch.setattr(tune, "compiler", stub)
        patch.setattr(tune, "CONTEXT", 3)
        patch.setattr(tune, "COLD_BYTES", 1 << 14)
        patch.setattr(tune, "COPIES_MOST", 3)
        patch.setattr(tiles, "OPTIONS_MOST", 3)
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, for one token at a time and for two."""
    path = tmp_path_factory.mktemp("tune") / "artifact"
    optimized(path)
    return path


def optimized(path: Path, model: str = "llama", **recipe: Any) -> None:
    sizes = {"max_step_tokens": 2, "max_step_rows": 1}
    api.optimize(
        models.pretrained(model), path, recipe=Recipe(targets=["sm_90"], **sizes, **recipe)
    )


def tuned(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, card: Card, table: Path, **how: Any
) -> dict[str, Any]:
    monkeypatch.setattr(tune, "CudaDevice", lambda: card)
    return tune.tune(artifact, table, **how)


def bound(**constants: int) -> Says:
    """Whether an entry of the schedule has these constants."""
    return lambda entry: constants.items() <= entry["constants"].items()


GATE = "linear_n96_k64_bf16_p2_fused"  # two matrices of 96 columns: 32 or 64 at a time


def entries(table: Path) -> dict[str, dict[str, Any]]:
    return TileTable.load(table).tiles


def test_the_fastest_sizes_win(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    """And a compile that is given the table takes them, computes the same, and can be verified."""
    table = tmp_path / "t.json"
    heard: list[tuple[str, int, int]] = []
    found = tuned(
        monkeypatch, artifact, Card(bound(BLOCK_N=32)), table, only=GATE,
        progress=lambda *news: heard.append(news),
    )  # fmt: skip
    assert (found["target"], found["path"], found["left"]) == ("sm_90", str(table), 0)
    assert (found["measured"], found["failed"], found["wrong"]) == (2, 0, 0)
    assert [(b["kernel"], b["rows"]) for b in found["better"]] == [(GATE, 1), (GATE, 2)]
    assert found["better"][0]["before"]["block_n"] == 64
    assert found["better"][0]["speedup"] == pytest.approx(2)
    assert heard[-1] == (f"tune {GATE}", 2, 2)
    assert entries(table).keys() == {GATE}
    for rows in ("1", "2"):
        assert entries(table)[GATE][rows]["block_n"] == 32

    again = tmp_path / "again"
    optimized(again, tiles=str(table))
    assert api.verify(again)["reproducible"]
    assert {e["BLOCK_N"] for e in launched(again, GATE)} == {32}
    assert {e["BLOCK_N"] for e in launched(artifact, GATE)} == {64}
    others = [
        json.loads((path / "kernels/sm_90/schedule.json").read_text())["binaries"]
        for path in (artifact, again)
    ]
    assert [b for b in others[0] if b["function"] != GATE] == [
        b for b in others[1] if b["function"] != GATE
    ]
    batch = Batch.of([([5, 7], 0, [0])], [1])
    logits = []
    for path in (artifact, again):
        with GpuExecutor(Artifact.open(path), InterpretedDevice(), cache_tokens=64) as executor:
            logits.append(executor.run(batch).copy())
    np.testing.assert_allclose(logits[0], logits[1], rtol=2e-2, atol=2e-2)

    # What an artifact's own table says is in force, and is not tried as if it were new.
    with_table = tuned(
        monkeypatch, again, Card(bound(BLOCK_N=32)), tmp_path / "next.json", only=GATE
    )
    assert with_table["measured"] == 2
    assert not with_table["better"]


def launched(artifact: Path, function: str) -> list[dict[str, Any]]:
    """The constants of a kernel's binaries."""
    schedule = json.loads((artifact / "kernels/sm_90/schedule.json").read_text())
    return [b["constants"] for b in schedule["binaries"] if b["function"] == function]


@pytest.mark.parametrize("how", ["idle", "fail"])
def test_what_is_wrong_or_fails_never_wins(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path, how: str
) -> None:
    small = bound(BLOCK_N=32)
    card = Card(small, **{how: small})
    found = tuned(monkeypatch, artifact, card, tmp_path / "t.json", only=GATE)
    assert found["measured"] == 2
    assert (found["wrong"], found["failed"]) == ((2, 0) if how == "idle" else (0, 2))
    assert found["path"] is None
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_built_is_left_out(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "UNBUILDABLE", [bound(BLOCK_N=32)])
    card = Card(bound(BLOCK_N=32))
    found = tuned(monkeypatch, artifact, card, tmp_path / "t.json", only=GATE)
    assert (found["failed"], found["wrong"], found["path"]) == (2, 0, None)
    monkeypatch.setitem(globals(), "UNBUILDABLE", [lambda entry: True])
    with pytest.raises(KernelBuildFailed):
        tuned(monkeypatch, artifact, card, tmp_path / "t.json", only=GATE)


@pytest.mark.parametrize("noisy", [False, True])
def test_what_is_hardly_faster_does_not_win(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path, noisy: bool
) -> None:
    """Twice as fast is not enough, if that much is asked for, or if times vary more than that."""
    card = Card(bound(BLOCK_N=32))
    if noisy:
        plain, rng = card.time, np.random.default_rng(0)
        monkeypatch.setattr(
            card, "time", lambda works: [s * rng.uniform(0.2, 4) for s in plain(works)]
        )
    else:
        monkeypatch.setattr(tune, "LEAST_GAIN", 0.51)
    found = tuned(monkeypatch, artifact, card, tmp_path / "t.json", only=GATE)
    assert found["measured"] == 2
    assert not found["better"]


def test_the_budget_ends_it_and_the_table_goes_on(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    table, now = tmp_path / "t.json", iter(range(1000))
    monkeypatch.setattr(tune, "monotonic", lambda: next(now))
    card = Card(bound(BLOCK_N=32))
    # The clock is read when it begins, before each of the two, and once for each binary.
    found = tuned(monkeypatch, artifact, card, table, only=GATE, seconds=4.5)
    assert (found["measured"], found["left"]) == (1, 1)
    assert entries(table)[GATE].keys() == {"1"}
    (text := table.read_text())
    other = {"linear_of_another_model": {"4": {"block_m": 16, "block_n": 16, "block_k": 32}}}
    table.write_text(json.dumps({"target": "sm_90", "tiles": other | json.loads(text)["tiles"]}))
    found = tuned(monkeypatch, artifact, Card(bound(BLOCK_N=32)), table, only=GATE)
    assert (found["measured"], found["left"]) == (1, 0)
    assert entries(table)[GATE].keys() == {"1", "2"}
    assert entries(table).keys() == {GATE, *other}
    none = tuned(monkeypatch, artifact, Card(), table, only=GATE, seconds=0)
    assert (none["measured"], none["left"], none["path"]) == (0, 0, None)


def test_every_kernel_of_a_model_with_latents_and_experts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, table = tmp_path / "artifact", tmp_path / "t.json"
    optimized(path, "deepseek_v3", weights="int8")
    monkeypatch.setattr(tiles, "OPTIONS_MOST", 2)
    found = tuned(monkeypatch, path, Card(), table)
    assert (found["wrong"], found["failed"], found["left"]) == (0, 0, 0)
    plan = api.open_plans(Artifact.open(path))["cuda"]
    products = {s.spec for s in plan.steps if s.spec.kind in ("linear", "latent_attend")}
    # Experts are two products, with one token and with two.
    assert found["measured"] == 2 * len(products) + 2 + 2 - 1  # the head has one row in both


def test_damaged_and_foreign_tables_are_refused(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.json"
    good = {"block_m": 16, "block_n": 64, "block_k": 64}
    cases: dict[str, Any] = {
        "is not JSON": "{",
        "is not a table of tiles: target": {"tiles": {}},
        r"tiles\.k\.1\.block_m": {"target": "sm_90", "tiles": {"k": {"1": {"block_m": 1.5}}}},
        "this card is tuned for sm_90": {"target": "sm_80", "tiles": {}},
        "unknown field 'block'": one({"rows": 16, "block": 16}),
        "missing 1 required": one({"block_m": 16, "block_n": 64}),
        "block_n is 48, and must be a power of two": one(good | {"block_n": 48}),
        "splits is 0, and must be 1 or more": one(good | {"splits": 0}),
        "a number above 0": one(good, rows="many"),
    }
    for reason, value in cases.items():
        table.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(errors.BadRecipe, match=reason):
            tuned(monkeypatch, artifact, Card(), table, only="nothing of that name")
    table.write_text(json.dumps(one(good | {"block_k": 128, "stages": 2, "group_m": 3})))
    assert tuned(monkeypatch, artifact, Card(), table, only="nothing")["measured"] == 0


def test_a_table_needs_a_place(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.OutputFailed, match="no such directory"):
        tuned(monkeypatch, artifact, Card(), tmp_path / "nowhere" / "t.json")


@pytest.mark.parametrize(
    ("tokens", "rows", "chunks"),
    [(1, 1, [1]), (3, 4, [1, 1, 1]), (7, 3, [7]), (600, 4, [200, 200, 200]), (513, 4, [171] * 3)],
)
def test_batches_fill_their_buckets(
    artifact: Path, tokens: int, rows: int, chunks: list[int]
) -> None:
    """Decoding after a context, or prompts of as many tokens as a sequence may have."""
    opened, told = Artifact.open(artifact), tiles.Tiles(TARGETS["sm_90"])
    with tune.Bench(opened, Card(), api.open_plans(opened)["cuda"], told) as bench:
        most = min(tokens, rows)
        batch = bench._full(Bucket(tokens, most, most, (), ()))
        assert np.diff(batch.starts).tolist() == chunks
        assert batch.ids.size == tokens
        assert batch.rows.tolist() == list(range(tokens - most, tokens))
        firsts = batch.positions[batch.starts[:-1]].tolist()
        assert firsts == [2 if tokens == most else 0] * len(chunks)
        assert batch.block_table.max() < bench.pages
        if len(chunks) * pages_for(chunks[0]) <= bench.pages:
            used = [
                row[: pages_for(size)] for row, size in zip(batch.block_table, chunks, strict=True)
            ]
            assert len(np.unique(np.concatenate(used))) == sum(map(len, used))


def one(entry: dict[str, Any], rows: str = "1") -> dict[str, Any]:
    return {"target": "sm_90", "tiles": {"linear_n1_k1_bf16": {rows: entry}}}


def test_a_recipe_takes_tables_for_its_targets(tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    table.write_text(json.dumps(one({"block_m": 16, "block_n": 64, "block_k": 64})))
    recipe = Recipe(targets=["cpu", "sm_90"], tiles=[str(table)])
    assert recipe.dump() == Recipe.model_validate(recipe.dump()).dump()
    assert recipe.tiles[0].tiles["linear_n1_k1_bf16"]["1"]["block_n"] == 64
    with pytest.raises(errors.BadRecipe, match="is for 'sm_90', and the targets are cpu"):
        Recipe(tiles=str(table))
    with pytest.raises(errors.BadRecipe, match="2 tables of tiles are for 'sm_90'"):
        Recipe(targets=["sm_90"], tiles=[str(table), str(table)])
    with pytest.raises(errors.BadRecipe, match="cannot be read: No such file"):
        Recipe(targets=["sm_90"], tiles=str(tmp_path / "none.json"))
    with pytest.raises(errors.BadRecipe, match="missing") as caught:
        Recipe.model_validate({"targets": ["sm_90"], "tiles": [{"target": "sm_90"}]})
    assert "a table needs `target` and `tiles`" in caught.value.advice


def test_entries_that_do_not_fit_a_format_are_refused_before_the_work() -> None:
    bad = one({"block_m": 16, "block_n": 64, "block_k": 64, "warps": 3})
    with pytest.raises(errors.BadRecipe, match="sm_90, linear_n1_k1_bf16, 1: warps is 3"):
        api.optimize(torch.nn.Linear(1, 1), recipe=Recipe(targets=["sm_90"], tiles=[bad]))


def test_an_artifact_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(api, "differing_sources", lambda *_: ["kernels/sm_90/linear_kernels.py"])
    with pytest.raises(errors.OtherKernels, match="this version makes other kernels"):
        tuned(monkeypatch, artifact, Card(), tmp_path / "t.json")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path, as_json: bool
) -> None:
    monkeypatch.setattr(tune, "CudaDevice", lambda: Card(bound(BLOCK_N=32)))
    table = tmp_path / "t.json"
    args = ["tune", str(artifact), "-o", str(table), "--only", GATE, *["--json"] * as_json]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    if as_json:
        found = json.loads(done.stdout)
        assert found["path"] == str(table)
        assert [b["best"]["block_n"] for b in found["better"]] == [32, 32]
    else:
        assert "block_n=32" in done.stdout
        assert "2.00x" in done.stdout
        assert f"tokenmill optimize MODEL --tiles {table}" in done.stdout


@NEEDS_NO_CARD
def test_without_a_card_it_says_so(artifact: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["tune", str(artifact), "-o", str(tmp_path / "t.json"), "--json"]
    )
    assert done.exit_code == 2
    assert json.loads(done.stdout)["remedy"]
    assert not list(tmp_path.iterdir())
