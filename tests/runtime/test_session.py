"""Generation through the whole runtime, against the fake model computed by hand."""

import ctypes
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenmill.errors as errors
from tokenmill.runtime import Artifact, Session


@pytest.fixture
def session(model_dir):
    with Session(model_dir, threads=1) as opened:
        yield opened


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


LENGTHS = [1, 2, 63, 64, 65, 16, 17, 128, 250, 5, 300 - 40]


def test_greedy_matches_the_model_in_one_batch_and_one_by_one(session, fake):
    prompts = prompts_of(LENGTHS)
    together = session.generate(prompts, max_new_tokens=40)
    for prompt, generation in zip(prompts, together, strict=True):
        assert generation.tokens == fake.greedy(prompt, 40)
        assert generation.tokens == session.generate([prompt], max_new_tokens=40)[0].tokens
        assert generation.prompt_tokens == len(prompt)
        assert generation.finish_reason == (
            "stop" if generation.tokens[-1] == fake.eos else "length"
        )
        assert generation.prefill_seconds > 0
        assert generation.decode_seconds >= 0


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 3), (16, 16), (7, 2)])
def test_any_capacity_gives_the_same_tokens(fake, tmp_path, tokens, rows):
    path = fake.write(tmp_path / "m", tokens=tokens, rows=rows)
    prompts = prompts_of([1, 33, 70, 4])
    with Session(path, threads=2) as session:
        got = [g.tokens for g in session.generate(prompts, max_new_tokens=12)]
        logits = session.logits(prompts[2])
    assert got == [fake.greedy(prompt, 12) for prompt in prompts]
    np.testing.assert_array_equal(logits, fake.logits(prompts[2]))


def test_a_small_cache_makes_sequences_wait_and_reuses_pages(fake, model_dir):
    prompts = prompts_of([60, 100, 3, 64, 90])
    with Session(model_dir, threads=1, cache_tokens=128) as session:
        got = [g.tokens for g in session.generate(prompts, max_new_tokens=20)]
        with pytest.raises(errors.OutOfCache):
            session.generate([prompts[0], [1] * 200])
        assert session.generate(prompts[2], max_new_tokens=20)[0].tokens == got[2]
    assert got == [fake.greedy(prompt, 20) for prompt in prompts]


def test_logits_of_several_sequences(session, fake):
    sequences = prompts_of([1, 64, 130, 300])
    for tokens, got in zip(sequences, session.logits_of(sequences), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, fake.logits(tokens))


def test_sampling_does_not_depend_on_the_batch(session):
    prompts = prompts_of([3, 40, 70])
    how = {"max_new_tokens": 15, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7}
    first = session.generate(prompts, **how)
    assert session.generate(prompts, **how)[1].tokens == first[1].tokens
    assert session.generate([prompts[0], [1], [2]], **how)[0].tokens == first[0].tokens
    assert [p.token for p in session.stream(prompts[0], **how)] == first[0].tokens
    assert session.generate(prompts, **how | {"seed": 8})[1].tokens != first[1].tokens
    twins = session.generate([prompts[0], prompts[0]], **how)
    assert twins[0].tokens != twins[1].tokens


def test_end_token_ends(session, fake):
    prompt = next(
        p
        for n in range(1, 3)
        for p in prompts_of([n] * 60, n)
        if fake.greedy(p, 30)[-1] == fake.eos
    )
    generation = session.generate(prompt, max_new_tokens=30)[0]
    assert generation.finish_reason == "stop"
    assert generation.tokens[-1] == fake.eos
    assert "<eos>" not in generation.text


def test_text_is_what_the_tokenizer_makes_of_all_tokens(session):
    for prompt in ("x", "def main():", "größer 漢字"):
        generation = session.generate(prompt, max_new_tokens=60)[0]
        ids = session.tokenizer.encode(prompt)
        assert prompt + generation.text == session.tokenizer.decode(ids + generation.tokens)


def test_stream_joins_to_the_text(session):
    generation = session.generate("hello", max_new_tokens=40)[0]
    pieces = list(session.stream("hello", max_new_tokens=40))
    assert [p.token for p in pieces] == generation.tokens
    assert "".join(p.text for p in pieces) == generation.text


