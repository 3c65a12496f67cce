"""Compiled artifacts next to what people run on a CPU: transformers, llama.cpp, ik_llama.cpp, vLLM.

    python benchmarks/cpu.py MODEL [--artifact FORMAT=DIR]... [--rounds 3] [--json FILE] [--skip NAME]...
        [--llama-bench PROGRAM --gguf NAME=FILE... [--batched-bench PROGRAM]]
        [--ik-bench PROGRAM --ik-gguf NAME=FILE... [--ik-batched-bench PROGRAM]]
        [--vllm-python PROGRAM]

Every measurement is a process of its own, and all contenders take turns, round by round, so that what
else the machine does falls on all of them; medians are compared.  What is measured:

    prefill        tokens/s of a prompt of 512 tokens
    decode         tokens/s of one sequence, 128 tokens after 512
    decode_deep    the same after 3968, or as many as the model has room for
    batched        tokens/s of 8 sequences together, each like that of decode
    first_token_s  from the start of a process to its first token, the files in the page cache
    peak_bytes     the most memory that the process of decode held, mapped weights included

Prompts are random tokens everywhere.  While decoding, artifacts and transformers choose greedily and go
on with random tokens; llama-bench goes on with random tokens and chooses none.  llama-batched-bench of
llama.cpp feeds random tokens, that of ik_llama.cpp token 0 to all sequences, which then agree on their
experts: pass one that was changed to feed random tokens.  Artifacts that are not given are compiled into
MODEL-artifacts/, again when tokenmill has changed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from tokenmill.bench import hardware
from tokenmill.runtime.cpu import available_cores
from tokenmill.units import amount, seconds, size

# What llama.cpp calls a 4-bit model has 4 bits nearly everywhere; our preset has them in the experts only.
# With these rules a token reads as many bytes of weights here (172 MB of the model that make_model.py
# writes, 159 MB in groups of 128) as there (168 to 177 MB).
RECIPES: dict[str, dict[str, Any]] = {
    **{
        name: {
            "weights": name,
            "rules": [{"match": f"role:{role}", "format": name} for role in ("linear", "head")],
        }
        for name in ("int4", "int4-g128")
    },
    "int8": {"weights": "int8"},
    "bf16": {"weights": "bf16"},
}
PROMPT, TOKENS, SEQUENCES, POSITIONS = 512, 128, 8, 4096
TOKENMILL = [sys.executable, "-c", "from tokenmill.cli import main; main()"]
TRANSFORMERS = [sys.executable, str(Path(__file__).with_name("transformers_peer.py"))]
VLLM = Path(__file__).with_name("vllm_peer.py")
RATES = ("prefill", "decode", "decode_deep", "batched")
SHOWN: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(RATES, amount),
    "first_token_s": seconds,
    "peak_bytes": size,
}

Figures = dict[str, float]


@dataclass
class Contender:
    """``measure`` gives the figures of one round; ``rounds`` collects them by name."""

    name: str
    measure: Callable[[], Figures]
    ours: bool = False
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def take_turn(self) -> None:
        """Measure once; who fails is left out of this round, and says why."""
        print(f"  {self.name}", file=sys.stderr, flush=True)
        try:
            found = self.measure()
        except (RuntimeError, ValueError, LookupError, OSError) as error:
            print(f"    left out: {error}", file=sys.stderr)
            return
        for name, value in found.items():
            self.rounds.setdefault(name, []).append(value)


def main() -> None:
    options = _options()
    contenders = [c for c in _contenders(options) if c.name not in options.skip]
    for at in range(options.rounds):
        print(f"round {at + 1} of {options.rounds}", file=sys.stderr)
        for contender in contenders:
            contender.take_turn()
        if options.json:  # after each round, since a long run may be cut off
            result = _result(options, contenders)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    _show(_result(options, contenders))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=_path, metavar="MODEL")
    for name in ("--artifact", "--gguf", "--ik-gguf"):
        parser.add_argument(name, type=_named, action="append", default=[], metavar="NAME=PATH")
    for name in ("--llama-bench", "--batched-bench", "--ik-bench", "--ik-batched-bench"):
        parser.add_argument(name, type=_path, metavar="PROGRAM")
    # Not resolved: the interpreter of a virtual environment is known by the link to it.
    parser.add_argument("--vllm-python", type=Path, metavar="PROGRAM")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    options.deep = min(POSITIONS, config["max_position_embeddings"]) - TOKENS
    return options


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, _path(path)


def _path(text: str) -> Path:
    return Path(text).resolve()


def _contenders(options: argparse.Namespace) -> Iterator[Contender]:
    for name, path in options.artifact or _compiled(options.model):
        yield Contender(f"tokenmill {name}", lambda p=path: _ours(options, p), ours=True)
    for how in ("eager", "compile"):
        yield Contender(f"transformers {how}", lambda h=how: _transformers(options, h))
    for name, path in options.gguf if options.llama_bench else []:
        yield Contender(f"llama.cpp {name}", lambda p=path: _llama(options, p))
    for name, path in options.ik_gguf if options.ik_bench else []:
        yield Contender(f"ik_llama.cpp {name}", lambda p=path: _ik(options, p))
    if options.vllm_python:
        yield Contender("vLLM bf16", lambda: _vllm(options))


def _compiled(model: Path) -> Iterator[tuple[str, Path]]:
    """Artifacts of the model, made where there is none that this tokenmill would make."""
    folder = model.with_name(f"{model.name}-artifacts")
    for name, recipe in RECIPES.items():
        path, file = folder / name, folder / f"{name}.yaml"
        if subprocess.run([*TOKENMILL, "verify", str(path)], capture_output=True).returncode:
            print(f"compiling to {name}", file=sys.stderr)
            folder.mkdir(exist_ok=True)
            file.write_text(json.dumps(recipe))  # JSON is YAML
            command = ["optimize", str(model), "-o", str(path), "--recipe", str(file), "--force"]
            subprocess.run([*TOKENMILL, *command], check=True, stdout=sys.stderr)
        yield name, path


# --- one round of each ----------------------------------------------------------------------------


def _ours(options: argparse.Namespace, artifact: Path) -> Figures:
    bench = [*TOKENMILL, "bench", artifact, "--json", "--repeat", 1, "--threads", options.threads]
    bench += ["--tokens", TOKENS]
    found = json.loads(_spawn(*bench, "--prompt", PROMPT, "--batch", SEQUENCES).output)
    deep = json.loads(_spawn(*bench, "--prompt", options.deep).output)
    return {
        "prefill": found["prefill"]["tokens_per_s"],
        "decode": found["decode"]["tokens_per_s"],
        "decode_deep": deep["decode"]["tokens_per_s"],
        "batched": found["batched"]["tokens_per_s"],
        "first_token_s": found["load"]["process_s"],
        "peak_bytes": found["memory"]["peak_bytes"],
        "packed_bytes": found["memory"]["packed_bytes"],
        "decode_gb_per_s": found["decode"]["gb_per_s"],
        "decode_fraction": found["decode"]["fraction"],
        "batched_gb_per_s": found["batched"]["gb_per_s"],
        "batched_fraction": found["batched"]["fraction"],
        "bandwidth_gb_per_s": found["bandwidth"]["gb_per_s"],
    }


def _transformers(options: argparse.Namespace, how: str) -> Figures:
    started = time.time()
    found: Figures = json.loads(_spawn(
        *TRANSFORMERS, options.model, how, "--prompt", PROMPT, "--deep", options.deep,
        "--sequences", SEQUENCES, "--threads", options.threads,
    ).output)  # fmt: skip
    if "first_token_at" in found:
        found["first_token_s"] = found.pop("first_token_at") - started
    return found


def _llama(options: argparse.Namespace, gguf: Path) -> Figures:
    bench = [options.llama_bench, "-m", gguf, "-t", options.threads, "-fa", 1]
    found = _llama_bench(
        bench, lambda depth: ["-p", 0, "-n", TOKENS, "-d", depth], ["--no-warmup"], options.deep
    )
    if options.batched_bench:
        found["batched"] = _batched(options.batched_bench, gguf, options.threads, [])
    return found


def _ik(options: argparse.Namespace, gguf: Path) -> Figures:
    bench = [options.ik_bench, "-m", gguf, "-t", options.threads, "-fa", 1]
    bench += ["-mla", 3, "-fmoe", 1, "-rtr", 1]
    # -gp starts its clock after the prompt, unlike -pg.
    found = _llama_bench(
        bench, lambda depth: ["-p", 0, "-n", 0, "-gp", f"{depth},{TOKENS}"], ["-w", 0], options.deep
    )
    if options.ik_batched_bench:
        # Here -rtr takes no value, and fused experts are the default.
        flags = ["-mla", 3, "-rtr"]
        found["batched"] = _batched(options.ik_batched_bench, gguf, options.threads, flags)
    return found


def _vllm(options: argparse.Namespace) -> Figures:
    done = _spawn(
        options.vllm_python.absolute(), VLLM, options.model, "--prompt", PROMPT, "--tokens", TOKENS,
        "--threads", options.threads,
    )  # fmt: skip
    found: Figures = json.loads(done.output.splitlines()[-1])
    return found


def _llama_bench(
    command: list[Any], after: Callable[[int], list[Any]], cold: list[Any], deep: int
) -> Figures:
    """``after`` says how to decode behind so many tokens, ``cold`` how to leave out the warm-up."""
    command = [*command, "-r", 1, "-o", "json"]
    prompt = _spawn(*command, "-p", PROMPT, "-n", 0)
    decode = _spawn(*command, *after(PROMPT))
    return {
        "prefill": _rate(prompt.output, PROMPT, 0),
        "decode": _rate(decode.output, PROMPT, TOKENS),
        "decode_deep": _rate(_spawn(*command, *after(deep)).output, deep, TOKENS),
        "first_token_s": _spawn(*command, "-p", 0, "-n", 1, *cold).seconds,
        "peak_bytes": decode.peak_bytes,
    }


def _rate(output: str, context: int, tokens: int) -> float:
    """tokens/s of one test in the JSON of llama-bench: of a prompt if it generates no tokens."""
    for row in json.loads(output[output.index("[") :]):
        depth = row.get("n_depth") or row["n_prompt"]
        if (depth, row["n_gen"]) == (context, tokens):
            return float(row["avg_ts"])
    raise LookupError(f"llama-bench does not tell of {tokens} tokens after {context}")


def _batched(program: Path, gguf: Path, threads: int, flags: list[Any]) -> float:
    """tokens/s of all sequences, from the table of llama-batched-bench."""
    command = [program, "-m", gguf, "-t", threads, "-fa", 1, *flags]
    command += ["-c", SEQUENCES * (PROMPT + TOKENS)]
    done = _spawn(*command, "-npp", PROMPT, "-ntg", TOKENS, "-npl", SEQUENCES)
    row = re.search(rf"^\| *{PROMPT} \| *{TOKENS} \| *{SEQUENCES} \|.*", done.said, re.MULTILINE)
    if not row:
        raise LookupError("llama-batched-bench printed no figures")
    return float(row[0].split("|")[8])  # | PP | TG | B | N_KV | T_PP | S_PP | T_TG | S_TG | ...


# --- processes ------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A process that ended well: standard output, that and standard error, wall time, peak memory."""

    output: str
    said: str
    seconds: float
    peak_bytes: int


