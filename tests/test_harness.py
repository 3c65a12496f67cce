"""The adapter to lm-eval: against what the session itself says, and, where it is installed, by its tasks."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenmill.errors import BadRequest, BadToken, MissingExtra
from tokenmill.evaluate import log_softmax
from tokenmill.harness import Adapter, Scoring, TokenmillLM, Wish, rolling
from tokenmill.runtime import Session
from tokenmill.runtime.cache import PagePool
from tokenmill.runtime.scheduler import Scheduler

VOCAB = 11


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


# --- scoring, step by step ------------------------------------------------------------------------


def _logits(ids: Sequence[int]) -> NDArray[np.float32]:
    """A model: what follows a token depends on the token and its position."""
    table = np.random.default_rng(0).normal(size=(VOCAB, 64, VOCAB)).astype(np.float32)
    return table[list(ids), np.arange(len(ids))]


_texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_texts, _texts, st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(1, 30),
    st.integers(1, 5),
)
def test_scores_do_not_depend_on_how_steps_cut_the_texts(
    texts: list[tuple[list[int], list[int], int]], tokens: int, rows: int
) -> None:
    scheduler = Scheduler(tokens, rows, PagePool(8))
    work = []
    for context, continuation, copies in texts:
        ids = [*context, *continuation][:-1]
        others = [[*continuation[:-1], (continuation[-1] + i) % VOCAB] for i in range(copies)]
        work.append((Scoring(ids, others), ids, others))
        scheduler.add(work[-1][0])
    computed = 0
    while not all(scoring.done for scoring, _, _ in work):
        batch, chunks = scheduler.schedule()
        assert batch.rows.size <= rows
        computed += batch.rows.size
        steps = [_logits(r.tokens)[r.computed : r.computed + size] for r, size, _ in chunks]
        scheduler.postprocess(chunks, np.concatenate(steps)[batch.rows])
    assert computed == sum(len(continuation) for _, continuation, _ in texts)
    for scoring, ids, others in work:
        for (nats, greedy), wanted in zip(scoring.found, others, strict=True):
            rows_ = _logits(ids)[len(ids) - len(wanted) :]
            expected = log_softmax(rows_)[np.arange(len(wanted)), wanted].sum()
            assert nats == pytest.approx(float(expected), rel=1e-9)
            assert greedy == (rows_.argmax(-1).tolist() == wanted)


@given(st.integers(1, 60), st.integers(1, 20))
def test_a_document_is_scored_once_with_as_much_before_as_fits(tokens: int, positions: int) -> None:
    pairs = list(rolling(range(tokens + 1), positions))
    assert [t for p in pairs for t in p.continuation] == list(range(1, tokens + 1))
    for pair in pairs:
        assert [*pair.context, *pair.continuation] == list(
            range(pair.context[0], pair.continuation[-1] + 1)
        )
        assert len(pair.context) + len(pair.continuation) <= positions + 1
    assert len(pairs[-1].context) + len(pairs[-1].continuation) == min(positions, tokens) + 1


# --- a real artifact ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(int4_artifact: Path) -> Iterator[Session]:
    with Session(int4_artifact) as opened:
        yield opened


@pytest.fixture
def adapter(session: Session) -> Adapter:
    return Adapter(session)


def _expected(session: Session, context: str, continuation: str) -> tuple[float, bool]:
    """By the plain way: one text, all logits."""
    whole = session.tokenizer.encode(context + continuation)
    split = len(session.tokenizer.encode(context))
    logits = session.logits(whole)[split - 1 : -1]
    wanted = whole[split:]
    nats = log_softmax(logits)[np.arange(len(wanted)), wanted].sum()
    return float(nats), logits.argmax(-1).tolist() == wanted


def test_likelihoods_are_those_of_the_logits(session: Session, adapter: Adapter) -> None:
    context = "import os\n\ndef main():\n    return"
    endings = [" os.path.join(a, b)", " None", " True", " 0", " xylophone"]
    found = adapter.loglikelihood([asked(context, e) for e in endings], disable_tqdm=True)
    for (nats, greedy), ending in zip(found, endings, strict=True):
        wanted, chosen = _expected(session, context, ending)
        assert nats == pytest.approx(wanted, abs=2e-3)
        assert greedy == chosen
    assert found[1][0] > found[4][0]


def test_what_the_model_writes_itself_is_greedy(session: Session, adapter: Adapter) -> None:
    context = "class Reader:\n    def __init__(self"
    made = session.generate(context, 12)[0].text
    ((nats, greedy),) = adapter.loglikelihood([asked(context, made)], disable_tqdm=True)
    assert greedy
    ((less, greedy),) = adapter.loglikelihood([asked(context, made + "zq")], disable_tqdm=True)
    assert not greedy
    assert less < nats


def test_choices_of_one_token_share_a_run(session: Session, adapter: Adapter) -> None:
    context, letters = "Answer:\n", ["a", "b", "c", "d"]
    pairs = [adapter.pair(context + "x = ", letter) for letter in letters]
    assert len({tuple([*p.context, *p.continuation][:-1]) for p in pairs}) == 1
    runs = []
    drive, session.drive = session.drive, lambda work: (runs.append(len(work)), drive(work))[1]
    try:
        found = adapter.loglikelihood([asked(context + "x = ", x) for x in letters], True)
    finally:
        del session.drive
    assert runs == [1]
    assert sum(np.exp(nats) for nats, _ in found) < 1
    assert len({nats for nats, _ in found}) == 4


def test_spaces_before_a_continuation_belong_to_it(adapter: Adapter) -> None:
    assert adapter.pair("x =  ", "1") == adapter.pair("x =", "  1")
    assert adapter.pair("x = 1", "") == (adapter.encode("x = 1"), [])
    assert adapter.loglikelihood([asked("x = 1", "")], True) == [(0.0, True)]


@pytest.mark.parametrize("context", ["", "   "])
def test_an_empty_context_is_the_begin_token(
    session: Session, adapter: Adapter, context: str
) -> None:
    before, after = adapter.pair(context, "import os")
    assert before == session.begin_tokens
    assert session.tokenizer.decode(after) == context + "import os"


def test_a_token_over_the_border_leaves_one_to_be_scored(adapter: Adapter) -> None:
    whole = adapter.encode("def")
    assert len(whole) == 1
    before, after = adapter.pair("d", "ef")
    assert (before, after) == (adapter.session.begin_tokens, whole)


def test_the_begin_token_is_put_first_once(session: Session) -> None:
    begin = session.begin_tokens
    plain, opened = Adapter(session), Adapter(session, add_bos_token=True)
    assert plain.encode("x") == session.tokenizer.encode("x")
    assert opened.encode("x") == begin + session.tokenizer.encode("x")
    assert plain.encode("") == opened.encode("") == begin


def test_a_document_is_the_sum_of_its_windows(session: Session, adapter: Adapter) -> None:
    text = (Path(__file__).parent / "test_harness.py").read_text("utf-8")[:2500]
    short = SimpleNamespace(
        positions=100, vocab=session.vocab, tokenizer=session.tokenizer, drive=session.drive,
        begin_tokens=session.begin_tokens, end_tokens=session.end_tokens,
    )  # fmt: skip
    whole, cut, empty = (
        Adapter(s).loglikelihood_rolling([asked(t)], True)[0]
        for s, t in ((session, text), (short, text), (session, ""))
    )
    ids = session.begin_tokens + session.tokenizer.encode(text)
    logp = log_softmax(session.logits(ids))
    assert whole == pytest.approx(float(logp[np.arange(len(ids) - 1), ids[1:]].sum()), rel=1e-3)
    assert 1.5 * whole < cut < whole  # both negative: less context, less likely
    assert empty == 0


def test_continuations_end_before_a_stop_string(session: Session, adapter: Adapter) -> None:
    contexts = ["def main():", "import ", "class A:\n    def f(self"]
    until = {"until": ["\n", ""], "max_gen_toks": 20, "do_sample": False}
    found = adapter.generate_until([asked(c, until) for c in contexts], True)
    longer = adapter.generate_until([asked(c, {"max_gen_toks": 30}) for c in contexts], True)
    free = [g.text for g in session.generate(contexts, 30)]
    assert longer == free
    assert found == [text.partition("\n")[0] for text in found]
    assert all(text.startswith(short) for text, short in zip(free, found, strict=True))


def test_the_same_request_is_sampled_anew(adapter: Adapter) -> None:
    how = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    twice = [adapter.generate_until([asked("def ", how)] * 3, True) for _ in range(2)]
    assert len({text for texts in twice for text in texts}) == 6


def test_long_contexts_lose_their_beginning(
    session: Session, adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    positions = session.positions
    ids = [i % 200 + 50 for i in range(positions + 500)]
    context = session.tokenizer.decode(ids)
    while len(adapter.encode(context)) <= positions:
        context += context
    pair = adapter.pair(context, " x")
    ((nats, _),) = adapter.loglikelihood([asked(context, " x")], True)
    assert adapter.truncated == 1
    assert "lost their beginning" in caplog.text
    kept = [*pair.context, *pair.continuation][-positions - 1 :]
    row = log_softmax(session.logits(kept[:-1])[-1:])
    assert nats == pytest.approx(float(row[0, kept[-1]]), abs=0.05)  # in other steps
    made = adapter.generate_until([asked(context, {"max_gen_toks": 4})], True)
    assert made == [session.generate([adapter.encode(context)[-positions + 4 :]], 4)[0].text]
    assert adapter.truncated == 2


# --- what cannot be -------------------------------------------------------------------------------


class _Words:
    """A tokenizer of one token per character, that appends an end token to a text."""

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.before, self.after = before, after

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids = [ord(c) for c in text]
        return [*self.before, *ids, *self.after] if special else ids


def _stub(
    begin: list[int], end: list[int], before: Sequence[int] = (), after: Sequence[int] = ()
) -> Any:
    return SimpleNamespace(
        tokenizer=_Words(before, after), begin_tokens=begin, end_tokens=frozenset(end),
        positions=40, vocab=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stub", "encoded", "prefix"),
    [
        (_stub([1], [2]), [], [1]),
        (_stub([1], [2], before=[1]), [1], [1]),
        (_stub([1], [2], before=[1], after=[2]), [1], [1]),
        (_stub([2], [2], before=[2]), [2], [2]),
        (_stub([], [2], after=[2]), [], [2]),
        (_stub([], [9, 2]), [], [2]),
    ],
)
def test_special_tokens_of_all_kinds(stub: Any, encoded: list[int], prefix: list[int]) -> None:
    adapter = Adapter(stub)
    assert adapter.encode("ab") == [*encoded, 97, 98]
    assert adapter.pair("a", "b") == ([*encoded, 97], [98])
    assert adapter.pair("", "ab") == (prefix, [97, 98])


def test_nothing_to_start_from() -> None:
    adapter = Adapter(_stub([], []))
    assert adapter.pair("a", "b") == ([97], [98])
    with pytest.raises(BadRequest, match="empty context"):
        adapter.pair("", "b")


def test_tokens_and_lengths_that_the_model_cannot_take() -> None:
    adapter = Adapter(_stub([1], [2]))
    with pytest.raises(BadToken, match="token id 8364"):
        adapter.loglikelihood([asked("a", "€b")], True)
    with pytest.raises(BadRequest, match="41 tokens, and the model 40 positions"):
        adapter.loglikelihood([asked("a", "b" * 41)], True)
    with pytest.raises(BadRequest, match="asks for 40 new tokens"):
        adapter.generate_until([asked("a", {"max_gen_toks": 40})], True)


def test_an_artifact_without_a_tokenizer_is_refused() -> None:
    class Bare:
        @property
        def tokenizer(self) -> Any:
            raise BadRequest(reason="the artifact has no tokenizer", advice="pass token ids")

    with pytest.raises(BadRequest, match=r"lm-eval's tasks are texts\n.*tokenizer.json"):
        Adapter(Bare())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (20, (), 0.0, 0, 1.0)),
        ({"until": ["a", ""], "max_new_tokens": 3}, (3, ("a",), 0.0, 0, 1.0)),
        ({"temperature": 0.5, "do_sample": False}, (20, (), 0.0, 0, 1.0)),
        ({"temperature": 0.5, "top_p": 0.9}, (20, (), 0.5, 0, 0.9)),
        ({"do_sample": True, "top_k": 5}, (20, (), 1.0, 5, 1.0)),
        ({"temperature": 0.0, "num_beams": 1, "top_k": None}, (20, (), 0.0, 0, 1.0)),
    ],
)
def test_generation_settings(given: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert Wish.of(given, positions=40) == wanted


@pytest.mark.parametrize("odd", [{"num_beams": 4}, {"repetition_penalty": 1.1}, {"typical_p": 1}])
def test_settings_that_would_be_ignored_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(odd))):
        Wish.of(odd, positions=40)


# --- with the package itself ----------------------------------------------------------------------

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named(session: Session) -> None:
    with pytest.raises(MissingExtra, match=r"tokenmill\[lm-eval\]"):
        TokenmillLM(session)


_TASKS = {
    "local_choice": """
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def write_tasks(folder: Path, text: str) -> None:
    """Tasks over a local file: which order of words is right, how likely is a text, what comes next."""
    lines = [line for line in text.splitlines() if len(line.split()) > 4]
    rng, rows = random.Random(0), []
    for at in range(0, 240, 12):
        words = lines[at + 6].split()
        choices = [" ".join(w) for w in (words, *(rng.sample(words, len(words)) for _ in range(3)))]
        order = rng.sample(range(4), 4)
        rows.append({
            "text": "\n".join(lines[at : at + 6]) + "\n",
            "choices": [choices[i] for i in order], "answer": order.index(0),
        })  # fmt: skip
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    data = (
        "dataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\n"
    )
    for name, task in _TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{task}")


