"""A kernel of your own: an op with its meaning in torch and its body in C++ and Triton.

    python examples/extend/my_kernel.py

The op keeps the k largest numbers of every row, in magnitude, and makes the others zero: a sparse
activation that torch can only write with a sort and a scatter. An artifact that uses it runs anywhere; to
emit its kernels again, name the module:

    tokenmill verify model.tm --extension my_kernel
"""

import tempfile

import tokenmill
import torch
from tokenmill import extend
from torch import nn

# Rows are shared out among threads; X_WIDTH and K are constants of the kernel.
CPP = """
for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
  for (int i = 0; i < X_WIDTH; i++) {
    const float size = __builtin_fabsf(x[r][i]);
    int larger = 0;
    for (int j = 0; j < X_WIDTH; j++) larger += __builtin_fabsf(x[r][j]) > size;
    out[r][i] = larger < K ? x[r][i] : 0.0f;
  }
"""
# One row per program; cols counts to a power of two that covers it.
TRITON = """
x = tl.load(x_ptr + row * X_PITCH + cols, cols < X_WIDTH, 0.0).to(tl.float32)
larger = tl.zeros([BLOCK], tl.int32)
for j in range(X_WIDTH):
    other = tl.load(x_ptr + row * X_PITCH + j).to(tl.float32)
    larger += (tl.abs(other) > tl.abs(x)).to(tl.int32)
value = tl.where(larger < K, x, 0.0)
tl.store(out_ptr + row * OUT_PITCH + cols, to(value, out_ptr), cols < X_WIDTH)
"""


@extend.kernel("keep_largest(Tensor x, int k) -> Tensor", cpp=CPP, triton=TRITON)
def keep_largest(x, k):
    """x where |x| is among the k largest of its row, else 0"""
    rank = (x.abs()[..., None, :] > x.abs()[..., None]).sum(-1)
    return torch.where(rank < k, x, 0.0)


class Sparse(nn.Module):
    def forward(self, x):
        return keep_largest(x, 8)


def main():
    torch.manual_seed(0)
    print(f"kernel next to its reference: {extend.check(keep_largest, torch.randn(9, 50), 7):.1e}")

    model = nn.Sequential(
        nn.Embedding(128, 48), nn.Linear(48, 96), Sparse(), nn.Linear(96, 128)
    ).eval()
    with tempfile.TemporaryDirectory() as directory:
        recipe = tokenmill.Recipe(weights="fp32")
        compiled = tokenmill.optimize(model, f"{directory}/model.tm", recipe=recipe)
        with tokenmill.load(compiled.path) as session:
            ids = [1, 2, 3, 5, 8]
            error = abs(session.logits(ids) - model(torch.tensor(ids)).detach().numpy()).max()
    names = ", ".join(k["symbol"] for k in compiled.facts["kernels"])
    print(f"kernels of a model with it: {names}")
    print(f"largest difference to the eager model: {error:.1e}")


if __name__ == "__main__":
    main()
