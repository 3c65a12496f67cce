"""GPU kernels proved and measured on a card, in one call of a few minutes.

    python benchmarks/gpu.py build -o build/gpu [--target sm_90] [--only NAME]... [--layers 27]
    python benchmarks/gpu.py run build/gpu --json FILE [--only TEXT]... [--seconds 420] [--sanitize]

``build`` needs no GPU: it emits and cross-compiles some 1050 kernels into the directory (65 MiB, see
_gpu_build.py), which takes about eight minutes on two cores; --only names its parts (gemm, model-bf16, ...).
``run`` needs a card, torch, cuda.core and, for the last lines, transformers; neither Triton nor what compiles
models, and tokenmill need not be installed.  --only is a part of the name of a case (check/, ours fp8, ...).
Cases are carried out in a process of their own, the most important first.  One that crashes, hangs or loses
the card costs itself only, and what does not fit into the time is listed as left out.  The tables come last;
the status is 1 if something of ours is wrong or failed, 2 where there is no card.

Where the card's machine has no network, bring wheels along:
``pip download --no-deps --only-binary=:all: --python-version 3.12 -d whl cuda-core cuda-pathfinder`` here,
``pip install --no-index --no-deps --target site whl/*`` and PYTHONPATH=site there.  What ``build`` wrote is a
tenth as large in xz.  ``pytest tests/runtime/test_cuda.py`` there is a first look.

    check       every kind and format of kernel on hostile shapes, against torch on the CPU
    model       the bundled model, prompt and decoding, against torch on the same plan and fp32 on a CPU
    gemm        products at DeepSeek-V3's shapes, next to cuBLAS and torch's FP8
    experts     router and experts of two mixtures, next to torch's grouped products
    mla         a token per sequence over a paged cache of latents, next to torch
    prompt      a chunk of one sequence over such a cache, expanded, next to ours absorbed and to torch's
                attention over keys and values that are there already
    end to end  a DeepSeek-V2-Lite of random weights: prompt of 512 tokens, 1 and 32 sequences, wall clock,
                next to transformers

A kernel's time is what the card takes in a recorded graph of many runs, over so many copies of what it
reads that its cache does not hold them.  Percentages are of the copy bandwidth or of the peak of a matrix
product that the same run measured, whichever is more.  `!` marks a result that differs from the reference.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "benchmarks") if str(path) not in sys.path]


def _from_checkout() -> None:
    """Where tokenmill is not installed, it is the checkout that this file is in."""
    spec = importlib.util.spec_from_file_location(
        "tokenmill", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tokenmill"] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("tokenmill") is None:
    _from_checkout()

from _gpu_cases import OURS, Case, cases  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tokenmill import errors  # noqa: E402

NO_GPU, LOST = 2, 3  # statuses of the child: no card to begin with, or none any more
RESTARTS = 12
PATIENCE = 60.0  # seconds, and so many times what a case may take
FACTOR = 4
SANITIZED = 12
Results = dict[str, dict[str, Any]]


def main() -> int:
    options = _options()
    if options.command == "build":
        from _gpu_build import build

        build(options.directory, options.target, lambda n: _among(n, options.only), options.layers)
        return 0
    if options.command == "perform":
        return _perform(options)
    return _run(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="emit and compile, without a GPU")
    build.add_argument("-o", dest="directory", type=Path, required=True, metavar="DIR")
    build.add_argument("--target", default="sm_90")
    build.add_argument("--layers", type=int, default=27, help="of the model end to end")
    run = commands.add_parser("run", help="check and measure, on a card")
    run.add_argument("directory", type=Path, metavar="DIR")
    run.add_argument("--json", type=Path, metavar="FILE")
    run.add_argument("--seconds", type=float, default=420.0)
    run.add_argument("--sanitize", action="store_true", help="some checks under compute-sanitizer")
    for command in (build, run):
        command.add_argument("--only", action="append", default=[], metavar="TEXT")
    child = commands.add_parser("perform")
    for name in ("directory", "names", "journal"):
        child.add_argument(name, type=Path)
    child.add_argument("deadline", type=float)
    return parser.parse_args()


def _among(name: str, only: Sequence[str]) -> bool:
    return not only or any(text in name for text in only)


# --- carrying out -----------------------------------------------------------------------------------


def all_cases(folder: Path) -> list[Case]:
    """The checks that ``folder`` has, and what else was built for."""
    found = []
    for path in sorted(folder.glob("checks-*/suite.json")):
        about = json.loads(path.read_text())
        steps, specs = about["plan"]["steps"], about["plan"]["specs"]
        for index, step in enumerate(steps):
            spec = specs[step["spec"]]
            fmts = ("format", "gate_up_format", "down_format", "cache_format")
            names = dict.fromkeys(spec[f] for f in fmts if f in spec)
            found.append(
                Case("check", " ".join([spec["kind"], *names, f"#{index}"]), path.parent.name,
                     suite=path.parent.name, step=index, seconds=2)
            )  # fmt: skip
    card, *rest = cases()
    return [card, *found, *(case for case in rest if _built(folder, case))]


def _built(folder: Path, case: Case) -> bool:
    if case.kind == "model":
        return (folder / f"model-{case.contender.removeprefix(OURS)}").is_dir()
    return not case.suite or (folder / case.suite).is_dir()


def _run(options: argparse.Namespace) -> int:
    started = time.time()
    wanted = [
        c for c in all_cases(options.directory) if c.kind == "card" or _among(c.name, options.only)
    ]
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder, "journal")
        journal.touch()
        status = carry_out(options.directory, wanted, journal, started + options.seconds)
        if status == NO_GPU:
            return NO_GPU
        result = summary(options.directory, wanted, read(journal))
        if options.sanitize:
            result["sanitizer"] = sanitized(options.directory, wanted)
    result["seconds"] = time.time() - started
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return int(any(_wrong(row) for row in result["results"].values()))


def _wrong(row: dict[str, Any]) -> bool:
    """Whether a result of ours is none, or not what the reference says."""
    ours = row["kind"] == "check" or row["contender"].startswith(OURS)
    return ours and ("failed" in row or not row.get("passed", True))


def carry_out(
    folder: Path, wanted: Sequence[Case], journal: Path, deadline: float, prefix: Sequence[str] = ()
) -> int:
    """Perform cases in child processes until all are done or the time is over; the last status."""
    status = 0
    for _ in range(RESTARTS):
        results = read(journal)
        left = [c for c in wanted if c.name not in results and time.time() + c.seconds < deadline]
        if not left:
            break
        names = journal.with_name("names")
        names.write_text("\n".join(case.name for case in left))
        command = [
            *prefix, sys.executable, __file__, "perform", folder, names, journal, deadline
        ]  # fmt: skip
        with subprocess.Popen([str(word) for word in command]) as child:
            why = _watch(child, journal, {case.name: case for case in left}, deadline)
            status = child.wait()
        if status in (0, NO_GPU):
            break
        if not (begun := _unfinished(journal)) and len(read(journal)) == len(results):
            break  # it did not even begin
        if begun:
            line = {"case": begun, "failed": why or f"the process ended with status {status}"}
            with journal.open("a") as file:
                print(json.dumps(line), file=file)
    return status


def _watch(
    child: subprocess.Popen[bytes], journal: Path, wanted: dict[str, Case], deadline: float
) -> str:
    """Wait for the child; end it, and say why, if a case takes far too long."""
    size, since = -1, time.time()
    while child.poll() is None:
        time.sleep(0.2)
        if (now := journal.stat().st_size) != size:
            size, since = now, time.time()
        begun = _unfinished(journal)
        patience = PATIENCE + FACTOR * wanted[begun].seconds if begun in wanted else 3 * PATIENCE
        late = time.time() > deadline + PATIENCE / 4
        if time.time() > since + patience or late:
            child.kill()
            return "the time was over" if late else f"no end after {patience:.0f} s"
    return ""


def _lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]


def read(journal: Path) -> Results:
    """Case -> its figures, or how it failed."""
    lines = [dict(line) for line in _lines(journal)]
    return {line.pop("case"): line for line in lines if "case" in line}


def _unfinished(journal: Path) -> str:
    lines = _lines(journal)
    return str(lines[-1].get("begin", "")) if lines else ""


def _perform(options: argparse.Namespace) -> int:
    from _gpu_run import Bench, perform
    from tokenmill.runtime.cuda import CudaDevice

    try:
        device = CudaDevice()
    except (errors.NoGpu, errors.MissingExtra) as error:
        print(error, file=sys.stderr)
        return NO_GPU
    names = options.names.read_text().splitlines()
    known = {case.name: case for case in all_cases(options.directory)}
    bench = Bench(options.directory, device)
    alive = perform(bench, [known[n] for n in names], options.journal, options.deadline)
    sys.stdout.flush()
    if not alive:
        os._exit(LOST)  # leaving in good order would wait for the card
    return 0


def sanitized(folder: Path, wanted: Iterable[Case]) -> dict[str, Any]:
    """What compute-sanitizer says of some checks, one of each kind."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"left_out": "compute-sanitizer is not there"}
    kinds = {case.what.split()[0]: case for case in wanted if case.kind == "check"}
    chosen = [replace(case, seconds=20) for case in list(kinds.values())[:SANITIZED]]
    with tempfile.TemporaryDirectory() as scratch:
        journal, log = Path(scratch, "journal"), Path(scratch, "log")
        journal.touch()
        prefix = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--log-file", str(log)]
        status = carry_out(folder, chosen, journal, time.time() + 90, prefix)
        said = log.read_text().splitlines() if log.is_file() else []
        return {"status": status, "checks": len(read(journal)), "said": said[-20:]}


