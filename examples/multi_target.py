"""One artifact for the CPU and two generations of NVIDIA cards, compiled on a machine that has neither card.

    python examples/multi_target.py [MODEL] [--output DIR] [--target NAME]...

The directory can be copied to any of these machines and runs there: a session takes the card if there is one
that it was compiled for, else the CPU. Needs `pip install 'tokenmill[triton]'` where it is compiled, and
`'tokenmill[cuda]'` where there is a card.
"""

import argparse
from pathlib import Path

import tokenmill
from tokenmill.api import verify
from tokenmill.console import progress_bar
from tokenmill.units import size

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=HERE / "tiny_deepseek")
    parser.add_argument("--output", default=HERE.parent / "build" / "multi_target")
    parser.add_argument("--target", action="append", help="default: cpu sm_80 sm_90")
    parser.add_argument("--step-tokens", type=int, default=64, help="most tokens of one step")
    options = parser.parse_args(arguments)

    recipe = tokenmill.Recipe(
        weights="int4",
        targets=options.target or ["cpu", "sm_80", "sm_90"],
        max_step_tokens=options.step_tokens,  # more means more kernels per card, and longer prompts at once
        max_step_rows=min(8, options.step_tokens),
    )
    with progress_bar() as progress:
        compiled = tokenmill.optimize(
            options.model, options.output, recipe=recipe, force=True, progress=progress
        )

    artifact, facts = tokenmill.Artifact.open(compiled.path), compiled.facts
    for target in artifact.targets:
        files = artifact.manifest.files.items()
        took = size(sum(fact.bytes for name, fact in files if name.startswith(target.directory)))
        about = f"one library of {len(facts['kernels'])} kernels"
        if binaries := facts["binaries"].get(target.name):
            most = max(binary["registers"] for binary in binaries)
            about = f"{len(binaries)} cubins, of {most} registers at most"
        print(f"{target.name:20} {took:>8}  {about}")
    print(f"{'weights':20} {size(facts['bytes']['weights']):>8}")
    print(f"kernels come from the plan: {verify(compiled.path)['reproducible']}")
    with tokenmill.load(compiled.path) as session:  # device="auto": a card, or the CPU
        print(f"it writes {session.generate([[1, 2, 3]], max_new_tokens=8)[0].tokens}")


if __name__ == "__main__":
    main()
