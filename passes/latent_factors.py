"""The algebra that turns attention with keys and values per head into latent attention; no graphs here.

One layer: ``H`` query heads of width ``d`` in ``G`` groups, each with one key head and one value head, all
linear in the layer's input ``x [n]``.  Of a head's ``d`` columns, ``P`` pairs are rotated by RoPE; a pair is
a complex number, and rotating it by the angle of position is multiplying it with ``z_p``, ``|z_p|`` constant.
Then ``score = Re(conj(q z_m) k z_n) = Re(conj(q) k r_D)``, where ``r_D = conj(z_D) z_0`` depends on the
distance ``D = m - n`` only.  Pairs of all groups together are called *channels* here, ``P G`` of them.

1. *Scale* (exact): every channel of a key by the root mean square of the queries that read it, those by its
   inverse.  Then all channels matter alike.
2. *Turn* (exact): any orthogonal mixing of channels that share a frequency, the same for real and imaginary
   parts, of keys and, transposed, of queries, commutes with RoPE; the principal axes gather what keys have
   in common over groups in few channels.  (RoRoPE: Meng et al. 2025, TransMLA.)
3. *Fold* (lossy): channels of ``M`` neighbouring frequencies are mixed as if they shared one.  (FreqFold,
   there.)
4. *Drop* (lossy): the strongest channels stay rotary keys, shared by all heads.  In the others ``r_D`` is
   replaced by its mean over the distances that attention looks at, a constant that queries absorb.  (There
   it is replaced by ``r_0``; the mean is the closest constant.)
5. *Factorise* (lossy): other channels and values become functions of one latent of width ``R``, the
   principal axes of both together on a text, where an error of a key counts as much as queries make of it,
   and one of a value as much as the output projection makes of it.  ``balance`` weighs one against the
   other.  (As CARE, Yao et al. 2026, and TransMLA do; both measure keys and values as they are.)

Constants cost no rank: the mean of keys without rotation adds the same to all scores of a query, which
softmax does not see, and the mean of values adds the same to every output, which becomes a bias there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-13  # of the largest eigenvalue; what is smaller is noise


@dataclass(frozen=True)
class Heads:
    """Projections of one layer in fp64: ``query [H, d, n]``, ``key [G, d, n]``, ``value [G, v, n]``, their
    biases without the last dim, and ``output [H, v, N]``, by which heads write to the residual stream.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    output: Tensor

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return len(self.query) // len(self.key)


@dataclass(frozen=True)
class Inputs:
    """Moments of what a layer sees: ``second [n, n]``, the mean of ``x x^T``, and ``mean [n]``."""

    second: Tensor
    mean: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Rotation:
    """RoPE: columns ``real`` and ``imaginary`` of a head are pairs ``[P]``; ``angle [L, P]`` is complex.

    ``distance [L]`` says how much attention looks how far back; it adds up to 1.
    """

    real: Tensor
    imaginary: Tensor
    angle: Tensor
    distance: Tensor

    @property
    def relative(self) -> Tensor:
        """``r_D``, ``[L, P]``: what a score is multiplied with at distance ``D``."""
        return self.angle.conj() * self.angle[:1]

    @property
    def constant(self) -> Tensor:
        """``[P]``: the mean of ``r_D``."""
        return (self.distance[:, None] * self.relative).sum(0)

    def still(self, width: int) -> Tensor:
        """The columns of a head that are not rotated."""
        turned = torch.zeros(width, dtype=torch.bool)
        turned[self.real] = turned[self.imaginary] = True
        return (~turned).nonzero().flatten()


class Channels(NamedTuple):
    """Axes of the channels of one layer after scaling and turning: ``axes [C, P, G]``, orthonormal, strongest
    first within a fold; ``fold [C]`` is the fold of each, ``gain [P, G]`` what keys are multiplied with,
    ``power [C]`` what each adds to the variance of scores, ``loss [C]`` what dropping its rotation costs.
    """

    axes: Tensor
    fold: Tensor
    gain: Tensor
    power: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Latent:
    """Latent attention of one layer, fp64.

    ``query [H, d + 2 S, n]`` and ``query_bias [H, d + 2 S]`` (the last 2 S rotary, halves), ``rotary
    [2 S, n]`` and ``rotary_bias [2 S]``, ``down [R, n]``, ``w_uk [H, d, R]``, ``w_uv [H, v, R]``,
    ``output_bias [N]``.
    """

    query: Tensor
    query_bias: Tensor
    rotary: Tensor
    rotary_bias: Tensor
    down: Tensor
    w_uk: Tensor
    w_uv: Tensor
    output_bias: Tensor


def linearised(second: Tensor, cross: Tensor, start: Tensor) -> Tensor:
    """The ``W [m, n]`` with ``W x`` closest to a function ``y(x)``, given ``E[x x^T]`` and ``E[y x^T]``.

    Where the text says nothing it stays at ``start``.
    """
    damp = 1e-4 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    return torch.linalg.solve(second + damp, (cross + start @ damp).T).T


