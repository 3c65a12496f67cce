"""Pages, scheduling, sampling and text streams, each alone."""

import json

import numpy as np
import pytest
import tokenmill.errors as errors
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.runtime import Session, cpu
from tokenmill.runtime.batch import Batch
from tokenmill.runtime.cache import PAGE, PagePool
from tokenmill.runtime.layout import Layout
from tokenmill.runtime.requests import Completion, Scoring
from tokenmill.runtime.sampling import Sampler, Sampling
from tokenmill.runtime.schedule import Binary, Launch, Scratch
from tokenmill.runtime.scheduler import Scheduler
from tokenmill.runtime.tokenizer import TextStream, Tokenizer, special_ids

# --- plan ---------------------------------------------------------------------------------------


def test_layout_reads_what_ir_plan_dumps():
    from tokenmill.ir import plan as ir

    spec = ir.Extern("aten.neg.default", ("x",), '{"args": [], "kwargs": {}}', "f32", (-1, 8))
    table = ir.Buffer("w", "weight", "bf16", shape=(8, 4))
    hidden = ir.Buffer("h", "arena", "f32", rows="tokens", width=16, offset=0)
    out = ir.Buffer("logits", "arena", "f32", rows="rows", width=8, offset=512 * 16 * 4)
    bind = {"x": ir.Operand("h", 8), "out": ir.Operand("h")}
    plan = ir.Plan(
        buffers={b.name: b for b in (table, hidden, out)},
        steps=(ir.Step(spec, bind, "tokens", "model.neg"),),
        caches=(ir.latent_cache("layer0", "bf16", 64, 16),),
        capacity=ir.Capacity(),
        arena_bytes=out.offset + 64 * 8 * 4,
        output="logits",
        vocab=8,
        positions=128,
        meta={"eos_token_id": 3},
    )
    layout = Layout.parse(json.loads(json.dumps(ir.dump(plan))))
    assert (layout.tokens, layout.rows, layout.steps) == (512, 64, 1)
    assert layout.bytes_per_token == 160
    assert layout.weights[0] == ("w", "bf16", (8, 4))
    assert layout.externs[0].item == -1
    assert layout.externs[0].bind == {"x": ("h", 8), "out": ("h", 0)}


def drop(key):
    return lambda plan: plan.pop(key)


@pytest.mark.parametrize(
    "change",
    [
        *(drop(key) for key in ("capacity", "buffers", "steps", "output", "vocab", "caches")),
        lambda plan: plan.update(output="h"),
        lambda plan: plan.update(arena_bytes=64),
        lambda plan: plan.update(positions=0),
        lambda plan: plan.update(capacity=None),
        lambda plan: plan["buffers"][8].update(offset=-1),
    ],
)
def test_a_malformed_plan_is_damage(fake, change):
    plan = fake.plan()
    change(plan)
    with pytest.raises(errors.ArtifactDamaged, match=r"plan\.json"):
        Layout.parse(plan)


def test_a_newer_plan(fake):
    with pytest.raises(errors.ArtifactTooNew):
        Layout.parse(fake.plan() | {"version": 2})


# --- launches -----------------------------------------------------------------------------------


def test_a_card_gets_as_many_blocks_as_it_has_use_for():
    binary = Binary("b", "b", (), 128, 0, (Scratch(16, 8),))
    launch = Launch(binary, (), (10, 2, 1), per_sm=2)
    assert [launch.blocks(sms) for sms in (3, 100)] == [(6, 2, 1), (10, 2, 1)]
    assert Launch(binary, (), (10, 2, 1)).blocks(3) == (10, 2, 1)
    assert launch.scratch_places()[-1] >= 16 * 10 * 2


# --- pages and scheduling -----------------------------------------------------------------------


def test_pages_grow_and_come_back():
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(PAGE + 1)
    pool.grow(first, PAGE)
    assert (len(first), len(second), pool.free) == (1, 2, 1)
    with pytest.raises(errors.OutOfCache, match=f"{PAGE * 5} tokens(.*)and {PAGE * 2} are"):
        pool.grow(first, PAGE * 5)
    assert (len(first), pool.free) == (1, 1)
    held = {*first, *second, *pool.take(PAGE)}
    assert held == {0, 1, 2, 3}
    pool.release(second)
    assert (second, pool.free) == ([], 2)


