"""What a cubin is, read from itself and from its PTX: no tool, no GPU."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Attributes of .nv.info sections: (format, attribute, size or value), then bytes if the format says so.
_SIZED = 4
_PARAM, _FRAME_SIZE, _REGISTERS, _CUDA, _THREADS = 0x17, 0x11, 0x2F, 0x37, 0x10
_PRODUCT = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.([\w.:]+)")
_KIND = re.compile(r"kind::(\w+)")
_ELSEWHERE = re.compile(r"\b(?:bra|brx|call|ret|exit|cp|(?:ld|st|atom|red)(?!\.param|\.shared))\b")
_NUMBER = re.compile(r"(?:b|t)?f\d+|e\dm\d|[su]\d+")  # number types in an instruction's name


@dataclass(frozen=True)
class Cubin:
    """The resources of a kernel, per thread, and how it is launched: blocks of ``threads`` (0: of any size).

    ``params`` are (offset, size) of what it takes, in order; ``cuda`` is the toolkit's version, which a
    driver must know.
    """

    registers: int
    local_bytes: int  # the stack: registers that were spilled, and arrays
    params: tuple[tuple[int, int], ...]
    threads: int
    cuda: str


def read_cubin(data: bytes) -> Cubin:
    """The one kernel of an ELF image; of functions that it calls, the greatest need."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF image")
    found: dict[int, list[bytes]] = {}
    for attribute, value in _attributes(data):
        found.setdefault(attribute, []).append(value)
    version = _last(found[_CUDA][0])
    return Cubin(
        registers=max(map(_last, found[_REGISTERS])),
        local_bytes=max(map(_last, found.get(_FRAME_SIZE, [bytes(4)]))),
        params=tuple((at, size) for _, at, size in sorted(map(_param, found.get(_PARAM, [])))),
        threads=math.prod(struct.unpack("<III", found[_THREADS][0])) if _THREADS in found else 0,
        cuda=f"{version // 10}.{version % 10}",
    )


def _param(value: bytes) -> tuple[int, int, int]:
    """Number, offset and size of a parameter."""
    _, number, offset, facts = struct.unpack("<IHHI", value)
    return number, offset, facts >> 18


def _last(value: bytes) -> int:
    """Values are [index of the function,] number."""
    return int.from_bytes(value[-4:], "little")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    for name, section in _sections(data):
        at = 0
        while name.startswith(".nv.info") and at < len(section):
            form, attribute, size = struct.unpack_from("<BBH", section, at)
            at += 4
            if form == _SIZED:
                yield attribute, section[at : at + size]
                at += size


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    pitch, count, names = struct.unpack_from("<HHH", data, 0x3A)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * pitch) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        name = data[start : data.index(b"\0", start)].decode()
        kept = name.startswith(".nv.info")
        yield name, data[header[4] : header[4] + header[5]] if kept else b""


def tensor_cores(ptx: str) -> list[str]:
    """Instructions that use tensor cores, with the type of what they multiply.

    >>> tensor_cores("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%r1")
    ['wgmma e4m3']
    >>> tensor_cores("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1")
    ['mma bf16']
    >>> tensor_cores("@%p1 tcgen05.mma.cta_group::1.kind::f8f6f4 [ %r1 + 0 ]")
    ['tcgen05 f8f6f4']
    """
    return sorted({f"{name.split('.')[0]} {_type(rest)}" for name, rest in _PRODUCT.findall(ptx)})


def _type(rest: str) -> str:
    """Types are those of the sum, the left and the right matrix; tcgen05 says a kind that covers them."""
    types = [part for part in rest.split(".") if _NUMBER.fullmatch(part)]
    if len(types) > 1:
        return types[1]
    kind = _KIND.search(rest)
    return kind[1] if kind else "?"


def traps(ptx: str) -> bool:
    """Whether a kernel does nothing but stop: what Triton makes of one that it found no room for.

    >>> traps("{\\n\\ttrap;\\n\\texit;\\n}"), traps("{\\n\\tst.global.b32 [%rd1], %r1;\\n}")
    (True, False)
    """
    return "trap;" in ptx and not re.search(r"\b(st|cp|red|atom)\.", ptx)


def waits_first(ptx: str) -> bool:
    """Whether a kernel waits for the launches before it ahead of anything that they could have to do with.

    >>> waits_first("{\\n\\tgriddepcontrol.wait;\\n\\tld.global.b32 %r1, [%rd1];\\n}")
    True
    >>> waits_first("{\\n\\tld.global.b32 %r1, [%rd1];\\n\\tgriddepcontrol.wait;\\n}")
    False
    """
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    # In the code that every way through the kernel begins with; shared memory is nobody else's.
    return bool(wait) and not _ELSEWHERE.search(before)


def ptx_header(ptx: str) -> tuple[str, str]:
    """Version of the language, and target.

    >>> ptx_header(".version 8.7\\n.target sm_90a\\n.address_size 64\\n")
    ('8.7', 'sm_90a')
    """
    version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    target = re.search(r"^\.target ([^\s,]+)", ptx, re.MULTILINE)
    if version is None or target is None:
        raise ValueError("not PTX")
    return version[1], target[1]