def test_stop_string_cuts_text_and_stream(session):
    full = session.generate("hello", max_new_tokens=40)[0]
    stop = full.text[4:7]
    cut = session.generate("hello", max_new_tokens=40, stop=["never there", stop])[0]
    assert cut.text == full.text[: full.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == full.tokens[: len(cut.tokens)]
    streamed = session.stream("hello", max_new_tokens=40, stop=stop)
    assert "".join(p.text for p in streamed) == cut.text
    almost = session.generate("hello", max_new_tokens=40, stop=full.text[-1] + "?")[0]
    assert almost.text == full.text


def test_calls_may_interleave_with_a_paused_stream(session, fake):
    prompt = prompts_of([20])[0]
    stream = session.stream(prompt, max_new_tokens=10)
    got = [next(stream).token, next(stream).token]
    other = session.generate([9, 9], max_new_tokens=25)[0].tokens
    got += [piece.token for piece in stream]
    assert got == fake.greedy(prompt, 10)
    assert other == fake.greedy([9, 9], 25)


def test_an_abandoned_stream_is_forgotten(model_dir):
    library = ctypes.CDLL(str((model_dir / "kernels/cpu-fake/step.so").resolve()))
    with Session(model_dir, threads=1, cache_tokens=300) as session:
        for _ in range(5):
            next(session.stream([1, 2, 3], max_new_tokens=290))  # all of the cache
        before = library.fake_calls()
        assert len(session.generate([1], max_new_tokens=1)) == 1
        assert library.fake_calls() == before + 1


@pytest.mark.parametrize("prompts", ["", ["a", ""], [[1], []]])
def test_an_empty_prompt_is_refused_even_if_there_is_a_begin_token(session, prompts):
    assert session.begin_tokens
    with pytest.raises(errors.EmptyPrompt):
        session.generate(prompts)


def test_without_tokenizer_ids_work_and_text_says_so(fake, tmp_path):
    with Session(fake.write(tmp_path / "m", tokenizer=False), threads=1) as session:
        generation = session.generate([[5, 6]], max_new_tokens=4)[0]
        assert (generation.text, len(generation.tokens)) == ("", 4)
        with pytest.raises(errors.BadRequest, match="no tokenizer"):
            session.generate("text")


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"prompts": [[1] * 290], "max_new_tokens": 11}, errors.PromptTooLong),
        ({"prompts": [[1, 259]]}, errors.BadToken),
        ({"prompts": [[-1]]}, errors.BadToken),
        ({"prompts": [[1.5]]}, errors.BadRequest),
        ({"prompts": [None]}, errors.BadRequest),
        ({"prompts": None}, errors.BadRequest),
        ({"prompts": 3}, errors.BadRequest),
        ({"prompts": "a", "temperature": "hot"}, errors.BadRequest),
        ({"prompts": "a", "top_k": 2.5}, errors.BadRequest),
        ({"prompts": "a", "seed": None}, errors.BadRequest),
        ({"prompts": "a", "temperature": -1.0}, errors.BadRequest),
        ({"prompts": "a", "temperature": float("nan")}, errors.BadRequest),
        ({"prompts": "a", "top_p": 0.0}, errors.BadRequest),
        ({"prompts": "a", "top_p": 1.1}, errors.BadRequest),
        ({"prompts": "a", "top_k": -1}, errors.BadRequest),
        ({"prompts": "a", "seed": -1}, errors.BadRequest),
        ({"prompts": "a", "max_new_tokens": 0}, errors.BadRequest),
        ({"prompts": "a", "stop": [""]}, errors.BadRequest),
    ],
)
def test_nonsense_is_refused_before_anything_runs(session, request_, error):
    with pytest.raises(error) as caught:
        session.generate(**request_)
    assert caught.value.advice


def test_the_longest_allowed_prompt_and_logits(session, fake):
    assert session.generate([[1] * 290], max_new_tokens=10)[0].tokens == fake.greedy([1] * 290, 10)
    with pytest.raises(errors.PromptTooLong):
        session.logits([1] * 301)
    with pytest.raises(errors.EmptyPrompt):
        session.logits([])


def operand(name, shape, columns=1, dtype="float32"):
    return {"operand": name, "columns": columns, "shape": shape, "dtype": dtype}


X = operand("x", [1, -1, 1])


@pytest.mark.parametrize(
    ("op", "args", "options"),
    [
        ("aten.mul.Tensor", [X, 3.0], {}),
        ("aten.add.Tensor", [X, operand("x", [-1, 1], dtype="float64")], {"kwargs": {"alpha": 2}}),
    ],
)
def test_extern_steps_run_in_torch(fake, tmp_path, extern_step, op, args, options):
    path = fake.write(tmp_path / "m", extern=extern_step(op, args, **options))
    with Session(path, threads=1) as session:
        prompts = prompts_of([1, 40, 70])
        got = [g.tokens for g in session.generate(prompts, max_new_tokens=9)]
        np.testing.assert_array_equal(session.logits(prompts[1]), fake.logits(prompts[1]))
    assert got == [fake.greedy(prompt, 9) for prompt in prompts]


IDS = operand("ids", [1, -1], dtype="int64")
BIAS = operand("w", [259], columns=259)
BIASES = [3 * 37 % 101 / 64, 5 * 37 % 101 / 64]
BOOL = {"kwargs": {"dtype": {"dtype": "bool"}}}


