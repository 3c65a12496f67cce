"""Where the time of a step goes: every kernel of an artifact, run and timed by itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bench import SEED, weight_share
from .runtime import Artifact
from .runtime.batch import Batch
from .runtime.cache import pages_for
from .runtime.cpu import CpuExecutor, choose_target
from .runtime.layout import Layout


@dataclass(frozen=True)
class KernelTime:
    """One kernel over all steps that use it.

    ``seconds`` of all its calls in one step of the model, waking the threads for each included;
    ``weight_bytes`` that they read at least, and ``gb_per_s`` the two together.
    """

    kernel: str
    calls: int
    seconds: float
    weight_bytes: int
    gb_per_s: float


def profile(
    directory: str | Path, prompt: int = 512, threads: int | None = None, repeat: int = 20
) -> dict[str, list[dict[str, Any]]]:
    """The kernels of ``prefill``, ``prompt`` tokens at once, and of ``decode``, one token after them.

    Slowest first, medians of ``repeat`` runs with random ids; ``prompt`` is cut to what a step
    carries.  Raises what opening an artifact raises.
    """
    artifact = Artifact.open(directory)
    choose_target(artifact.targets)  # it says what is wrong if none is for this CPU
    layout = Layout.parse(artifact.plan)
    prompt = min(prompt, layout.tokens, layout.positions - 1)
    pages = list(range(pages_for(prompt + 1)))
    rng = np.random.default_rng(SEED)
    with CpuExecutor(artifact, threads, prompt + 1) as executor:

        def times(tokens: int, first: int, rounds: int) -> list[dict[str, Any]]:
            runs = []
            for _ in range(rounds + 1):
                ids = rng.integers(layout.vocab, size=tokens).tolist()
                batch = Batch.of([(ids, first, pages)], rows=[tokens - 1])
                runs.append(executor.time_steps(batch))
            return _by_kernel(artifact.plan, layout, runs[1:], tokens)

        return {
            "prefill": times(prompt, 0, max(1, repeat // 5)),
            "decode": times(1, prompt, repeat),
        }


def _by_kernel(
    plan: Mapping[str, Any], layout: Layout, runs: Sequence[Sequence[float]], tokens: int
) -> list[dict[str, Any]]:
    seconds = [statistics.median(times) for times in zip(*runs, strict=True)]
    weights = {weight.name: weight for weight in layout.weights}
    found = []
    for index, spec in enumerate(plan["specs"]):
        at = [i for i, step in enumerate(plan["steps"]) if step["spec"] == index]
        read = sum(
            weight_share(spec, weights[name].shape, tokens) * weights[name].nbytes
            for i in at
            for name, _ in plan["steps"][i]["bind"].values()
            if name in weights
        )
        total = sum(seconds[i] for i in at)
        found.append(KernelTime(_label(spec), len(at), total, round(read), read / total / 1e9))
    return [asdict(kernel) for kernel in sorted(found, key=lambda k: -k.seconds)]


def _label(spec: Mapping[str, Any]) -> str:
    """A kernel by what tells it from others: ``linear 1024x768 int8``."""
    match spec["kind"]:
        case "linear":
            rows = f"{spec['parts']}x{spec['n']}" if spec["parts"] > 1 else str(spec["n"])
            return f"linear {rows} x {spec['k']} {spec['format']}"
        case "experts":
            size = f"{spec['top_k']} of {spec['experts']}, {spec['inter']} x {spec['hidden']}"
            return f"experts {size} {spec['gate_up_format']}"
        case "attend" | "latent_attend" as kind:
            return f"{kind} {spec['heads']} heads {spec['cache_format']}"
        case "chain":
            return " | ".join(" ".join(link["kind"] for link in b) for b in spec["branches"])
        case "extern":
            return str(spec["op"])
        case kind:
            return f"{kind} {spec['width']}" if "width" in spec else str(kind)
