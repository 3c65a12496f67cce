"""What latent attention instead of keys and values costs in quality, and gains in speed.

    python benchmarks/kv_compress.py [--only NAME]... [--minutes 10] [--json FILE]

Quality: the bundled models are converted and healed as a user would who has text of the kind that the model
was trained on: files of Python's library.  The artifacts are scored on files that are in no training batch
and not in that text (evaluate.py states the protocol).  Healing takes its minutes by the clock, so it wants a
quiet machine.

Speed: one decoding step after long contexts, kernel by kernel, of a model with random weights before and
after its conversion, on as many sequences' worth of layers as stream from memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenmill
import torch
import transformers
from _markdown import table
from tokenmill import Recipe
from tokenmill.api import original
from tokenmill.bench import hardware
from tokenmill.evaluate import evaluate
from tokenmill.profiling import profile

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from stdlib_corpus import load_corpus  # noqa: E402

TEXT = EXAMPLES / "tiny_deepseek" / "heldout.txt"
ROWS: dict[str, tuple[str, str]] = {
    "tiny_qwen3_moe 50%": ("tiny_qwen3_moe", "50%"),
    "tiny_qwen3_moe 75%": ("tiny_qwen3_moe", "75%"),
    "tiny_llama 87.5%": ("tiny_llama", "87.5%"),
}
CONTEXTS = (512, 2048, 4096)
# Heads, groups, share saved.  Absorbed attention computes with whole latents in every head, so more heads for
# the same cache meet the arithmetic's limit sooner.
SPEED: dict[str, tuple[int, int, str]] = {
    "8 heads in 4 groups, 50%": (8, 4, "50%"),
    "16 heads in 4 groups, 50%": (16, 4, "50%"),
    "8 heads, 87.5%": (8, 8, "87.5%"),
    "16 heads, 87.5%": (16, 16, "87.5%"),
}
LAYERS, WIDTH, ROTARY, ROUNDS = 16, 64, 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="rows that contain this")
    parser.add_argument("--minutes", type=float, default=10.0, help="of healing, for each row")
    parser.add_argument("--characters", type=int, help="of held-out text; default: all of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.only or [""]
    text = TEXT.read_text("utf-8")[: options.characters]
    result: dict[str, Any] = {
        "benchmark": "latent attention instead of keys and values",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "threads": options.threads,
        "quality": {},
        "speed": {},
    }
    for name, (model, save) in ROWS.items():
        if any(part in name for part in wanted):
            result["quality"][name] = quality(EXAMPLES / model, save, options.minutes, text)
            _write(options.json, result)
    for name, (heads, groups, save) in SPEED.items():
        if any(part in name for part in wanted):
            result["speed"][name] = speed(heads, groups, save, options.threads)
            _write(options.json, result)
    show(result)


def _write(file: Path | None, result: dict[str, Any]) -> None:
    if file:  # after each row, since a long run may be cut off
        file.write_text(json.dumps(result, indent=1) + "\n")


def quality(model: Path, save: str, minutes: float, text: str) -> dict[str, Any]:
    """The loss of one conversion by its artifact, and after every step of it as the compiler measured."""
    print(f"{model.name} {save}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output, learned = Path(folder) / "model.tm", Path(folder) / "text"
        learned.write_text("".join(f.text for f in load_corpus().train if not f.is_test))
        recipe = Recipe(
            weights="fp32", kv="fp32", calibration=str(learned), rounding="rtn",
            kv_compress={"save": save, "heal_minutes": minutes},
        )  # fmt: skip
        compiled = tokenmill.optimize(model, output, recipe=recipe, progress=_say)
        with tokenmill.load(output) as session:
            found = evaluate(session, text, original(model))
    facts = compiled.facts["kv_compress"]
    assert facts is not None
    keys = (
        "bits_per_byte", "original_bits_per_byte", "bits_per_byte_increase_percent",
        "standard_error_percent", "kl_mean", "top1_agreement", "bytes", "tokens",
    )  # fmt: skip
    return {
        **{key: found[key] for key in keys},
        "values_before": facts["values_before"],
        "values_after": facts["values_after"],
        "fold": facts["fold"],
        "layers": facts["layers"],
        "steps": facts["steps"],
        "healing": facts.get("healing"),
    }


def _say(what: str, done: int, total: int) -> None:
    if total and done % max(1, total // 10) == 0:
        print(f"  {what}: {done} of {total}", file=sys.stderr, flush=True)


def speed(heads: int, groups: int, save: str, threads: int) -> dict[str, Any]:
    """Seconds of attention in a decoding step after each context, before and after the conversion.

    Beside them what bounds it: bytes of the cache and FLOP of a step, GB/s and GFLOP/s that they make.
    """
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=WIDTH,
        max_position_embeddings=2 * max(CONTEXTS),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = [torch.randint(0, config.vocab_size, (512,)) for _ in range(4)]
    values = 2 * groups * WIDTH
    kept = round(values * (1 - float(save.rstrip("%")) / 100))
    flop = {"before": 2 * heads * 2 * WIDTH, "after": 2 * heads * (2 * kept - ROTARY)}
    cached = {"before": 2 * values, "after": 2 * kept}
    with tempfile.TemporaryDirectory() as folder:
        for how, compress in (
            ("before", None),
            ("after", {"save": save, "rotary": ROTARY, "heal_steps": 0}),
        ):
            print(f"speed {heads} {groups} {how}", file=sys.stderr, flush=True)
            recipe = Recipe(weights="int8", kv_compress=compress, max_step_tokens=max(CONTEXTS))
            tokenmill.optimize(model, Path(folder) / how, recipe=recipe, calibration_ids=ids)
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for context in CONTEXTS:
                for how in cached:
                    times = profile(Path(folder) / how, context, threads)["decode"]
                    spent = sum(k["seconds"] for k in times if "attend" in k["kernel"])
                    seconds.setdefault((how, context), []).append(spent)
    found: dict[str, Any] = {"values_before": values, "values_after": kept, "layers": LAYERS}
    for (how, context), spent in seconds.items():
        median = statistics.median(spent)
        found.setdefault(how, {})[str(context)] = {
            "seconds": median,
            "spread": [min(spent), max(spent)],
            "gb_per_s": LAYERS * context * cached[how] / median / 1e9,
            "gflop_per_s": LAYERS * context * flop[how] / median / 1e9,
        }
    found["faster"] = {
        c: found["before"][c]["seconds"] / found["after"][c]["seconds"] for c in found["before"]
    }
    return found


def show(result: dict[str, Any]) -> None:
    rows = {
        name: {
            "values per token": f"{row['values_before']:,} -> {row['values_after']:,}",
            "before healing": f"{row['steps'][-2]['perplexity_increase_percent']:+.2f}% ppl",
            "bits per byte": f"{row['bits_per_byte_increase_percent']:+.2f}% "
            f"± {row['standard_error_percent']:.2f}",
            "KL": f"{row['kl_mean']:.4f}",
        }
        for name, row in result["quality"].items()
    }
    titles = ("values per token", "before healing", "bits per byte", "KL")
    if rows:
        print(table("conversion", {title: (title, str) for title in titles}, rows))
    for name, row in result["speed"].items():
        print(name, {c: f"{x:.2f}x" for c, x in row["faster"].items()})


if __name__ == "__main__":
    main()
