"""benchmarks/gpu.py where there is no GPU: its list of cases, what it builds, its driver, its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenmill import codegen
from tokenmill.codegen.triton import experts
from tokenmill.errors import KernelFailed
from tokenmill.ir import plan as plans
from tokenmill.ir.plan import Experts, LatentAttend, Linear, Norm, Pointwise, Route
from tokenmill.ir.router import RouterSpec

from .runtime.interpreted import InterpretedDevice

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import _gpu_build as gpu_build  # noqa: E402
import _gpu_cases as gpu_cases  # noqa: E402
import _gpu_run as gpu_run  # noqa: E402
import gpu  # noqa: E402
from _gpu_cases import Case, Suite  # noqa: E402

NO_PYDANTIC = "import sys; sys.modules['pydantic'] = None; sys.path.insert(0, {path!r}); "


def named(files, target):
    """Instead of binaries, files that name their kernel, as InterpretedDevice wants them."""
    schedule = json.loads(files["schedule.json"])
    facts = {
        b["name"]: {
            "kernel": b["function"],
            "threads": 32 * b["warps"],
            "shared_bytes": 0,
            "scratch": [],
        }
        for b in schedule["binaries"]
    }
    found = {
        f"{b['name']}.cubin": f"cubin of {b['function']}".encode() for b in schedule["binaries"]
    }
    return found | {"binaries.json": json.dumps({"binaries": facts}).encode()}


# --- cases ------------------------------------------------------------------------------------------


def of(kind, ours=True):
    return [case for case in gpu_cases.cases() if case.kind == kind and case.ours == ours]


def test_every_product_is_there():
    wanted = {
        (f"{n}x{k}", f"ours {fmt}", rows)
        for n, k in ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))
        for fmt in ("bf16", "fp8", "int4-g128")
        for rows in (1, 16, 64, 512, 4096)
    }
    pointed = {
        (what, f"{ours} pointers", rows)
        for what, ours, rows in wanted
        if rows >= 512 and ours in ("ours bf16", "ours fp8")
    }
    assert {(c.what, c.contender, c.size) for c in of("gemm")} == wanted | pointed
    peers = {(c.what, c.size) for c in of("gemm", ours=False) if c.contender == "cublas bf16"}
    assert peers == {(what, size) for what, _, size in wanted}


def test_every_mixture_is_there():
    wanted = {
        (mixture, f"ours {fmt}", tokens)
        for mixture in ("deepseek-v3", "qwen3-30b")
        for fmt in ("bf16", "fp8", "int4-g128")
        for tokens in (1, 8, 64, 512, 4096)
    }
    assert {(c.what, c.contender, c.size) for c in of("experts")} == wanted
    assert gpu_cases.MIXTURES["deepseek-v3"] == (256, 8, 7168, 2048)
    assert gpu_cases.MIXTURES["qwen3-30b"] == (128, 8, 2048, 768)
    peers = {c.contender for c in of("experts", ours=False)}
    assert peers == {"grouped_mm bf16", "compiled grouped_mm bf16"}


def test_every_context_is_there():
    wanted = {
        (f"{heads} heads, {context}", f"ours {fmt}", batch)
        for heads in (16, 128)
        for context in (1024, 4096, 32768)
        for fmt in ("bf16", "int8", "fp8")
        for batch in (1, 32, 128)
    }
    assert {(c.what, c.contender, c.size) for c in of("mla")} == wanted


def test_names_are_distinct_and_steps_are_of_their_format():
    found = gpu_cases.cases()
    assert len({case.name for case in found}) == len(found)
    for suite in gpu_cases.SUITES.values():
        for case in found:
            if case.suite == suite.name:
                fmt = case.contender.removesuffix(" pointers").split()[-1]
                spec = suite.specs[case.step]
                assert case.size in suite.buckets
                match spec:
                    case Linear():
                        assert (f"{spec.n}x{spec.k}", spec.format) == (case.what, fmt)
                    case Experts():
                        sizes = (spec.experts, spec.top_k, spec.hidden, spec.inter)
                        assert sizes == gpu_cases.MIXTURES[case.what]
                        assert spec.gate_up_format == spec.down_format == fmt
                    case LatentAttend():
                        assert case.what.startswith(f"{spec.heads} heads")
                        assert spec.cache_format == fmt
                        absorbs = spec.absorb_below > max(gpu_cases.CHUNKS)
                        assert absorbs == ("absorbed" in case.contender)


# --- building ---------------------------------------------------------------------------------------


def test_what_is_built_can_be_loaded(tmp_path):
    suite = Suite("tiny", (Linear(64, 128, "bf16"), Norm(32, 1e-6)), (1, 4))
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", suite)
    schedule = json.loads((tmp_path / "tiny" / "schedule.json").read_text())
    assert [bucket["tokens"] for bucket in schedule["buckets"]] == [1, 4]
    for binary in schedule["binaries"]:
        assert (tmp_path / "tiny" / f"{binary['name']}.cubin").read_bytes()[:4] == b"\x7fELF"
    about = json.loads((tmp_path / "tiny" / "suite.json").read_text())
    assert plans.load(about["plan"]).specs == list(suite.specs)


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    (tmp_path / "build.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, SCRIPT, "run", tmp_path, "--only", "nothing"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == gpu.NO_GPU
    assert "GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_running_takes_no_compiler():
    code = NO_PYDANTIC.format(path=str(SCRIPT.parent)) + (
        "sys.modules['triton'] = sys.modules['hypothesis'] = None; "
        "import gpu, _gpu_run, tokenmill.runtime.cuda, tokenmill.runtime.gpu; "
        "from _gpu_checks import Checked; from tokenmill.ir.plan import Linear; "
        "assert 'schedule.json' in Checked([Linear(32, 32, 'bf16')], 'sm_90').files"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the driver -------------------------------------------------------------------------------------


@pytest.fixture
def device():
    return InterpretedDevice(total=1 << 28)


def performed(folder, device, cases):
    journal = folder / "journal"
    assert gpu_run.perform(gpu_run.Bench(folder, device), cases, journal)
    return gpu.read(journal)


def test_kernels_are_checked(tmp_path, device):
    specs = (Linear(33, 160, "int8"), Pointwise(40, "silu(x0) + x1", ("row", "row")))
    gpu_build.build_checks(tmp_path / "checks-f32", "sm_90", "f32", specs, named)
    found = [case for case in gpu.all_cases(tmp_path) if case.kind == "check"]
    assert [case.what for case in found] == ["linear int8 #0", "pointwise #1"]
    about = tmp_path / "checks-f32" / "suite.json"
    text = json.loads(about.read_text())
    batches = {name: text["batches"][name] for name in ("none", "decode")}
    about.write_text(json.dumps(text | {"batches": batches}))
    for figures in performed(tmp_path, device, found).values():
        assert figures["passed"], figures
        assert figures["batches"] == 2
        assert figures["error"] < figures["bound"]


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "int4-g128"])
def test_a_product_is_timed_and_right(tmp_path, device, fmt, monkeypatch):
    monkeypatch.setattr(gpu_run, "copies", lambda nbytes: 2)
    suite = Suite("tiny", (Linear(32, 128, fmt),), (1, 4))
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", suite, named)
    case = Case("gemm", "32x128", f"ours {fmt}", 4, "tiny", 0)
    figures = performed(tmp_path, device, [case])[case.name]
    assert figures["passed"], figures
    assert figures["seconds"] > 0
    assert figures["flops"] == 2 * 4 * 32 * 128


@pytest.mark.parametrize("fmt", ["bf16", "fp8"])
@pytest.mark.parametrize("pointers", [False, True])
def test_a_large_product_is_right_read_either_way(tmp_path, device, monkeypatch, fmt, pointers):
    monkeypatch.setattr(gpu_run, "seconds", once)
    suite = Suite("tiny", (Linear(200, 144, fmt),), (160,), pointers=pointers)
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", suite, named)
    schedule = json.loads((tmp_path / "tiny" / "schedule.json").read_text())
    launch = schedule["groups"][schedule["buckets"][0]["steps"][0]][-1]
    (bound,) = (b["constants"] for b in schedule["binaries"] if b["name"] == launch["binary"])
    assert bound["DESCRIPTORS"] == bound["PERSISTENT"] == (not pointers)
    assert ("per_sm" in launch) == (not pointers)
    case = Case("gemm", "200x144", f"ours {fmt}", 160, "tiny", 0)
    figures = performed(tmp_path, device, [case])[case.name]
    assert figures["passed"], figures


def once(device, works, record=None):
    """Instead of timing."""
    works[0]()
    return 1.0


@pytest.mark.parametrize(("count", "fmt", "tokens"), [(8, "bf16", 4), (2, "fp8", 128)])
def test_experts_are_right(tmp_path, device, monkeypatch, count, fmt, tokens):
    """FP8 with so many tokens that activations are rounded to E4M3: farther than the bound from bf16."""
    monkeypatch.setattr(gpu_run, "seconds", once)
    monkeypatch.setattr(gpu_run, "ROUTINGS", 2)
    specs = (Route(count, RouterSpec(2)), Experts(count, 2, 64, 32, fmt, fmt))
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", Suite("tiny", specs, (tokens,)), named)
    case = Case("experts", "tiny", f"ours {fmt}", tokens, "tiny", 1)
    figures = performed(tmp_path, device, [case])[case.name]
    assert figures["passed"], figures
    monkeypatch.setattr(gpu_run.checks, "rounds", lambda rig, spec, tokens: fmt == "bf16")
    figures = performed(tmp_path, device, [case])[case.name]
    assert figures["passed"] == (fmt == "bf16"), figures


def test_a_large_batch_meets_fp8_experts_in_e4m3():
    target = codegen.parse_target("sm_90")
    suite = gpu_cases.SUITES["experts"]
    found = [s for s in suite.specs if s.kind == "experts" and experts.rounds(s, target, 4096)]
    assert [s.gate_up_format for s in found] == ["fp8"] * len(gpu_cases.MIXTURES)
    assert not any(experts.rounds(spec, target, 64) for spec in found)


@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
def test_latent_attention_is_right(tmp_path, device, monkeypatch, fmt):
    sizes = {
        "NOPE": 16,
        "ROPE": 8,
        "LATENT": 32,
        "VALUE": 16,
        "CONTEXTS": (128,),
        "SEQUENCES": (2,),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_run, name, value)
    monkeypatch.setattr(gpu_run, "seconds", once)
    suite = Suite("tiny", (LatentAttend(4, 16, 8, 32, 16, 0.2, fmt),), (2,), 128)
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", suite, named)
    case = Case("mla", "4 heads, 100", f"ours {fmt}", 2, "tiny", 0, 100)
    figures = performed(tmp_path, device, [case])[case.name]
    assert figures["passed"], figures


@pytest.mark.parametrize("below", [4, 100], ids=["expanded", "absorbed"])
def test_a_chunk_of_a_prompt_is_right(tmp_path, device, monkeypatch, below):
    for name, value in {"NOPE": 16, "ROPE": 8, "LATENT": 32, "VALUE": 16}.items():
        monkeypatch.setattr(gpu_run, name, value)
    monkeypatch.setattr(gpu_run, "seconds", once)
    monkeypatch.setattr(gpu_run, "COPIES_MOST", 2)
    spec = LatentAttend(4, 16, 8, 32, 16, 0.2, "bf16", absorb_below=below)
    suite = Suite("tiny", (spec,), (8,), 128, sequences=2)
    gpu_build.build_suite(tmp_path / "tiny", "sm_90", suite, named)
    for before in (0, 70):
        case = Case("prompt", f"4 heads, after {before}", "ours bf16", 8, "tiny", 0, before)
        figures = performed(tmp_path, device, [case])[case.name]
        assert figures["passed"], figures
        pairs = 8 * before + 36
        assert figures["flops"] == 2 * 4 * (40 * pairs + 8 * 32 * 32)


def test_a_case_that_fails_leaves_the_others_alone(tmp_path, device):
    bad = Case("gemm", "1x1", "ours bf16", 1, "nowhere", 0)
    worse = Case("gemm", "2x2", "ours bf16", 1, "nowhere", 0)
    found = performed(tmp_path, device, [bad, worse])
    assert [line["failed"].split(":")[0] for line in found.values()] == ["FileNotFoundError"] * 2


def test_a_model_that_loses_the_card_ends_the_process(tmp_path, device, monkeypatch):
    def lose(bench, case):
        device.fails = True
        raise KernelFailed(target="sm_90", code="CUDA_ERROR_ILLEGAL_ADDRESS", first=0, last=1)

    monkeypatch.setattr(gpu_run.Bench, "perform", lose)
    cases = [Case("model", name, "ours bf16") for name in ("a", "b")]
    journal = tmp_path / "journal"
    assert not gpu_run.perform(gpu_run.Bench(tmp_path, device), cases, journal)
    assert gpu.read(journal).keys() == {cases[0].name}  # the other has not been spoilt


CHILD = """
import json, sys, time
_, _, folder, names, journal, _ = sys.argv
for name in open(names).read().split():
    print(json.dumps({"begin": name}), file=open(journal, "a"))
    if "crash" in name: sys.exit(7)
    if "hang" in name: time.sleep(60)
    print(json.dumps({"case": name, "seconds": 1.0}), file=open(journal, "a"))
