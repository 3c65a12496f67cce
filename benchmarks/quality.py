"""What formats and ways of rounding cost in quality, on the bundled models.

    python benchmarks/quality.py [--characters N] [--only NAME]... [--json benchmarks/results/quality.json]

Each row is an artifact, compiled as a user would and run by its kernels, scored on held-out text that is in
no training batch, nor in the text that weights are fitted to and formats are searched with.  A loss is the
rise of bits per byte over the original in fp32, with its standard error (evaluate.py states the protocol).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenmill
import torch
from _markdown import table
from tokenmill import Recipe
from tokenmill.api import original
from tokenmill.bench import hardware
from tokenmill.evaluate import evaluate
from tokenmill.recipe import Budget, Healing, Rule
from tokenmill.units import size

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = EXAMPLES / "tiny_deepseek" / "heldout.txt"
MODELS = ("tiny_deepseek", "tiny_qwen3_moe")
EVERYWHERE = tuple(
    Rule(match=f"role:{r}", format="int4-g128") for r in ("expert", "linear", "head")
)
HEALING = Healing(steps=300)
ROWS: dict[str, dict[str, Any]] = {
    "bf16": {"weights": "bf16"},
    "bf16, cache int8": {"weights": "bf16", "kv": "int8"},
    "bf16, cache fp8": {"weights": "bf16", "kv": "fp8"},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
    "int4 (experts), rtn": {"weights": "int4"},
    "int4 (experts), gptq": {"weights": "int4", "rounding": "gptq"},
    "int4-g128 everywhere, rtn": {"rules": EVERYWHERE},
    "int4-g128 everywhere, clip": {"rules": EVERYWHERE, "rounding": "clip"},
    "int4-g128 everywhere, balance": {"rules": EVERYWHERE, "rounding": "clip", "balance": True},
    "int4-g128 everywhere, gptq": {"rules": EVERYWHERE, "rounding": "gptq"},
    "int4-g128 everywhere, rotate, gptq": {"rules": EVERYWHERE, "rounding": "gptq", "rotate": True},
    "int4-g128 everywhere, gptq, healed": {
        "rules": EVERYWHERE,
        "rounding": "gptq",
        "heal_scales": HEALING,
    },
    "--max-loss 1%": {"rounding": "gptq", "budget": Budget(max_loss="1%")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, help="of held-out text; default: all of it")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--only", action="append", metavar="NAME", help="rows that contain this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    text = TEXT.read_text("utf-8")[: options.characters]
    models = {}
    for model in options.model or MODELS:
        chosen = {n: r for n, r in ROWS.items() if any(o in n for o in options.only or [""])}
        models[model] = measure(EXAMPLES / model, chosen, text)
        show(model, models[model])
    if options.json:
        result = {
            "benchmark": "quality of formats and ways of rounding",
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "held_out_characters": len(text),
            "models": models,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: Path, rows: dict[str, dict[str, Any]], text: str) -> dict[str, Any]:
    eager = original(model)

    @functools.cache
    def remembered(ids: tuple[int, ...]) -> torch.Tensor:
        return eager(torch.tensor([ids])).logits

    def against(ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=remembered(tuple(ids[0].tolist())))

    found = {}
    for name, fields in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            path, start = Path(folder) / "artifact", time.perf_counter()
            compiled = tokenmill.optimize(model, path, recipe=Recipe(**fields))
            seconds = time.perf_counter() - start
            with tokenmill.load(path) as session:
                scores = evaluate(session, text, against, continuations=16)
        facts = compiled.facts
        found[name] = {
            "weights_bytes": facts["bytes"]["weights"],
            "bits_per_weight": round(facts["quantized"]["bits"], 3),
            "kv_bytes_per_token": facts["kv_bytes_per_token"],
            "compile_s": round(seconds, 1),
            **scores,
        }
        if facts["search"]:
            found[name]["verdict"] = facts["search"]["verdict"]
        print(f"  {model.name}, {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def show(model: str, rows: dict[str, Any]) -> None:
    """A table in Markdown."""
    columns = {
        "weights_bytes": ("size", size),
        "bits_per_weight": ("bits", "{:.2f}".format),
        "kv_bytes_per_token": ("KV per token", size),
        "bits_per_byte_increase_percent": ("loss", "{:+.3f}%".format),
        "standard_error_percent": ("±", "{:.3f}%".format),
        "kl_mean": ("KL", "{:.1e}".format),
        "top1_agreement": ("same top-1", "{:.2%}".format),
        "greedy_agreement_mean": ("same greedy tokens of 64", "{:.1f}".format),
    }
    print(table(model, columns, rows))


if __name__ == "__main__":
    main()
