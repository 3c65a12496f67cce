"""The protocol of evaluation, on a model whose figures are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenmill.errors import BadRequest
from tokenmill.evaluate import evaluate, read_text, windows

VOCAB = 16


class _Letters:
    """One token per character a..p; ``special`` is no text."""

    def __init__(self, special: int | None) -> None:
        self.special = special

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + ord("a")) for i in ids if i != self.special)


class _Repeater:
    """A session whose model says with logit ``sure`` that the last token comes again."""

    def __init__(self, sure: float, positions: int = 64, begin: int | None = None) -> None:
        self.vocab, self.positions, self.sure = VOCAB, positions, sure
        self.tokenizer = _Letters(begin)
        self.begin_tokens = [] if begin is None else [begin]
        self.seen: list[int] = []

    def logits_of(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        self.seen += [len(s) for s in sequences]
        return [(self.sure * np.eye(VOCAB, dtype=np.float32))[list(s)] for s in sequences]


def _eager(sure: float) -> Any:
    """The same model, with the interface of transformers."""
    return lambda ids: SimpleNamespace(logits=(sure * torch.eye(VOCAB))[ids])


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 12, 13, 100])
@pytest.mark.parametrize(("window", "stride"), [(6, 3), (6, 6), (6, 1), (2, 1), (500, 250)])
def test_every_token_is_scored_once_with_enough_context(
    tokens: int, window: int, stride: int
) -> None:
    cuts = list(windows(tokens, window, stride))
    assert [i for cut in cuts for i in range(cut.scored, cut.stop)] == list(range(1, tokens))
    assert all(cut.stop - cut.start <= window for cut in cuts)
    assert all(cut.scored - cut.start >= window - stride for cut in cuts[1:])
    assert all(cut.start < cut.scored for cut in cuts)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary() -> None:
    found = evaluate(_Repeater(sure=0), "abcdefghij" * 30, window=32, stride=16)
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCAB))
    assert found["perplexity"] == pytest.approx(VOCAB)
    assert found["tokens"] == found["bytes"] == 299


def test_windows_do_not_exceed_the_positions() -> None:
    session = _Repeater(sure=1, positions=20)
    evaluate(session, "abcd" * 50)
    assert max(session.seen) == 20


def test_a_begin_token_lets_every_byte_be_scored() -> None:
    found = evaluate(_Repeater(sure=0, begin=0), "bcd", window=8, stride=4)
    assert found["bytes"] == found["tokens"] == 3


def test_a_model_compared_with_itself() -> None:
    found = evaluate(_Repeater(sure=2), "aabbcc" * 20, _eager(2), window=32, stride=16)
    assert found["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert (found["top1_agreement"], found["max_abs_logit_error"]) == (1, 0)
    assert found["original_bits_per_byte"] == pytest.approx(found["bits_per_byte"])
    assert found["logit_spread"] == pytest.approx(2 * math.sqrt(1 / 16 - 1 / 256))


def test_the_divergence_is_from_the_original_to_the_artifact() -> None:
    found = evaluate(_Repeater(sure=1), "abcd" * 20, _eager(3), window=32, stride=16)

    def log_softmax(sure: float) -> NDArray[np.float64]:
        row = sure * np.eye(VOCAB)[0]
        return row - np.log(np.exp(row).sum())

    p, q = log_softmax(3), log_softmax(1)
    assert found["kl_mean"] == pytest.approx(float((np.exp(p) * (p - q)).sum()))
    assert found["max_abs_logit_error"] == pytest.approx(2)


def test_another_vocabulary_is_refused() -> None:
    other = lambda ids: SimpleNamespace(logits=torch.zeros(*ids.shape, VOCAB + 1))  # noqa: E731
    with pytest.raises(BadRequest, match="17 token ids and the artifact 16"):
        evaluate(_Repeater(sure=1), "abcd", other)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_predicted_token_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="longer text"):
        evaluate(_Repeater(sure=1), text)


def test_reading_a_text(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("grüß\r\n".encode())
    assert read_text(file) == "grüß\r\n"
    with pytest.raises(BadRequest, match="cannot read"):
        read_text(tmp_path)
