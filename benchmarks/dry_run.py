"""A dry run of DeepSeek-V3 at full size, 671B parameters, from its config.json alone.

    python benchmarks/dry_run.py [--layers 8 61 200] [--json benchmarks/results/dry_run.json]

Each depth is a process of its own: `tokenmill optimize CONFIG --dry-run --config-only`, for the CPU and two
GPU architectures.  Seconds are from start to exit, imports included; memory is the most that the process held
at once, as the kernel counted it.  Load and priority are noted: on a busy machine the seconds of a core say
more than those of the clock.  The other depths are the same config with another number of layers, which
has the same two kinds of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _markdown import Columns, table
from tokenmill.bench import hardware
from tokenmill.units import size

CONFIG = Path(__file__).resolve().parent / "configs" / "deepseek_v3" / "config.json"
TARGETS = ("cpu-x86-64-v3", "sm_90", "sm_100")
SECONDS, BYTES = 60, 2 << 30  # at the published depth
COLUMNS: Columns = {
    "parameters": ("Parameters", lambda p: f"{p['total'] / 1e9:.0f}B"),
    "seconds": ("Seconds", lambda s: f"{s:.1f}"),
    "cpu_seconds": ("of a core", lambda s: f"{s:.1f}"),
    "peak_bytes": ("Peak memory", size),
    "kernels": ("Kernels", lambda k: str(sum(k.values()))),
    "steps": ("Steps", str),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 61, 200])
    parser.add_argument("--weights", default="fp8", help="format of the weights")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    rows = {str(n): measure(n, options.weights) for n in options.layers}
    result = {
        "benchmark": "dry run of DeepSeek-V3 from its config",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "targets": TARGETS,
        "weights": options.weights,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table("Layers", COLUMNS, rows))
    full = rows.get("61")
    if full and (full["seconds"] > SECONDS or full["peak_bytes"] > BYTES):
        sys.exit(f"more than {SECONDS} s or {size(BYTES)}")


def measure(layers: int, weights: str) -> dict[str, Any]:
    """One dry run in a child process: its cost, and what it reports."""
    config = json.loads(CONFIG.read_text())
    config["num_hidden_layers"] = layers
    with tempfile.TemporaryDirectory() as folder:
        model, answer = Path(folder) / "deepseek_v3", Path(folder) / "answer.json"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        command = [
            sys.executable, "-c", "from tokenmill.cli import main; main()", "optimize", str(model),
            "--dry-run", "--config-only", "--json", "--weights", weights,
            *(a for t in TARGETS for a in ("--target", t)),
        ]  # fmt: skip
        start = time.perf_counter()
        with answer.open("wb") as out:
            child = os.posix_spawn(
                sys.executable, command, os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)],
            )  # fmt: skip
            _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")
        facts = json.loads(answer.read_text())
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "load_average": round(os.getloadavg()[0], 1),
        "niceness": os.nice(0),
        **_facts(facts),
    }


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": found["parameters"],
        "bytes": found["bytes"],
        "bytes_by_format": found["bytes_by_format"],
        "kv_bytes_per_token": found["kv_bytes_per_token"],
        "kv_bytes_per_token_expanded": found["kv_bytes_per_token_expanded"],
        "memory": found["memory"],
        "matches": {p["name"]: p["matches"] for p in found["passes"]},
        "pass_seconds": {p["name"]: round(p["seconds"], 2) for p in found["passes"]},
        "kernels": dict(Counter(k["kind"] for k in found["kernels"])),
        "steps": sum(k["steps"] for k in found["kernels"]),
        "emitted": found["emitted"],
        "left_to_torch": len(found["extern_steps"]),
    }


if __name__ == "__main__":
    main()
