"""How fast an artifact runs on this machine, and how near that is to what its memory allows.

The protocol: everything goes through a :class:`Session`, token ids in and token ids out.  Prompts
are random ids from a fixed seed.  Each step pays for the greedy choice of its token, and then takes
the next id of a random sequence instead: a model left to itself soon repeats a few tokens, whose
experts stay in the processor's cache.  Contenders (the artifact alone, its batch, the original) and
the read bandwidth take turns, round by round, after one round that warms up and does not count;
medians are reported, with the lowest and highest round.

The bound of decoding is what a step has to read (:func:`step_bytes`), so its speed is also given in
GB/s, and as a fraction of the bandwidth that :class:`ReadBandwidth` finds with as many threads.  A
model that fits the processor's cache may exceed 1.

Load time and peak memory are those of a fresh process.  Its peak (VmHWM) counts mapped weights from
the moment that they are touched, so next to it stands ``packed``: stored weights and used cache.
"""

from __future__ import annotations

import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BadRequest, MissingExtra, PromptTooLong
from .runtime import Artifact, Session
from .runtime.cache import PAGE, pages_for
from .runtime.cpu import available_cores, choose_target, cpu_features
from .runtime.layout import Layout
from .runtime.requests import Completion
from .runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from .api import Progress

SEED = 0
SHORT_PROMPT = 8  # tokens, of the first request to a session just opened
WARM_UP_TOKENS = 4
# Instruction sets that decide which kernels run, as /proc/cpuinfo spells them.
FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def bench(
    directory: str | Path,
    against: str | Path | None = None,
    prompt: int = 512,
    tokens: int = 128,
    batch: int | None = None,
    threads: int | None = None,
    repeat: int = 5,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the artifact at ``directory``; the module's docstring states the protocol.

    ``decode`` is one sequence that generates ``tokens`` tokens after a prompt of ``prompt`` tokens;
    ``batched``, with ``batch``, that many such sequences at once, all tokens counted.  ``against``
    is a checkpoint that transformers runs eagerly in bf16, in the same rounds.  Gives::

        benchmark, date, threads
        hardware    processor, flags, cores
        artifact    path, target, weights and kv (formats)
        workload    prompt, tokens, rounds, seed
        prefill     tokens_per_s, spread [lowest, highest]
        decode      tokens_per_s, spread, bytes_per_step {weights, cache}, gb_per_s, fraction
        batched     sequences, and the keys of decode
        bandwidth   gb_per_s, spread
        memory      peak_bytes, packed_bytes, ratio; of one sequence
        load        seconds of a fresh process: open_s; first_token_s, opening included; process_s,
                    from the start of the process to the first token
        against     model, dtype; prefill, decode and batched with tokens_per_s and spread
        speedup     prefill, decode, batched: tokens/s over those of ``against``

    Raises what Session raises; PromptTooLong or BadRequest for a workload that does not fit the
    model; with ``against`` also MissingExtra and what opening a checkpoint raises.
    """
    if min(prompt, tokens, repeat) < 1:
        raise BadRequest(
            reason=f"a prompt of {prompt}, {tokens} tokens and {repeat} rounds are nothing to measure",
            advice="give whole numbers from 1 on",
        )
    artifact = Artifact.open(directory)
    choose_target(artifact.targets)  # it says what is wrong if none is for this CPU
    layout = Layout.parse(artifact.plan)
    threads = threads or available_cores()
    works = {"decode": Workload.draw(layout, 1, prompt, tokens)}
    if batch:
        works["batched"] = Workload.draw(layout, batch, prompt, tokens)
    rounds = _Rounds(repeat, progress)
    cache_tokens = max(work.cache_tokens for work in works.values())
    opened = Session(artifact, threads, cache_tokens, device="cpu")
    with opened as session, ReadBandwidth(threads) as bandwidth:
        contenders: dict[str, Contender] = {"ours": _Artifact(session)}
        if against is not None:
            contenders["eager"] = Eager(against, layout.vocab, threads, trust_remote_code)
        rounds.run(contenders, works, bandwidth)
    found = {
        "benchmark": "tokenmill bench",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "threads": threads,
        "artifact": _about(artifact, directory),
        "workload": {"prompt": prompt, "tokens": tokens, "rounds": repeat, "seed": SEED},
        **rounds.speeds("ours", works),
        "bandwidth": _spread("gb_per_s", rounds.bandwidth),
    }
    for name, work in works.items():
        context = rounds.runs["ours", name][0].context
        found[name] |= _traffic(found[name], artifact.plan, work, context, found["bandwidth"])
    del contenders  # the original may need the memory that is measured next
    found |= _fresh_process(artifact, layout, prompt, tokens, threads)
    if against is not None:
        theirs = rounds.speeds("eager", works)
        found["against"] = {"model": str(against), "dtype": "bf16"} | theirs
        found["speedup"] = {
            name: found[name]["tokens_per_s"] / theirs[name]["tokens_per_s"] for name in theirs
        }
    return found


# --- what is run ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """One round of a workload.

    ``prefill_s`` seconds until every sequence had its first token, ``decode_s`` those of ``tokens``
    more, in all sequences together; ``context`` is how many tokens a step attended to on average.
    """

    prefill_s: float
    decode_s: float
    tokens: int
    context: float


class Workload(NamedTuple):
    """Prompts ``[sequences, prompt]``, and for each the ids ``fed`` that stand for its choices.

    ``tokens`` decoding steps are timed, from when the last prompt is done; by then earlier
    sequences have decoded a little already, so there are more ids than that.
    """

    prompts: NDArray[np.int64]
    fed: NDArray[np.int64]
    tokens: int

    @staticmethod
    def draw(layout: Layout, sequences: int, prompt: int, tokens: int) -> Workload:
        """Random ids for a model; raises PromptTooLong or BadRequest if it cannot take them."""
        most = min(layout.rows, layout.tokens - 1)
        if not 0 < sequences <= most:
            reason = f"{sequences} sequences at once, where a step carries 1 to {most}"
            raise BadRequest(reason=reason, advice=f"pass a batch of at most {most}")
        ahead = -(-sequences * prompt // (layout.tokens - sequences)) if sequences > 1 else 0
        if prompt + tokens + ahead > layout.positions:
            raise PromptTooLong(tokens=prompt, new=tokens + ahead, limit=layout.positions)
        drawn = np.random.default_rng(SEED).integers(
            layout.vocab, size=(sequences, prompt + tokens + ahead + 1)
        )
        return Workload(drawn[:, :prompt], drawn[:, prompt:], tokens)

    @property
    def cache_tokens(self) -> int:
        """The room that it takes in the cache, in whole pages."""
        sequences, ids = len(self.prompts), self.prompts.shape[1] + self.fed.shape[1]
        return sequences * pages_for(ids) * PAGE


class Contender(Protocol):
    """Something that can run a workload."""

    def run(self, work: Workload) -> Run: ...


class _Artifact:
    """The artifact of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, work: Workload) -> Run:
        start = time.perf_counter()
        requests = [
            Completion(prompt.tolist(), len(fed), _Fed(fed.tolist()), ends=(), text=None)
            for prompt, fed in zip(work.prompts, work.fed, strict=True)
        ]
        with closing(self._session.drive(requests)) as steps:
            while not all(request.pieces for request in requests):
                next(steps)
            first = time.perf_counter()
            cached = statistics.fmean(request.computed for request in requests)
            for _ in range(work.tokens):
                next(steps)
            last = time.perf_counter()
        context = cached + (work.tokens + 1) / 2
        return Run(first - start, last - first, work.tokens * len(requests), context)


