"""Decode speed of an artifact next to eager transformers on the same model, interleaved in one run.

    python benchmarks/decode.py examples/tiny_deepseek --weights int4 --json benchmarks/results/decode.json

Reports medians over the rounds with their spread, the ratio, and the share of the read bandwidth (measured
in the same run) that the weight bytes of a step amount to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenmill import Recipe, Session, optimize
from tokenmill.api import original


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = original(options.model)
    with tempfile.TemporaryDirectory() as directory:
        compiled = optimize(
            options.model,
            Path(directory) / "a",
            recipe=Recipe(weights=options.weights, kv=options.kv),
        )
        with Session(compiled.path, threads=options.threads) as session:
            result = measure(session, model, compiled.facts, options)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(
    session: Session, model: Any, facts: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, session.vocab, options.prompt_tokens).tolist()
    times: dict[str, list[float]] = {"tokenmill": [], "transformers": []}
    for round_ in range(options.rounds + 1):
        ours = session.generate([prompt], max_new_tokens=options.new_tokens, stop=())[0]
        theirs = eager_decode(model, prompt, options.new_tokens)
        if round_:  # the first warms up
            times["tokenmill"].append(ours.decode_seconds / max(1, len(ours.tokens) - 1))
            times["transformers"].append(theirs)
    median = {name: statistics.median(t) for name, t in times.items()}
    bandwidth = read_bandwidth()
    step_bytes = (
        facts["bytes"]["weights"] * facts["parameters"]["active"] / facts["parameters"]["total"]
    )
    return {
        "benchmark": "decode, batch 1",
        "model": facts["model"]["name"],
        "recipe": {"weights": options.weights, "kv": options.kv},
        "context": options.prompt_tokens,
        "hardware": hardware(),
        "threads": options.threads,
        "date": datetime.date.today().isoformat(),
        "tokens_per_s": {n: round(1 / t, 1) for n, t in median.items()},
        "spread": {n: [round(1 / max(t), 1), round(1 / min(t), 1)] for n, t in times.items()},
        "ratio": round(median["transformers"] / median["tokenmill"], 2),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "fraction_of_bandwidth": round(step_bytes / median["tokenmill"] / bandwidth, 3),
    }


def eager_decode(model: Any, prompt: list[int], new: int) -> float:
    """Seconds per token of greedy decoding with the library's own cache."""
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(new - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - start) / (new - 1)


def read_bandwidth(size: int = 1 << 28, rounds: int = 5) -> float:
    """Bytes per second of summing an array far larger than the caches, best of a few rounds."""
    data = torch.ones(size // 4)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def hardware() -> str:
    """The processor's name and the number of cores."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor()


if __name__ == "__main__":
    main()