def completion(prompt, new=4, ends=()):
    return Completion(prompt, new, Sampler(Sampling()), ends, None)


def run(scheduler, vocab=10):
    batch, chunks = scheduler.schedule()
    logits = np.zeros((batch.rows.size, vocab), np.float32)
    logits[:, 7] = 1
    scheduler.postprocess(chunks, logits)
    return batch, [(chunk.request, chunk.size) for chunk in chunks]


def test_decode_goes_first_and_prompts_fill_what_is_left():
    scheduler = Scheduler(tokens=6, rows=3, pool=PagePool(8))
    short, long = completion([1]), completion(list(range(9)))
    scheduler.add(long)
    assert run(scheduler)[1] == [(long, 6)]
    scheduler.add(short)
    batch, chunks = run(scheduler)
    assert chunks == [(short, 1), (long, 3)]
    assert batch.rows.tolist() == [0, 3]
    assert batch.positions.tolist() == [0, 6, 7, 8]
    assert (short.generated, long.generated) == ([7], [7])


def test_no_more_run_than_a_step_serves_and_memory_holds():
    pool = PagePool(3)
    scheduler = Scheduler(tokens=8, rows=2, pool=pool)
    requests = [completion([1], new=2), completion([1] * 100, new=20), completion([2], new=1)]
    for request in requests:
        scheduler.add(request)
    assert [r for r, _ in run(scheduler)[1]] == requests[:2]
    assert pool.free == 0
    while not all(request.done for request in requests):
        run(scheduler)
    assert pool.free == 3
    scheduler.cancel(requests[0])  # long gone: nothing to do
    assert pool.free == 3


def test_requests_that_a_step_cannot_serve_hold_no_pages():
    pool = PagePool(9)
    scheduler = Scheduler(tokens=8, rows=2, pool=pool)
    for _ in range(5):
        scheduler.add(completion([1], new=3))
    run(scheduler)
    assert pool.free == 7


