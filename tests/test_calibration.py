"""The text that weights are fitted to, from a file to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenmill import Recipe, calibration, optimize
from tokenmill.calibration import Text, cut, read
from tokenmill.errors import BadRequest
from tokenmill.recipe import Rule
from tokenmill.runtime.tokenizer import Tokenizer

from .models import hand_written

WORDS = "def add(a, b):\n    return a + b\n" * 200


def test_the_text_that_comes_along_is_enough(tiny_deepseek: Path) -> None:
    text = read(None, tiny_deepseek, 2 * Recipe().calibration_tokens, 2048)
    assert text.tokens == 2 * Recipe().calibration_tokens
    assert not text.notes
    assert text.facts["source"] == "the text that comes with tokenmill"


def test_sequences_begin_like_texts_and_hold_the_file(tiny_deepseek: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS)
    text = read(str(file), tiny_deepseek, 1024, 256)
    assert [len(s) for s in text.sequences] == [256] * 4
    assert all(s[0] == 0 for s in text.sequences)
    assert Tokenizer(tiny_deepseek / "tokenizer.json").decode(text.sequences[0].tolist()) in WORDS
    assert text.digest != read(str(file), tiny_deepseek, 512, 256).digest


def test_a_text_shorter_than_asked_for_is_noted(tiny_deepseek: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(WORDS)
    (note,) = read(str(file), tiny_deepseek, 1_000_000, 2048).notes
    assert "has only" in note
    assert "of the 1 M tokens asked for" in note


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"\xff\xfeh\x00i\x00", "not UTF-8"),
        ("gr\xfc\xdfe ".encode("latin-1") * 1000, "not UTF-8.*iconv"),
        (b"\x7fELF\x00\x00" * 1000, "binary"),
        (b"too short", "too few to calibrate with.*at least 512"),
    ],
)
def test_a_file_that_cannot_be_used(
    tiny_deepseek: Path, tmp_path: Path, data: bytes | None, message: str
) -> None:
    file = tmp_path / "text"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(BadRequest, match=f"(?s){message}"):
        read(str(file), tiny_deepseek, 4096, 2048)
    out = tmp_path / "out"
    with pytest.raises(BadRequest):
        optimize(tiny_deepseek, out, recipe=Recipe(weights="int4", calibration=str(file)))
    assert not out.exists()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="has no tokenizer"):
        read(None, tmp_path, 4096, 2048)
    with pytest.raises(BadRequest, match="calibration_ids"):
        optimize(hand_written(), dry_run=True, recipe=Recipe(rounding="gptq"))


@given(
    count=st.integers(1, 300),
    tokens=st.integers(1, 400),
    length=st.integers(2, 50),
    begin=st.booleans(),
)
def test_pieces_are_consecutive_and_spread(
    count: int, tokens: int, length: int, begin: bool
) -> None:
    head = [-1] if begin else []
    pieces = [s.tolist() for s in cut(range(count), head, tokens, length)]
    assert pieces
    for piece in pieces:
        assert piece[: len(head)] == head
        body = piece[len(head) :]
        assert body == list(range(body[0], body[0] + len(body)))
        assert len(piece) <= length
    assert len(pieces) == 1 or sum(map(len, pieces)) <= tokens
    starts = [p[len(head)] for p in pieces]
    assert starts == sorted(set(starts))


def test_halves_share_nothing() -> None:
    sequences = [torch.tensor([i]) for i in range(7)]
    first, second = Text(sequences).split()
    assert sorted(int(s) for s in [*first.sequences, *second.sequences]) == list(range(7))


# --- compiling with it ------------------------------------------------------------------------------


def _bytes(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_killed_compile_goes_on_and_gives_the_same_bytes(
    tiny_deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.passes.calibrate.SAVE_SECONDS", 0.0)
    recipe = Recipe(weights="int4-g128", rounding="gptq", calibration_tokens=1024)
    whole, other = tmp_path / "whole", tmp_path / "other"
    compiled = optimize(tiny_deepseek, whole, recipe=recipe)
    assert compiled.facts["calibration"]["tokens"] == 1024
    (result,) = [p for p in compiled.facts["passes"] if p["name"] == "calibrate"]
    assert "weights rounded by GPTQ, on 1,024 tokens" in result["notes"][0]

    def interrupted(what: str, done: int, total: int) -> None:
        if what.startswith("calibrate") and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(tiny_deepseek, other, recipe=recipe, progress=interrupted)
    assert not other.exists()
    assert (tmp_path / "other.work").is_dir()
    told: list[int] = []

    def listen(what: str, done: int, total: int) -> None:
        if what.startswith("calibrate"):
            told.append(done)

    optimize(tiny_deepseek, other, recipe=recipe, progress=listen)
    assert sorted(told)[1] > 1
    assert not (tmp_path / "other.work").exists()
    assert _bytes(whole) == _bytes(other)


def test_a_module_is_fitted_to_ids(tmp_path: Path) -> None:
    model: Any = hand_written()
    ids = [torch.arange(40) % 7 for _ in range(4)]
    rules = [Rule(match="role:linear", format="int4-g32")]
    recipe = Recipe(rounding="gptq", rules=rules)
    compiled = optimize(
        model, tmp_path / "out", recipe=recipe, calibration_ids=ids, max_positions=256
    )
    assert compiled.facts["calibration"]["source"] == "the caller's token ids"
    assert not list(tmp_path.glob("*.work"))
    assert calibration.DEFAULT.is_file()
