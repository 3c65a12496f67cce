"""Carrying out cases on a card: the child process of gpu.py.

Every result is a line of a journal, written when it is there, and a line says which case begins; so whatever
a kernel does to the process or the card costs its own case only.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import _gpu_checks as checks
import _gpu_peers as peers
import numpy as np
import torch
from _gpu_cases import (
    CONTEXTS,
    DECODED,
    LATENT,
    MIXTURES,
    NOPE,
    OURS,
    PAGE,
    PROMPT,
    ROPE,
    SEQUENCES,
    TOGETHER,
    VALUE,
    Case,
    latent_spec,
    lite_config,
    model_batches,
    weight_parts,
)
from _gpu_rig import COPIES_MOST, Memory, Rig, copies, counts, inputs_of, seconds
from tokenmill.codegen import reference
from tokenmill.errors import KernelFailed
from tokenmill.ir import cache, quant
from tokenmill.ir.plan import Experts, LatentAttend, Linear, load
from tokenmill.runtime import Artifact, Session
from tokenmill.runtime.batch import Batch
from tokenmill.runtime.device import Choices, Device, Work
from tokenmill.runtime.gpu import GpuExecutor
from tokenmill.runtime.tensors import DTYPES, Tensor, TensorSpec
from torch import Tensor as TorchTensor

Result = dict[str, Any]
SAMPLED = 4  # tokens or sequences whose results are compared with the reference
SKEW = 0.5  # of the logits' spread, by expert: some are chosen more often
ROUTINGS = 8
MODEL_ERROR, MODEL_AGREEMENT = 0.05, 0.95  # of the logits' spread, rms; of the greedy choices


class Bench:
    """Performs cases on ``device``, from what was built in ``folder``."""

    def __init__(self, folder: Path, device: Device) -> None:
        self.folder, self.device = folder, device
        self.data = Memory(device)
        self._rigs: dict[str, Rig] = {}
        self._kept: tuple[object, Any] = (None, None)

    def perform(self, case: Case) -> Result:
        """The figures of a case; raises whatever goes wrong."""
        works: dict[str, Callable[[Case], Result]] = {
            "card": lambda _: facts(self.device),
            "check": self._check,
            "model": self._model,
            "gemm": self._gemm if case.ours else self._gemm_peer,
            "experts": self._experts if case.ours else self._experts_peer,
            "mla": self._mla if case.ours else self._mla_peer,
            "prompt": self._mla if case.ours else self._prompt_peer,
            "end to end": self._end if case.ours else self._end_peer,
        }
        return works[case.kind](case)

    def _keep(self, key: object, make: Callable[[], Any]) -> Any:
        """What cases in a row share; what went before is let go of first."""
        if self._kept[0] != key:
            self._kept = (None, None)
            self.data.clear()
            gc.collect()
            self.device.free_bytes()
            self._kept = (key, make())
        return self._kept[1]

    def _rig(self, suite: str) -> Rig:
        if suite not in self._rigs:
            with self.device.stream():
                self._rigs[suite] = Rig(self.folder / suite, self.device)
        return self._rigs[suite]

    # --- correctness

    def _check(self, case: Case) -> Result:
        rig = self._rig(case.suite)
        kernels = self._keep(case.suite, lambda: checks.load(rig.folder, rig))
        return checks.check(kernels, case.step, rig.about["batches"])

    def _model(self, case: Case) -> Result:
        path = self.folder / f"model-{case.contender.removeprefix(OURS)}"
        with np.load(path.with_suffix(".npz")) as file:
            expected = dict(file)
        ids = expected["ids"]
        with GpuExecutor(Artifact.open(path), self.device) as executor:
            steps = model_batches(ids)
            for _ in range(2):  # the second time from recorded graphs
                got = np.concatenate([executor.run(batch).copy() for batch in steps])
        found = _likeness(got, expected["meant"])
        with Session(path, device="cuda") as session:
            greedy = expected["greedy"].tolist()
            prompt = ids[: len(ids) - len(greedy)].tolist()
            tokens = session.generate([prompt], max_new_tokens=len(greedy))[0].tokens
        same = next(
            (i for i, (a, b) in enumerate(zip(tokens, greedy, strict=False)) if a != b), len(greedy)
        )
        exact = _likeness(got, expected["fp32"])
        return {
            **found,
            "passed": found["error"] < MODEL_ERROR and found["agreement"] >= MODEL_AGREEMENT,
            "fp32_error": exact["error"],
            "fp32_agreement": exact["agreement"],
            "greedy_same": same,
            "greedy": len(greedy),
        }

    # --- products

    def _gemm(self, case: Case) -> Result:
        rig = self._rig(case.suite)
        spec = rig.plan.steps[case.step].spec
        assert isinstance(spec, Linear)
        size = quant.parse(spec.format).bytes(spec.n, spec.k)
        with self.device.stream():
            weights = self._keep(
                (case.suite, case.step),
                lambda: [self.data.weights(spec) for _ in range(copies(size))],
            )
            memory = Memory(self.device)
            x = memory.normal((case.size, spec.k), torch.bfloat16)
            out = memory.normal((case.size, spec.n), torch.bfloat16)
            given = {"x": x, "out": out, **counts(memory, case.size)}
            works = [self._group(rig, case, {**given, **w}) for w in weights]
            found = self._measured(works, 2 * case.size * spec.n * spec.k, size + _bytes(x, out))
            at = _sample(case.size)
            works[0]()
            self.device.wait()
            e4m3 = checks.rounds(rig, spec, case.size)
            operands = {**weights[0], "x": x[at]}
            want = reference.run(spec, operands, _nowhere(), "cuda", e4m3)["out"]
            return found | _judged(out[at], want)

    def _gemm_peer(self, case: Case) -> Result:
        n, k = map(int, case.what.split("x"))
        size = n * k * (2 if case.contender.endswith("bf16") else 1)
        with self.device.stream():
            weights = self._keep(
                (case.contender, case.what),
                lambda: [self.data.normal((n, k), torch.bfloat16) for _ in range(copies(size))],
            )
            x = self.data.normal((case.size, k), torch.bfloat16)
            works = [peers.gemm(case.contender, x, w) for w in weights]
            moved = size + x.nbytes * size // (2 * n * k) + 2 * case.size * n
            return self._measured(works, 2 * case.size * n * k, moved, peers.record)

    # --- experts

    def _experts(self, case: Case) -> Result:
        rig = self._rig(case.suite)
        spec = rig.plan.steps[case.step].spec
        assert isinstance(spec, Experts)
        router = next(i for i in range(case.step, -1, -1) if rig.plan.steps[i].spec.kind == "route")
        with self.device.stream():
            weights = self._keep((case.suite, case.step), lambda: self.data.weights(spec))
            memory = Memory(self.device)
            x = memory.normal((case.size, spec.hidden), torch.bfloat16)
            out = memory.normal((case.size, spec.hidden), torch.bfloat16)
            choices = [_routing(memory, case.size, spec.experts) for _ in range(ROUTINGS)]
            chosen = {
                "x": x, "out": out, **weights, **counts(memory, case.size),
                "ids": memory.array((case.size, spec.top_k), torch.int32),
                "weights": memory.array((case.size, spec.top_k), torch.float32),
            }  # fmt: skip
            bucket = rig.bucket(case.size)
            works = []
            for logits in choices:
                given = {**chosen, "logits": logits}
                works.append(
                    _all([*rig.works(router, bucket, given), *rig.works(case.step, bucket, given)])
                )
            each = sum(quant.parse(f).bytes(n, k) for f, n, k in _matrices(spec))
            touched = [len(logits.topk(spec.top_k, -1).indices.unique()) for logits in choices]
            read = each * sum(touched) / len(touched)
            pairs = case.size * spec.top_k
            found = self._measured(
                works, 2 * pairs * 3 * spec.hidden * spec.inter, read + _bytes(x, out)
            )
            works[0]()
            self.device.wait()
            e4m3 = checks.rounds(rig, spec, case.size)
            want = _experts_of(spec, x, chosen["ids"], chosen["weights"], weights, e4m3)
            got = torch.stack([out[i] for i in _sample(case.size).tolist()])
            chosen_ids = choices[0].topk(spec.top_k, -1).indices
            right = torch.equal(chosen_ids.sort(-1).values, chosen["ids"].long().sort(-1).values)
            judged = _judged(got, want)
            return found | judged | {"passed": judged["passed"] and right, "experts": touched[0]}

    def _experts_peer(self, case: Case) -> Result:
        experts, top_k, hidden, inter = MIXTURES[case.what]
        with self.device.stream():
            gate_up, down = self._keep(
                ("grouped", case.what),
                lambda: (
                    self.data.normal((experts, 2 * inter, hidden), torch.bfloat16, hidden**-0.5),
                    self.data.normal((experts, hidden, inter), torch.bfloat16, inter**-0.5),
                ),
            )
            memory = Memory(self.device)
            x = memory.normal((case.size, hidden), torch.bfloat16)
            choices = [_routing(memory, case.size, experts) for _ in range(ROUTINGS)]
            call = (
                peers.compiled_grouped() if case.contender.startswith("compiled") else peers.grouped
            )
            works = [functools.partial(call, x, logits, gate_up, down, top_k) for logits in choices]
            touched = [len(logits.topk(top_k, -1).indices.unique()) for logits in choices]
            read = 2 * 3 * hidden * inter * sum(touched) / len(touched)
            flops = 2 * case.size * top_k * 3 * hidden * inter
            return self._measured(works, flops, read + 2 * x.nbytes, peers.record)

    # --- latent attention

    def _mla(self, case: Case) -> Result:
        rig = self._rig(case.suite)
        step = rig.plan.steps[case.step]
        spec = step.spec
        assert isinstance(spec, LatentAttend)
        # A token of each of many sequences, or the newest ones of one.
        sequences, new, keys = case.size, 1, case.context
        pages = max(SEQUENCES) * max(CONTEXTS) // PAGE
        if case.kind == "prompt":
            sequences, new, keys = 1, case.size, case.context + case.size
            pages = COPIES_MOST * -(-rig.plan.positions // PAGE)
        each = -(-keys // PAGE)
        with self.device.stream():
            rows = self._keep(
                (case.suite, spec.cache_format), lambda: self.data.cache(spec.cache, pages)
            )
            memory = Memory(self.device)
            weights = memory.weights(spec)
            q = memory.normal((case.size, spec.heads * (NOPE + ROPE)), torch.bfloat16)
            out = memory.normal((case.size, spec.heads * VALUE), torch.bfloat16)
            positions = torch.arange(keys - new, keys, dtype=torch.int32).repeat(sequences)
            given = {
                "q": q, "out": out, "cache": rows, **weights,
                **counts(memory, case.size, case.size, sequences),
                "positions": memory.put(positions),
                "starts": memory.put(new * torch.arange(sequences + 1, dtype=torch.int32)),
            }  # fmt: skip
            read = sequences * keys * spec.cache.row_bytes
            tables = [
                _table(pages, sequences, each, rig.table_pitch, seed)
                for seed in range(copies(read))
            ]
            works = [
                self._group(rig, case, {**given, "block_table": memory.put(t)}) for t in tables
            ]
            flops = _mla_flops(spec.heads, case.size, case.context)
            if case.kind == "prompt":
                flops = _prompt_flops(spec.heads, new, case.context, expanding=True)
            found = self._measured(works, flops, read + _bytes(q, out, *weights.values()))
            found["latent_gb_per_s"] = read / found["seconds"] / 1e9
            works[0]()
            self.device.wait()
            # Each as if it were a sequence of one token.
            at = _sample(case.size, 2)
            table = tables[0][at // new, :each]
            small = rows[table.flatten().long().to(rows.device)].cpu()
            batch = cache.Batch(
                positions[at],
                torch.arange(len(at) + 1, dtype=torch.int32),
                torch.arange(table.numel(), dtype=torch.int32).view_as(table),
            )
            operands = {name: w.cpu() for name, w in weights.items()}
            operands |= {"q": q[at].cpu(), "cache": small}
            want = reference.run(spec, operands, batch, "cuda")["out"]
            return found | _judged(out[at], want)

    def _prompt_peer(self, case: Case) -> Result:
        heads = int(case.what.split()[0])
        each = 2 * heads * case.size * 2 * (NOPE + ROPE + VALUE)  # of queries and results too
        self._keep(case.name, lambda: None)
        with self.device.stream():
            works = [peers.expanded(1, heads, case.size, case.size) for _ in range(copies(each))]
            flops = _prompt_flops(heads, case.size, 0, expanding=False)
            return self._measured(works, flops, each, peers.record)

    def _mla_peer(self, case: Case) -> Result:
        heads = int(case.what.split()[0])
        spec = latent_spec(heads, "bf16")
        expanded = case.contender.startswith("expanded")
        row = 2 * heads * (NOPE + ROPE + VALUE) if expanded else spec.cache.row_bytes
        read = case.size * case.context * row
        self._keep(case.name, lambda: None)
        if 3 * read > self.device.free_bytes():
            raise MemoryError(f"keys and values of {read / 1e9:.0f} GB")
        with self.device.stream():
            if expanded:
                works = [
                    peers.expanded(case.size, heads, case.context) for _ in range(copies(read))
                ]
                flops = 2 * case.size * heads * case.context * (NOPE + ROPE + VALUE)
                return self._measured(works, flops, read, peers.record)
            q = self.data.normal((case.size, heads, NOPE + ROPE), torch.bfloat16)
            up = self.data.normal((heads, NOPE, LATENT), torch.bfloat16, NOPE**-0.5)
            down = self.data.normal((heads, VALUE, LATENT), torch.bfloat16, LATENT**-0.5)
            works = [
                functools.partial(peers.absorbed, q, latents, up, down, spec.scale)
                for latents in (
                    self.data.normal((case.size, case.context, LATENT + ROPE), torch.bfloat16)
                    for _ in range(copies(read))
                )
            ]
            flops = _mla_flops(heads, case.size, case.context)
            found = self._measured(works, flops, read + _bytes(q, up, down), peers.record)
            return found | {"latent_gb_per_s": read / found["seconds"] / 1e9}

    # --- a whole model

    def _end(self, case: Case) -> Result:
        """Prompt and decoding from random weights, which are made where the kernels read them."""
        self._keep(case.name, lambda: None)
        artifact = _Weightless.open(self.folder / case.suite)
        per_sequence = -(-(PROMPT + 4 * DECODED) // PAGE)
        with GpuExecutor(artifact, self.device, TOGETHER * per_sequence * PAGE) as executor:
            plan = load(artifact.gpu_plan)
            with self.device.stream():
                self._randomize(executor, plan)
            return _generation(executor, plan, per_sequence)

    def _randomize(self, executor: GpuExecutor, plan: Any) -> None:
        """Each weight by the kernel that reads it; norms stand at 1."""
        region, seen = executor._memory["weights"], set()
        for step in (link for each in plan.steps for link in each.links):
            shapes = weight_parts(step.spec)
            fresh = {p: step.bind[p].buffer for p in shapes if step.bind[p].buffer not in seen}
            seen |= set(fresh.values())
            if not fresh:
                continue
            views = {
                p: region[name].view(shapes[p][1]).view(shapes[p][0]) for p, name in fresh.items()
            }
            if step.spec.kind == "norm":
                views["weight"].fill_(1.0)
                continue
            inputs = {p: inputs_of(step.spec, p) for p in views}
            self.data.draw_weights(views, {p: shapes[p] for p in views}, inputs)

    def _end_peer(self, case: Case) -> Result:
        self._keep(case.name, lambda: None)
        layers = json.loads((self.folder / "build.json").read_text())["layers"]
        model = peers.transformers_model(lite_config(layers))
        found = peers.generation(model, "compiled" in case.contender)
        how = getattr(model.config, "_experts_implementation", "")
        return _rates(found) | {"layers": layers, "experts": how}

    # --- times

    def _group(self, rig: Rig, case: Case, given: dict[str, TorchTensor]) -> Work:
        bucket = rig.bucket(case.size, 0, case.size if case.kind == "mla" else 1)
        return _all(rig.works(case.step, bucket, given))

    def _measured(
        self,
        works: Sequence[Work],
        flops: float,
        moved: float,
        record: Callable[[Work], Work] | None = None,
    ) -> Result:
        took = seconds(self.device, works, record)
        return {
            "seconds": took,
            "tflops": flops / took / 1e12,
            "gb_per_s": moved / took / 1e9,
            "flops": flops,
            "bytes": moved,
        }


# --- operands ---------------------------------------------------------------------------------------


def _all(works: Sequence[Work]) -> Work:
    def run() -> None:
        for work in works:
            work()

    return run


def _bytes(*tensors: TorchTensor) -> int:
    return sum(t.nbytes for t in tensors)


def _sample(size: int, most: int = SAMPLED) -> TorchTensor:
    """Some of ``size``, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, most)).round().long()