def channels(heads: Heads, inputs: Inputs, rotation: Rotation, fold: int) -> Channels:
    """Steps 1 to 3: the channels of a layer, mixed over groups and over ``fold`` frequencies."""
    pairs, groups = len(rotation.real), len(heads.key)
    folds = torch.arange(pairs) // fold
    queries = _second(
        _complex(heads.query, rotation), _complex_bias(heads.query_bias, rotation), inputs
    )
    energy = queries.diagonal(dim1=-2, dim2=-1).real.unflatten(0, (groups, -1)).sum(1).T  # [P, G]
    gain = energy.clamp(min=_TINY * float(energy.max())).sqrt()
    keys = _complex(heads.key, rotation) * gain.T[..., None]  # [G, P, n]
    biases = _complex_bias(heads.key_bias, rotation) * gain.T
    varying = 1 - rotation.constant.abs().square() / rotation.relative[0].abs().square()
    axes = torch.zeros(pairs * groups, pairs, groups, dtype=torch.float64)
    power = torch.zeros(pairs * groups, dtype=torch.float64)
    loss, owner, at = power.clone(), torch.zeros(pairs * groups, dtype=torch.long), 0
    for one in folds.unique().tolist():
        members = (folds == one).nonzero().flatten()
        some, bias = (
            t[:, members].transpose(0, 1).flatten(0, 1) for t in (keys, biases)
        )  # [M G, n]
        moments = _second(some[None], bias[None], inputs)[0].real
        values, vectors = torch.linalg.eigh(moments)
        count = len(values)
        mixed = vectors.flip(-1).T.unflatten(-1, (len(members), groups))
        axes[at : at + count, members] = mixed
        power[at : at + count] = values.flip(-1).clamp(min=0)
        # An axis over several frequencies varies as its members do.
        share = mixed.square().sum(-1)
        loss[at : at + count] = power[at : at + count] * (share @ varying[members])
        owner[at : at + count] = one
        at += count
    return Channels(axes, owner, gain, power, loss)


@dataclass(frozen=True)
class Factors:
    """Steps 4 and 5 of one layer, for every rank: ``tail [R + 1]`` is the share of what latents hold that is
    lost with the first 0, 1, ... of them.
    """

    full: Latent
    tail: Tensor
    heads: Heads
    inputs: Inputs

    def latent(self, rank: int | None = None) -> Latent:
        """The first ``rank`` latents, all by default; what they leave out of the mean value is a bias."""
        down, w_uk, w_uv = (
            self.full.down[:rank],
            self.full.w_uk[..., :rank],
            self.full.w_uv[..., :rank],
        )
        values = (self.heads.value @ self.inputs.mean + self.heads.value_bias).repeat_interleave(
            self.heads.group, 0
        )
        missing = values - w_uv @ (down @ self.inputs.mean)
        bias = torch.einsum("hv,hvn->n", missing, self.heads.output)
        return replace(self.full, down=down, w_uk=w_uk, w_uv=w_uv, output_bias=bias)


def factorise(
    heads: Heads,
    inputs: Inputs,
    rotation: Rotation,
    found: Channels,
    slots: Tensor,
    balance: float = 1.0,
) -> Factors:
    """Steps 4 and 5, where the channels ``slots [S]`` stay rotary."""
    split = _split(heads, rotation, found, slots)
    key_metric = _root(split.metric(heads, inputs))
    value_metric = balance * _value_metric(heads)
    stacked = torch.cat((key_metric @ split.rest, value_metric @ heads.value.flatten(0, 1)))
    strength, basis = _principal(stacked @ inputs.covariance @ stacked.T)
    down = basis.T @ stacked
    keys_up, values_up = basis.split((len(key_metric), len(value_metric)))
    w_uk = split.readers @ torch.linalg.solve(key_metric, keys_up)
    w_uv = torch.linalg.solve(value_metric, values_up).unflatten(0, (len(heads.value), -1))
    left = torch.cat((strength.flip(0).cumsum(0).flip(0), strength.new_zeros(1)))
    # Weights of one size, as a model is trained with, and as training them further takes them to be.
    size, turn = _rms(heads.key) / _rms(down), _rms(heads.query) / _rms(split.query)
    full = Latent(
        torch.cat((heads.query, turn * split.query), 1),
        torch.cat((heads.query_bias, turn * split.query_bias), 1),
        split.rotary / turn, split.rotary_bias / turn, size * down, w_uk / size,
        w_uv.repeat_interleave(heads.group, 0) / size,
        heads.output.new_zeros(heads.output.shape[-1]),
    )  # fmt: skip
    return Factors(full, left / left[0], heads, inputs)


