"""A model small enough to check by hand, behind the real C ABI.

The logits after token p of a sequence depend on its id, its position and a sum over everything that
the cache holds for positions 0..p, in exact integer arithmetic: a wrong page, a stale row or a
misplaced chunk changes them.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenmill.runtime.artifact import ArtifactWriter, Target, TensorSpec

VOCAB, EOS, BOS, POSITIONS = 259, 256, 257, 300

SOURCE = r"""
#include <cstdint>
struct tm_args {
  int32_t tokens, sequences, rows, table_stride;
  const int32_t *ids, *positions, *row_index, *starts, *block_table;
  const void *const *weights; void *const *caches; uint8_t *arena; uint8_t *workspace;
};
static const int VOCAB = 259, PAGE = 64, PITCH = 272;
static int32_t pools = 0, calls = 0;

static int check(const tm_args *a) {
  if ((uintptr_t)a->arena % 64 || (uintptr_t)a->workspace % 64) return 2;
  for (int i = 0; i < 3; i++) if ((uintptr_t)a->weights[i] % 16) return 3;
  if (((const int32_t *)a->weights[1])[0] != 77) return 4;
  if (a->starts[0] != 0 || a->starts[a->sequences] != a->tokens || a->tokens < 1) return 5;
  for (int b = 0; b < a->sequences; b++)
    for (int t = a->starts[b] + 1; t < a->starts[b + 1]; t++)
      if (a->positions[t] != a->positions[t - 1] + 1) return 6;
  a->workspace[127] = 1;
  return 0;
}
static void step(const tm_args *a, int s, float *h, float *g, float *logits) {
  int64_t *c0 = (int64_t *)a->caches[0];
  int32_t *c1 = (int32_t *)a->caches[1];
  if (s == 3) {
    const float *bias = (const float *)a->weights[0];
    for (int r = 0; r < a->rows; r++)
      for (int64_t v = 0; v < VOCAB; v++) {
        int64_t x = (int64_t)g[a->row_index[r]];
        logits[r * PITCH + v] = (float)((x * (v + 1) * 17 + v * v * 5) % 1013) / 64 + bias[v];
      }
    return;
  }
  for (int b = 0; b < a->sequences; b++)
    for (int t = a->starts[b]; t < a->starts[b + 1]; t++) {
      const int32_t *table = a->block_table + b * a->table_stride;
      int p = a->positions[t];
      if (s == 0) {
        c0[table[p / PAGE] * PAGE + p % PAGE] = a->ids[t] * 31 + p * 7 + 1;
        c1[table[p / PAGE] * PAGE + p % PAGE] = a->ids[t];
      }
      if (s == 1) {
        int64_t sum = 0;
        for (int j = 0; j <= p; j++) {
          int at = table[j / PAGE] * PAGE + j % PAGE;
          sum += c0[at] * (j + 1) + c1[at];
        }
        h[2 * t] = -1; h[2 * t + 1] = (float)(sum % 1009);
      }
      if (s == 2) g[t] = 3 * h[2 * t + 1];
    }
}
extern "C" {
int32_t tm_abi_version(void) { return 1; }
const char *tm_isa(void) { return "fake"; }
void *tm_pool_create(int32_t threads) { pools++; return new int32_t(threads); }
void tm_pool_destroy(void *pool) { pools--; delete (int32_t *)pool; }
int64_t tm_workspace_bytes(int32_t threads) { return 64 * threads + 64; }
int32_t fake_pools(void) { return pools; }
int32_t fake_calls(void) { return calls; }
int32_t tm_run(void *pool, const tm_args *a, int32_t first, int32_t last) {
  if (!pool) return 1;
  calls++;
  if (int code = check(a)) return code;
  bool extern_step = ((const int8_t *)a->weights[2])[0];
  for (int s = first; s < last; s++) {
    if (s == 2 && extern_step) return 9;
    step(a, s, (float *)a->arena, (float *)(a->arena + 512), (float *)(a->arena + 768));
  }
  return 0;
}
}
"""


class FakeModel:
    vocab, eos, bos, positions = VOCAB, EOS, BOS, POSITIONS

    def __init__(self, library):
        self.library = library
        self.bias = (np.arange(VOCAB) * 37 % 101 / 64).astype(np.float32)

    def logits(self, tokens):
        """What the model says, computed here: [len(tokens), vocab]."""
        v = np.arange(VOCAB, dtype=np.int64)
        total, out = 0, []
        for p, token in enumerate(tokens):
            total += (token * 31 + p * 7 + 1) * (p + 1) + token
            x = 3 * (total % 1009)
            out.append(((x * (v + 1) * 17 + v * v * 5) % 1013).astype(np.float32) / 64 + self.bias)
        return np.array(out)

    def greedy(self, prompt, new):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + new and tokens[len(prompt) :][-1:] != [EOS]:
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def plan(self, tokens=16, rows=4, extern=None):
        weights = [("bias", "f32", [VOCAB]), ("check", "i32", [1]), ("mode", "i8", [3])]
        arena = [("h", "tokens", 2, 0), ("g", "tokens", 1, 512), ("logits", "rows", 272, 768)]
        inputs = ["ids", "positions", "rows", "starts", "block_table"]
        third = {"kind": "pointwise"} if extern is None else {"kind": "extern", **extern}
        bind = {"x": ["h", 1], "h": ["h", 0], "ids": ["ids", 0], "w": ["bias", 0], "out": ["g", 0]}
        return {
            "version": 1,
            "capacity": {"tokens": tokens, "rows": rows},
            "arena_bytes": 768 + 16 * 272 * 4,
            "output": "logits",
            "vocab": VOCAB,
            "positions": POSITIONS,
            "meta": {},
            "caches": [{"name": "c0", "row_bytes": 8}, {"name": "c1", "row_bytes": 4}],
            "buffers": [
                *(_buffer(name, "input", "i32") for name in inputs),
                *(_buffer(name, "weight", dtype, shape=s) for name, dtype, s in weights),
                *(
                    _buffer(name, "arena", "f32", rows=rows, width=width, offset=offset)
                    for name, rows, width, offset in arena
                ),
            ],
            "specs": [{"kind": "fake"}, third],
            "steps": [
                {"spec": int(i == 2), "rows": "tokens", "where": f"layer {i}", "bind": bind}
                for i in range(4)
            ],
        }

    def write(self, path, *, target=None, tokenizer=True, force=False, plan=None, **options):
        plan = plan or self.plan(**options)
        extern = plan["specs"][1]["kind"] == "extern"
        data = {
            "mode": np.array([extern, 0, 0], np.int8),
            "bias": self.bias,
            "check": np.array([77], np.int32).tobytes(),
        }
        index = [TensorSpec(b["name"], b["dtype"], tuple(b["shape"])) for b in plan["buffers"]]
        with ArtifactWriter(path, force) as writer:
            writer.json("plan.json", plan)
            writer.weights((s for s in index if s.name in data), data.items())
            writer.text("kernels/cpu-fake/step.cpp", SOURCE)
            writer.copy("kernels/cpu-fake/step.so", self.library)
            writer.text("report.html", "<p>fake")
            if tokenizer:
                _write_tokenizer(writer)
            target = target or Target("cpu", "kernels/cpu-fake")
            writer.describe(targets=[target], tokenmill="0.1.0", recipe={"weights": "fp32"})
        return Path(path)


def _buffer(name, kind, dtype, rows="fixed", width=1, shape=(), offset=-1):
    return {
        "name": name,
        "kind": kind,
        "dtype": dtype,
        "rows": rows,
        "width": width,
        "shape": list(shape),
        "offset": offset,
    }


def _write_tokenizer(writer):
    """Bytes as tokens, by their value, and the two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    names = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({name: b for b, name in names.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    writer.text("tokenizer/tokenizer.json", tokenizer.to_str())
    writer.json("tokenizer/generation_config.json", {"eos_token_id": [EOS]})
    writer.json("tokenizer/tokenizer_config.json", {"bos_token": {"content": "<bos>"}})


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """The fake model, with its step library compiled."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("fake")
    (folder / "step.cpp").write_text(SOURCE)
    command = [compiler, "-O1", "-shared", "-fPIC", "step.cpp", "-o", "step.so"]
    subprocess.run(command, cwd=folder, check=True)
    return FakeModel(folder / "step.so")


@pytest.fixture(scope="session")
def model_dir(fake, tmp_path_factory):
    """One artifact of the fake model that no test changes."""
    return fake.write(tmp_path_factory.mktemp("artifact") / "model.tm")


@pytest.fixture
def extern_step():
    """The third step of the fake model as one that torch runs."""

    def make(op, args, kwargs=None, item=-1):
        return {"op": op, "args": json.dumps({"args": args, "kwargs": kwargs or {}}), "item": item}

    return make