def test_a_request_that_can_never_run():
    scheduler = Scheduler(tokens=8, rows=2, pool=PagePool(1))
    scheduler.add(completion([1] * PAGE, new=1))
    with pytest.raises(errors.OutOfCache):
        scheduler.add(completion([1] * PAGE, new=2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(3, 12),
)
def test_every_request_is_served_within_the_capacity(wishes, tokens, rows, pages):
    """Completions of some length, or scoring where nothing is to be generated."""
    pool = PagePool(pages)
    scheduler = Scheduler(tokens, rows, pool)
    requests = [
        completion([1] * size, new) if new else Scoring([1] * size, 10) for size, new in wishes
    ]
    for request in requests:
        scheduler.add(request)
    while not all(request.done for request in requests):
        batch, chunks = run(scheduler)
        assert 0 < batch.ids.size <= tokens
        assert batch.rows.size <= rows
        used = [page for request, _ in chunks for page in request.pages]
        assert len(used) == len(set(used))
    assert pool.free == pages
    assert all(len(r.generated) == new for r, (_, new) in zip(requests, wishes, strict=True) if new)


def test_batch_pads_block_tables():
    batch = Batch.of([([1], 0, [5]), ([2, 3], 70, [8, 6])], rows=[])
    assert batch.block_table.tolist() == [[5, 0], [8, 6]]
    assert all(array.dtype == np.int32 for array in batch)


# --- sampling -----------------------------------------------------------------------------------

LOGITS = np.array([0.0, 3.0, 1.0, 3.0, 2.0, -1.0], np.float32)


def drawn(draws=4000, **how):
    sampler = Sampler(Sampling(**how))
    return np.bincount([sampler(LOGITS) for _ in range(draws)], minlength=LOGITS.size) / draws


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_greedy_takes_the_lowest_of_equals():
    assert Sampler(Sampling(top_k=3))(LOGITS) == 1


def test_frequencies_follow_the_temperature():
    np.testing.assert_allclose(drawn(temperature=1.0), softmax(LOGITS), atol=0.03)
    np.testing.assert_allclose(drawn(temperature=2.0), softmax(LOGITS / 2), atol=0.03)


def test_top_k_breaks_ties_by_id():
    assert drawn(200, temperature=1.0, top_k=1).tolist() == [0, 1, 0, 0, 0, 0]
    assert np.flatnonzero(drawn(temperature=9.0, top_k=3)).tolist() == [1, 3, 4]
    assert np.count_nonzero(drawn(temperature=9.0, top_k=99)) == 6
    flat = Sampler(Sampling(temperature=1.0, top_k=5))
    coarse = np.random.default_rng(0).integers(0, 3, 1000).astype(np.float32)
    best = set(np.flatnonzero(coarse == 2)[:5].tolist())
    assert {flat(coarse) for _ in range(200)} == best


def test_top_p_keeps_the_fewest_that_reach_it():
    first = softmax(LOGITS)[1]
    assert np.flatnonzero(drawn(temperature=1.0, top_p=first - 0.01)).tolist() == [1]
    assert np.flatnonzero(drawn(temperature=1.0, top_p=first + 0.01)).tolist() == [1, 3]
    assert np.flatnonzero(drawn(temperature=1.0, top_p=1e-9)).tolist() == [1]
    assert np.flatnonzero(drawn(temperature=9.0, top_k=2, top_p=0.99)).tolist() == [1, 3]


def test_extreme_temperatures_stay_finite():
    assert set(np.flatnonzero(drawn(200, temperature=1e-300))) == {1, 3}
    assert np.count_nonzero(drawn(temperature=1e300)) == 6


# --- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return Tokenizer(model_dir / "tokenizer/tokenizer.json")


def feed(stream, ids):
    return [stream.push(token) for token in ids]


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(errors.TokenizerDamaged, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_characters_come_whole(tokenizer):
    stream = TextStream(tokenizer, [])
    assert feed(stream, "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert feed(stream, b"\xf0\x9f") == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.text == "aé€😀\ufffd"


def test_what_will_never_be_a_character_is_not_held_for_long(tokenizer):
    stream = TextStream(tokenizer, [])
    assert "".join(feed(stream, b"\x80" * 50)) == "\ufffd" * 47
    assert stream.flush() == "\ufffd" * 3


def test_a_character_that_the_prompt_began(tokenizer):
    stream = TextStream(tokenizer, list(b"x\xe2\x82"))
    assert feed(stream, b"\xac!") == ["€", "!"]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.text(max_size=20), st.binary(max_size=60))
def test_pieces_join_to_the_decoded_text(tokenizer, before, middle, after):
    ids = list(before + middle.encode() + after)
    stream = TextStream(tokenizer, list(b"prompt"))
    pieces = [*feed(stream, ids), stream.flush()]
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    stream = TextStream(tokenizer, [], stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    ends = [text.find(s) + len(s) for s in stop if s in text]
    whole = text[: min(ends)] if ends else text
    starts = [whole.find(s) for s in stop if s in whole]
    assert "".join(pieces) == stream.text == (whole[: min(starts)] if starts else text)
    assert stream.stopped == bool(ends)


def test_special_ids(model_dir):
    file = model_dir / "tokenizer/tokenizer.json"
    assert special_ids("eos", [{"eos_token_id": None}, {"eos_token_id": 4}], None) == [4]
    assert special_ids("eos", [{"eos_token": "<eos>"}], file) == [256]
    assert special_ids("bos", [{"bos_token": {"content": "<bos>"}}], file) == [257]
    assert special_ids("bos", [{"bos_token": None}], file) == []
    assert special_ids("bos", [{"bos_token": "<bos>"}], None) == []


def test_a_missing_tokenizers_library_is_named(model_dir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(errors.MissingExtra, match="tokenizers"):
        Tokenizer(model_dir / "tokenizer/tokenizer.json")
    with Session(model_dir, threads=1) as session:
        assert session.generate([[1, 2]], max_new_tokens=2)[0].text == ""
        with pytest.raises(errors.MissingExtra):
            session.generate([[1, 2]], stop=["x"])


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)],
)
def test_a_container_s_quota_bounds_the_cores(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpu.available_cores() == cores
