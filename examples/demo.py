"""The whole path on the bundled model: compile it, let it write, compare it with the original.

python examples/demo.py [--output DIR]
"""

import argparse
import time
import warnings
from pathlib import Path

import tokenmill
from rich.console import Console
from rich.table import Table
from tokenmill.api import original
from tokenmill.console import progress_bar
from tokenmill.evaluate import evaluate
from tokenmill.units import ratio, size

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny_deepseek"
PROMPT = "def read_config(path):\n"
# Enough held-out text for a stable figure, little enough for a minute on two cores.
HELD_OUT_CHARACTERS = 40_000

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "build" / "demo")
    output = parser.parse_args().output

    warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
    build(output)
    with tokenmill.load(output) as session:
        write(session)
        measure(session)
    report = output / "report.html"
    console.print(f"\nThe passes, the kernels and a drawing of one layer: [bold]{report}[/]")


def build(output: Path) -> None:
    console.rule("compile")
    recipe = tokenmill.Recipe(weights="int4", kv="bf16")
    start = time.perf_counter()
    with progress_bar() as progress:
        facts = tokenmill.optimize(
            MODEL, output, recipe=recipe, force=True, progress=progress
        ).facts
    took = time.perf_counter() - start
    before, after = facts["bytes"]["original"], facts["bytes"]["weights"]
    cached, expanded = facts["kv_bytes_per_token"], facts["kv_bytes_per_token_expanded"]
    show({
        "model": f"{MODEL.name}, {facts['parameters']['total'] / 1e6:.1f} M parameters",
        "weights": f"{size(before)} -> {size(after)} ({ratio(before, after)} smaller)",
        "KV per token": f"{size(expanded)} -> {size(cached)} ({ratio(expanded, cached)} smaller)",
        "kernels": f"{len(facts['kernels'])}, and {len(facts['extern_steps'])} steps left to torch",
        "took": f"{took:.1f} s",
    })  # fmt: skip


def write(session: tokenmill.Session) -> None:
    console.rule("run")
    result = session.generate(PROMPT, max_new_tokens=120, temperature=0.7, seed=1)[0]
    console.print(PROMPT + result.text, markup=False)
    rate = (len(result.tokens) - 1) / max(result.decode_seconds, 1e-9)
    console.print(
        f"first token after {result.prefill_seconds * 1000:.0f} ms, then {rate:.0f} tokens/s"
    )


def measure(session: tokenmill.Session) -> None:
    console.rule("measure")
    text = (MODEL / "heldout.txt").read_text("utf-8")[:HELD_OUT_CHARACTERS]
    with progress_bar() as progress:
        found = evaluate(session, text, against=original(MODEL), progress=progress)
    show({
        "held-out text": f"{found['bytes']} bytes, {found['tokens']} tokens",
        "bits per byte": f"{found['bits_per_byte']:.4f}",
        "KL to the original": f"{found['kl_mean']:.5f} nats per token",
        "same likeliest token": f"{found['top1_agreement']:.1%}",
    })  # fmt: skip


def show(values: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    main()
