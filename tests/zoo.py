"""Decoders as people write them, one for each way of writing attention, positions, blocks and experts.

Everything is as small as it can be with all sizes different, and no weight is so small that a mistake
could hide behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, HEADS, DIM, INTER, EXPERTS, POSITIONS = 61, 32, 4, 8, 20, 3, 128


# --- attention --------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    tokens, half = x.shape[-2], x.shape[-1] // 2
    steps = 100.0 ** (-torch.arange(half) / half)
    angles = torch.arange(tokens)[:, None] * steps
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    """Three projections with biases; subclasses say what happens between them and the output."""

    def __init__(self, heads_kv: int = HEADS, bias: bool = True) -> None:
        super().__init__()
        self.heads_kv = heads_kv
        self.q = nn.Linear(HIDDEN, HEADS * DIM, bias=bias)
        self.k = nn.Linear(HIDDEN, heads_kv * DIM, bias=bias)
        self.v = nn.Linear(HIDDEN, heads_kv * DIM, bias=bias)
        self.out = nn.Linear(HEADS * DIM, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            m(x).view(batch, tokens, -1, DIM).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            rotate_half(q), rotate_half(k), v, is_causal=True, enable_gqa=self.heads_kv != HEADS
        )


class Plain(Attention):
    """No positions at all."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FusedQKV(nn.Module):
    """q, k and v of one head side by side, as in GPT-NeoX; the first half of a head is rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, HEADS, 3 * DIM).transpose(1, 2).chunk(3, -1)
        q, k = (
            torch.cat((rotate_half(t[..., : DIM // 2]), t[..., DIM // 2 :]), -1) for t in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class MaskBuffer(nn.Module):
    """Softmax by hand under a triangle in a buffer, over one projection cut in three."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HEADS * DIM), nn.Linear(HIDDEN, HIDDEN)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(POSITIONS, POSITIONS))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            t.view(batch, tokens, HEADS, DIM).transpose(1, 2)
            for t in self.c_attn(x).split(HIDDEN, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(batch, tokens, width))


class AddedMask(Attention):
    """An additive triangle made on the way, scores divided, softmax in fp32."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        mask = torch.full((tokens, tokens), float("-inf"), device=q.device).triu(1)
        scores = torch.matmul(rotate_half(q), rotate_half(k).transpose(2, 3)) / math.sqrt(DIM)
        return torch.matmul(torch.softmax((scores + mask).float(), -1).type_as(q), v)


class WhereMask(Attention):
    """torch.where with the smallest number, keys repeated for their query heads, einsum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // self.heads_kv, 1) for t in (k, v))
        scores = torch.einsum("bhqd,bhkd->bhqk", rotate_half(q), rotate_half(k)) * DIM**-0.5
        at = torch.arange(q.shape[2])
        visible = at[None, :] <= at[:, None]
        scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class Grouped(Attention):
    """Query heads in groups of their key head, which einsum broadcasts over."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, tokens, _ = q.shape
        q = rotate_half(q).view(batch, self.heads_kv, HEADS // self.heads_kv, tokens, DIM)
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q, rotate_half(k)) * DIM**-0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -1e9).softmax(-1)
        return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).reshape(batch, HEADS, tokens, DIM)


class Capped(Attention):
    """Scores capped by tanh."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = rotate_half(q) @ rotate_half(k).transpose(-1, -2) * 0.3
        scores = 5.0 * torch.tanh(scores / 5.0)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class Windowed(Attention):
    """Every token sees itself and the 12 before it, by a mask of positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        distance = at[:, None] - at[None, :]
        visible = (distance >= 0) & (distance < 13)
        return F.scaled_dot_product_attention(rotate_half(q), rotate_half(k), v, attn_mask=visible)


class Sinks(Attention):
    """A learned logit per head that takes probability and gives nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = rotate_half(q) @ rotate_half(k).transpose(-1, -2) * DIM**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        column = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = torch.cat((scores.masked_fill(hidden, -torch.inf), column), -1)
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def slopes() -> Tensor:
    return 2.0 ** (-8.0 / HEADS * torch.arange(1, HEADS + 1))


