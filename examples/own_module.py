"""A model of your own, from training to an artifact that needs no torch to run.

    python examples/own_module.py [--steps 600]

The model is a small decoder over bytes, an ordinary nn.Module. It learns this very file, is compiled, and
then recites from it. Bytes are its token ids, so no tokenizer is needed.
"""

import argparse
import tempfile
from pathlib import Path

import tokenmill
import torch
import torch.nn.functional as F
from torch import nn

TEXT = torch.tensor(list(Path(__file__).read_bytes()))
WIDTH, HEADS, LAYERS, POSITIONS = 96, 4, 2, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(WIDTH, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """ids [B, T] -> logits [B, T, 256]; tokenmill asks for no more than that."""

    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.bytes(ids) + self.places(places)))


def train(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=max(steps, 2))
    for step in range(steps):
        starts = torch.randint(0, len(TEXT) - POSITIONS, (8,)).tolist()
        batch = torch.stack([TEXT[i : i + POSITIONS + 1] for i in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.2f} nats per byte")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Decoder()
    train(model, options.steps)

    with tempfile.TemporaryDirectory() as directory:
        compiled = tokenmill.optimize(
            model, f"{directory}/decoder.tm", recipe=tokenmill.Recipe(weights="int8"),
            max_positions=POSITIONS, check=True,
        )  # fmt: skip
        with tokenmill.load(compiled.path) as session:
            ids = TEXT[:64].tolist()
            logits = session.logits(ids)  # numpy, [64, 256]
            (made,) = session.generate([ids], max_new_tokens=64)
    with torch.no_grad():
        wanted = model(TEXT[None, :64])[0].numpy()
    same = (logits.argmax(1) == wanted.argmax(1)).mean()
    print(f"\nINT8 next to the eager model: logits differ by {abs(logits - wanted).max():.3f},")
    print(f"of {wanted.std():.1f}; the same byte comes next in {same:.0%}\n")
    print(bytes(ids).decode() + "|" + bytes(made.tokens).decode(errors="replace"))


if __name__ == "__main__":
    main()