# --- rotary keys, and the rest ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """``rotary [2 S, n]`` are the keys that stay rotary and ``query [H, 2 S, n]`` what reads them; ``rest
    [K, n]`` are the real numbers that the other parts of keys are made of, and ``readers [H, d, K]`` how the
    queries of a head read these.
    """

    rotary: Tensor
    rotary_bias: Tensor
    query: Tensor
    query_bias: Tensor
    rest: Tensor
    readers: Tensor

    def metric(self, heads: Heads, inputs: Inputs) -> Tensor:
        """``[K, K]``: what an error of the rest adds to the squared scores of all heads."""
        queries = _second(heads.query, heads.query_bias, inputs)
        return torch.einsum("hdk,hde,hel->kl", self.readers, queries, self.readers)


def _split(heads: Heads, rotation: Rotation, found: Channels, slots: Tensor) -> _Split:
    keys = _complex(heads.key, rotation) * found.gain.T[..., None]
    biases = _complex_bias(heads.key_bias, rotation) * found.gain.T
    queries, query_biases = (
        f(q, rotation) for f, q in ((_complex, heads.query), (_complex_bias, heads.query_bias))
    )
    inverse = (1 / found.gain).T.repeat_interleave(heads.group, 0)  # [H, P]
    queries, query_biases = queries * inverse[..., None], query_biases * inverse
    chosen = torch.zeros(len(found.axes), dtype=torch.bool)
    chosen[slots] = True
    axes = found.axes[slots].to(keys.dtype)
    per_head = axes.repeat_interleave(heads.group, -1)  # [S, P, H]
    rotary = torch.einsum("spg,gpn->sn", axes, keys)
    rotary_bias = torch.einsum("spg,gp->s", axes, biases)
    query = torch.einsum("sph,hpn->hsn", per_head, queries)
    query_bias = torch.einsum("sph,hp->hs", per_head, query_biases)

    other = found.axes[~chosen]
    rest = torch.einsum("spg,gpn->sn", other.to(keys.dtype), keys)
    still = rotation.still(heads.key.shape[1])
    parts = [rest.real, rest.imag, heads.key[:, still].flatten(0, 1)]
    readers = _readers(heads, rotation, found, other, still)
    return _Split(
        torch.cat((rotary.real, rotary.imag)), torch.cat((rotary_bias.real, rotary_bias.imag)),
        torch.cat((query.real, query.imag), 1), torch.cat((query_bias.real, query_bias.imag), 1),
        torch.cat(parts), readers,
    )  # fmt: skip


def _readers(
    heads: Heads, rotation: Rotation, found: Channels, other: Tensor, still: Tensor
) -> Tensor:
    """``[H, d, K]``: score += q_h . readers[h] rest.  Of a pair, Re(conj(q) m k) with the constant m."""
    groups, width = len(heads.key), heads.key.shape[1]
    weight = torch.einsum("spg,pg->gps", other, 1 / found.gain)  # of channel s in pair p of group g
    constant = rotation.constant
    count = len(other)
    readers = torch.zeros(groups, width, 2 * count + groups * len(still), dtype=torch.float64)
    cos, sin = (part[None, :, None] * weight for part in (constant.real, constant.imag))
    readers[:, rotation.real, :count] = cos
    readers[:, rotation.real, count : 2 * count] = -sin
    readers[:, rotation.imaginary, :count] = sin
    readers[:, rotation.imaginary, count : 2 * count] = cos
    for g in range(groups):
        at = 2 * count + g * len(still)
        readers[g, still, at + torch.arange(len(still))] = 1.0
    return readers.repeat_interleave(heads.group, 0)


def _complex(weight: Tensor, rotation: Rotation) -> Tensor:
    """``[.., P, n]`` complex of the rows of heads ``[.., d, n]``."""
    return torch.complex(weight[:, rotation.real], weight[:, rotation.imaginary])


def _complex_bias(bias: Tensor, rotation: Rotation) -> Tensor:
    return torch.complex(bias[:, rotation.real], bias[:, rotation.imaginary])


# --- linear algebra ---------------------------------------------------------------------------------


def _second(weight: Tensor, bias: Tensor, inputs: Inputs) -> Tensor:
    """``E[y y^H]`` of ``y = W x + b``, for stacks ``W [.., m, n]``, ``b [.., m]``."""
    second, mean = inputs.second.to(weight.dtype), inputs.mean.to(weight.dtype)
    cross = (weight @ mean)[..., :, None] * bias.conj()[..., None, :]
    product = bias[..., :, None] * bias.conj()[..., None, :]
    return weight @ second @ weight.mH + cross + cross.mH + product


def _rms(weight: Tensor) -> float:
    return float(weight.square().mean().sqrt()) if weight.numel() else 1.0


def _root(matrix: Tensor) -> Tensor:
    """``L`` with ``L L^T = matrix``, symmetric; small eigenvalues are raised so that nothing is free."""
    if not matrix.numel():
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    floor = 1e-6 * values.max().clamp(min=torch.finfo(torch.float64).tiny)
    return (vectors * values.clamp(min=float(floor)).sqrt()) @ vectors.T


def _value_metric(heads: Heads) -> Tensor:
    """The root of what an error of values adds to the squared output, ``[G v, G v]``."""
    gram = torch.einsum("hvn,hwn->hvw", heads.output, heads.output)
    per_group = gram.unflatten(0, (len(heads.value), -1)).sum(1)
    return torch.block_diag(*(_root(g) for g in per_group))


def _principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances ``[R]`` and axes ``[m, R]``, the strongest first, of all that hold anything."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = int((values > _TINY * values.max()).sum())
    return values.flip(-1)[:kept], vectors.flip(-1)[:, :kept]
