"""Statistics of Monet's experts: which gates a text opened, and whose each expert is.

Shapes: G router groups, E experts per axis (expert ij has two indices), H heads, B batch, T tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.special import rel_entr, xlogy

from modeling_monet import Gates, MonetRouter
from tiered.data import ProcessedData
from tiered.store import UserError


@contextmanager
def record_gates(model: torch.nn.Module) -> Iterator[list[Gates]]:
    """A list that holds, once the block is left, each router group's gates of the tokens read.

    One (g1, g2) per group, each (B, tokens, H, E): in `generate`, those of the prompt and of every
    new token but the last, which is never read. Beam search reorders rows between steps: read the
    chosen sequences once more instead.
    """
    routers = [m for m in model.modules() if isinstance(m, MonetRouter)]
    steps: list[list[Gates]] = [[] for _ in routers]
    gates: list[Gates] = []
    hooks = [
        router.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        for router, kept in zip(routers, steps, strict=True)
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()
    for kept in filter(None, steps):  # none where nothing was read
        first, second = (torch.cat(axis, 1) for axis in zip(*kept, strict=True))
        gates.append((first, second))


@torch.inference_mode()
def mean_expert_weights(model: torch.nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean over tokens of sum_h g1_hi g2_hj, (G, E, E) float64 on the CPU.

    batches: input ids (B, T) without padding. Every group's weights sum to H. The model is read
    in evaluation mode: training mode would move its running statistics.
    """
    device, total, tokens = next(model.parameters()).device, None, 0
    training = model.training
    model.eval()
    for ids in filter(len, batches):  # a split without a block is one empty batch
        out = model(input_ids=ids.to(device), output_router_probs=True, logits_to_keep=1)
        sums = torch.stack([g1.flatten(0, 2).T @ g2.flatten(0, 2) for g1, g2 in out.router_probs])
        total = sums.double() if total is None else total + sums.double()
        tokens += ids.numel()
    model.train(training)
    if total is None:
        raise ValueError("mean_expert_weights: no tokens")
    return (total / tokens).cpu()


@torch.inference_mode()
def block_expert_weights(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens of sum_h g1_hi g2_hj, (B, G, E, E) float64 on the CPU.

    input_ids (B, T) without padding; the model is read in evaluation mode.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    out = model(input_ids=input_ids.to(device), output_router_probs=True, logits_to_keep=1)
    model.train(training)
    tokens = input_ids.shape[1]
    sums = [torch.einsum("bthi,bthj->bij", g1, g2) for g1, g2 in out.router_probs]
    return (torch.stack(sums, 1).double() / tokens).cpu()


def expert_scores(
    model: torch.nn.Module,
    data: ProcessedData,
    split: str = "calibration",
    batch_rows: int = 16,
    domains: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """S_D of the domains (None: all present): `mean_expert_weights` on a split's blocks."""
    scores = {}
    for domain in data.domains if domains is None else domains:
        blocks = torch.from_numpy(np.ascontiguousarray(data.blocks(domain, split), dtype=np.int64))
        if not len(blocks):
            raise UserError(f"domain {domain}: no block in its {split} split; nothing to score")
        scores[domain] = mean_expert_weights(model, blocks.split(batch_rows))
    return scores


def experts_of(scores: dict[str, torch.Tensor], domain: str, ratio: float = 2.0) -> torch.Tensor:
    """Experts (G, E, E) bool that are a domain's: S_D > 0 and S_D >= ratio * every other's score.

    The rest are generalists or another domain's. (arXiv:2412.04139, where ratio is 2.) Raises
    ValueError for a domain without scores or without others to compare with.
    """
    if domain not in scores or len(scores) < 2:
        raise ValueError(
            f"domain: {domain!r} and at least one other need scores, found {list(scores)}"
        )
    others = torch.stack([s for name, s in scores.items() if name != domain])
    own = scores[domain]
    return (own > 0) & (own >= ratio * others.amax(0))


def purge(
    model: torch.nn.Module,
    scores: dict[str, torch.Tensor],
    domain: str,
    ratio: float = 2.0,
    renormalize: bool = False,
) -> torch.Tensor:
    """Purge a domain's experts from a model, in place; returns them, (G, E, E) bool."""
    purged = experts_of(scores, domain, ratio)
    model.purge_experts(~purged, renormalize)
    return purged


# --- how experts divide domains among them -----------------------------------------------------
#
# joint (D, X): weight that domain d sends through expert x, every domain's row summing to the same.


def joint_of(scores: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """One joint (D, X) per router group from S of every domain (G, E, E), rows summing to 1 / D."""
    stacked = torch.stack(list(scores.values())).flatten(2).double().numpy()  # (D, G, X)
    rows = stacked / stacked.sum(-1, keepdims=True) / len(stacked)
    return [rows[:, group] for group in range(rows.shape[1])]


def _entropy(p: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Entropy in nats along an axis (None: of all entries); 0 log 0 = 0."""
    return -xlogy(p, p).sum(axis)


def normalised_information(joint: np.ndarray) -> float:
    """NMI of domain and expert under a joint (D, X): I(d; x) over the mean of H(d) and H(x)."""
    p = joint / joint.sum()
    by_domain, by_expert = _entropy(p.sum(1)), _entropy(p.sum(0))
    information = by_domain + by_expert - _entropy(p)
    mean = (by_domain + by_expert) / 2
    return float(information / mean) if mean > 0 else 0.0


def permuted_information(
    weights: np.ndarray, labels: np.ndarray, samples: int, generator: np.random.Generator
) -> np.ndarray:
    """`normalised_information` with the labels of documents shuffled, (samples,): what few
    documents and many experts give by chance. weights (documents, X), labels (documents,)."""
    domains, index = np.unique(labels, return_inverse=True)
    found = []
    for _ in range(samples):
        joint = np.zeros((len(domains), weights.shape[1]))
        np.add.at(joint, generator.permutation(index), weights)
        found.append(normalised_information(joint / joint.sum(1, keepdims=True)))
    return np.array(found)


def effective_numbers(joint: np.ndarray) -> tuple[float, float]:
    """Effective domains per expert and experts per domain under a joint (D, X): exp of the
    conditional entropy, mean over experts (by weight) and over domains."""
    p = joint / joint.sum()
    by_expert, by_domain = p.sum(0), p.sum(1)
    used = by_expert > 0
    domains = np.exp(_entropy(p[:, used] / by_expert[used], 0))
    experts = np.exp(_entropy(p / by_domain[:, None], 1))
    return float(domains @ by_expert[used]), float(experts @ by_domain)


def divergences(joint: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits between the experts of every two domains, (D, D)."""
    rows = joint / joint.sum(1, keepdims=True)
    found = []
    for row in rows:
        mean = (rows + row) / 2
        found.append((rel_entr(rows, mean) + rel_entr(row, mean)).sum(1) / 2)
    # of nearly equal rows the sum of tiny terms of both signs may end below 0
    return np.maximum(found, 0) / np.log(2)
