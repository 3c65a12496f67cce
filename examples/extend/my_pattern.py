"""A rewrite by example: a norm as many people write it becomes the norm that kernels know.

    python examples/extend/my_pattern.py

In a recipe file: passes: [{use: "my_pattern:NormalizedScaled", before: fuse_norm}]
"""

import math
import tempfile

import tokenmill
import torch
import torch.nn.functional as F
from tokenmill import extend
from torch import nn


class NormalizedScaled(extend.Pattern):
    """normalize(x) * sqrt(d) * g => rms_norm(x, g)"""

    name = "normalized_scaled"
    weights = ("g",)  # x matches any activation, g only a weight, and scale any number

    def example(self):
        return torch.randn(1, 3, 8), torch.randn(8), 2.5

    def find(self, x, g, scale):
        return F.normalize(x, dim=-1) * scale * g

    def put(self, x, g, scale):
        return extend.mill.rms_norm(x, g, 1e-24)

    def accept(self, x, g, scale):
        return math.isclose(scale**2, extend.shape(x)[-1], rel_tol=1e-6)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.g, self.scale = nn.Parameter(1 + 0.1 * torch.randn(width)), width**0.5

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.g


def main():
    torch.manual_seed(0)
    width, vocab = 48, 128
    model = nn.Sequential(
        nn.Embedding(vocab, width), Norm(width), nn.Linear(width, width), Norm(width),
        nn.Linear(width, vocab),
    ).eval()  # fmt: skip
    recipe = tokenmill.Recipe(
        weights="fp32", passes=[extend.use(NormalizedScaled, before="fuse_norm")]
    )
    with tempfile.TemporaryDirectory() as directory:
        compiled = tokenmill.optimize(model, f"{directory}/model.tm", recipe=recipe, check=True)
        with tokenmill.load(compiled.path) as session:
            ids = [1, 2, 3, 5, 8]
            error = abs(session.logits(ids) - model(torch.tensor(ids)).detach().numpy()).max()
    mine = next(p for p in compiled.facts["passes"] if p["name"] == "normalized_scaled")
    print(f"{mine['summary']}: {mine['matches']} matches, relative error {mine['error']:.1e}")
    print(f"steps left to torch: {len(compiled.facts['extern_steps'])}")
    print(f"largest difference to the eager model: {error:.1e}")


if __name__ == "__main__":
    main()
