"""Chapter 02: one squared error by every convention in use, and where among the tokens it sits.

Activations are harvested once. What errors are divided by depends on them alone (`Ruler`), so each SAE costs one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saelib.metrics import About, Estimate, Spread, mean, precise, ratio
from saelib.models import checkpoints, load_model
from saelib.profile import Profile
from saelib.sae import SAE, TINY
from saelib.train import load_sae, there


class Convention(NamedTuple):
    """What a squared error is divided by."""

    centred: bool
    """Whether each activation first loses its mean over d_model."""
    scaled: bool
    """Whether each is first divided by its norm, and its error with it."""
    about: About
    """What the divisor is the mean squared distance from."""


PAPER = Convention(True, True, "mean")
README = Convention(False, True, "zero")
PEERS = Convention(False, False, "mean")
JOURNAL = Convention(False, False, "last")
WALK = {
    "OpenAI's README": README,
    "… about the mean": Convention(False, True, "mean"),
    "the paper": PAPER,
    "… in raw lengths": Convention(True, False, "mean"),
    "peers": PEERS,
    "the journal": JOURNAL,
}
"""From one convention to the next with one change at a time.

`README`: mean of |e|^2 / |x|^2. `PEERS`: 1 - variance explained as SAELens 6 computes it, sums over all tokens, one
division. `JOURNAL`: the variance is about the mean of the activations at last positions.
"""


def in_space(
    x: Float[Tensor, "*batch d_model"], centred: bool, scaled: bool
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch"]]:
    """Activations in a convention's space, and what their squared errors are to be multiplied by there."""
    x = precise(x)
    x = x - x.mean(-1, keepdim=True) if centred else x
    norm = x.norm(dim=-1, keepdim=True).clamp_min(TINY) if scaled else torch.ones_like(x[..., :1])
    return x / norm, norm[..., 0] ** -2


class Ruler:
    """What errors are divided by under some conventions, from raw activations, `first` position on, read once."""

    def __init__(
        self,
        contexts: Iterable[Float[Tensor, "contexts pos d_model"]],
        conventions: Iterable[Convention] = tuple(WALK.values()),
        first: int = 0,
    ):
        self.first = first
        self._spreads = {(c.centred, c.scaled): Spread() for c in conventions}
        weights: dict[tuple[bool, bool], list[Tensor]] = {space: [] for space in self._spreads}
        for x in contexts:
            for space, spread in self._spreads.items():
                seen, weight = in_space(x[:, first:], *space)
                spread.add(seen)
                weights[space].append(weight.cpu())
        self._weights = {space: torch.cat(found) for space, found in weights.items()}

    def measure(self, error: Float[Tensor, "n pos"], convention: Convention = PAPER) -> Estimate:
        """Normalised MSE from raw squared errors, and its standard error over contexts."""
        centred, scaled, about = convention
        weighted = error[:, self.first :] * self._weights[centred, scaled]
        return ratio(weighted, self._spreads[centred, scaled].result(about))

    def shares(self, error: Float[Tensor, "n pos"], convention: Convention = PAPER) -> Float[Tensor, "n counted"]:
        """Each token's error over the mean distance of all tokens: their mean is the normalised MSE."""
        centred, scaled, about = convention
        spread = self._spreads[centred, scaled].result(about)
        weighted = error[:, self.first :] * self._weights[centred, scaled]
        return weighted * weighted.numel() / spread.sum()


def control(profile: Profile, name: str) -> tuple[SAE, TransformerBridge] | None:
    """An SAE that reads a training checkpoint, and that checkpoint's model; None where it was not trained."""
    if name not in profile.saes or not there(profile, name):
        return None
    model = load_model(profile, next(c for c in checkpoints(profile) if c.step == profile.saes[name].checkpoint))
    return load_sae(profile, name, model), model


# --- where the error sits ---------------------------------------------------------------------------------------------