def _nowhere() -> cache.Batch:
    return cache.single_sequence(1)


def _routing(memory: Memory, tokens: int, experts: int) -> TorchTensor:
    """Logits of random tokens, with some experts more popular than others."""
    logits = memory.normal((tokens, experts))
    logits += SKEW * memory.normal((experts,))
    return logits


def _matrices(spec: Experts) -> list[tuple[str, int, int]]:
    """Format, rows and inputs of what a visited expert reads."""
    up = (spec.gate_up_format, 2 * spec.inter, spec.hidden)
    return [up, (spec.down_format, spec.hidden, spec.inter)]


def _experts_of(
    spec: Experts,
    x: TorchTensor,
    ids: TorchTensor,
    weights: TorchTensor,
    matrices: dict[str, TorchTensor],
    e4m3: bool,
) -> TorchTensor:
    """What some of the tokens get, from a mixture of just the experts that each visits."""
    small, found = replace(spec, experts=spec.top_k), []
    for token in _sample(len(x)).tolist():
        visited = ids[token].long()
        operands = {name: part[visited] for name, part in matrices.items()}
        operands |= {
            "x": x[token : token + 1],
            "ids": torch.arange(spec.top_k, device=x.device, dtype=torch.int32)[None],
            "weights": weights[token : token + 1],
        }
        found.append(reference.run(small, operands, _nowhere(), "cuda", e4m3)["out"][0])
    return torch.stack(found)


