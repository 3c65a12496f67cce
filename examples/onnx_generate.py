"""Continue a text with an ONNX export, by onnxruntime and tokenizers alone.

tokenmill export model.tm --format onnx -o model.onnx
python examples/onnx_generate.py model.onnx "def main():"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(
    session: onnxruntime.InferenceSession, prompt: list[int], count: int, ends: set[int]
) -> Iterator[int]:
    """The likeliest continuation, token by token."""
    outputs = [o.name for o in session.get_outputs()]
    # Caches begin empty: [1, heads, 0, width], or [1, 0, width] of latents.
    caches = {
        i.name: np.zeros([{"batch": 1, "past": 0}.get(d, d) for d in i.shape], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    step, past = prompt, 0
    for _ in range(count):
        total = past + len(step)
        inputs = {
            "input_ids": np.array([step], np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            "attention_mask": np.ones((1, total), np.int64),
        }
        found = dict(zip(outputs, session.run(outputs, inputs | caches), strict=True))
        token = int(found["logits"][0, -1].argmax())
        yield token
        if token in ends:
            return
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
        step, past = [token], total


def end_tokens(directory: Path) -> set[int]:
    file = directory / "generation_config.json"
    found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    return set(found) if isinstance(found, list) else {found} - {None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.directory / "tokenizer.json"))
    session = onnxruntime.InferenceSession(
        str(options.directory / "model.onnx"), providers=onnxruntime.get_available_providers()
    )
    prompt = tokenizer.encode(options.prompt).ids
    tokens = generate(session, prompt, options.max_new_tokens, end_tokens(options.directory))
    print(options.prompt + tokenizer.decode(list(tokens)))


if __name__ == "__main__":
    main()