class Norms(NamedTuple):
    """Lengths of activations, and how alike they are, by position."""

    length: Float[Tensor, "n pos"]
    alike: Float[Tensor, "pos"]
    """Length of the mean of all unit vectors at a position: 1 if they all point the same way."""

    @property
    def ratio(self) -> Estimate:
        """Mean length at position 0 over the mean length elsewhere."""
        return ratio(self.length[:, 0], self.length[:, 1:].mean(1))


def norms(contexts: Iterable[Float[Tensor, "contexts pos d_model"]]) -> Norms:
    """Lengths of raw activations, and how alike the directions are at each position."""
    lengths, directions = [], 0
    for x in contexts:
        x = precise(x)
        length = x.norm(dim=-1)
        directions = directions + (x / length[..., None].clamp_min(TINY)).sum(0)
        lengths.append(length.cpu())
    length = torch.cat(lengths)
    return Norms(length, directions.norm(dim=-1).cpu() / len(length))


class Groups(NamedTuple):
    """Tokens sorted into groups by some number: where each group lies, and its mean."""

    at: list[float]
    values: list[Estimate]


def grouped(
    values: Float[Tensor, "n pos"],
    by: Shaped[Tensor, "n pos"],
    edges: Sequence[float],
    where: Bool[Tensor, "n pos"] | None = None,
) -> Groups:
    """Mean of `values` over tokens whose `by` lies from one edge up to the next; groups without tokens are left out.

    The last group has no upper end; what lies below the first edge is not counted.
    """
    group = torch.bucketize(by.double(), torch.tensor(edges, dtype=torch.float64), right=True)
    members = [(group == i + 1) if where is None else (group == i + 1) & where for i in range(len(edges))]
    members = [chosen for chosen in members if chosen.any()]
    return Groups([by[one].double().mean().item() for one in members], [mean(values, one) for one in members])


def occurrences(tokens: Int[Tensor, "n pos"], text: Int[Tensor, "m pos"]) -> Float[Tensor, "n pos"]:
    """How often each token occurs in some other text, per million tokens; half an occurrence stands for none."""
    counts = torch.bincount(text.flatten(), minlength=int(tokens.max()) + 1).double().clamp_min(0.5)
    return counts[tokens] * (1e6 / text.numel())


# --- a giant, planted -------------------------------------------------------------------------------------------------


def plant(
    x: Float[Tensor, "n pos d_model"], error: Float[Tensor, "n pos"], times: float, exact: float | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, "n pos d_model"], Float[Tensor, "n pos"]]:  # fmt: skip
    """Position 0 taken over by a vector `times` as long as the others are on average, and its squared error with it.

    With `exact` all these point the same, random way and lose this share of their squared length; without, they are
    those from the middle of the contexts, reconstructed as badly as there, both brought to that length.
    """
    x, error = x.double(), error.clone()
    length, middle = times * x[:, 1:].norm(dim=-1).mean(), x.shape[1] // 2
    vector, share = x[:, middle].roll(1, 0), error[:, middle].roll(1, 0)
    if exact is None:
        share = share / vector.square().sum(-1)
    else:
        vector = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        vector, share = vector.expand(len(x), -1), exact
    error[:, 0] = share * length**2
    giant = vector * (length / vector.norm(dim=-1, keepdim=True))
    return torch.cat([giant[:, None], x[:, 1:]], 1), error


def with_giant(
    x: Float[Tensor, "n pos d_model"], error: Float[Tensor, "n pos"], times: float, exact: float | None, seed: int = 0
) -> dict[Convention, Estimate]:
    """What the paper's convention and the journal's make of activations with such a position 0 (see `plant`)."""
    x, error = plant(x, error, times, exact, seed)
    ruler = Ruler(x.split(64), (PAPER, JOURNAL))
    return {convention: ruler.measure(error, convention) for convention in (PAPER, JOURNAL)}


def implied_ratio(honest: float, flattered: float, positions: int) -> float | None:
    """How long one position of a context must be, in lengths of the others, to turn one error into the other.

    If it is reconstructed exactly: flattered = honest (T - 1) / (T - 1 + ratio^2). None: no length does.
    """
    return ((positions - 1) * (honest / flattered - 1)) ** 0.5 if flattered <= honest else None
