"""The smallest artifact that loses no more than you allow, and what the search found out.

    python examples/within_budget.py [MODEL] [--max-loss 1%] [--output DIR]

The loss is a rise of perplexity (1%) or a KL divergence (kl=0.01) on text that neither calibration nor search
has seen. `--calibration FILE` names text like what the model will see; some comes with tokenmill.
"""

import argparse
from pathlib import Path

import tokenmill
from tokenmill.console import progress_bar
from tokenmill.units import size

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=HERE / "tiny_qwen3_moe")
    parser.add_argument("--max-loss", default="1%")
    parser.add_argument("--calibration", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--output", default=HERE.parent / "build" / "within_budget")
    options = parser.parse_args(arguments)

    recipe = tokenmill.Recipe(
        budget={"max_loss": options.max_loss},
        calibration=options.calibration,
        calibration_tokens=options.tokens,
    )
    with progress_bar() as progress:
        compiled = tokenmill.optimize(
            options.model, options.output, recipe=recipe, force=True, progress=progress
        )

    facts, found = compiled.facts, compiled.facts["search"]
    print(f"{found['verdict']}\n")
    before, after = facts["bytes"]["original"], facts["bytes"]["weights"]
    print(f"{size(before)} -> {size(after)}, {facts['quantized']['bits']:.2f} bits a weight")
    print("formats: " + ", ".join(f"{n} {s:.0%}" for n, s in facts["weights_by_format"].items()))
    print(f"what each weight loses in each format: {compiled.path}/report.html")


if __name__ == "__main__":
    main()
