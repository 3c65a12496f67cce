"""Device functions: products of activations with weights in every format.

A tile is computed as W x^T: decoded weights are then the operand that tensor cores take from registers, and
few tokens are the short side of the product.  Activations are rounded to bf16.  Weights are bf16 exactly, for
scales multiply the fp32 sums: once at the end (INT8), or after every group of inputs that shares one (INT4,
FP8).  FP32 weights meet activations in fp32, and FP8 weights may meet E4M3 ones.

Formats are "fp32", "bf16", "int8", "int4" and "fp8", laid out as ir/quant.py has it, INT4 in halves
(ir/packing.py): inputs in chunks of 128, the first 64 of a chunk in the low nibbles of its 64 bytes.  "e4m3"
stands for FP8 weights that meet E4M3 activations.
"""

import triton
import triton.language as tl

from .support import decode_fp8


@triton.jit
def tile_of(
    tile, rows,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Which block of rows and of columns a tile is, of as many as cover [rows, N].

    Tiles in a row share GROUP_M blocks of rows, and so programs that run together read each block of weights
    once.
    """
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = tile // (GROUP_M * across) * GROUP_M
    high = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)  # the last group may be lower
    at = tile % (GROUP_M * across)
    return first + at % high, at // high


@triton.jit
def below(at, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """at < COUNT, for parts of blocks; where blocks fill COUNT, a constant, so that masks vanish."""
    if (COUNT + BLOCK - 1) // BLOCK * BLOCK == COUNT:
        return tl.full(at.shape, True, tl.int1)
    else:
        return at < COUNT


@triton.jit
def product(
    x, rows, inside, w, scale_ptr, col, k_begin, k_end,
    X_PITCH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32: the sum over k in [k_begin, k_end) of x[rows, k] W[col ... col + BN - 1, k], W [N, K].

    ``rows`` [BM] are int64, those that are not ``inside`` count as zeros, and so do columns from N on;
    ``col`` is a multiple of BN.  ``k_begin`` is a multiple of BLOCK_K, and so is ``k_end`` if it is not K.
    BLOCK_K is 128 for INT4, and for FP8 it divides 128; FP8 may come as u8, where the architecture does not
    know it.  Formats without a scale take any ``scale_ptr``.

    x and w are pointers; or both are descriptors of tiles [BM, BLOCK_K] and [BN, BLOCK_K], which know where
    the matrices end, and ``rows`` is the first of the rows.
    """
    acc, _ = _products(
        x, x, rows, inside, w, scale_ptr, col, k_begin, k_end,
        X_PITCH, N, K, FORMAT, GROUP, BLOCK_N, BLOCK_K, False,
    )  # fmt: skip
    return tl.trans(acc)


@triton.jit
def product_pair(
    x, rows, inside, w, scale_ptr, col, k_begin, k_end,
    X_PITCH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Two products at once, for W of 2 N rows: with those from ``col`` and from N + ``col`` on."""
    acc0, acc1 = _products(
        x, x, rows, inside, w, scale_ptr, col, k_begin, k_end,
        X_PITCH, N, K, FORMAT, GROUP, BLOCK_N, BLOCK_K, True,
    )  # fmt: skip
    return tl.trans(acc0), tl.trans(acc1)


@triton.jit
def product_e4m3(
    x, x_scale_ptr, rows, inside, w, scale_ptr, col, k_begin, k_end,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``product`` of FP8 weights with activations that ``round_e4m3`` left in x and x_scale."""
    acc, _ = _products(
        x, x_scale_ptr, rows, inside, w, scale_ptr, col, k_begin, k_end,
        (K + 127) // 128 * 128, N, K, "e4m3", 0, BLOCK_N, 128, False,
    )  # fmt: skip
    return tl.trans(acc)


@triton.jit
def product_pair_e4m3(
    x, x_scale_ptr, rows, inside, w, scale_ptr, col, k_begin, k_end,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``product_pair`` of FP8 weights with activations that ``round_e4m3`` left in x and x_scale."""
    acc0, acc1 = _products(
        x, x_scale_ptr, rows, inside, w, scale_ptr, col, k_begin, k_end,
        (K + 127) // 128 * 128, N, K, "e4m3", 0, BLOCK_N, 128, True,
    )  # fmt: skip
    return tl.trans(acc0), tl.trans(acc1)


@triton.jit
def round_e4m3(x_ptr, row, groups, q_ptr, scale_ptr, X_PITCH: tl.constexpr, K: tl.constexpr):
    """Groups of 128 inputs of a row as E4M3 with a scale: x[row, k] is about q[row, k] scale(row, k / 128).

    Rows of q are padded to whole groups, with zeros.  Scales are [ceil(rows / 128), groups, 128], so that a
    tile of rows finds those of a group side by side.
    """
    GROUPS: tl.constexpr = (K + 127) // 128
    k = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * X_PITCH + k, k < K, 0.0).to(tl.float32)
    q, scale = _to_e4m3(x)
    tl.store(q_ptr + row * (GROUPS * 128) + k, q, k < GROUPS * 128)
    tl.store(scale_ptr + _scale_at(row, groups, GROUPS), scale, groups < GROUPS)


@triton.jit
def store_e4m3(x, rows, inside, col, q_ptr, scale_ptr, K: tl.constexpr):
    """x [BM, 128], columns from ``col`` on of the ``rows`` of a matrix [, K], as ``round_e4m3`` leaves it."""
    GROUPS: tl.constexpr = (K + 127) // 128
    tl.static_assert(x.shape[1] == 128, "a scale is of 128 columns")
    k = col + tl.arange(0, 128)[None, :]
    q, scale = _to_e4m3(tl.where(k < K, x, 0.0))
    tl.store(q_ptr + rows[:, None] * (GROUPS * 128) + k, q, inside[:, None])
    tl.store(scale_ptr + _scale_at(rows, col // 128, GROUPS), scale, inside)


@triton.jit
def _to_e4m3(x):
    """x [groups, 128] as E4M3, and the scale of each group."""
    # NaN gives an infinite scale, so that what is not finite stays so.
    scale = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1) / 448.0
    return (x / tl.where(scale == 0.0, 1.0, scale)[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _scale_at(row, group, GROUPS: tl.constexpr):
    """Where the scale of a row's group of 128 inputs is."""
    return (row // 128 * GROUPS + group) * 128 + row % 128


@triton.jit
def _products(
    x, x_scale_ptr, rows, inside, w, scale_ptr, col, k_begin, k_end,
    X_PITCH: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """The accumulators [BN, BM] of one product, or of two."""
    TILED: tl.constexpr = isinstance(x, tl.tensor_descriptor)
    BLOCK_M: tl.constexpr = inside.shape[0]
    E4M3: tl.constexpr = FORMAT == "e4m3"
    FP8: tl.constexpr = FORMAT == "fp8" or E4M3
    ONE: tl.constexpr = 128 % BLOCK_N == 0  # scale for all columns of a tile
    acc0 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # INT4 bytes whose low nibbles share one scale, and whose high nibbles do.
    STEP: tl.constexpr = 64 if GROUP > 64 else GROUP
    cols = col + tl.arange(0, BLOCK_N)
    there = below(cols, N, BLOCK_N)
    row0 = col if TILED else cols.to(tl.int64)
    row1 = row0 + N
    if E4M3:
        indices = rows + tl.arange(0, BLOCK_M) if TILED else rows
        # Where a row is not inside, any scale will do: a mask would take registers.
        x_scale_at = _scale_at(indices.to(tl.int32), 0, (K + 127) // 128)
    for k0 in range(k_begin, k_end, BLOCK_K):
        # Scales are asked for first: they arrive while the tiles are waited for.
        if FORMAT == "int4":
            tl.static_assert(BLOCK_K == 128, "a block of INT4 is a chunk of 128 inputs")
            for at in tl.static_range(0, 64, STEP):
                k = k0 + at
                scales0 = _int4_scales(scale_ptr, row0, there, k, K, GROUP)
                if PAIR:
                    scales1 = _int4_scales(scale_ptr, row1, there, k, K, GROUP)
                low = _inputs(x, rows, inside, k, STEP, X_PITCH, K, BLOCK_K, FORMAT)
                high = _inputs(x, rows, inside, k + 64, STEP, X_PITCH, K, BLOCK_K, FORMAT)
                byte = k0 // 2 + at + tl.arange(0, STEP)
                acc0 = _add_int4(acc0, low, high, w, scales0, row0, there, byte, K, GROUP)
                if PAIR:
                    acc1 = _add_int4(acc1, low, high, w, scales1, row1, there, byte, K, GROUP)
        else:
            if FP8:
                tl.static_assert(128 % BLOCK_K == 0, "a block of FP8 has one scale")
                scale0 = _fp8_scales(scale_ptr, col, there, k0, K, ONE)
                if PAIR:
                    scale1 = _fp8_scales(scale_ptr, col + N, there, k0, K, ONE and N % 128 == 0)
                if E4M3:
                    x_scale = tl.load(x_scale_ptr + k0 // 128 * 128 + x_scale_at)[None, :]
                    scale0 *= x_scale
                    if PAIR:
                        scale1 *= x_scale
            inputs = _inputs(x, rows, inside, k0, BLOCK_K, X_PITCH, K, BLOCK_K, FORMAT)
            if FP8:
                acc0 += _fp8(inputs, w, row0, there, k0, K, BLOCK_K) * scale0
                if PAIR:
                    acc1 += _fp8(inputs, w, row1, there, k0, K, BLOCK_K) * scale1
            else:
                acc0 = _add(acc0, inputs, w, row0, there, k0, K, BLOCK_K)
                if PAIR:
                    acc1 = _add(acc1, inputs, w, row1, there, k0, K, BLOCK_K)
    if FORMAT == "int8":
        acc0 *= tl.load(scale_ptr + row0, there, 0.0)[:, None]
        if PAIR:
            acc1 *= tl.load(scale_ptr + row1, there, 0.0)[:, None]
    return acc0, acc1


@triton.jit
def _inputs(
    x, rows, inside, k, COUNT: tl.constexpr,
    X_PITCH: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """x[rows, k ... k + COUNT - 1] as [COUNT, rows], in the type that it is multiplied in."""
    if isinstance(x, tl.tensor_descriptor):
        return tl.trans(x.load([rows, k]))
    else:
        ks = k + tl.arange(0, COUNT)
        mask = inside[None, :] & below(ks, K, BLOCK_K)[:, None]
        values = tl.load(x + rows[None, :] * X_PITCH + ks[:, None], mask, 0.0)
        if FORMAT == "e4m3":
            return values
        elif FORMAT == "fp32":
            return values.to(tl.float32)
        else:
            return values.to(tl.bfloat16)


@triton.jit
def _weights(w, row, there, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """W[row, k ... k + BLOCK_K - 1] of formats stored row by row; ``row`` is the first for a descriptor."""
    if isinstance(w, tl.tensor_descriptor):
        return w.load([row, k])
    else:
        ks = k + tl.arange(0, BLOCK_K)
        mask = there[:, None] & below(ks, K, BLOCK_K)[None, :]
        return tl.load(w + row[:, None] * K + ks[None, :], mask, 0.0)


@triton.jit
def _add(acc, x, w, row, there, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + W[row, k] x of weights that need no scale, or one at the end."""
    weights = _weights(w, row, there, k, K, BLOCK_K).to(x.dtype)
    return tl.dot(weights, x, acc, input_precision="ieee")


@triton.jit
def _fp8(x, w, row, there, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """W[row, k] x without scales."""
    weights = _weights(w, row, there, k, K, BLOCK_K)
    if x.dtype == tl.bfloat16:
        weights = decode_fp8(weights, tl.bfloat16)
    return tl.dot(weights, x)


@triton.jit
def _fp8_scales(scale_ptr, first, there, k, K: tl.constexpr, ONE: tl.constexpr):
    """Scales [BN, 1] of weights from row ``first`` and input k on; a number if it is ONE for all of them."""
    GROUPS: tl.constexpr = (K + 127) // 128
    if ONE:
        return tl.load(scale_ptr + first // 128 * GROUPS + k // 128)
    else:
        row = first + tl.arange(0, there.shape[0])
        return tl.load(scale_ptr + row // 128 * GROUPS + k // 128, there, 0.0)[:, None]


@triton.jit
def _add_int4(
    acc, low, high, w_ptr, scales, row, there, byte, K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """acc + the products of weights in low nibbles with low inputs, and in high nibbles with high ones."""
    PITCH: tl.constexpr = (K + 127) // 128 * 64
    q = tl.load(w_ptr + row[:, None] * PITCH + byte[None, :], there[:, None], 0).to(tl.int16)
    at_low, at_high = scales
    if GROUP == 128:
        partial = tl.dot(decode_int4(q & 15), low)
        return acc + tl.dot(decode_int4(q >> 4), high, partial) * at_low
    else:
        acc += tl.dot(decode_int4(q & 15), low) * at_low
        return acc + tl.dot(decode_int4(q >> 4), high) * at_high


@triton.jit
def _int4_scales(scale_ptr, row, there, k, K: tl.constexpr, GROUP: tl.constexpr):
    """Scales [BN, 1] of the groups of inputs k and k + 64; padding, all zeros, takes that of the last."""
    LAST: tl.constexpr = (K - 1) // GROUP
    scales = scale_ptr + row * (LAST + 1)
    low = tl.load(scales + tl.minimum(k // GROUP, LAST), there, 0.0).to(tl.float32)[:, None]
    if GROUP == 128:
        return low, low
    else:
        high = tl.load(scales + tl.minimum((k + 64) // GROUP, LAST), there, 0.0).to(tl.float32)
        return low, high[:, None]


@triton.jit
def decode_int4(nibbles):
    """i16 values 0 ... 15 as bf16 -8 ... 7: 0x43vv are the bits of 128 + vv."""
    return (nibbles | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
