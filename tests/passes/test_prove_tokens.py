"""What mixes tokens outside attention is refused, with the place; what does not passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenmill.capture.module import capture
from tokenmill.errors import TokenMixing
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor, nn


class Decoder(nn.Module):
    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.mix = nn.Linear(8, 8)
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.inner(self.mix(x)))


def shift(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over tokens": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "running sum": lambda x: x.cumsum(1),
    "token shift": shift,
    "reversal": lambda x: x.flip(1),
    "scores without softmax": lambda x: (x @ x.transpose(1, 2)).tril() @ x,
    "softmax over tokens": lambda x: x.softmax(1),
    "sorted tokens": lambda x: x.sort(1).values,
    "normalised by the largest": lambda x: x / x.abs().amax(),
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over features": lambda x: x.softmax(-1),
    "running sum over features": lambda x: x.cumsum(-1),
    "sorted features": lambda x: x.sort(-1).values,
    "flattened and back": lambda x: x.reshape(-1, 2, 4).transpose(1, 2).reshape(x.shape),
    "largest feature": lambda x: x / (1 + x.abs().amax(-1, keepdim=True)),
    "flipped features": lambda x: x.flip(-1),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name: str) -> None:
    program = capture(Decoder(MIXING[name]), max_positions=64)
    with pytest.raises(TokenMixing, match=r"test_prove_tokens\.py"):
        run_passes(program, pipeline(Recipe(weights="fp32", kv="fp32")))


@pytest.mark.parametrize("name", APART)
def test_token_by_token_passes(name: str) -> None:
    program = capture(Decoder(APART[name]), max_positions=64)
    run_passes(program, pipeline(Recipe(weights="fp32", kv="fp32")), check=True)
