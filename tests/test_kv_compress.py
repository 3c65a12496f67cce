"""From a model with keys and values per head to an artifact with latents, and what is refused on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenmill import Recipe, Session, optimize
from tokenmill.api import open_program
from tokenmill.bench import step_bytes
from tokenmill.cli import app
from tokenmill.codegen import Built
from tokenmill.errors import BadRequest, LossTooHigh
from tokenmill.ir.plan import Attend, LatentAttend, Plan, dump, latent_cache
from tokenmill.passes.pipeline import relative_error
from tokenmill.recipe import Budget, KvCompress
from torch import Tensor
from typer.testing import CliRunner, Result

from .models import VOCAB, pretrained

HALF = {"save": "50%", "heal_steps": 2}


def byte_tokenizer() -> Tokenizer:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    pretrained("llama").save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"the {n}th of {n * n % 97} lines, {n:x}\n" for n in range(56)))
    return file


def texts(count: int = 12, length: int = 48) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (length,), generator=rng) for _ in range(count)]


def tokenmill(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="tokenmill")


# --- artifacts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "limit"), [("fp32", 1e-5), ("bf16", 5e-3), ("int8", 1e-2)])
def test_an_artifact_computes_what_its_program_does(
    checkpoint: Path, tmp_path: Path, kv: Any, limit: float
) -> None:
    recipe = Recipe(weights="fp32", kv=kv, kv_compress=HALF)
    path = tmp_path / "out"
    compiled = optimize(checkpoint, path, recipe=recipe, calibration_ids=texts())
    found = compiled.facts["kv_compress"]
    (plan,) = compiled.plans.values()
    for cache, layer in zip(plan.caches, found["layers"], strict=True):
        assert replace(cache, name="") == latent_cache("", kv, layer["rank"], layer["rotary"])
    assert found["values_after"] == sum(cache.width for cache in plan.caches)
    program = open_program(path)
    with Session(path) as session:
        for ids in (texts()[0], torch.arange(1), torch.arange(200) % 7):
            expected, actual = program.run(ids), torch.tensor(session.logits(ids.tolist()))
            assert relative_error(expected, actual) < limit
    assert not list(tmp_path.glob("*.work"))
    assert "KV compression" in (path / "report.html").read_text()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts without binaries, for tests that run none."""
    monkeypatch.setattr("tokenmill.api.build", lambda *_: Built({}, []))


def _attention_flop(plan: Plan) -> int:
    """Of one query for each cached token: a product with what it is scored by, one with what is summed."""
    flop = 0
    for step in plan.steps:
        match spec := step.spec:
            case Attend():
                flop += 2 * spec.heads * (spec.head_dim + spec.value_dim)
            case LatentAttend():
                flop += 2 * spec.heads * (2 * spec.latent + spec.rope)
    return flop


def test_what_it_was_before_is_reckoned_as_a_compile_without_it_is(checkpoint: Path) -> None:
    plain = optimize(checkpoint, recipe=Recipe(weights="int8", kv="int8"), dry_run=True)
    recipe = Recipe(weights="int8", kv="int8", kv_compress="40%")
    compiled = optimize(checkpoint, recipe=recipe, dry_run=True)
    found = compiled.facts["kv_compress"]
    assert "steps" not in found
    assert found["bytes_before"] == plain.facts["kv_bytes_per_token"]
    assert found["bytes_after"] == compiled.facts["kv_bytes_per_token"]
    (before,), (after,) = plain.plans.values(), compiled.plans.values()
    for row in found["decode"]:
        read = sum(step_bytes(dump(before), 1, row["context"]).values())
        assert row["before"] == pytest.approx(read, rel=0.04)
        assert row["after"] == sum(step_bytes(dump(after), 1, row["context"]).values())
        assert row["flop_before"] == row["context"] * _attention_flop(before)
        assert row["flop_after"] == row["context"] * _attention_flop(after)
    assert {c["memory_bytes"] for c in found["contexts"]} == {m * 10**9 for m in (16, 24, 48, 80)}
    for row in found["contexts"]:
        fitting = (row["memory_bytes"] - plain.facts["bytes"]["weights"]) // found["bytes_before"]
        assert row["before"] == pytest.approx(fitting, rel=0.01)
        assert row["after"] > row["before"]


def test_a_killed_compile_goes_on_with_the_same_training(
    checkpoint: Path, tmp_path: Path, unbuilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.passes.heal.SAVE_SECONDS", 0.0)
    recipe = Recipe(kv_compress={"save": "50%", "heal_steps": 4})
    whole, other = tmp_path / "whole", tmp_path / "other"
    optimize(checkpoint, whole, recipe=recipe, calibration_ids=texts())

    def interrupted(what: str, done: int, total: int) -> None:
        if what.startswith("heal") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(checkpoint, other, recipe=recipe, calibration_ids=texts(), progress=interrupted)
    assert not other.exists()
    assert (tmp_path / "other.work").is_dir()
    told: list[int] = []

    def listen(what: str, done: int, total: int) -> None:
        if what.startswith("heal"):
            told.append(done)

    optimize(checkpoint, other, recipe=recipe, calibration_ids=texts(), progress=listen)
    assert told[0] == 3
    assert not (tmp_path / "other.work").exists()
    for file in (files := list((whole / "weights").iterdir())):
        assert file.read_bytes() == (other / "weights" / file.name).read_bytes()
    assert files


def test_too_great_a_loss_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    how = KvCompress(save="75%", max_loss="kl=0.0000001", heal_steps=1)
    with pytest.raises(LossTooHigh, match=r"kl=0\.0000001"):
        optimize(
            checkpoint, tmp_path / "out", recipe=Recipe(kv_compress=how), calibration_ids=texts()
        )
    assert not list(tmp_path.iterdir())


def test_the_largest_saving_within_a_limit_is_taken(
    checkpoint: Path, tmp_path: Path, unbuilt: None
) -> None:
    """Formats are searched for with what the conversion leaves of the limit."""
    recipe = Recipe(
        kv_compress={"save": "auto", "heal_steps": 0}, budget=Budget(max_loss="50%"),
        calibration_tokens=512,
    )  # fmt: skip
    compiled = optimize(checkpoint, tmp_path / "out", recipe=recipe, calibration_ids=texts(32, 48))
    found, searched = compiled.facts["kv_compress"], compiled.facts["search"]
    lost = found["steps"][-1]
    assert found["values_after"] < found["values_before"]
    guarded = max(lost["rise"] + 2 * lost["rise_error"], lost["kl"])
    limit = Budget(max_loss="50%").nats
    assert limit is not None
    assert guarded <= limit / 2
    assert searched["budget"]["nats"] == pytest.approx(limit - guarded, abs=1e-3)
    assert searched["met"]
    assert found["bytes_after"] == compiled.facts["kv_bytes_per_token"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_texts_are_refused(checkpoint: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(BadRequest, match="too few to measure healing"):
        optimize(
            checkpoint,
            tmp_path / "out",
            recipe=Recipe(kv_compress="50%"),
            calibration_ids=texts(count),
        )
    assert not list(tmp_path.iterdir())


# --- the command line -------------------------------------------------------------------------------


def test_the_command_line_answers_with_what_was_lost(
    checkpoint: Path, words: Path, tmp_path: Path, unbuilt: None
) -> None:
    result = tokenmill(
        "optimize", checkpoint, "-o", tmp_path / "out", "--kv-compress", "50%", "--heal-minutes", 0,
        "--calibration", words, "--rounding", "rtn", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["recipe"]["kv_compress"]["save"] == "50%"
    assert found["kv_compress"]["bytes_after"] == found["kv_bytes_per_token"]
    assert [s["step"] for s in found["kv_compress"]["steps"]][-1] == "factorise"
    assert "healing" not in found["kv_compress"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-compress", "150%"], "neither like 50% nor auto"),
        (["--kv-compress", "0%"], "neither like 50% nor auto"),
        (["--kv-compress", "half"], "neither like 50% nor auto"),
        (["--kv-compress", "0"], "greater than or equal to 1"),
        (["--kv-compress", "auto"], "auto needs a max_loss"),
        (["--heal-minutes", "5"], "needs one of save and rank"),
    ],
)
def test_wrong_wishes_are_refused(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = tokenmill("optimize", checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "kv_compress" in result.stderr
    assert "remedy: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_option_stands_in_for_that_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("kv_compress: {save: 30%, heal_minutes: 1}\n")
    result = tokenmill(
        "optimize", checkpoint, "--dry-run", "--recipe", file, "--kv-compress", "16", "--json"
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    found = answer["recipe"]["kv_compress"]
    assert (found["rank"], found["save"], found["heal_minutes"]) == (16, None, 1)
    assert [layer["rank"] for layer in answer["kv_compress"]["layers"]] == [16, 16]
