"""Mixtures of partition models: p(x_{t+1} | x_0..t) = sum_j w_j(x_0..t) p_j(x_{t+1} | x_0..t).

One equation for c-BTM (weights by distance, arXiv:2303.14177), DEMix and BTM (Bayes posterior,
arXiv:2108.05036, arXiv:2208.03306), averages and top-1. Weights come from tokens 0..t alone.

Shapes: R rows, S scored positions (t predicts token t + 1), N partitions. log_probs (R, S, N): log
p_j of the token that came, -inf or NaN for absent partitions; log weights (R, S, N), each
position's exp sums to 1. Float64 throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

UPDATE = 0.3  # share of a block's posterior in the updated prior (DEMix, section 4)


@dataclass(frozen=True)
class Evidence:
    """What weights are made of: router scores (R, S, N), log_probs (R, S, N), log_probs of earlier
    rows of the same stream (rows, S, N) for the cached prior, and which partitions there are."""

    scores: torch.Tensor
    log_probs: torch.Tensor
    earlier: torch.Tensor
    present: tuple[int, ...]
    metric: str = "cosine"


@dataclass(frozen=True)
class MixtureSettings:
    """Temperature and number of partitions mixed (0: all) of one mixture; what all share."""

    temperature: float = 0.1
    top_k: int = 0
    distance_power: int = 2
    routing_fraction: float = 1.0
    likelihood: str = "cumulative"


def keep_top(log_weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """The top_k largest weights of each position, renormalised; ties go to the lowest index."""
    if top_k and top_k < log_weights.shape[-1]:
        order = torch.argsort(log_weights, dim=-1, descending=True, stable=True)
        log_weights = log_weights.scatter(-1, order[..., top_k:], -torch.inf)
    return log_weights.log_softmax(-1)


def mix(log_weights: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Nats (R, S) of the token that came; a partition of weight 0 is skipped, whatever it says."""
    skipped = log_weights == -torch.inf
    return -torch.where(skipped, -torch.inf, log_weights + log_probs).logsumexp(-1)


def by_distance(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """w_j proportional to exp(-dist(h(x_0..t), c_j)^power / T) (c-BTM, Eq. 2; its code has 4).

    With routing_fraction below 1 the weights of that share of the positions are kept to the end.
    """
    scores = evidence.scores.double()
    squared = -scores if evidence.metric == "euclidean" else 2 - 2 * scores
    log_weights = -(squared.clamp(min=0) ** (settings.distance_power / 2)) / settings.temperature
    last = max(1, round(settings.routing_fraction * scores.shape[1])) - 1
    places = torch.arange(scores.shape[1]).clamp(max=last)
    return keep_top(log_weights.log_softmax(-1)[:, places], settings.top_k)


def average(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """Equal weights of all present partitions."""
    prior = _uniform(evidence)
    return prior.log().expand(evidence.log_probs.shape)


def bayes_uniform(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """Posterior of the partition given the tokens so far, from equal priors in every row."""
    rows = len(evidence.log_probs)
    return _posterior(evidence, _uniform(evidence).expand(rows, -1), settings)


def bayes_updating(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """As bayes_uniform, but each row begins from 0.7 of the last prior and 0.3 of its posterior."""
    priors, _ = _updated(evidence.log_probs, _uniform(evidence), settings)
    return _posterior(evidence, priors, settings)


def bayes_cached(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """As bayes_uniform from one prior: the one that updating ends with on earlier rows."""
    _, prior = _updated(evidence.earlier, _uniform(evidence), settings)
    return _posterior(evidence, prior.expand(len(evidence.log_probs), -1), settings)


def hindsight(evidence: Evidence, settings: MixtureSettings) -> torch.Tensor:
    """All weight on the partition with the least loss of the whole row: no router, a lower bound of
    the loss of top-1 by row."""
    totals = evidence.log_probs.sum(1).nan_to_num(nan=-torch.inf)
    chosen = torch.full_like(totals, -torch.inf).scatter(1, totals.argmax(1, keepdim=True), 0.0)
    return chosen[:, None].expand(evidence.log_probs.shape)


def cached_prior(log_probs: torch.Tensor) -> torch.Tensor:
    """Probabilities (N,) that updating ends with on whole rows (R, S, N), from equal ones."""
    count = log_probs.shape[-1]
    prior = torch.full((count,), 1 / count, dtype=torch.float64)
    return _updated(log_probs, prior, MixtureSettings())[1]


MIXTURES: dict[str, Callable[[Evidence, MixtureSettings], torch.Tensor]] = {
    "distance": by_distance,
    "bayes_uniform": bayes_uniform,
    "bayes_updating": bayes_updating,
    "bayes_cached": bayes_cached,
    "average": average,
    "hindsight": hindsight,
}


def _uniform(evidence: Evidence) -> torch.Tensor:
    """Equal probabilities (N,) of the present partitions, 0 of the others."""
    prior = torch.zeros(evidence.log_probs.shape[-1], dtype=torch.float64)
    prior[list(evidence.present)] = 1 / len(evidence.present)
    return prior


def _posterior(evidence: Evidence, priors: torch.Tensor, settings: MixtureSettings) -> torch.Tensor:
    """Log posterior (R, S, N): priors (R, N) times the likelihood of the tokens up to t."""
    seen = _likelihood(evidence.log_probs, settings)
    before = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], 1)
    return keep_top(_plus(priors.log()[:, None], before), settings.top_k)


def _likelihood(log_probs: torch.Tensor, settings: MixtureSettings) -> torch.Tensor:
    """Log likelihood (R, S, N) after the token at each position: of all so far, or of it alone."""
    return log_probs.cumsum(1) if settings.likelihood == "cumulative" else log_probs


def _plus(log_prior: torch.Tensor, log_likelihood: torch.Tensor) -> torch.Tensor:
    return torch.where(log_prior == -torch.inf, -torch.inf, log_prior + log_likelihood)


def _updated(
    log_probs: torch.Tensor, prior: torch.Tensor, settings: MixtureSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prior (R, N) each row begins with, and the one (N,) after the last row."""
    priors = []
    for whole in _likelihood(log_probs, settings)[:, -1]:
        priors.append(prior)
        prior = (1 - UPDATE) * prior + UPDATE * _plus(prior.log(), whole).softmax(-1)
    return torch.stack(priors) if priors else prior.new_zeros(0, len(prior)), prior