def _table(pages: int, sequences: int, each: int, pitch: int, seed: int) -> TorchTensor:
    """A page of its own for all that each sequence needs, in no order."""
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    table = torch.zeros(sequences, pitch, dtype=torch.int32)
    table[:, :each] = order[: sequences * each].view(sequences, each)
    return table


def _mla_flops(heads: int, batch: int, context: int) -> float:
    attend = context * (2 * LATENT + ROPE)
    return 2 * batch * heads * (attend + LATENT * (NOPE + VALUE))


def _prompt_flops(heads: int, new: int, before: int, expanding: bool) -> float:
    """Of keys and values of every head, and of making those of the ``new`` tokens."""
    pairs = new * before + new * (new + 1) // 2
    expansion = new * LATENT * (NOPE + VALUE) if expanding else 0
    return 2 * heads * (pairs * (NOPE + ROPE + VALUE) + expansion)


def _judged(got: TorchTensor, want: TorchTensor) -> Result:
    error = reference.row_error(got, want)
    return {"error": error, "bound": checks.NARROW, "passed": error <= checks.NARROW}


def _likeness(got: np.ndarray, want: np.ndarray) -> Result:
    error = np.sqrt(np.mean((got - want) ** 2)) / np.std(want)
    return {"error": float(error), "agreement": float(np.mean(got.argmax(-1) == want.argmax(-1)))}