class _Fed(Sampler):
    """Chooses greedily, and hands on the next of ``ids`` instead."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(Sampling())
        self._ids = iter(ids)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        super().__call__(logits)
        return next(self._ids)


class Eager:
    """A checkpoint in bf16 as transformers runs it, with the library's own cache.

    Raises MissingExtra without torch or transformers, BadRequest if it has not ``vocab`` ids, and
    what opening a checkpoint raises.
    """

    def __init__(
        self, model: str | Path, vocab: int, threads: int, trust_remote_code: bool = False
    ) -> None:
        try:
            import torch

            from .capture.checkpoint import open_checkpoint
        except ImportError as error:
            package = error.name or "torch"
            purpose = "comparing with the original"
            raise MissingExtra(package=package, purpose=purpose, extra="hf") from error
        torch.set_num_threads(threads)
        self._torch = torch
        self.model = open_checkpoint(model, trust_remote_code).load("bfloat16")
        if (has := self.model.get_input_embeddings().num_embeddings) != vocab:
            raise BadRequest(
                reason=f"the original has {has} token ids and the artifact {vocab}",
                advice="compare with the model that the artifact was made of",
            )

    def run(self, work: Workload) -> Run:
        with self._torch.inference_mode():
            start = time.perf_counter()
            cache = self.step(work.prompts, None)
            first = time.perf_counter()
            for column in work.fed.T[: work.tokens]:
                cache = self.step(column[:, None], cache)
            last = time.perf_counter()
        context = work.prompts.shape[1] + (work.tokens + 1) / 2
        return Run(first - start, last - first, work.tokens * len(work.prompts), context)

    def step(self, ids: NDArray[np.int64], cache: Any) -> Any:
        """The cache after ``ids [sequences, tokens]``, whose next tokens were chosen greedily."""
        tensor = self._torch.from_numpy(np.ascontiguousarray(ids))
        out = self.model(tensor, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return out.past_key_values


# --- rounds ---------------------------------------------------------------------------------------


class _Rounds:
    """Lets contenders take turns; keeps their runs, and the bandwidth of each round in GB/s."""

    def __init__(self, count: int, progress: Progress | None) -> None:
        self.runs: dict[tuple[str, str], list[Run]] = {}
        self.bandwidth: list[float] = []
        self._count = count
        self._progress = progress

    def run(
        self,
        contenders: Mapping[str, Contender],
        works: Mapping[str, Workload],
        bandwidth: ReadBandwidth,
    ) -> None:
        for at in range(self._count + 1):
            if self._progress:
                self._progress("measure" if at else "warm up", at, self._count + 1)
            measured = bandwidth.measure()
            if at:
                self.bandwidth.append(measured)
            for name, work in works.items():
                for contender, it in contenders.items():
                    if at:
                        self.runs.setdefault((contender, name), []).append(it.run(work))
                    else:
                        it.run(work._replace(tokens=min(work.tokens, WARM_UP_TOKENS)))

    def speeds(self, contender: str, works: Mapping[str, Workload]) -> dict[str, Any]:
        """``prefill``, ``decode`` and ``batched`` of a contender in tokens/s."""
        prompt = works["decode"].prompts.size
        prefill = [prompt / run.prefill_s for run in self.runs[contender, "decode"]]
        found: dict[str, Any] = {"prefill": _spread("tokens_per_s", prefill)}
        for name, work in works.items():
            rates = [run.tokens / run.decode_s for run in self.runs[contender, name]]
            sequences = {"sequences": len(work.prompts)} if name == "batched" else {}
            found[name] = sequences | _spread("tokens_per_s", rates)
        return found


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.median(values), "spread": [min(values), max(values)]}


# --- bytes and bandwidth --------------------------------------------------------------------------


def step_bytes(plan: Mapping[str, Any], sequences: int, context: float) -> dict[str, int]:
    """Bytes of ``weights`` and ``cache`` that a decoding step has to read at least.

    ``plan`` is plan.json; each of the sequences attends to ``context`` tokens.  A weight is read
    once, of embeddings one row a token, of experts those that some token chose: with S sequences,
    top-k of E experts and even, independent choices E (1 - (1 - k/E)^S) of them on average.  A
    sliding window reads no more than itself.
    """
    layout = Layout.parse(plan)
    weights = {weight.name: weight for weight in layout.weights}
    shares = dict.fromkeys(weights, 0.0)
    windows: dict[str, int] = {}
    for step in plan["steps"]:
        spec = plan["specs"][step["spec"]]
        for buffer, _ in step["bind"].values():
            if buffer in weights:
                share = weight_share(spec, weights[buffer].shape, sequences)
                shares[buffer] = max(shares[buffer], share)
            elif spec.get("window"):
                windows[buffer] = spec["window"]
    cached = sum(c.row_bytes * min(context, windows.get(c.name, context)) for c in layout.caches)
    return {
        "weights": round(sum(share * weights[name].nbytes for name, share in shares.items())),
        "cache": round(sequences * cached),
    }


def weight_share(spec: Mapping[str, Any], shape: Sequence[int], sequences: int) -> float:
    """Which part of a weight, of a kernel and shape, a step of ``sequences`` tokens reads."""
    if spec["kind"] == "embed":
        return min(1.0, sequences / shape[0])
    if spec["kind"] == "experts":
        return 1 - (1 - spec["top_k"] / spec["experts"]) ** sequences
    return 1.0


class ReadBandwidth:
    """How fast this machine reads memory: ``threads`` threads, each with numpy's exclusive or of a part
    of an array that no cache holds.

    numpy runs that loop vectorized and without the interpreter lock, and one thread of it reads about
    as fast as a loop in C.  A context manager, which holds the array.
    """

    BYTES, BYTES_PER_THREAD, PASSES = 512 << 20, 64 << 20, 4

    def __init__(self, threads: int) -> None:
        size = max(self.BYTES, threads * self.BYTES_PER_THREAD)
        self._parts = np.array_split(np.ones(size // 8, np.uint64), threads)
        self._pool = ThreadPoolExecutor(threads)

    def measure(self) -> float:
        """GB/s, over a few passes."""
        start = time.perf_counter()
        for _ in range(self.PASSES):
            list(self._pool.map(np.bitwise_xor.reduce, self._parts))
        seconds = time.perf_counter() - start
        return self.PASSES * sum(part.nbytes for part in self._parts) / seconds / 1e9

    def __enter__(self) -> ReadBandwidth:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._parts.clear()


def _traffic(
    speed: Mapping[str, Any],
    plan: Mapping[str, Any],
    work: Workload,
    context: float,
    bandwidth: Mapping[str, Any],
) -> dict[str, Any]:
    """What a step reads, and how fast that is done."""
    sequences = len(work.prompts)
    read = step_bytes(plan, sequences, context)
    rate = sum(read.values()) * speed["tokens_per_s"] / sequences / 1e9
    return {
        "bytes_per_step": read,
        "gb_per_s": rate,
        "fraction": rate / bandwidth["gb_per_s"],
    }


# --- a fresh process ------------------------------------------------------------------------------


def _fresh_process(
    artifact: Artifact, layout: Layout, prompt: int, tokens: int, threads: int
) -> dict[str, Any]:
    """``load`` and ``memory``; the files are in the page cache by now."""
    code = "import sys; from tokenmill.bench import report_fresh; report_fresh(*sys.argv[1:])"
    arguments = [str(artifact.path), *map(str, (prompt, tokens, threads))]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = f"the process that measures memory ended with status {done.returncode}: {said}"
        raise BadRequest(reason=reason, advice="free some memory, or lower --prompt")
    fresh = json.loads(done.stdout)
    stored = sum(weight.nbytes for weight in layout.weights)
    packed = stored + layout.bytes_per_token * (prompt + tokens)
    return {
        "memory": {
            "peak_bytes": fresh["peak_bytes"],
            "packed_bytes": packed,
            "ratio": fresh["peak_bytes"] / packed,
        },
        "load": {
            "open_s": fresh["opened"] - fresh["called"],
            "first_token_s": fresh["first_token"] - fresh["called"],
            "process_s": fresh["first_token"] - started,
        },
    }


def report_fresh(directory: str, prompt: str, tokens: str, threads: str) -> None:
    """The fresh process: prints the times of what it does (time.time) and its peak memory as JSON."""
    times = {"called": time.time()}
    with Session(directory, int(threads), device="cpu") as session:
        times["opened"] = time.time()
        ids = np.random.default_rng(SEED).integers(session.vocab, size=SHORT_PROMPT)
        session.generate([ids.tolist()], max_new_tokens=1)
        times["first_token"] = time.time()
        layout = Layout.parse(session.artifact.plan)
        _Artifact(session).run(Workload.draw(layout, 1, int(prompt), int(tokens)))
    print(json.dumps(times | {"peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The most memory that this process held at once.

    getrusage would not do on Linux: it begins with the peak of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


# --- where ----------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """The processor's name and those of its instruction sets that matter here."""
    flags = cpu_features() or frozenset()
    return {
        "processor": processor(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": available_cores(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _about(artifact: Artifact, directory: str | Path) -> dict[str, Any]:
    recipe = artifact.manifest.recipe
    return {
        "path": str(directory),
        "target": choose_target(artifact.targets).name,
        "weights": recipe.get("weights"),
        "kv": recipe.get("kv"),
    }
