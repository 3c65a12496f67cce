"""Weight formats: layout, bounds, hostile shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.ir import quant

# Relative error of one value against the largest of its group, at most.
STEP = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 1e-6, "fp8": 2**-4, "int4": 0.5 / 8 + 2**-8}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 300))


def bound(name: str) -> float:
    return STEP[name.split("-")[0]]


@settings(max_examples=30, deadline=None)
@given(shape=shapes, name=st.sampled_from(quant.NAMES), seed=st.integers(0, 99))
def test_every_value_is_within_a_step(shape: tuple[int, int, int], name: str, seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fmt = quant.parse(name)
    parts = quant.quantize(w, fmt)
    back = quant.dequantize(parts, fmt, shape[-1])
    assert back.shape == w.shape
    # An INT4 group's positive peak may be clipped by one step where the negative one set the scale.
    slack = 2 if fmt.bits == 4 else 1
    assert (back - w).abs().max() <= slack * bound(name) * w.abs().max() + 1e-7


@settings(max_examples=20, deadline=None)
@given(shape=shapes, name=st.sampled_from(quant.NAMES))
def test_bytes_are_what_is_stored(shape: tuple[int, int, int], name: str) -> None:
    fmt = quant.parse(name)
    parts = quant.quantize(torch.ones(shape), fmt)
    assert sum(p.nbytes for p in parts.values()) == shape[0] * fmt.bytes(*shape[1:])
    assert tuple(parts) == fmt.parts


@pytest.mark.parametrize("name", quant.NAMES)
def test_zeros_stay_zero(name: str) -> None:
    fmt = quant.parse(name)
    parts = quant.quantize(torch.zeros(2, 5, 33), fmt)
    assert quant.dequantize(parts, fmt, 33).eq(0).all()


@pytest.mark.parametrize("name", quant.NAMES)
def test_meta_tensors_give_the_same_shapes(name: str) -> None:
    fmt = quant.parse(name)
    real = quant.quantize(torch.randn(2, 130, 67), fmt)
    meta = quant.quantize(torch.randn(2, 130, 67, device="meta"), fmt)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
        k: (v.shape, v.dtype) for k, v in meta.items()
    }


def test_int4_groups_do_not_touch_each_other() -> None:
    fmt = quant.parse("int4-g32")
    w = torch.randn(4, 96)
    far = w.clone()
    far[:, 64:] *= 100
    near, after = (quant.dequantize(quant.quantize(t, fmt), fmt, 96) for t in (w, far))
    assert torch.equal(near[:, :64], after[:, :64])


def test_fp8_blocks_follow_the_published_convention() -> None:
    """weight = q * scale with fp32 scales [ceil(N/128), ceil(K/128)], as DeepSeek's weight_scale_inv."""
    w = torch.randn(200, 300)
    parts = quant.quantize(w, quant.parse("fp8"))
    assert parts["scale"].shape == (2, 3)
    assert parts["q"].dtype == torch.float8_e4m3fn
    block = parts["q"][128:, 256:].float() * parts["scale"][1, 2]
    torch.testing.assert_close(block, quant.dequantize(parts, quant.parse("fp8"), 300)[128:, 256:])


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match="int3"):
        quant.parse("int3")
