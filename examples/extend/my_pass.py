"""A pass of your own: every token visits fewer experts, which is faster and loses some.

    python examples/extend/my_pass.py [MODEL]

In a recipe file, with this directory on PYTHONPATH:

    passes: [{use: "my_pass:FewerExperts", before: quantize, options: {top_k: 1}}]
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenmill
from tokenmill import extend

MODEL = Path(__file__).resolve().parent.parent / "tiny_qwen3_moe"


@dataclass
class FewerExperts(extend.Pass):
    """experts(x, ids, weights) => experts(x, ids[:k], weights[:k])"""

    top_k: int = 1

    name = "fewer_experts"
    tolerance = None  # it changes what the model computes; --check reports by how much

    def run(self, program):
        matches = 0
        for node in extend.calls(program, extend.mill.experts):
            x, ids, weights, *rest = node.args
            if extend.shape(ids)[-1] > self.top_k:
                with program.graph.inserting_before(node):
                    ids, weights = (
                        program.call(extend.aten.slice.Tensor, each, -1, 0, self.top_k, like=node)
                        for each in (ids, weights)
                    )
                node.args = x, ids, weights, *rest
                matches += 1
        return matches


def main(model=MODEL, top_k=1):
    mine = extend.use(FewerExperts, before="quantize", top_k=top_k)
    before = tokenmill.optimize(model, recipe=tokenmill.Recipe(weights="int8"), dry_run=True)
    with tempfile.TemporaryDirectory() as directory:
        recipe = tokenmill.Recipe(weights="int8", passes=[mine])
        after = tokenmill.optimize(model, f"{directory}/model.tm", recipe=recipe, check=True)
        with tokenmill.load(after.path) as session:
            (made,) = session.generate([[1, 2, 3]], max_new_tokens=8)
    for name, compiled in (("as it is", before), ("with the pass", after)):
        print(f"{name}: {compiled.facts['parameters']['active']:,} parameters are active per token")
    done = next(p for p in after.facts["passes"] if p["name"] == FewerExperts.name)
    print(f"{done['summary']}: {done['matches']} layers, logits change by {done['error']:.1%}")
    print(f"it writes {made.tokens}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
