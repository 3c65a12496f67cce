"""The examples run, and say what they promise; on small models, where they take one."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from tokenmill import Session

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "extend"))


@pytest.fixture(scope="module")
def small(tiny_deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one random layer, with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints") / "small"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for file in tiny_deepseek.glob("tokenizer*.json"):
        shutil.copy(file, path)
    return path


def test_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_local_experts=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    import_module("my_pass").main(transformers.AutoModelForCausalLM.from_config(config).eval())
    said = capsys.readouterr().out
    before, after = (
        int(line.partition(": ")[2].split()[0].replace(",", "")) for line in said.splitlines()[:2]
    )
    assert after < before
    assert "1 layers, logits change by" in said


def test_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("my_pattern").main()
    said = capsys.readouterr().out
    assert "2 matches" in said
    assert "left to torch: 0" in said
    assert float(said.split()[-1]) < 1e-5


def test_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("my_kernel").main()
    said = capsys.readouterr().out
    assert "reference: 0.0e+00" in said
    assert "keep_largest_w96" in said
    assert float(said.split()[-1]) < 1e-5


def test_a_format(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_module("my_format").main(small, characters=1000, where="linear")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["int4-g64", "nf4"]
    found = [re.search(r"(\S+) bits .* original (\S+),", line) for line in lines]
    (bits, loss), (nf4_bits, nf4_loss) = ((float(m[1]), float(m[2])) for m in found if m)
    assert bits == pytest.approx(nf4_bits, abs=0.05)
    assert 0 < nf4_loss < loss  # its weights are normally distributed


def test_a_module_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("own_module").main(["--steps", "8"])
    said = capsys.readouterr().out
    assert "step 7: " in said
    assert "needs |" in said


def test_several_targets(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "many"), "--step-tokens", "1"]
    import_module("multi_target").main([str(small), *options])
    said = capsys.readouterr().out
    assert "sm_80" in said
    assert "sm_90" in said
    assert "kernels come from the plan: True" in said


def test_a_budget(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "small"), "--tokens", "512", "--max-loss", "kl=0.5"]
    import_module("within_budget").main([str(small), *options])
    said = capsys.readouterr().out
    assert "within the budget of kl=0.5" in said
    assert "bits a weight" in said


# --- the server -------------------------------------------------------------------------------------


@pytest.fixture
def address(int4_artifact: Path) -> Iterator[str]:
    with Session(int4_artifact) as session, import_module("serve").server(session, 0) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/generate"
        http.shutdown()
        thread.join()


def _post(address: str, **request: object) -> str:
    data = json.dumps(request).encode()
    with urllib.request.urlopen(address, data, timeout=60) as answer:
        return answer.read().decode()


def test_a_server(address: str, int4_artifact: Path) -> None:
    prompts = ["def main():", "import os\n"]
    with Session(int4_artifact) as session:
        wanted = [made.text for made in session.generate(prompts, max_new_tokens=12)]
    assert _post(address, prompt=prompts[0], max_new_tokens=12) == wanted[0]
    assert json.loads(_post(address, prompt=prompts, max_new_tokens=12)) == wanted


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"prompt": "x", "max_new_tokens": 10**6}, "positions"),
        ({"prompt": "x", "colour": "red"}, "colour"),
        ({}, "prompt"),
    ],
)
def test_a_server_says_what_is_wrong(
    address: str, request_: dict[str, object], reason: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _post(address, **request_)
    assert caught.value.code == 400
    assert reason in caught.value.read().decode()
    assert _post(address, prompt="def ", max_new_tokens=1) is not None  # it still serves
