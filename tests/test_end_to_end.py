"""From the bundled, trained checkpoint to text, judged on text that training never saw."""

from __future__ import annotations

import filecmp
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenmill
import torch
from tokenmill import Recipe, Session
from tokenmill.api import optimize, original, verify
from tokenmill.codegen.cpp.target import cpu_features, host_target, parse_target
from tokenmill.evaluate import evaluate, windows
from tokenmill.recipe import Rule
from tokenmill.runtime import Artifact, cpu

EVALUATED = 12_000  # characters of held-out text

RECIPES = {
    "fp32": Recipe(weights="fp32", kv="fp32"),
    "bf16": Recipe(weights="bf16", kv="bf16"),
    "int8": Recipe(weights="int8", kv="bf16"),
    "int4": Recipe(weights="int4", kv="bf16"),
    "fp8": Recipe(weights="fp8", kv="bf16"),
    "kv-int8": Recipe(weights="bf16", kv="int8"),
    "kv-fp8": Recipe(weights="bf16", kv="fp8", rules=[Rule(match="role:embedding", format="int8")]),
}


@pytest.fixture(scope="module")
def model(tiny_deepseek: Path) -> Any:
    return original(tiny_deepseek)


@pytest.fixture(scope="module")
def heldout(tiny_deepseek: Path) -> str:
    return (tiny_deepseek / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def artifact(
    tiny_deepseek: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("artifacts")

    def get(name: str) -> Path:
        if name not in made:
            optimize(tiny_deepseek, root / name, recipe=RECIPES[name])
            made[name] = root / name
        return made[name]

    return get


@pytest.fixture(scope="module")
def score(
    artifact: Callable[[str], Path], model: Any, heldout: str
) -> Callable[[str], dict[str, Any]]:
    seen: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in seen:
            with Session(artifact(name)) as session:
                seen[name] = evaluate(session, heldout[:EVALUATED], model)
        return seen[name]

    return get


def loss(found: dict[str, Any]) -> float:
    """Relative increase of bits per byte over the original."""
    return found["bits_per_byte"] / found["original_bits_per_byte"] - 1


def test_the_original_has_learnt(score: Callable[[str], dict[str, Any]]) -> None:
    assert score("fp32")["original_bits_per_byte"] < 1.8


def test_fp32_is_the_original(score: Callable[[str], dict[str, Any]]) -> None:
    found = score("fp32")
    assert found["max_abs_logit_error"] <= 1e-3 * found["logit_spread"]
    assert found["top1_agreement"] > 0.999


def test_bf16_is_near(score: Callable[[str], dict[str, Any]]) -> None:
    assert score("bf16")["kl_mean"] <= 1e-3


@pytest.mark.parametrize(("name", "most"), [("int8", 0.005), ("int4", 0.02), ("fp8", 0.005)])
def test_quantized_weights_lose_little(
    score: Callable[[str], dict[str, Any]], name: str, most: float
) -> None:
    assert loss(score(name)) <= most


@pytest.mark.parametrize("name", ["kv-int8", "kv-fp8"])
def test_rounded_latents_lose_little(score: Callable[[str], dict[str, Any]], name: str) -> None:
    """And INT8 embeddings."""
    assert score(name)["bits_per_byte"] <= 1.002 * score("bf16")["bits_per_byte"]


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_cache_holds_latents_only(
    artifact: Callable[[str], Path], model: Any, name: str, size: int
) -> None:
    config = model.config
    wanted = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * size
    assert Artifact.open(artifact(name)).manifest.report["kv_bytes_per_token"] == wanted


def test_the_report_names_every_pass(artifact: Callable[[str], Path]) -> None:
    report = Artifact.open(artifact("int4")).manifest.report
    matches = {p["name"]: p["matches"] for p in report["passes"]}
    assert report["extern_steps"] == []
    assert matches["compress_kv"] == report["model"]["layers"] == 5
    assert matches["fuse_router"] == 4
    assert report["weights_by_format"]["int4-g32"] > 0.6
    assert sum(report["weights_by_format"].values()) == pytest.approx(1)


# --- generation -------------------------------------------------------------------------------------


def prompts(heldout: str, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """20 prompts of held-out text; one is a single token."""
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 63, 64, 65, 89, 127, 128, 129, 144, 200, 233, 300]
    tokens = encode(heldout[:60_000])
    return [tokens[700 * i : 700 * i + n] for i, n in enumerate(lengths)]


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False,
            attention_mask=torch.ones(1, len(prompt)), pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_greedy_text_is_the_originals(
    artifact: Callable[[str], Path], model: Any, heldout: str
) -> None:
    with Session(artifact("fp32")) as session:
        batch = prompts(heldout, session.tokenizer.encode)
        together = [g.tokens for g in session.generate(batch, max_new_tokens=64)]
        alone = [session.generate([p], max_new_tokens=64)[0].tokens for p in batch]
    wanted = [greedy(model, p, 64) for p in batch]
    assert [list(t) for t in alone] == wanted
    assert [list(t) for t in together] == wanted


def test_a_prompt_that_fills_the_model(
    artifact: Callable[[str], Path], model: Any, heldout: str
) -> None:
    with Session(artifact("fp32")) as session:
        prompt = session.tokenizer.encode(heldout[:20_000])[: session.positions - 8]
        found = session.generate([prompt], max_new_tokens=8)[0]
    assert list(found.tokens) == greedy(model, prompt, 8)


def test_logits_do_not_depend_on_chunks(artifact: Callable[[str], Path], heldout: str) -> None:
    with Session(artifact("fp32")) as session:
        ids = session.tokenizer.encode(heldout[:6000])[:900]
        whole = session.logits(ids)
        part = session.logits(ids[:333])
    np.testing.assert_allclose(whole[:333], part, atol=1e-4)


def test_loading_compiles_nothing_and_is_quick(artifact: Callable[[str], Path]) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from tokenmill.runtime import Session\n"
        f"text = Session({str(artifact('int4'))!r}).generate(['def '], max_new_tokens=1)\n"
        "print(time.perf_counter() - start); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PATH": "", "CXX": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    # Generous: the machine may be busy, and the figure is measured in benchmarks/.
    assert float(done.stdout) < 10


# --- the artifact as a whole --------------------------------------------------------------------------


def test_two_builds_are_the_same_bytes(
    tiny_deepseek: Path, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    first, second = artifact("int4"), tmp_path / "again"
    optimize(tiny_deepseek, second, recipe=RECIPES["int4"])
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    _, differing, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (differing, missing) == ([], [])


def test_kernels_come_from_the_plan(artifact: Callable[[str], Path]) -> None:
    found = verify(artifact("int4"))
    assert found["reproducible"], found["differing"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 targets")
def test_one_artifact_serves_several_instruction_sets(
    tiny_deepseek: Path, heldout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best that a machine runs is chosen at load; in fp32, whichever it is writes the same text."""
    here = cpu_features()
    names = dict.fromkeys(("cpu-x86-64", "cpu-x86-64-v3", host_target().name))
    targets = [t for t in map(parse_target, names) if here.issuperset(t.features)]
    recipe = Recipe(weights="fp32", kv="fp32", targets=[t.name for t in targets])
    optimize(tiny_deepseek, tmp_path / "many", recipe=recipe)
    texts = set()
    for target in targets:
        monkeypatch.setattr(cpu, "cpu_features", lambda t=target: frozenset(t.features))
        with Session(tmp_path / "many") as session:
            assert cpu.choose_target(session.artifact.targets).name == target.name
            (made,) = session.generate([heldout[:200]], max_new_tokens=24)
            texts.add(made.text)
    assert len(texts) == 1


def test_checked_compile_reports_errors(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    compiled = optimize(tiny_qwen3_moe, tmp_path / "q", recipe=Recipe(weights="int8"), check=True)
    for fact in compiled.facts["passes"]:
        assert fact["error"] is not None
        assert fact["error"] <= (fact["tolerance"] or 0.5), fact["name"]
    with tokenmill.load(compiled.path) as session:
        assert len(session.generate(["def "], max_new_tokens=4)[0].tokens) == 4


def test_windows_cover_every_token_once() -> None:
    covered = [t for w in windows(1000, 64, 32) for t in range(w.scored, w.stop)]
    assert covered == list(range(1, 1000))