@pytest.mark.parametrize(
    ("op", "args", "options", "column"),
    [
        ("aten.cumsum.default", [IDS, 1], {}, [3, 8]),
        ("aten.index_select.default", [BIAS, 0, operand("ids", [-1], dtype="int32")], {}, BIASES),
        ("aten.full.default", [[{"size": "tokens", "times": 1}, 1], 6.0], {}, [6, 6]),
        ("aten.ones.default", [[{"size": "tokens", "times": 1}]], BOOL, [1, 1]),
        ("aten.max.dim", [operand("h", [-1, 2], columns=2), 1], {"item": 1}, [1, 1]),
    ],
)
def test_extern_arguments_of_every_kind(fake, tmp_path, extern_step, op, args, options, column):
    path = fake.write(tmp_path / "m", extern=extern_step(op, args, **options))
    with Session(path, threads=1) as session:
        session.logits([3, 5])
        assert session._executor._arena.tensor("g", 2).array[:, 0].tolist() == column


def test_a_result_that_does_not_fit_its_place_is_not_written(fake, tmp_path, extern_step):
    path = fake.write(tmp_path / "m", extern=extern_step("aten.cat.default", [[IDS, IDS], 0]))
    with Session(path, threads=1) as session, pytest.raises(RuntimeError):
        session.logits([3, 5])


def test_an_operator_that_torch_lacks_is_named(fake, tmp_path, extern_step):
    path = fake.write(tmp_path / "m", extern=extern_step("aten.not_there.default", []))
    with pytest.raises(errors.Unsupported, match=r"no operator aten\.not_there(?s:.*)layer 2"):
        Session(path, threads=1)


def test_a_failing_kernel_is_reported_with_its_steps(fake, tmp_path):
    path = fake.write(tmp_path / "m")
    with Session(path, threads=1) as session:
        session._executor._tables[0][0] += 4  # a misaligned weight, which the fake kernels refuse
        with pytest.raises(errors.KernelFailed, match="code 3 between steps 0 and 4"):
            session.generate([1])


def test_close_stops_the_pool_and_refuses_further_work(fake, tmp_path):
    path = fake.write(tmp_path / "m")
    library = ctypes.CDLL(str((path / "kernels/cpu-fake/step.so").resolve()))
    with Session(Artifact.open(path)) as session:
        assert library.fake_pools() == 1
        stream = session.stream([1])
        next(stream)
    session.close()
    assert library.fake_pools() == 0
    for call in (lambda: session.generate([1]), lambda: session.logits([1]), lambda: next(stream)):
        with pytest.raises(errors.BadRequest, match="closed"):
            call()


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": -2}, {"threads": 1 << 20}, {"cache_tokens": 0}]
)
def test_session_options_are_checked(model_dir, options):
    with pytest.raises(errors.BadRequest):
        Session(model_dir, **options)


def test_an_impossible_cache_is_refused(model_dir):
    with pytest.raises(errors.BadRequest, match="the cache"):
        Session(model_dir, threads=1, cache_tokens=1 << 60)


def test_the_runtime_needs_nothing_of_the_compiler(model_dir):
    code = (
        "import sys, json, tokenmill.runtime as runtime\n"
        "banned = {'torch', 'transformers', 'triton', 'networkx', 'onnx', 'tokenizers'}\n"
        "loaded = sorted(banned & set(sys.modules))\n"
        f"session = runtime.Session({str(model_dir)!r}, threads=1)\n"
        "session.generate('hi', max_new_tokens=2)\n"
        "ours = [m for m in sys.modules if m.startswith('tokenmill.')]\n"
        "print(json.dumps([loaded, sorted(banned & set(sys.modules)), ours]))\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    at_import, in_use, ours = json.loads(result.stdout)
    assert at_import == []
    assert in_use == ["tokenizers"]
    assert {name.split(".")[1] for name in ours} == {"errors", "runtime"}


def test_an_artifact_that_is_compiled_anew_runs_its_own_kernels(fake, tmp_path):
    """The system's loader knows libraries by their path, and would yield the first one again."""
    path = fake.write(tmp_path / "model")
    with Session(path, threads=1) as old:
        before = old.logits([1, 2])
        other = tmp_path / "other.so"
        source = path / "kernels/cpu-fake/step.cpp"
        changed = tmp_path / "step.cpp"
        changed.write_text(source.read_text().replace("* 17 +", "* 19 +"))
        command = ["g++", "-shared", "-fPIC", "-o", str(other), str(changed)]
        subprocess.run(command, check=True)
        type(fake)(other).write(path, force=True)
        with Session(path, threads=1) as new:
            assert not np.array_equal(new.logits([1, 2]), before)
        assert np.array_equal(old.logits([1, 2]), before)