class Alibi(Attention):
    """Softmax by hand over scores with a bias that falls with the distance (Press et al. 2022)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        distance = (at[None, :] - at[:, None]).float()
        scores = q @ k.transpose(-1, -2) * DIM**-0.5 + slopes()[:, None, None] * distance
        return scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ v


class AlibiOfKeys(Attention):
    """The bias of a key alone, which differs by a constant per query, as a mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        bias = slopes()[None, :, None, None] * torch.arange(tokens)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mask = bias.expand(1, HEADS, tokens, tokens).masked_fill(hidden, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class NormedHeads(Attention):
    """Queries and keys normalised head by head, with a learned scale."""

    def __init__(self) -> None:
        super().__init__(heads_kv=2)
        self.q_norm, self.k_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(self.q_norm(q), self.k_norm(k), v)


class Bidirectional(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class Dilated(Attention):
    """A token sees every second one before it: causal, but no window."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        distance = at[:, None] - at[None, :]
        mask = (distance >= 0) & (distance % 2 == 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# --- experts ----------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two maps and an activation."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(HIDDEN, INTER, bias=bias),
            nn.Linear(INTER, HIDDEN, bias=bias),
        )
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gated(nn.Module):
    """SwiGLU in three maps."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INTER, bias=bias) for _ in range(2))
        self.w2 = nn.Linear(INTER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Halves(nn.Module):
    """Gate and up in one map, the gate second."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = (
            nn.Linear(HIDDEN, 2 * INTER, bias=False),
            nn.Linear(INTER, HIDDEN, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wi(x).chunk(2, -1)
        return self.wo(up * F.gelu(gate, approximate="tanh"))


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class MoE(nn.Module):
    """A softmax router over module experts; subclasses dispatch."""

    def __init__(
        self, expert: Callable[[], nn.Module] = Gated, top_k: int = 2, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=bias)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))
        self.top_k = top_k

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, -1)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        chosen, weights = self.route(flat)
        return self.dispatch(flat, chosen, weights).view(x.shape)

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class SkipsEmpty(MoE):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            out[token] += weights[token, slot].unsqueeze(-1) * self.experts[e](x[token])
        return out


class BooleanMasks(MoE):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = chosen == e
            mask = hit.any(-1)
            if mask.any():
                share = (weights * hit).sum(-1)[mask]
                out[mask] += share[:, None] * expert(x[mask])
        return out


class OneHotLoop(MoE):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            idx, top_x = torch.where(expert_mask[e])
            current = x[None, top_x].reshape(-1, HIDDEN)
            out.index_add_(0, top_x, self.experts[e](current) * weights[top_x, idx, None])
        return out


class SharedFirst(MoE):
    """The sum begins with an expert that everybody visits."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Gated()

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class AllExperts(MoE):
    """Everybody visits everyone, with weight 0 where not chosen."""

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        shares = x.new_zeros(x.shape[0], EXPERTS).scatter(1, chosen, weights)
        return torch.stack([f(x) * shares[:, e, None] for e, f in enumerate(self.experts)]).sum(0)


class Switch(MoE):
    """Top-1 by argmax; its probability weighs the answer (Fedus et al. 2021)."""

    def __init__(self, expert: Callable[[], nn.Module] = lambda: MLP(F.relu)) -> None:
        super().__init__(expert, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        if self.training:
            flat = flat * torch.empty_like(flat).uniform_(0.99, 1.01)
        best, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = chosen == e
            out[mask] = expert(flat[mask]) * best[mask].unsqueeze(-1)
        return out.view(x.shape)


class Weighted(MoE):
    """Top-1 whose sigmoid score weighs what the expert sees."""

    def __init__(self) -> None:
        super().__init__(Gated, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        best, chosen = self.gate(flat).topk(1, -1)
        scaled, out = flat * best.sigmoid(), torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token = torch.where(chosen[:, 0] == e)[0]
            out = out.index_add(0, token, expert(scaled[token]))
        return out.view(x.shape)


class Stacked(nn.Module):
    """Weights of all experts in two tensors; subclasses dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTER) / 5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) / 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.router(flat).topk(2, -1)
        return self.dispatch(flat, chosen, weights.softmax(-1)).view(x.shape)

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class SelectedSlices(Stacked):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(chosen == e)
            gate, up = (x[token] @ self.w_in[e]).chunk(2, -1)
            out.index_add_(
                0, token, (F.silu(gate) * up) @ self.w_out[e] * weights[token, slot, None]
            )
        return out


class OneHotEinsum(Stacked):
    """Tokens are copied to every expert by a one-hot mask and summed up by it again (GShard)."""

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        onehot = F.one_hot(chosen, EXPERTS).to(x.dtype)
        combine = torch.einsum("tke,tk->te", onehot, weights)
        inputs = torch.einsum("te,th->eth", onehot.sum(1), x)
        gate, up = torch.einsum("eth,ehi->eti", inputs, self.w_in).chunk(2, -1)
        outputs = torch.einsum("eti,eih->eth", F.silu(gate) * up, self.w_out)
        return torch.einsum("te,eth->th", combine, outputs)


class DenseEinsum(Stacked):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("th,ehi->tei", x, self.w_in).chunk(2, -1)
        y = torch.einsum("tei,eih->teh", F.silu(gate) * up, self.w_out)
        shares = x.new_zeros(x.shape[0], EXPERTS).scatter(1, chosen, weights)
        return (y * shares[..., None]).sum(1)


class GatheredWeights(Stacked):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("th,tkhi->tki", x, self.w_in[chosen]).chunk(2, -1)
        y = torch.einsum("tki,tkih->tkh", F.silu(gate) * up, self.w_out[chosen])
        return (y * weights[..., None]).sum(1)


class GatheredBmm(Stacked):
    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        flat = chosen.reshape(-1)
        rows = x.repeat_interleave(2, 0)[:, None]
        gate, up = torch.bmm(rows, self.w_in[flat]).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.w_out[flat])[:, 0]
        return (y.view(-1, 2, HIDDEN) * weights[..., None]).sum(1)


class BiasedStack(nn.Module):
    """Gate and up interleaved, both clamped, biases everywhere; every expert sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTER) / 5)
        self.b_in = nn.Parameter(torch.randn(EXPERTS, 2 * INTER) / 5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) / 5)
        self.b_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN) / 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        best, chosen = self.router(flat).topk(2, -1)
        shares = flat.new_zeros(flat.shape[0], EXPERTS).scatter(1, chosen, best.softmax(-1))
        copies = flat.repeat(EXPERTS, 1).view(EXPERTS, -1, HIDDEN)
        both = torch.bmm(copies, self.w_in) + self.b_in[:, None]
        gate, up = both[..., ::2].clamp(max=1.5), both[..., 1::2].clamp(-1.5, 1.5)
        y = torch.bmm((up + 1) * gate * torch.sigmoid(gate * 1.7), self.w_out) + self.b_out[:, None]
        return (y * shares.t()[..., None]).sum(0).view(x.shape)


class Capacity(MoE):
    """An expert takes the first few tokens that choose it and drops the others."""

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        onehot = F.one_hot(chosen[:, 0], EXPERTS)
        kept = onehot * (onehot.cumsum(0) <= 3)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (kept[:, e] * weights[:, 0])[:, None]
        return out


class ExpertChoice(MoE):
    """Experts choose tokens (Zhou et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        best, token = self.gate(flat).softmax(-1).t().topk(1, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, token[e], expert(flat[token[e]]) * best[e][:, None])
        return out.view(x.shape)


class SortedLoop(MoE):
    """Tokens sorted by expert and cut by counts that become Python numbers."""

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order = chosen.flatten().argsort()
        counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
        rows, out = order // self.top_k, torch.zeros_like(x)
        pairs = zip(rows.split(counts), order.split(counts), self.experts, strict=True)
        for token, one, expert in pairs:
            out.index_add_(0, token, expert(x[token]) * weights.flatten()[one, None])
        return out


# --- the rest of a decoder --------------------------------------------------------------------------


class Decoder(nn.Module):
    """One or more blocks between an embedding and a head.

    ``wiring`` is where the norms are: ``pre``, ``post`` (after the sum), ``sandwich`` (before and after each
    part), or ``parallel`` (attention and MLP read the same norm).
    """

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Attention,
        mlp: Callable[[], nn.Module] = Gated,
        *,
        wiring: str = "pre",
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        learned: bool = False,
        tied: bool = False,
        head_bias: bool = False,
        cap: float = 0.0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.wiring, self.cap = wiring, cap
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN) if learned else None
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": attention(),
                    "mlp": mlp(),
                    "norms": nn.ModuleList(norm(HIDDEN) for _ in range(4)),
                }
            )
            for _ in range(layers)
        )
        self.norm = norm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=head_bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = self.block(x, block["attention"], block["mlp"], block["norms"])
        logits = self.head(self.norm(x))
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def block(self, x: Tensor, attention: Any, mlp: Any, norms: Any) -> Tensor:
        if self.wiring == "parallel":
            y = norms[0](x)
            return x + attention(y) + mlp(y)
        if self.wiring == "post":
            x = norms[0](x + attention(x))
            return norms[1](x + mlp(x))
        if self.wiring == "sandwich":
            x = x + norms[1](attention(norms[0](x)))
            return x + norms[3](mlp(norms[2](x)))
        x = x + attention(norms[0](x))
        return x + mlp(norms[1](x))


def _model(*args: Any, **kwargs: Any) -> Callable[[], Decoder]:
    def build() -> Decoder:
        torch.manual_seed(0)
        model = Decoder(*args, **kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(1.7)
                elif parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


def _experts(kinds: Sequence[Callable[[], nn.Module]]) -> dict[str, Callable[[], Decoder]]:
    return {kind.__name__: _model(Plain, kind) for kind in kinds}  # type: ignore[attr-defined]


DENSE: dict[str, Callable[[], Decoder]] = {
    "fused_qkv": _model(FusedQKV, MLP, norm=nn.LayerNorm, wiring="parallel"),
    "grouped_queries": _model(lambda: Attention(2), layers=2),
    "multi_query": _model(lambda: Attention(1, bias=False), MLP),
    "mask_buffer": _model(MaskBuffer, MLP, norm=nn.LayerNorm, learned=True, tied=True, layers=2),
    "added_mask": _model(AddedMask, wiring="post", norm=nn.LayerNorm, head_bias=True),
    "where_mask": _model(lambda: WhereMask(2), lambda: MLP(relu2), wiring="sandwich"),
    "grouped_einsum": _model(lambda: Grouped(2), Halves),
    "capped": _model(Capped, cap=7.0, tied=True),
    "windowed": _model(Windowed),
    "sinks": _model(Sinks),
    "alibi": _model(Alibi, layers=2),
    "alibi_of_keys": _model(AlibiOfKeys),
    "normed_heads": _model(NormedHeads),
}

EXPERT: dict[str, Callable[[], Decoder]] = {
    "gelu": _model(Plain, lambda: MoE(lambda: MLP(F.gelu, bias=False))),
    "relu2_biased": _model(Plain, lambda: MoE(lambda: MLP(relu2))),
    "gated_biased": _model(Plain, lambda: MoE(lambda: Gated(bias=True))),
    "halves": _model(Plain, lambda: MoE(Halves), wiring="parallel"),
    "top_1": _model(Plain, lambda: MoE(top_k=1)),
    "biased_router": _model(Plain, lambda: MoE(bias=True), wiring="post", norm=nn.LayerNorm),
    **_experts(
        [
            *(SkipsEmpty, BooleanMasks, OneHotLoop, SharedFirst, AllExperts, Switch, Weighted),
            *(SelectedSlices, OneHotEinsum, DenseEinsum, GatheredWeights, GatheredBmm, BiasedStack),
        ]
    ),
}
REFUSED: dict[str, tuple[Callable[[], Decoder], str]] = {
    "bidirectional": (_model(Bidirectional), "later tokens"),
    "dilated": (_model(Dilated), "neither causal nor"),
    "capacity": (_model(mlp=Capacity), "mixes tokens"),
    "expert_choice": (_model(mlp=ExpertChoice), "mixes tokens"),
    "sorted_loop": (_model(mlp=SortedLoop), "traced"),
}
# Beside those, what kernels do for few models: ALiBi and experts with biases, top-1.
COMPILED = {"biased": _model(Alibi, BiasedStack, layers=2), "top_1": _model(Sinks, Switch)}