"""


@pytest.mark.parametrize(
    ("bad", "why"), [("crash", "the process ended with status 7"), ("hang", "no end after 1 s")]
)
def test_what_ends_or_holds_the_process_is_named_and_the_rest_goes_on(
    tmp_path, monkeypatch, bad, why
):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(gpu, "PATIENCE", 1.0)
    monkeypatch.setattr(gpu, "FACTOR", 0)
    wanted = [Case("gemm", what, "ours") for what in ("a", bad, "c")]
    (journal := tmp_path / "journal").touch()
    gpu.carry_out(tmp_path, wanted, journal, deadline=2e12)
    found = gpu.read(journal)
    assert [found[case.name].get("failed", "") for case in wanted] == ["", why, ""]


# --- tables -----------------------------------------------------------------------------------------


def test_tables_of_made_up_figures(tmp_path, capsys):
    (tmp_path / "build.json").write_text('{"target": "sm_90"}')
    timed = {
        "seconds": 1e-5,
        "tflops": 50.0,
        "gb_per_s": 2000.0,
        "passed": True,
        "error": 0.001,
        "bound": 0.01,
    }
    wanted = gpu_cases.cases()
    results = {c.name: timed for c in wanted if c.kind in ("gemm", "experts", "mla")}
    results["card/peaks/torch"] = {
        "copy_gb_per_s": 2500.0,
        "bf16_tflops": 700.0,
        "fp8_tflops": 1300.0,
    }
    results["gemm/4096x7168/ours fp8/64"] = timed | {"passed": False}
    results["gemm/4096x7168/cublas bf16/1"] = {"failed": "RuntimeError: no"}
    checked = Case("check", "linear int8 #0", "checks-f32", suite="checks-f32", step=0)
    results[checked.name] = {"error": 0.5, "bound": 0.1, "worst": "decode", "passed": False}
    end = next(case for case in wanted if case.kind == "end to end")
    results[end.name] = {
        "layers": 27,
        "decode_tokens_per_s": 123.0,
        "step_seconds": {"decode": {"experts": 2.0, "linear": 1.0}},
    }
    summary = gpu.summary(tmp_path, [*wanted, checked], results)
    assert summary["results"]["gemm/4096x7168/ours fp8/64"]["of_bandwidth"] == 0.8
    assert "model/tiny_deepseek/ours bf16" in summary["left_out"]
    gpu.show(summary)
    said = capsys.readouterr().out
    for text in (
        "10.0 80% !",
        "failed: 4096x7168, cublas bf16, 1: RuntimeError: no",
        "123.0",
        "experts 67%, linear 33%",
        "wrong: linear int8 #0",
        "checks passed: 0 of 1",
        "left out: ",
    ):
        assert text in said
    assert len(said) < 12000
