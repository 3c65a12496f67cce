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
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenmill.errors import BadRequest
from tokenmill.evaluate import PROMPT_TOKENS, cut_prompts, evaluate, read_text, windows

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

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Any]:
        assert all(len(p) + new <= self.positions for p in prompts)
        return [SimpleNamespace(tokens=[p[-1]] * new) for p in prompts]


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


# --- the increase, and how sure it is -------------------------------------------------------------


def test_the_increase_is_that_of_the_bits() -> None:
    found = evaluate(_Repeater(sure=1), "aaab" * 40, _eager(2), window=32, stride=16)
    increase = found["bits_per_byte"] / found["original_bits_per_byte"] - 1
    assert found["bits_per_byte_increase_percent"] == pytest.approx(100 * increase)
    bits = found["bits_per_byte"] - found["original_bits_per_byte"]  # a byte is a token here
    assert found["perplexity_increase_percent"] == pytest.approx(100 * (2**bits - 1))


def test_no_difference_is_sure() -> None:
    found = evaluate(_Repeater(sure=2), "abca" * 40, _eager(2), window=32, stride=16)
    assert found["bits_per_byte_increase_percent"] == pytest.approx(0, abs=1e-6)
    assert found["standard_error_percent"] == pytest.approx(0, abs=1e-6)


def test_one_window_has_no_standard_error() -> None:
    found = evaluate(_Repeater(sure=1), "abca", _eager(2))
    assert "standard_error_percent" not in found


def test_the_standard_error_is_how_far_texts_scatter() -> None:
    """Over many texts of one kind, increases scatter as widely as each text's error says."""
    rng, increases, errors = np.random.default_rng(0), [], []
    for _ in range(150):
        stay = rng.random(40 * 8) < np.repeat(rng.uniform(0.2, 0.9, 40), 8)  # windows differ
        steps = np.where(stay, 0, 1)
        text = [int(t) for t in np.cumsum([0, *steps]) % VOCAB]
        found = evaluate(_Repeater(sure=1), text, _eager(2), window=9, stride=8)
        increases.append(found["bits_per_byte_increase_percent"])
        errors.append(found["standard_error_percent"])
    assert float(np.mean(errors)) == pytest.approx(float(np.std(increases)), rel=0.2)


# --- continuations --------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 700),
    most=st.integers(1, 20),
    positions=st.integers(4, 400),
    wanted=st.integers(1, 64),
    begin=st.sampled_from([None, 3]),
)
def test_prompts_fit_come_from_the_text_and_do_not_overlap(
    tokens: int, most: int, positions: int, wanted: int, begin: int | None
) -> None:
    session = _Repeater(sure=1, positions=positions, begin=begin)
    new = min(wanted, positions // 2)
    text = [1000 + i for i in range(tokens)]
    prompts = cut_prompts(session, session.begin_tokens + text, most, new)
    assert 1 <= len(prompts) <= most
    assert all(len(p) + new <= positions and len(p) <= PROMPT_TOKENS + 1 for p in prompts)
    assert all(p[: len(session.begin_tokens)] == session.begin_tokens for p in prompts)
    cut = [t for p in prompts for t in p[len(session.begin_tokens) :]]
    assert set(cut) <= set(text)
    assert cut == sorted(set(cut))
    assert prompts[0][len(session.begin_tokens)] == text[0]
    if len(prompts) > 1:
        assert prompts[-1][-1] == text[-1]


def _counting(start_at: int) -> Any:
    """Says that the last token comes again, up to position ``start_at``, and then the next one."""

    def model(ids: torch.Tensor) -> Any:
        later = (torch.arange(ids.shape[1]) >= start_at).long()
        return SimpleNamespace(logits=5 * torch.eye(VOCAB)[(ids + later) % VOCAB])

    return model


def test_a_model_agrees_with_itself_to_the_end() -> None:
    text = "aabc" * 200
    found = evaluate(_Repeater(2), text, _eager(2), continuations=3, continuation_tokens=9)
    assert found["continuations"] == 3
    assert found["greedy_agreement_mean"] == found["greedy_agreement_median"] == 9
    assert found["greedy_agreement_to_the_end"] == 1


@pytest.mark.parametrize(("wrong_from", "alike"), [(0, 0), (15, 0), (16, 1), (20, 5), (24, 9)])
def test_agreement_ends_with_the_first_difference(wrong_from: int, alike: int) -> None:
    """Prompts have 16 tokens, so the first choice is made at position 15."""
    session = _Repeater(2, positions=25)
    found = evaluate(
        session, "abcd" * 20, _counting(wrong_from), continuations=4, continuation_tokens=9
    )
    assert found["greedy_agreement_mean"] == alike
    assert found["greedy_agreement_to_the_end"] == (alike == 9)


def test_an_end_token_is_agreed_on_too() -> None:
    class Ending(_Repeater):
        def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Any]:
            return [SimpleNamespace(tokens=[p[-1], 7]) for p in prompts]

    found = evaluate(Ending(2), "aaaa" * 20, _eager(2), continuations=2)
    assert found["greedy_agreement_mean"] == 1  # the original goes on
    assert found["greedy_agreement_to_the_end"] == 0


def test_no_continuations_and_progress() -> None:
    said: list[tuple[str, int, int]] = []
    note = lambda *what: said.append(what)  # noqa: E731
    found = evaluate(_Repeater(2), "aabc" * 20, _eager(2), progress=note)
    assert not any(key.startswith(("greedy", "continuations")) for key in found)
    assert {what for what, _, _ in said} == {"evaluate"}
    evaluate(_Repeater(2), "aabc" * 20, _eager(2), progress=note, continuations=2)
    assert [s for s in said if s[0] == "continue"] == [("continue", i, 2) for i in range(3)]


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
