"""The contract of the command line: one JSON object, exit statuses, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenmill import __version__
from tokenmill.cli import app
from tokenmill.runtime.artifact import ArtifactWriter
from typer.testing import CliRunner, Result

COMMANDS = [
    "optimize", "run", "eval", "bench", "tune", "inspect", "export", "verify", "doctor",
]  # fmt: skip


def tokenmill(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="tokenmill")


def answer(*arguments: object) -> dict[str, Any]:
    """The object that a command prints with --json; nothing else may be on standard output."""
    result = tokenmill(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def refused(*arguments: object) -> str:
    """The error of a command that must end with status 2, a remedy, and no traceback."""
    result = tokenmill(*arguments, "--json")
    assert result.exit_code == 2, result.output
    assert set(json.loads(result.stdout)) == {"error", "remedy"}
    assert "remedy: " in result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


# --- help and usage -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = tokenmill(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_the_version() -> None:
    assert tokenmill("--version").stdout == f"tokenmill {__version__}\n"
    command = [sys.executable, "-m", "tokenmill", "--version"]
    assert subprocess.check_output(command, text=True) == f"tokenmill {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["optimise", "x"], ["optimize", "x", "--wieghts", "int4"],
     ["run", "x", "--prompt", "a", "--max-new-tokens", "0"]],
)  # fmt: skip
def test_misuse_is_status_2(arguments: list[str]) -> None:
    assert tokenmill(*arguments).exit_code == 2


def test_an_error_without_json_leaves_standard_output_empty(tmp_path: Path) -> None:
    result = tokenmill("verify", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "remedy: make one with `tokenmill optimize" in result.stderr


# --- the main path --------------------------------------------------------------------------------


def test_optimize_answers_with_the_facts(tiny_deepseek: Path, tmp_path: Path) -> None:
    found = answer("optimize", tiny_deepseek, "-o", tmp_path / "a", "--weights", "int4")
    assert found["path"] == str(tmp_path / "a")
    assert found["extern_steps"] == []
    assert found["recipe"]["weights"] == "int4-g32"
    assert (tmp_path / "a" / "report.html").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_inspect_says_at_least_what_the_contract_says(int4_artifact: Path) -> None:
    found = answer("inspect", int4_artifact)
    assert {"total", "active"} <= set(found["parameters"])
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert found["bytes"]["weights"] < found["bytes"]["original"]
    assert sum(found["weights_by_format"].values()) == pytest.approx(1)
    assert {"kv_bytes_per_token", "kernels", "targets"} <= set(found)
    assert found["extern_steps"] == []
    for one in found["passes"]:
        assert {"name", "matches", "seconds", "error"} <= set(one)


def test_inspect_compiles_a_model_without_writing(tiny_deepseek: Path) -> None:
    before = sorted(tiny_deepseek.iterdir())
    found = answer("inspect", tiny_deepseek, "--kernels", "--graph", "aten")
    assert found["parameters"]["total"] > 0
    assert found["sources"]
    assert "attention" in found["graph"]
    assert sorted(tiny_deepseek.iterdir()) == before


def test_inspect_prints_graphs_and_kernels(int4_artifact: Path) -> None:
    sources = answer("inspect", int4_artifact, "--kernels")["sources"]
    assert any(name.endswith("step.cpp") for name in sources)
    for stage in answer("inspect", int4_artifact)["stages"]:
        assert answer("inspect", int4_artifact, "--graph", stage)["graph"]
    assert "use one of" in refused("inspect", int4_artifact, "--graph", "nowhere")


def test_inspect_needs_a_report(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "bare") as writer:
        writer.json("plan.json", {})
        writer.describe(targets=[])
    assert "without a report" in refused("inspect", tmp_path / "bare")


def test_a_dry_run_writes_nothing(tiny_deepseek: Path, tmp_path: Path) -> None:
    found = answer("optimize", tiny_deepseek, "-o", tmp_path / "a", "--dry-run")
    assert found["path"] is None
    assert found["peak_memory_bytes"] > 0
    assert sum(one["matches"] for one in found["passes"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_run_continues_a_text_the_same_way_each_time(int4_artifact: Path) -> None:
    arguments = ("run", int4_artifact, "--prompt", "def main():", "--max-new-tokens", 12)
    sampled = (*arguments, "--temperature", 0.8, "--seed", 3)
    streamed = tokenmill(*sampled)
    assert streamed.exit_code == 0
    found = answer(*sampled)
    assert streamed.stdout == found["text"] + "\n"
    assert answer(*sampled)["tokens"] == found["tokens"]
    assert found["prompt_tokens"] > 0
    assert len(answer(*arguments)["tokens"]) <= 12


def test_eval_measures_and_compares(
    int4_artifact: Path, tiny_deepseek: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((tiny_deepseek / "heldout.txt").read_text()[:4000])
    found = answer("eval", int4_artifact, "--text", text, "--against", tiny_deepseek)
    assert found["bits_per_byte"] == pytest.approx(found["original_bits_per_byte"], rel=0.05)
    assert found["bytes"] == len(text.read_bytes())
    assert 0 <= found["kl_mean"] < 0.1
    assert 0.8 < found["top1_agreement"] <= 1
    assert found["max_abs_logit_error"] > 0
    increase = found["bits_per_byte"] / found["original_bits_per_byte"] - 1
    assert found["bits_per_byte_increase_percent"] == pytest.approx(100 * increase)
    assert 0 < found["standard_error_percent"] < 1
    assert found["continuations"] > 1
    assert 1 < found["greedy_agreement_mean"] <= 64
    assert 0 <= found["greedy_agreement_to_the_end"] <= 1
    alone = answer("eval", int4_artifact, "--text", text)
    assert alone["bits_per_byte"] == pytest.approx(found["bits_per_byte"])
    assert "kl_mean" not in alone


def test_verify_proves_an_artifact(int4_artifact: Path) -> None:
    assert tokenmill("verify", int4_artifact).exit_code == 0
    assert answer("verify", int4_artifact)


def test_doctor_knows_what_is_installed() -> None:
    found = answer("doctor")
    assert found["packages"]["core"]["torch"]
    assert found["cpu"]["cores"] >= 1
    assert all("pip install" in remedy for remedy in found["remedies"])
    assert tokenmill("doctor").exit_code == 0


def test_doctor_answers_in_a_checkout_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert answer("doctor")["packages"] == {}


# --- bad input ------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "no model directory" in refused("optimize", tmp_path / "none", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _copy(model: Path, parent: Path) -> Path:
    """A copy without published checksums, so that the damage itself must be found."""
    without = shutil.ignore_patterns("SHA256SUMS")
    return shutil.copytree(model, parent / "model", ignore=without)


def _empty(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def _without_config(model: Path) -> None:
    (model / "config.json").unlink()


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _not_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def _truncated(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def _broken_header(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[12] ^= 0xFF
    file.write_bytes(data)


def _configured(**changes: object) -> Callable[[Path], None]:
    """Damage by changes to config.json."""

    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    damage.__name__ = "_".join(changes)
    return damage


def _indexed(content: str) -> Callable[[Path], None]:
    """Damage by an index of shards with this content."""

    def damage(model: Path) -> None:
        (model / "model.safetensors.index.json").write_text(content)

    damage.__name__ = f"index {content}"
    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _empty,
        _without_config,
        _without_weights,
        _not_json,
        _truncated,
        _broken_header,
        _configured(hidden_size=512),  # contradicts the weights
        _configured(rms_norm_eps="x"),
        _configured(num_attention_heads=0),
        _indexed("[]"),
        _indexed('{"weight_map": {"a": 3}}'),
        _indexed('{"weight_map": {"a": "../secret.safetensors"}}'),
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_a_damaged_model(
    damage: Callable[[Path], None], tiny_deepseek: Path, tmp_path: Path
) -> None:
    model = _copy(tiny_deepseek, tmp_path)
    damage(model)
    refused("optimize", model, "-o", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_flipped_bit_in_a_model_with_checksums(tiny_deepseek: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_deepseek, tmp_path / "model")
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused("optimize", model, "-o", tmp_path / "out")


def test_a_weight_that_is_not_a_number(tiny_deepseek: Path, tmp_path: Path) -> None:
    model = _copy(tiny_deepseek, tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.gate.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    said = refused("optimize", model, "-o", tmp_path / "out")
    assert "model.layers.1.mlp.gate.weight" in said
    assert "1 NaN" in said


def test_an_output_that_exists(tiny_deepseek: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "--force" in refused("optimize", tiny_deepseek, "-o", tmp_path / "out")
    refused("optimize", tiny_deepseek, "-o", tmp_path / "out", "--force")  # it is no artifact
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "options",
    [["--weights", "int3"], ["--kv", "int4"], ["--target", "tpu"], ["--recipe", "no.yaml"]],
)
def test_a_recipe_that_cannot_be(tiny_deepseek: Path, tmp_path: Path, options: list[str]) -> None:
    refused("optimize", tiny_deepseek, "-o", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_no_output_directory(tiny_deepseek: Path) -> None:
    assert "--dry-run" in refused("optimize", tiny_deepseek)


@pytest.mark.parametrize(
    "command", [["run", "--prompt", "x"], ["verify"], ["eval", "--text", "x"], ["bench"]]
)
def test_a_directory_that_is_no_artifact(tmp_path: Path, command: list[str]) -> None:
    refused(command[0], tmp_path, *command[1:])


def test_one_flipped_byte_in_any_file(int4_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(int4_artifact, tmp_path / "copy")
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        assert file.name in refused("verify", copy)
        file.write_bytes(whole)
    assert tokenmill("verify", copy).exit_code == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot read"), (b"", "is empty"), (b"ab\xff", "byte 2 is 0xff")],
)
def test_a_text_that_cannot_be_scored(
    int4_artifact: Path, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert expected in refused("eval", int4_artifact, "--text", file)


def test_an_empty_prompt(int4_artifact: Path) -> None:
    assert "empty" in refused("run", int4_artifact, "--prompt", "")


def test_a_prompt_that_is_too_long(int4_artifact: Path) -> None:
    assert "positions" in refused("run", int4_artifact, "--prompt", "x " * 5000)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "kill"]
)
def test_an_interrupted_run_leaves_nothing(
    tiny_deepseek: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-c", "from tokenmill.cli import main; main()"]
    arguments = ["optimize", str(tiny_deepseek), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command + arguments,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell starts with Ctrl-C ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the artifact is being written
    process.send_signal(number)
    _, log = process.communicate(timeout=60)
    assert process.returncode == status, log
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []
