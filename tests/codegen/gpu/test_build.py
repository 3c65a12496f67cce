"""Cubins are built here, without a GPU: what they are, that they are the same again, and what goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenmill import codegen
from tokenmill.codegen.triton.binary import read_cubin
from tokenmill.codegen.triton.build import BINARIES, GpuBuild, build_gpu, toolchain
from tokenmill.codegen.triton.target import TARGETS, parse_target
from tokenmill.errors import BuildFailed, KernelTooLarge, MissingExtra
from tokenmill.ir.plan import (
    KINDS,
    Attend,
    Device,
    Embed,
    Experts,
    LatentAttend,
    Linear,
    Norm,
    Plan,
    Pointwise,
    SelectRows,
)
from tokenmill.passes.narrow import narrow
from tokenmill.runtime.schedule import read_binary, read_launch

from ..decoder import decoder_plan
from ..harness import Kernels

SPECS = (
    Norm(96, 1e-6, residual=True),
    Pointwise(40, "silu(x0) * x1", ("row", "row")),
    Embed(11, 40, "bf16"),
    SelectRows(40),
)
SUPPORT = "import triton\nimport triton.language as tl\n"
PRODUCT = '''
@triton.jit
def product(x_ptr, w_ptr, out_ptr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out = x w^T, x [M, K], w [N, K]."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, BLOCK)
    out = tl.zeros((M, N), tl.float32)
    for at in range(0, K, BLOCK):
        x = tl.load(x_ptr + m * K + at + k[None, :])
        w = tl.load(w_ptr + n[None, :] * K + at + k[:, None])
        out = tl.dot(x, w, out)
    tl.store(out_ptr + m * N + n[None, :], out)
'''


class Emitted(Kernels):
    """Text for a GPU, which nothing runs."""

    device: ClassVar[Device] = "cuda"

    def planned(self, plan: Plan) -> Plan:
        return narrow(plan)


def emitted(target: str) -> dict[str, str]:
    return Emitted(SPECS, target, column=0).files


def by_hand(text: str, function: str = "product", dtype: str = "*bf16", **constants: int) -> Any:
    """As if ``text`` had been emitted for two operands of ``dtype``."""
    binary = {
        "name": f"{function}.0",
        "file": "hand_kernels.py",
        "function": function,
        "params": [[dtype, True], [dtype, True], ["*fp32", True]],
        "constants": constants,
        "warps": 4,
        "stages": 3,
    }
    launch = {"binary": binary["name"], "grid": [1, 1, 1], "args": ["x", "w", "out"]}
    buckets = [{"tokens": tokens, "steps": [-1, 0]} for tokens in (1, 2)]
    schedule = {"binaries": [binary], "groups": [[launch]], "buckets": buckets}
    return {
        "support.py": SUPPORT,
        "hand_kernels.py": f"from .support import *\n\n{text}",
        "schedule.json": json.dumps(schedule),
    }


def build_some(files: dict[str, str], target: str, wanted: Callable[[Any], bool]) -> GpuBuild:
    """What is built of some binaries."""
    schedule = json.loads(files["schedule.json"])
    schedule["binaries"] = [entry for entry in schedule["binaries"] if wanted(entry)]
    schedule["buckets"] = []
    return build_gpu(files | {"schedule.json": json.dumps(schedule)}, parse_target(target))


def launched(files: dict[str, str], bucket: int) -> list[str]:
    """Binaries of a bucket, in order."""
    schedule = json.loads(files["schedule.json"])
    groups = [schedule["groups"][step] for step in schedule["buckets"][bucket]["steps"]]
    return [launch["binary"] for group in groups for launch in group]


def bf16_core(target: str) -> str:
    """The instruction that multiplies tall tiles of bf16."""
    return {"sm_90": "wgmma bf16", "sm_100": "tcgen05 f16"}.get(target, "mma bf16")


def tool(name: str, *args: str) -> str:
    """What a program inside the Triton wheel says."""
    path = str(resources("triton") / "backends" / "nvidia" / "bin" / name)
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def assert_launched_as_built(built: GpuBuild) -> None:
    """The runtime passes every kernel as many addresses as its machine code takes, in blocks of its size."""
    binaries = {
        entry["name"]: read_binary(entry, asdict(built.binaries[entry["name"]]))
        for entry in built.schedule["binaries"]
    }
    launches = [launch for group in built.schedule["groups"] for launch in group]
    launched = [read_launch(data, binaries) for data in launches if data["binary"] in binaries]
    assert {launch.binary.name for launch in launched} == binaries.keys()
    for launch in launched:
        cubin = read_cubin(built.files[f"{launch.binary.name}.cubin"])
        passed = [*launch.args, *launch.binary.scratch]
        assert cubin.params == tuple((8 * i, 8) for i in range(len(passed))), launch.binary.name
        assert cubin.threads == launch.binary.threads


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories go."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture(scope="module")
def hopper() -> GpuBuild:
    return build_gpu(emitted("sm_90"), parse_target("sm_90"))


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_built_anywhere(name: str) -> None:
    files, heard = emitted(name), []
    built = build_gpu(files, parse_target(name), lambda done, total: heard.append((done, total)))
    entries = json.loads(files["schedule.json"])["binaries"]
    assert heard == [(i, len(entries)) for i in range(len(entries) + 1)]
    assert set(built.files) == {BINARIES} | {
        f"{entry['name']}.{kind}" for entry in entries for kind in ("cubin", "ptx")
    }
    for entry in entries:
        binary = built.binaries[entry["name"]]
        assert binary.kernel.encode() + b"\0" in built.files[f"{entry['name']}.cubin"]
        assert binary.ptx_target.removesuffix("a") == name
        assert binary.threads == 32 * entry["warps"]
        assert binary.scratch == [{"bytes": 0, "align": 1}] * 2  # two pointers that may be null
        assert 8 <= binary.registers <= 64
        assert not binary.local_bytes
        assert not binary.tensor_cores


def test_same_text_gives_same_bytes(
    hopper: GpuBuild, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another directory, with an empty cache, whatever the user has set for Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for switch in ("DISABLE_PTXAS_OPT", "TRITON_FORCE_DISABLE_FP_FUSION", "TRITON_INTERPRET"):
        monkeypatch.setenv(switch, "1")
    again = build_gpu(emitted("sm_90"), parse_target("sm_90"))
    assert again.files == hopper.files
    assert (tmp_path / "cache").is_dir()
    assert not any(str(tmp_path.parent).encode() in data for data in again.files.values())


def test_resources_are_what_cuobjdump_says(hopper: GpuBuild, tmp_path: Path) -> None:
    wide = by_hand(PRODUCT, K=64, M=64, N=512, BLOCK=16)  # 256 sums per thread: some spill
    spilled = build_gpu(wide, parse_target("sm_80"))
    for built in (hopper, spilled):
        for name, binary in built.binaries.items():
            path = tmp_path / f"{name}.cubin"
            path.write_bytes(built.files[path.name])
            said = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", str(path)))
            assert said is not None
            assert (binary.registers, binary.local_bytes) == tuple(map(int, said.groups()))
            sizes = re.findall(
                r"Ordinal : 0x(\w+)\s+Offset +: 0x(\w+)\s+Size +: 0x(\w+)",
                tool("cuobjdump", "-elf", str(path)),
            )
            params = sorted(tuple(int(number, 16) for number in row) for row in sizes)
            assert read_cubin(path.read_bytes()).params == tuple(row[1:] for row in params)
    (row,) = spilled.facts()
    assert row["local_bytes"] > 0


def test_facts_say_which_buckets_a_binary_serves(hopper: GpuBuild) -> None:
    rows = hopper.facts()
    assert [row["binary"] for row in rows] == list(hopper.binaries)
    assert rows[0]["function"] == "rms_norm_w96_residual"
    assert rows[0]["buckets"][:3] == [1, 2, 4]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(
    ("name", "dtype", "instruction"),
    [
        ("sm_80", "*bf16", "mma bf16"),
        ("sm_89", "*fp8e4nv", "mma e4m3"),
        ("sm_90", "*bf16", "wgmma bf16"),
        ("sm_90", "*fp8e4nv", "wgmma e4m3"),
        ("sm_100", "*fp8e4nv", "tcgen05 f8f6f4"),
        ("sm_120", "*fp8e4nv", "mma e4m3"),
    ],
)
def test_tensor_cores_are_named(name: str, dtype: str, instruction: str, tmp_path: Path) -> None:
    """The PTX says so, and the machine code has the instruction of that name."""
    files = by_hand(PRODUCT, dtype=dtype, K=128, M=64 if name == "sm_90" else 128, N=32, BLOCK=64)
    built = build_gpu(files, parse_target(name))
    (row,) = built.facts()
    assert row["tensor_cores"] == instruction
    assert row["buckets"] == [1, 2]
    path = tmp_path / "product.cubin"
    path.write_bytes(built.files["product.0.cubin"])
    mnemonic = {
        ("mma", False): "HMMA.",
        ("mma", True): "QMMA.",
        ("wgmma", False): "HGMMA.",
        ("wgmma", True): "QGMMA.",
        ("tcgen05", True): "UTCQMMA",
    }[instruction.split()[0], "8" in dtype]
    assert mnemonic in tool("nvdisasm", "-c", str(path))


def test_the_machine_code_waits_before_it_reads(hopper: GpuBuild, tmp_path: Path) -> None:
    for name, binary in hopper.binaries.items():
        assert binary.waits, name
        path = tmp_path / f"{name}.cubin"
        path.write_bytes(hopper.files[path.name])
        code = tool("nvdisasm", "-c", str(path))
        found = re.findall(r"\b(ACQBULK|PREEXIT|LDG|STG|BRA|EXIT)\b", code)
        assert found[:3] == ["ACQBULK", "PREEXIT", "LDG"], name


def test_a_kernel_that_reads_before_it_waits_does_not_count_as_waiting() -> None:
    wait = "    tl.extra.cuda.gdc_wait()\n"
    late = PRODUCT.replace("    tl.store(", f"{wait}    tl.store(")
    some = PRODUCT.replace(
        "    out = tl.z", f"    if tl.program_id(0) == 1:\n    {wait}    out = tl.z"
    )
    for text in (PRODUCT, late, some):
        built = build_gpu(by_hand(text, K=64, M=16, N=16, BLOCK=32), parse_target("sm_90"))
        assert [binary.waits for binary in built.binaries.values()] == [False]


def test_a_kernel_that_does_not_fit_is_refused(temporary: Path) -> None:
    files = by_hand(PRODUCT, K=1024, M=128, N=256, BLOCK=128)
    with pytest.raises(KernelTooLarge, match=r"product needs \d+ bytes of shared memory; sm_80"):
        build_gpu(files, parse_target("sm_80"))
    assert not list(temporary.iterdir())


UNKNOWN_NAME = PRODUCT.replace("tl.dot(", "tl.dott(")
FOREIGN = PRODUCT.replace(
    "tl.dot(x, w, out)",
    'tl.inline_asm_elementwise("nonsense $0, $1;", "=f,f", [out], tl.float32, False, 1)',
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def product(:\n", "SyntaxError"),
        (UNKNOWN_NAME, "dott"),
        ("def other(): pass", "no attribute 'product'"),
        (PRODUCT.replace("M: ", "ROWS: "), "ROWS"),
        (FOREIGN, "ptxas"),
        ("import os\nos._exit(7)", "ended with status 7"),
    ],
    ids=["syntax", "name", "function", "constants", "assembly", "crash"],
)
def test_failures_name_file_and_function(text: str, reason: str, temporary: Path) -> None:
    files = by_hand(text, K=64, M=16, N=16, BLOCK=32)
    with pytest.raises(BuildFailed, match=r"product in hand_kernels\.py for sm_80") as raised:
        build_gpu(files, parse_target("sm_80"))
    assert reason in raised.value.message
    assert str(temporary) not in raised.value.message
    assert not list(temporary.iterdir())


def test_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tokenmill\[triton\]'"):
        build_gpu({}, parse_target("sm_90"))
    monkeypatch.undo()
    assert re.fullmatch(r"triton \d+\.\d+.*", toolchain())


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("target", "products"),
    [("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("sm_120", "mma")],
)
def test_large_products_copy_tiles_by_descriptors(
    target: str, products: str, fmt: str, tmp_path: Path
) -> None:
    """The copying instruction is in the machine code, and the descriptors in memory of each block."""
    spec = Linear(2048, 512, fmt, parts=2, epilogue="silu(acc0) * acc1")
    files = Emitted([spec], target, column=0).files
    schedule = json.loads(files["schedule.json"])
    launch = schedule["groups"][schedule["buckets"][-1]["steps"][0]][-1]
    name = launch["binary"]
    assert launch["per_sm"] > 0
    built = build_some(files, target, lambda entry: entry["name"] == name)
    assert_launched_as_built(built)
    binary = built.binaries[name]
    assert [s["bytes"] > 0 for s in binary.scratch] == [True, False]
    assert binary.scratch[0]["align"] == 128
    assert binary.local_bytes <= 64
    (cores,) = binary.tensor_cores
    assert cores.split()[0] == products
    path = tmp_path / "product.cubin"
    path.write_bytes(built.files[f"{name}.cubin"])
    assert "UTMALDG" in tool("nvdisasm", "-c", str(path))


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "sm_120"])
def test_many_tokens_multiply_fp8_experts_in_e4m3(target: str) -> None:
    """The instruction is there, and no register is spilled."""
    spec = Experts(1, 1, 7168, 256, "fp8", "fp8")
    files = Emitted([spec], target, column=0).files
    wanted = set(launched(files, -1))
    built = build_some(files, target, lambda entry: entry["name"] in wanted)
    assert_launched_as_built(built)
    assert not any(binary.local_bytes for binary in built.binaries.values())
    products = [name for name in wanted if "_sorted_" in name]
    assert len(products) == 2
    core = {"sm_90": "wgmma e4m3", "sm_100": "tcgen05 f8f6f4"}.get(target, "mma e4m3")
    for name in products:
        assert "_e4m3." in name
        assert built.binaries[name].tensor_cores == [core]


@pytest.mark.parametrize("target", TARGETS)
def test_expanded_attention_of_wide_heads_compiles(target: str) -> None:
    """DeepSeek-V3's sizes: keys and values are made and attended on tensor cores, and little is spilled."""
    spec = LatentAttend(128, 128, 64, 512, 128, 0.1, "fp8", absorb_below=128)
    files = Emitted((spec,), target, column=0).files
    wanted = launched(files, -1)[-3:]
    built = build_some(files, target, lambda entry: entry["name"] in wanted)
    functions = {name.rpartition(".")[0].rpartition("_")[2] for name in built.binaries}
    assert functions == {"expand", "expanded"}
    for name, binary in built.binaries.items():
        expected = bf16_core(target)
        assert binary.tensor_cores == [expected]
        assert binary.local_bytes <= 80, f"{name} spills {binary.local_bytes} bytes"


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("target", TARGETS)
def test_absorbed_attention_of_many_heads_spills_nothing(target: str, fmt: str) -> None:
    """DeepSeek-V3's sizes, decoding and beside long prompts; a few values may wait for the loop to end."""
    spec = LatentAttend(128, 128, 64, 512, 128, 0.1, fmt, absorb_below=128)
    files = Emitted((spec,), target, column=0).files
    used = launched(files, 0) + launched(files, -1)
    absorbed = (fmt, f"{fmt}_some")
    built = build_some(
        files, target, lambda b: b["name"] in used and b["function"].endswith(absorbed)
    )
    assert len(built.binaries) == 2
    for name, binary in built.binaries.items():
        expected = bf16_core(target)
        assert binary.tensor_cores == [expected]
        assert binary.local_bytes <= 48, f"{name} spills {binary.local_bytes} bytes"


