"""Sample: the next token of every row of logits, chosen on the card, so that only ids leave it."""

from __future__ import annotations

from ..text import fill
from .launch import Kernel, Launch, Param, power_of_2

FILE = "sample_kernels.py"
BLOCK = 4096  # logits that a program looks at together
_ARGS = {
    "logits": "*fp32",
    "sampling.temperature": "*fp32",
    "sampling.top_k": "*i32",
    "sampling.top_p": "*fp32",
    "sampling.uniform": "*fp32",
    "sampling.tokens": "*i32",
    "count.rows": "*i32",
}


def emit(vocab: int, pitch: int) -> str:
    """The kernel for rows of ``vocab`` logits that begin ``pitch`` apart."""
    return fill(TEMPLATE, vocab=vocab, pitch=pitch)


def launch(rows: int, vocab: int) -> Launch:
    """The kernel on at most ``rows`` rows of logits."""
    constants = (("BLOCK", min(BLOCK, power_of_2(vocab))),)
    params = tuple(Param(type_, aligned=False) for type_ in _ARGS.values())
    kernel = Kernel(FILE, "sample", params, constants, warps=8, stages=2)
    return Launch(kernel, tuple(_ARGS), (rows, 1, 1))


TEMPLATE = '''
@triton.jit
def sample(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, uniform_ptr, token_ptr, count_ptr,
    BLOCK: tl.constexpr,
):
    """token[r]: logits [rows, $vocab] at temperature[r] (0: the likeliest, of equals the lowest id).

    top_k (0: all) keeps the k likeliest, top_p then the fewest that reach this share of what they weigh
    together; uniform[r] in [0, 1) picks one by weight, in order of ids.  Where a cut goes through equals,
    the lowest ids stay.  One row per program.
    """
    wait_for_launches()
    VOCAB: tl.constexpr = $vocab
    PITCH: tl.constexpr = $pitch
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(count_ptr):
        return
    logits_ptr += row * PITCH
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)

    peak, likeliest = sample_peak(logits_ptr, VOCAB, BLOCK)
    if temperature == 0.0:
        tl.store(token_ptr + row, likeliest)
        return
    # What is kept: keys above the threshold, and the first ``ties`` of those that equal it.
    threshold = tl.full([], 0, tl.uint32)
    ties = tl.full([], VOCAB, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        threshold = sample_kth(logits_ptr, top_k, VOCAB, BLOCK)
        above, _ = sample_above(logits_ptr, threshold, 0, peak, temperature, VOCAB, BLOCK)
        ties = top_k - above
    _, total = sample_above(logits_ptr, threshold, ties, peak, temperature, VOCAB, BLOCK)
    if top_p < 1.0:
        wanted = top_p * total
        kth, kept = threshold, ties
        threshold = sample_nucleus(logits_ptr, wanted, kth, peak, temperature, VOCAB, BLOCK)
        above, mass = sample_above(logits_ptr, threshold, 0, peak, temperature, VOCAB, BLOCK)
        each = tl.exp((key_value(threshold) - peak) / temperature)
        more = tl.maximum(tl.ceil((wanted - mass) / each).to(tl.int32), 1)
        ties = tl.where(threshold == kth, tl.minimum(more, kept), more)
        _, total = sample_above(logits_ptr, threshold, ties, peak, temperature, VOCAB, BLOCK)
    token = sample_draw(
        logits_ptr, tl.load(uniform_ptr + row) * total, threshold, ties, peak, temperature, VOCAB, BLOCK
    )
    tl.store(token_ptr + row, token)


@triton.jit
def order_key(x):
    """uint32 numbers in the order of fp32 ``x``."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)  # -0 becomes 0
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def key_value(key):
    """The inverse of order_key."""
    bits = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sample_peak(logits_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit and the lowest id that has it."""
    peak = tl.full([], float("-inf"), tl.float32)
    likeliest = tl.full([], 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, ids < VOCAB, float("-inf"))
        best = tl.max(x, 0)
        first = tl.min(tl.where(x == best, ids, VOCAB), 0)
        likeliest = tl.where(best > peak, first, likeliest)
        peak = tl.maximum(peak, best)
    return peak, likeliest


@triton.jit
def sample_above(
    logits_ptr, threshold, ties, peak, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys are above the threshold, and what they weigh with the first ``ties`` that equal it."""
    above = tl.full([], 0, tl.int32)
    seen = tl.full([], 0, tl.int32)
    weight = tl.full([], 0.0, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, ids < VOCAB, float("-inf"))
        key = order_key(x)
        equal = ((key == threshold) & (ids < VOCAB)).to(tl.int32)
        over = (key > threshold) & (ids < VOCAB)
        kept = over | ((equal == 1) & (seen + tl.cumsum(equal, 0) <= ties))
        weight += tl.sum(tl.where(kept, tl.exp((x - peak) / temperature), 0.0), 0)
        above += tl.sum(over.to(tl.int32), 0)
        seen += tl.sum(equal, 0)
    return above, weight


@triton.jit
def sample_kth(logits_ptr, k, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest key, bit by bit: the largest number that at least k keys reach."""
    found = tl.full([], 0, tl.uint32)
    for i in range(32):
        trial = found | (tl.full([], 1, tl.uint32) << (31 - i))
        reached = tl.full([], 0, tl.int32)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + ids, ids < VOCAB, float("-inf"))
            reached += tl.sum(((order_key(x) >= trial) & (ids < VOCAB)).to(tl.int32), 0)
        found = tl.where(reached >= k, trial, found)
    return found


@triton.jit
def sample_nucleus(
    logits_ptr, wanted, kth, peak, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key such that it and what is above weigh ``wanted``: the k-th, or one above it."""
    found = tl.full([], 0, tl.uint32)
    for i in range(32):
        trial = found | (tl.full([], 1, tl.uint32) << (31 - i))
        weight = tl.full([], 0.0, tl.float32)
        if trial > kth:
            for start in range(0, VOCAB, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                x = tl.load(logits_ptr + ids, ids < VOCAB, float("-inf"))
                counts = (order_key(x) >= trial) & (ids < VOCAB)
                weight += tl.sum(tl.where(counts, tl.exp((x - peak) / temperature), 0.0), 0)
        found = tl.where((trial <= kth) | (weight >= wanted), trial, found)
    return found


@triton.jit
def sample_draw(
    logits_ptr, target, threshold, ties, peak, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The first kept id at which the running weight passes ``target``, or the last kept one."""
    token = tl.full([], -1, tl.int32)
    last = tl.full([], 0, tl.int32)
    seen = tl.full([], 0, tl.int32)
    weight = tl.full([], 0.0, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, ids < VOCAB, float("-inf"))
        key = order_key(x)
        equal = ((key == threshold) & (ids < VOCAB)).to(tl.int32)
        kept = ((key > threshold) & (ids < VOCAB)) | (
            (equal == 1) & (seen + tl.cumsum(equal, 0) <= ties)
        )
        each = tl.where(kept, tl.exp((x - peak) / temperature), 0.0)
        passed = kept & (weight + tl.cumsum(each, 0) > target)
        first = tl.min(tl.where(passed, ids, VOCAB), 0)
        token = tl.where((token < 0) & (first < VOCAB), first, token)
        last = tl.maximum(last, tl.max(tl.where(kept, ids, 0), 0))
        weight += tl.sum(each, 0)
        seen += tl.sum(equal, 0)
    return tl.where(token < 0, last, token)
'''
