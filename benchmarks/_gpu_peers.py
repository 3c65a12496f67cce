"""What people run instead on the same card: torch's matrix products, and transformers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_cases import DECODED, LATENT, NOPE, PROMPT, ROPE, TOGETHER, VALUE
from torch import Tensor

Work = Callable[[], Any]
BLOCK = 128
DEVICE = "cuda"


def record(work: Work) -> Work:
    """A CUDA graph of what torch does in ``work``; it has run before.  Where it cannot be, ``work``."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    except (RuntimeError, torch.AcceleratorError):
        return work
    return graph.replay


# --- products ---------------------------------------------------------------------------------------


def gemm(name: str, x: Tensor, w: Tensor) -> Work:
    """x [m, k] w [n, k]^T in bf16, of bf16 or of E4M3 numbers that are rounded already."""
    if name == "cublas bf16":
        out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16, device=x.device)
        return functools.partial(torch.mm, x, w.t(), out=out)
    a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).t()
    make = _block_scales if name.endswith("blocks") else _row_scales
    return _first(
        [
            functools.partial(
                torch._scaled_mm, a, b, scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, **more
            )
            for sa, sb, more in make(a, b)
        ]
    )


def _row_scales(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """One scale per row and column, else one in all."""
    rows, columns = (
        a.new_ones(a.shape[0], 1, dtype=torch.float32),
        a.new_ones(1, b.shape[1], dtype=torch.float32),
    )
    one, fast = a.new_ones((), dtype=torch.float32), {"use_fast_accum": True}
    return [(rows, columns, fast), (one, one, fast)]


def _block_scales(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """One per 128 inputs of a row, and per block of the weight; versions of torch differ in order."""
    k, m, n = a.shape[1] // BLOCK, a.shape[0], b.shape[1] // BLOCK
    rows = a.new_ones(k, m, dtype=torch.float32).t()
    blocks = a.new_ones(n, k, dtype=torch.float32).t()
    return [(rows, blocks, {}), (rows, blocks.contiguous(), {}), (rows.contiguous(), blocks, {})]


def _first(works: list[Work]) -> Work:
    """The first that runs; raises what the last one says."""
    for work in works[:-1]:
        try:
            work()
        except (RuntimeError, ValueError, NotImplementedError):
            continue
        return work
    works[-1]()
    return works[-1]


def peak_flops(dtype: torch.dtype, size: int = 8192) -> Work:
    """A product of square matrices, which takes 2 size^3 operations."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE)
    return gemm("cublas bf16" if dtype == torch.bfloat16 else "scaled_mm fp8", x, x.clone())


# --- experts ----------------------------------------------------------------------------------------


def grouped(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """Router and experts as transformers has them: pairs sorted by expert, two grouped products."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    weights, ids = logits.softmax(-1).topk(top_k, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype).reshape(-1)
    expert, order = torch.sort(ids.reshape(-1))
    every = torch.arange(len(gate_up), device=x.device)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)
    gate, up = product(x[order // top_k], gate_up.transpose(-2, -1), offs=ends).chunk(2, -1)
    y = product(F.silu(gate) * up, down.transpose(-2, -1), offs=ends) * weights[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(len(x), top_k, -1).sum(1)


@functools.cache
def compiled_grouped() -> Callable[..., Tensor]:
    return torch.compile(grouped, dynamic=False)


# --- latent attention -----------------------------------------------------------------------


def absorbed(q: Tensor, latents: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """q [B, H, nope + rope], latents [B, context, latent + rope]."""
    q_nope, q_pe = q.split((NOPE, ROPE), -1)
    turned = torch.einsum("bhn,hnl->bhl", q_nope, w_uk)
    score = torch.cat((turned, q_pe), -1) @ latents.transpose(-2, -1) * scale
    mixed = score.softmax(-1, dtype=torch.float32).to(q.dtype) @ latents[..., :LATENT]
    return torch.einsum("bhl,hvl->bhv", mixed, w_uv)


def expanded(batch: int, heads: int, context: int, queries: int = 1) -> Work:
    """torch's attention over keys and values of every head, which others cache; of the last ``queries``."""

    def draw(tokens: int, width: int) -> Tensor:
        return torch.randn(batch, heads, tokens, width, dtype=torch.bfloat16, device=DEVICE)

    q, key, value = draw(queries, NOPE + ROPE), draw(context, NOPE + ROPE), draw(context, VALUE)
    causal = queries > 1
    assert not causal or queries == context, "torch counts the first queries of such a mask"
    return functools.partial(F.scaled_dot_product_attention, q, key, value, is_causal=causal)


# --- a whole model ----------------------------------------------------------------------------------


def transformers_model(values: Mapping[str, Any]) -> Any:
    import transformers

    fields = dict(values)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


@torch.inference_mode()
def generation(model: Any, compiled: bool) -> dict[str, float]:
    """Seconds of a prompt, and of a step of one and of several sequences after it."""
    import transformers

    vocab = model.config.vocab_size
    step = torch.compile(model, mode="reduce-overhead") if compiled else model
    found: dict[str, float] = {}
    for batch in (1, TOGETHER):
        ids = torch.randint(vocab, (batch, PROMPT), device=DEVICE)
        cache: Any = transformers.DynamicCache()
        if compiled:
            cache = transformers.StaticCache(
                config=model.config, max_cache_len=PROMPT + 2 * DECODED
            )

        def run(tokens: Tensor, at: int, call: Any, cache: Any = cache) -> Tensor:
            positions = torch.arange(at, at + tokens.shape[1], device=DEVICE)
            out = call(
                input_ids=tokens, position_ids=positions[None].expand(len(tokens), -1),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            return out.logits[:, -1].argmax(-1, keepdim=True).clone()

        if batch == 1 and not compiled:  # once to warm up, on a cache of its own
            run(ids, 0, model, transformers.DynamicCache())
        start = _now()
        token = run(ids, 0, model)
        if batch == 1 and not compiled:
            found["prefill_s"] = _now() - start
        for at in range(PROMPT, PROMPT + 4):  # compiling, recording
            token = run(token, at, step)
        start = _now()
        for at in range(PROMPT + 4, PROMPT + 4 + DECODED):
            token = run(token, at, step)
        found["decode_s" if batch == 1 else "batched_s"] = (_now() - start) / DECODED
    if compiled:  # what was recorded holds on to the model
        torch._dynamo.reset()
    return found


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
