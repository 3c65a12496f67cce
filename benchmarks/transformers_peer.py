"""One round of transformers in bf16, as benchmarks/cpu.py asks for it: prints one JSON object.

    python benchmarks/transformers_peer.py MODEL eager|compile --prompt P --deep D --sequences N --threads N

The steps are those of `tokenmill bench`: a greedy choice is made, a random token follows.  With ``compile``
the decoding step goes through torch.compile over a static cache that is just long enough; the prompt runs
eagerly, as in the library's own generate(), and so is not reported again; neither is a batch.  Few tokens
are enough here: every step costs the same.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from tokenmill.bench import SEED, SHORT_PROMPT, Eager, Run, Workload, peak_bytes
from transformers import AutoConfig, StaticCache

TOKENS, TOKENS_OF_BATCH = 32, 8


class Compiled(Eager):
    """Decoding through torch.compile, over a static cache."""

    def run(self, work: Workload) -> Run:
        room = work.prompts.shape[1] + work.fed.shape[1]
        self._cache = StaticCache(config=self.model.config, max_cache_len=room)
        self._compiled = torch.compile(self.model.forward, dynamic=False)
        return super().run(work)

    def step(self, ids: Any, cache: Any) -> Any:
        step = self.model if cache is None else self._compiled
        out = step(torch.tensor(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return self._cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("how", choices=["eager", "compile"])
    for name in ("--prompt", "--deep", "--sequences", "--threads"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()

    vocab = AutoConfig.from_pretrained(options.model, local_files_only=True).vocab_size
    model = {"eager": Eager, "compile": Compiled}[options.how](
        options.model, vocab, options.threads
    )
    model.run(draw(vocab, 1, SHORT_PROMPT, 0))
    found: dict[str, float] = {}
    if (
        options.how == "eager"
    ):  # who compiles waits much longer, for the first step after the prompt
        found["first_token_at"] = time.time()
    decode = measured(model, draw(vocab, 1, options.prompt, TOKENS))
    found["decode"] = decode.tokens / decode.decode_s
    found["peak_bytes"] = peak_bytes()
    deep = measured(model, draw(vocab, 1, options.deep, TOKENS))
    found["decode_deep"] = deep.tokens / deep.decode_s
    if options.how == "eager":
        found["prefill"] = options.prompt / decode.prefill_s
        batched = measured(model, draw(vocab, options.sequences, options.prompt, TOKENS_OF_BATCH))
        found["batched"] = batched.tokens / batched.decode_s
    print(json.dumps(found))


def draw(vocab: int, sequences: int, prompt: int, tokens: int) -> Workload:
    ids = np.random.default_rng(SEED).integers(vocab, size=(sequences, prompt + tokens))
    return Workload(ids[:, :prompt], ids[:, prompt:], tokens)


def measured(model: Eager, work: Workload) -> Run:
    """A second run: the first one compiles, and fills the caches of the library."""
    model.run(work._replace(tokens=1))
    return model.run(work)


if __name__ == "__main__":
    main()