# --- generation by our executor ---------------------------------------------------------------------


class _Weightless(Artifact):
    """An artifact whose weights are zeros, all the same ones."""

    @staticmethod
    def open(path: Any, verify: bool = True) -> _Weightless:
        plain = Artifact.open(path, verify)
        return _Weightless(plain.path, plain.manifest)

    def weights(self) -> dict[str, Tensor]:
        buffers = [b for b in self.gpu_plan["buffers"] if b["kind"] == "weight"]
        sizes = [TensorSpec(b["name"], b["dtype"], tuple(b["shape"])) for b in buffers]
        zeros = np.zeros(max(spec.nbytes for spec in sizes), np.uint8)
        return {
            name: Tensor(dtype, zeros[: spec.nbytes].view(DTYPES[dtype][1]).reshape(shape))
            for spec in sizes
            for name, dtype, shape in [spec]
        }


def _generation(executor: GpuExecutor, plan: Any, per_sequence: int) -> Result:
    rng, vocab = np.random.default_rng(0), executor.layout.vocab
    pages = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(TOGETHER)]

    def prompt(sequence: int) -> Batch:
        ids = rng.integers(vocab, size=PROMPT).tolist()
        return Batch.of([(ids, 0, pages[sequence])], [PROMPT - 1])

    def choose(batch: Batch) -> np.ndarray:
        n = batch.rows.size
        zeros = np.zeros(n, np.float32)
        return executor.choose(batch, Choices(zeros, np.zeros(n, np.int32), zeros + 1, zeros))

    def decode(count: int, at: int, tokens: np.ndarray) -> tuple[Batch, np.ndarray]:
        chunks = [([int(tokens[i])], at, pages[i]) for i in range(count)]
        batch = Batch.of(chunks, list(range(count)))
        return batch, choose(batch).copy()

    for i in range(TOGETHER):
        choose(prompt(i))
    start = time.perf_counter()
    for i in range(4):
        choose(prompt(i))
    found = {"prefill_s": (time.perf_counter() - start) / 4}
    steps = {"prefill": prompt(0)}
    for name, count in (("decode", 1), ("batched", TOGETHER)):
        tokens = rng.integers(vocab, size=count)
        for at in range(PROMPT, PROMPT + 4):
            _, tokens = decode(count, at, tokens)
        start = time.perf_counter()
        for at in range(PROMPT + 4, PROMPT + 4 + DECODED):
            steps[name], tokens = decode(count, at, tokens)
        found[f"{name}_s"] = (time.perf_counter() - start) / DECODED
    parts = {}
    for name, batch in steps.items():
        by_kind: dict[str, float] = defaultdict(float)
        times = np.median([executor.time_steps(batch) for _ in range(3)], 0)
        for step, took in zip(plan.steps, times, strict=True):
            by_kind[step.spec.kind] += float(took)
        parts[name] = dict(sorted(by_kind.items(), key=lambda item: -item[1]))
    layers = sum(step.spec.kind in ("attend", "latent_attend") for step in plan.steps)
    return _rates(found) | {"step_seconds": parts, "layers": layers}