@pytest.mark.parametrize(
    ("target", "heads", "latent", "fmt"),
    [("sm_89", 32, 640, "int8"), ("sm_90", 32, 1024, "fp8"), ("sm_100", 128, 576, "bf16")],
)
def test_absorbed_attention_of_wide_latents_fits(
    target: str, heads: int, latent: int, fmt: str
) -> None:
    """Their tiles have fewer rows: registers, shared memory or tensor memory would not do for more."""
    spec = LatentAttend(heads, 128, 64, latent, 128, 0.1, fmt, absorb_below=128)
    files = Emitted((spec,), target, column=0).files
    used, absorbed = launched(files, -1), (fmt, f"{fmt}_some")
    built = build_some(
        files, target, lambda b: b["name"] in used and b["function"].endswith(absorbed)
    )
    (binary,) = built.binaries.values()
    assert binary.shared_bytes <= parse_target(target).shared_bytes


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_caches_in_bytes_are_read_ahead_and_by_the_line(fmt: str, target: str) -> None:
    """Of few queries: 16 bytes of a row are copied at once, and none of them is gathered alone."""
    specs = Attend(32, 8, 128, 128, 0.1, fmt), LatentAttend(16, 128, 64, 512, 128, 0.1, fmt)
    files = Emitted(specs, target, column=0).files
    first = launched(files, 0)
    built = build_some(
        files, target, lambda b: b["name"] in first and b["function"].endswith(f"_{fmt}")
    )
    assert len(built.binaries) == 2
    for name, binary in built.binaries.items():
        ptx = built.files[f"{name}.ptx"].decode()
        assert not re.search(r"ld\.shared\.[bsu]8", ptx)
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global.*, 0x(\w+), ", ptx)
        assert set(sizes) == {"10", "4"}, "rows and scales"
        keys = 64 if name.startswith("attend") else 32  # 16 bytes of each go to a thread at once
        width = 2 * 128 if name.startswith("attend") else 512
        assert sizes.count("10") >= 2 * keys * width // 16 // binary.threads, "two blocks or more"
        assert binary.local_bytes <= 8


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_kernel_compiles(target: str) -> None:
    """The kernels of a decode step and of a prompt of a decoder that has all kinds."""
    files = codegen.emit(narrow(replace(decoder_plan(), device="cuda")), target)
    schedule = json.loads(files["schedule.json"])
    # Not all buckets: the time is in the binaries.
    buckets = [bucket for bucket in schedule["buckets"] if bucket["tokens"] in (1, 80)]
    groups = {i for bucket in buckets for i in [*bucket["steps"], bucket["sample"]] if i >= 0}
    wanted = {launch["binary"] for i in groups for launch in schedule["groups"][i]}
    schedule["binaries"] = [b for b in schedule["binaries"] if b["name"] in wanted]
    schedule["buckets"] = buckets
    built = build_gpu(files | {"schedule.json": json.dumps(schedule)}, parse_target(target))
    assert_launched_as_built(built)
    kinds = {b["file"].removesuffix("_kernels.py") for b in schedule["binaries"]}
    assert kinds == KINDS.keys() - {"custom", "extern"} | {"sample"}
    for name, binary in built.binaries.items():
        assert binary.local_bytes <= 64, f"{name} spills {binary.local_bytes} bytes"
        assert binary.waits == parse_target(target).dependent_launch, name
    cores = {core for binary in built.binaries.values() for core in binary.tensor_cores}
    expected = bf16_core(target)
    assert expected in cores
