"""Device functions that the emitted kernels share."""

import triton
import triton.language as tl


@triton.jit
def square(x):
    return x * x


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def softplus(x):
    # log(1 + e^x) without overflow; past 20 it is x to the last bit.
    small = tl.minimum(x, 20.0)
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(small)))


@triton.jit
def to(x, pointer):
    """fp32 ``x`` as what ``pointer`` points at."""
    return x.to(pointer.dtype.element_ty)


@triton.jit
def decode_fp8(q, MATH: tl.constexpr):
    """Finite E4M3 numbers, or their bits where the architecture does not know them, as bf16 or fp32.

    Exponent and fraction in the place of those of a bf16 number give one that is 2^120 times too small, also
    where they are subnormal.
    """
    if q.dtype == tl.uint8:
        q = q.to(tl.int16)
        bits = ((q & 0x80) << 8) | ((q & 0x7F) << 4)
        return bits.to(tl.bfloat16, bitcast=True).to(MATH) * 1.329227995784916e36
    else:
        return q.to(tl.float16).to(tl.float32).to(MATH)