@pytest.mark.skipif(not INSTALLED, reason="needs the extra lm-eval")
def test_local_tasks_through_lm_eval(
    session: Session, tiny_deepseek: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path, (tiny_deepseek / "heldout.txt").read_text("utf-8"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    how = {"tasks": list(_TASKS), "task_manager": manager, "bootstrap_iters": 0}
    whole = simple_evaluate(model=TokenmillLM(session), **how)
    found, samples = whole["results"], whole["samples"]["local_generation"]
    assert 0.7 <= found["local_choice"]["acc,none"] <= 1  # a guess gets 0.25
    assert 1 < found["local_rolling"]["bits_per_byte,none"] < 2.5
    texts = [sample["doc"]["text"] for sample in samples]
    wanted = [made.text for made in session.generate(texts, 24, stop="\n")]
    assert [sample["resps"][0][0] for sample in samples] == wanted
    assert found["local_generation"]["exact_match,none"] == 0
    path = {"path": str(session.artifact.path), "device": "cpu", "batch_size": 3}
    again = simple_evaluate(model="tokenmill", model_args=path, **how)["results"]
    for task, metric in (("local_choice", "acc,none"), ("local_rolling", "bits_per_byte,none")):
        assert again[task][metric] == pytest.approx(found[task][metric], rel=1e-3)