def _spawn(*command: object) -> Done:
    """Run a command; raises RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as folder:  # some leave a log where they run
        out, log = Path(folder, "out"), Path(folder, "log")
        start = time.perf_counter()
        with out.open("wb") as stdout, log.open("wb") as stderr:
            words = [str(word) for word in command]
            process = subprocess.Popen(words, cwd=folder, stdout=stdout, stderr=stderr)
            # Unlike getrusage, wait4 tells of this child alone.
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        output, said = out.read_text(), log.read_text()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (said.strip() or output.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"status {process.returncode}: {last}")
    return Done(output, output + said, wall, usage.ru_maxrss << 10)


# --- results --------------------------------------------------------------------------------------


def _result(options: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    took_part = [c for c in contenders if c.rounds]
    figures = {c.name: {n: _spread(v) for n, v in c.rounds.items()} for c in took_part}
    ours = [c.name for c in took_part if c.ours]
    bandwidth = [b for c in took_part for b in c.rounds.get("bandwidth_gb_per_s", [])]
    return {
        "benchmark": "artifacts next to other engines on a CPU",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "threads": options.threads,
        "model": options.model.name,
        "workload": {
            "prompt": PROMPT, "tokens": TOKENS, "sequences": SEQUENCES, "deep": options.deep,
            "rounds": options.rounds,
        },
        "bandwidth_gb_per_s": _spread(bandwidth) if bandwidth else None,
        "contenders": figures,
        "ratios": {
            name: {peer: _ratios(figures[name], figures[peer]) for peer in figures if peer not in ours}
            for name in ours
        },
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> Figures:
    """How many times better ours is: faster, or cheaper."""
    found = {n: ours[n]["median"] / peer[n]["median"] for n in SHOWN if n in ours and n in peer}
    return {name: times if name in RATES else 1 / times for name, times in found.items()}


def _show(result: dict[str, Any]) -> None:
    """The figures, then how many times better each artifact is."""
    _table("median (lowest..highest)", result["contenders"], _cell)
    for ours, peers in result["ratios"].items():
        _table(f"{ours}, times better than", peers, lambda _, times: f"{times:.2f}x")
    read, machine = result["bandwidth_gb_per_s"], result["hardware"]["processor"]
    if read:
        print(
            f"read bandwidth {read['median']:.1f} GB/s with {result['threads']} threads, {machine}"
        )


def _cell(name: str, figure: dict[str, Any]) -> str:
    lowest, highest = map(SHOWN[name], figure["spread"])
    return f"{SHOWN[name](figure['median'])} ({lowest}..{highest})"


def _table(corner: str, rows: dict[str, dict[str, Any]], cell: Callable[[str, Any], str]) -> None:
    table = Table(corner, *SHOWN, box=box.MARKDOWN)
    for name, figures in rows.items():
        table.add_row(name, *(cell(n, figures[n]) if n in figures else "" for n in SHOWN))
    Console(width=240, highlight=False).print(table)


if __name__ == "__main__":
    main()
