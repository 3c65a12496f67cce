"""A weight format of your own: a table of values, and one scale for every group of inputs.

    python examples/extend/my_format.py [MODEL]

NF4 (Dettmers et al. 2023) has its 16 values where normally distributed weights are; INT4 has them at equal
distances.  In a recipe file, with this directory on PYTHONPATH:

    extensions: [my_format]
    weights: int8
    rules: [{match: "role:expert", format: nf4}]

A format whose scale is not that of the largest value says how to choose it, from groups [..., G] of weights:

    Codebook("ternary", values=(-1, 0, 1), group=64, fit=lambda groups: groups.abs().mean(-1))
"""

import sys
import tempfile
from pathlib import Path

import tokenmill
from tokenmill import extend
from tokenmill.api import original
from tokenmill.evaluate import evaluate

NF4 = extend.register_format(
    extend.Codebook(
        "nf4",
        group=64,
        values=(
            -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0,
            0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
        ),
    )
)  # fmt: skip

MODEL = Path(__file__).resolve().parent.parent / "tiny_qwen3_moe"
TEXT = MODEL.parent / "tiny_deepseek" / "heldout.txt"


def main(model=MODEL, characters=4000, where="expert"):
    eager = original(model)
    for name in ("int4-g64", "nf4"):
        recipe = tokenmill.Recipe(
            weights="int8", rules=[{"match": f"role:{where}", "format": name}]
        )
        with tempfile.TemporaryDirectory() as directory:
            compiled = tokenmill.optimize(model, f"{directory}/model.tm", recipe=recipe)
            with tokenmill.load(compiled.path) as session:
                found = evaluate(session, TEXT.read_text()[:characters], eager, continuations=0)
        print(
            f"{where}s in {name:8}  {compiled.facts['quantized']['bits']:.2f} bits a weight, "
            f"KL to the original {found['kl_mean']:.2e}, "
            f"the same token in {found['top1_agreement']:.1%}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