# --- results ----------------------------------------------------------------------------------------


def summary(folder: Path, wanted: Sequence[Case], results: Results) -> dict[str, Any]:
    card = results.get("card/peaks/torch", {})
    return {
        "benchmark": "kernels and models on a GPU",
        "date": datetime.date.today().isoformat(),
        "hardware": _hardware(),
        "built": json.loads((folder / "build.json").read_text()),
        "card": card,
        "left_out": [case.name for case in wanted if case.name not in results],
        "results": {
            case.name: {
                "kind": case.kind, "what": case.what, "contender": case.contender,
                "size": case.size, **_fraction(case, results[case.name], card),
            }
            for case in wanted if case.name in results and case.kind != "card"
        },
    }  # fmt: skip


def _fraction(case: Case, figures: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """``figures`` with their share of what the card can do."""
    if "tflops" not in figures or "copy_gb_per_s" not in card:
        return figures
    peak = card["fp8_tflops" if "fp8" in case.contender else "bf16_tflops"]
    return figures | {
        "of_peak": figures["tflops"] / peak,
        "of_bandwidth": figures["gb_per_s"] / card["copy_gb_per_s"],
    }


def _hardware() -> dict[str, str]:
    """Name, driver and clocks, as nvidia-smi has them."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = said.stdout.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values, strict=False))


def show(result: dict[str, Any], width: int = 150) -> None:
    """The tables, shortest form: a line per contender and problem, a column per size."""
    console = Console(width=width, highlight=False, markup=False)
    rows = list(result["results"].values())
    for kind, title in (
        ("gemm", "gemm N x K, by rows"),
        ("experts", "experts, by tokens"),
        ("mla", "mla heads, context, by sequences"),
        ("prompt", "mla heads, context, by new tokens"),
    ):
        _grid(console, title, [row for row in rows if row["kind"] == kind])
    _end(console, [row for row in rows if row["kind"] == "end to end"])
    _models(console, [row for row in rows if row["kind"] == "model"])
    _checks(console, [row for row in rows if row["kind"] == "check"])
    failed = [row for row in rows if "failed" in row and row["kind"] != "check"]
    for row in failed[:15]:
        console.print(
            f"failed: {row['what']}, {row['contender']}, {row['size']}: {row['failed']}"[:width]
        )
    if result["left_out"]:
        console.print(f"left out: {len(result['left_out'])}, from {result['left_out'][0]} on")
    if said := result.get("sanitizer"):
        console.print(f"sanitizer: {said}")
    card = result["card"]
    if "copy_gb_per_s" in card:
        console.print(
            f"copy {card['copy_gb_per_s']:.0f} GB/s, bf16 {card['bf16_tflops']:.0f} TFLOPS, "
            f"fp8 {card['fp8_tflops']:.0f} TFLOPS"
        )
    console.print(", ".join([*result["hardware"].values(), result["date"]]))


def _grid(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    sizes = sorted({row["size"] for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["what"], row["contender"]), {})[row["size"]] = cell(row)
    _table(
        console,
        [title, "µs, share of the bound", *map(str, sizes)],
        [[what, who, *(line.get(s, "") for s in sizes)] for (what, who), line in lines.items()],
    )


def cell(row: dict[str, Any]) -> str:
    """Microseconds, and the share of bandwidth or peak.

    >>> cell({"seconds": 1e-5, "of_peak": 0.1, "of_bandwidth": 0.82, "passed": True})
    '10.0 82%'
    """
    if "failed" in row:
        return "failed"
    share = max(row.get("of_peak", 0.0), row.get("of_bandwidth", 0.0))
    wrong = "" if row.get("passed", True) else " !"
    return f"{row['seconds'] * 1e6:.1f} {share:.0%}{wrong}"


def _end(console: Console, rows: list[dict[str, Any]]) -> None:
    figures = ("prefill", "decode", "batched")
    _table(
        console,
        ["end to end, tokens/s", "layers", *figures, "where decode spends its time"],
        [
            [
                row["contender"],
                str(row.get("layers", row.get("failed", "")))[:40],
                *(
                    f"{row[key]:.1f}" if (key := f"{f}_tokens_per_s") in row else ""
                    for f in figures
                ),
                _spent(row.get("step_seconds", {}).get("decode", {})),
            ]
            for row in rows
        ],
    )


def _spent(kinds: dict[str, float]) -> str:
    total = sum(kinds.values())
    return ", ".join(f"{kind} {took / total:.0%}" for kind, took in list(kinds.items())[:4])


def _models(console: Console, rows: list[dict[str, Any]]) -> None:
    heads = [
        "bundled model",
        "passed",
        "error",
        "agreement",
        "fp32 error",
        "fp32 agreement",
        "greedy",
    ]
    _table(
        console,
        heads,
        [
            [row["contender"], row["failed"][:60]]
            if "failed" in row
            else [
                row["contender"], str(row["passed"]), f"{row['error']:.4f}", f"{row['agreement']:.2f}",
                f"{row['fp32_error']:.4f}", f"{row['fp32_agreement']:.2f}",
                f"{row['greedy_same']} of {row['greedy']}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def _checks(console: Console, rows: list[dict[str, Any]]) -> None:
    """Kind by kind how many passed and the worst error in units of its bound, then who did not."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["what"].split()[0], row["contender"]), []).append(row)
    _table(
        console,
        ["check", "activations", "passed", "worst error / bound"],
        [
            [
                kind,
                suite.removeprefix("checks-"),
                f"{sum(bool(r.get('passed')) for r in group)} of {len(group)}",
                f"{max((r['error'] / r['bound'] for r in group if 'error' in r), default=0.0):.2g}",
            ]
            for (kind, suite), group in kinds.items()
        ],
    )
    wrong = [row for row in rows if not row.get("passed")]
    for row in wrong[:20]:
        why = (
            row.get("failed") or f"{row['error']:.2g} on {row['worst']!r}, bound {row['bound']:.2g}"
        )
        console.print(f"wrong: {row['what']}, {row['contender']}: {why}"[:150])
    if rows:
        console.print(f"checks passed: {len(rows) - len(wrong)} of {len(rows)}")


def _table(console: Console, heads: Sequence[str], lines: list[list[str]]) -> None:
    if not lines:
        return
    table = Table(*heads, box=box.MARKDOWN, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
