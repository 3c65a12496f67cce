"""One round of vLLM in bf16, as benchmarks/cpu.py asks for it: prints one JSON object on the last line.

    PYTHON benchmarks/vllm_peer.py MODEL --prompt P --tokens N --threads N

PYTHON is that of an environment with vLLM (serve_vllm.py tells how to make one; with zentorch beside it, its
kernels are used).  One sequence; prompts are random, what follows is greedy.  Decoding is the time of a
prompt with so many tokens, less that of a prompt with one.  A checkpoint of transformers 5 does not say how
DeepSeek-V3 routes, and vLLM would assume softmax: it reads a copy of the configuration that does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

PROMPTS = 5
ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    for name in ("--prompt", "--tokens", "--threads"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    # Read when vLLM is imported.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_MLA_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(described(options.model, Path(folder)), options)))


def described(model: Path, folder: Path) -> Path:
    """The checkpoint, with a configuration that names its routing."""
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] == "deepseek_v3":
        config |= ROUTING
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measured(model: Path, options: argparse.Namespace) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model), dtype="bfloat16", max_model_len=options.prompt + options.tokens + 1,
        max_num_seqs=1, enable_prefix_caching=False, skip_tokenizer_init=True,
    )  # fmt: skip
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    prompts = np.random.default_rng(0).integers(vocab, size=(PROMPTS, options.prompt)).tolist()

    def seconds(ids: list[int], tokens: int) -> float:
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
        return time.perf_counter() - start

    seconds(prompts[0], 4)
    prefill = statistics.median(seconds(ids, 1) for ids in prompts)
    both = seconds(prompts[0], 1 + options.tokens)
    return {
        "prefill": options.prompt / prefill,
        "decode": options.tokens / (both - prefill),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


if __name__ == "__main__":
    main()