def _rates(found: dict[str, float]) -> Result:
    rates = {"prefill": PROMPT, "decode": 1, "batched": TOGETHER}
    return found | {
        f"{name}_tokens_per_s": tokens / found[f"{name}_s"]
        for name, tokens in rates.items()
        if f"{name}_s" in found
    }


# --- the child process ------------------------------------------------------------------------------


def facts(device: Device) -> Result:
    """Bandwidth of a copy and peaks of products, measured here and now."""
    with device.stream():
        half = 1 << 30
        source, target = torch.empty(2, half, dtype=torch.uint8, device=peers.DEVICE).unbind()
        copying = seconds(device, [lambda: target.copy_(source)], peers.record)
        found = {"copy_gb_per_s": 2 * half / copying / 1e9}
        for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            took = seconds(device, [peers.peak_flops(dtype)], peers.record)
            found[f"{name}_tflops"] = 2 * 8192**3 / took / 1e12
    return found


def perform(
    bench: Bench, cases: Sequence[Case], journal: Path, deadline: float = float("inf")
) -> bool:
    """Carry out ``cases`` until the time is over; False if the device is lost to this process."""
    with journal.open("a") as file:

        def note(**line: Any) -> None:
            print(json.dumps(line), file=file, flush=True)

        for case in cases:
            if time.time() + case.seconds > deadline:
                continue
            note(begin=case.name)
            start = time.time()
            try:
                note(case=case.name, **bench.perform(case), took=time.time() - start)
            except Exception as error:
                last = (str(error).strip() or type(error).__name__).splitlines()[0]
                note(case=case.name, failed=f"{type(error).__name__}: {last}"[:300])
                lost = isinstance(error, (*bench.device.failures, KernelFailed))
                if lost and not _alive(bench.device):
                    return False
            print(f"  {case.name} {time.time() - start:.1f} s", file=sys.stderr, flush=True)
    return True


def _alive(device: Device) -> bool:
    try:
        with device.stream():
            cast("TorchTensor", device.alloc(256)).zero_()
            device.wait()
    except Exception:
        return False
    return True
