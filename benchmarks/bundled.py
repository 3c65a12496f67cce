"""The bundled model in every format next to the original: the table of the README.

    python benchmarks/bundled.py [--characters N] [--json benchmarks/results/bundled.json]

Quality is over held-out text.  Speed is greedy decoding of one sequence from a context of 256 tokens: all
formats and eager transformers take turns, round by round, and the medians are compared, so that whatever
else the machine does falls on all of them.  The bound of decoding is the memory traffic of a step, here
the weights that one token visits; they and the read bandwidth measured in the same run give the fraction.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tokenmill
import torch
from _markdown import table
from tokenmill.api import original
from tokenmill.bench import ReadBandwidth, hardware
from tokenmill.evaluate import evaluate
from tokenmill.runtime.cpu import available_cores
from tokenmill.units import size

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_deepseek"
FORMATS = [  # weights, cache
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("bf16", "int8"),
    ("bf16", "fp8"),
    ("int8", "bf16"),
    ("fp8", "bf16"),
    ("int4-g32", "bf16"),
    ("int4-g128", "bf16"),
]
EAGER = "transformers, eager fp32"
CONTEXT, NEW_TOKENS, ROUNDS = 256, 64, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, help="of held-out text; default: all of it")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    torch.set_num_threads(available_cores())
    text = (MODEL / "heldout.txt").read_text("utf-8")[: options.characters]
    eager = original(MODEL)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sessions, rows = {}, {EAGER: {"weights_bytes": sum(p.nbytes for p in eager.parameters())}}
        for weights, kv in FORMATS:
            name, path = f"{weights}, {kv}", Path(folder) / f"{weights}-{kv}"
            recipe = tokenmill.Recipe(weights=weights, kv=kv)
            facts = tokenmill.optimize(MODEL, path, recipe=recipe).facts
            sessions[name] = stack.enter_context(tokenmill.load(path))
            rows[name] = sizes(facts) | evaluate(sessions[name], text, eager) | first_token(path)
        rows[EAGER]["bits_per_byte"] = rows["fp32, fp32"]["original_bits_per_byte"]
        with ReadBandwidth(available_cores()) as memory:
            bandwidth = 1e9 * statistics.median(memory.measure() for _ in range(ROUNDS))
        for name, seconds in decode_seconds(sessions, eager).items():
            rows[name] |= speed(seconds, rows[name], bandwidth)
    for row in rows.values():
        row["speedup"] = round(row["tokens_per_s"] / rows[EAGER]["tokens_per_s"], 2)
    show(rows)
    if options.json:
        result = {
            "benchmark": "bundled model: quality, and decoding of one sequence",
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "context": CONTEXT,
            "held_out_characters": len(text),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def sizes(facts: dict[str, Any]) -> dict[str, Any]:
    active = facts["parameters"]["active"] / facts["parameters"]["total"]
    return {
        "weights_bytes": facts["bytes"]["weights"],
        "active_bytes": round(facts["bytes"]["weights"] * active),
        "kv_bytes_per_token": facts["kv_bytes_per_token"],
    }


def first_token(path: Path) -> dict[str, float]:
    """Seconds to open an artifact, every hash checked, and to make the first token."""
    start = time.perf_counter()
    with tokenmill.load(path) as session:
        session.generate(["def "], max_new_tokens=1)
    return {"open_and_first_token_s": round(time.perf_counter() - start, 3)}


def decode_seconds(sessions: dict[str, Any], eager: Any) -> dict[str, list[float]]:
    """Seconds per token, one figure per round and contender; the first round warms up."""
    vocab = next(iter(sessions.values())).vocab
    prompt = np.random.default_rng(0).integers(1, vocab, CONTEXT).tolist()
    times: dict[str, list[float]] = {name: [] for name in (EAGER, *sessions)}
    for _ in range(ROUNDS + 1):
        times[EAGER].append(eager_decode(eager, prompt))
        for name, session in sessions.items():
            done = session.generate([prompt], max_new_tokens=NEW_TOKENS)[0]
            times[name].append(done.decode_seconds / max(1, len(done.tokens) - 1))
    return {name: seconds[1:] for name, seconds in times.items()}


def eager_decode(model: Any, prompt: list[int]) -> float:
    """Seconds per token of greedy decoding with the library's own cache."""
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - start) / (NEW_TOKENS - 1)


def speed(seconds: list[float], row: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    found: dict[str, Any] = {
        "tokens_per_s": round(1 / median, 1),
        "spread": [round(1 / max(seconds), 1), round(1 / min(seconds), 1)],
    }
    if "active_bytes" in row:
        found["fraction_of_bandwidth"] = round(row["active_bytes"] / median / bandwidth, 3)
    return found


def show(rows: dict[str, dict[str, Any]]) -> None:
    """A table in Markdown."""
    columns = {
        "weights_bytes": ("size", size),
        "kv_bytes_per_token": ("KV per token", size),
        "bits_per_byte": ("bits per byte", "{:.4f}".format),
        "kl_mean": ("KL", "{:.1e}".format),
        "top1_agreement": ("same top-1", "{:.2%}".format),
        "tokens_per_s": ("tokens/s", "{:.0f}".format),
        "speedup": ("ratio", "{:.1f}x".format),
    }
    print(table("weights, cache", columns, rows))


if __name__ == "__main__":
    main()
