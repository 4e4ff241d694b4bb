"""Membership attacks: one score per row, low for what an attack takes for a member.

LOSS, zlib, Min-K%, Min-K%++ and reference come from the one pass that scores the rows;
neighbourhood, ReCaLL and GradNorm cost passes of their own (`unlearn.attacks`). Attacks are
compared within the forget domain: across languages they measure the language.

Shapes: R rows, T tokens per row, S = T - 1 scored positions.
"""

import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from sklearn.svm import SVC
from torch.nn import functional as F

from tiered.config import Config
from tiered.data import ProcessedData, Rows, unigram_log_probs
from tiered.evaluation import RowScores
from tiered.metrics import extraction_strength
from tiered.modeling_tiered import TieredForCausalLM
from tiered.scoring import TokenScores
from tiered.store import seed_of

# --- what a row's tokens say ------------------------------------------------------------------


def row_statistics(tokens: TokenScores, share: float) -> dict[str, np.ndarray]:
    """Per row (R,): min_k, min_k_pp (where z is known), confidence, extraction_strength.

    min_k: mean of the `share` largest -log p (arXiv:2310.16789); min_k_pp: minus the mean of the
    `share` lowest z (arXiv:2404.02936); confidence: mean probability of the right token. Only
    positions that are scored in every row count, at least one of them.
    """
    scored = tokens.scored.all(0)
    nll = tokens.nll[:, scored].astype(np.float64)
    count = max(1, int(round(share * nll.shape[1], 9)))  # 0.29 * 100 is 28.999...
    found = {
        "min_k": np.sort(nll, 1)[:, -count:].mean(1),
        "confidence": np.exp(-nll).mean(1),
        "extraction_strength": extraction_strength(tokens.correct[:, scored]),
    }
    if tokens.z is not None:
        z = tokens.z[:, scored].astype(np.float64)
        found["min_k_pp"] = -np.sort(z, 1)[:, :count].mean(1)
    return found


def zlib_bytes(texts: list[str]) -> np.ndarray:
    """Bytes of each text's UTF-8 under zlib, (R,) int64."""
    return np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.int64)


# --- attacks on the scored rows -----------------------------------------------------------------

# (the attacked system's rows, the same rows under the reference model) -> scores (R,)
Attack = Callable[[RowScores, RowScores], np.ndarray]

ATTACKS: dict[str, Attack] = {
    "LOSS": lambda s, _: s.mean_loss,
    "zlib": lambda s, _: s.mean_loss / s.extra["zlib_bytes"],
    "Min-K": lambda s, _: s.extra["min_k"],
    "Min-K++": lambda s, _: s.extra["min_k_pp"],
    "reference": lambda s, reference: s.mean_loss - reference.mean_loss,
    "neighbourhood": lambda s, _: s.mean_loss - s.extra["neighbour_loss"],
    "ReCaLL": lambda s, _: -s.extra["conditional_loss"] / s.extra["unconditional_loss"],
    "GradNorm": lambda s, _: s.extra["grad_norm"],
}
NEEDS = {
    **{"zlib": "zlib_bytes", "Min-K": "min_k", "Min-K++": "min_k_pp"},
    **{"neighbourhood": "neighbour_loss", "ReCaLL": "conditional_loss", "GradNorm": "grad_norm"},
}
FORWARD_ONLY = ("LOSS", "zlib", "Min-K", "Min-K++", "reference")


# --- attacks that read more than the rows ----------------------------------------------------

# (model, token ids (R, T)) -> nll (R, S) of the system under attack
Score = Callable[[np.ndarray], np.ndarray]


def neighbour_loss(config: Config, data: ProcessedData, rows: Rows, score: Score) -> np.ndarray:
    """Mean L over neighbours of each row (arXiv:2305.18462), (R,).

    Here a neighbour swaps a share of the row's tokens for draws from the domain's unigram: a
    masked language model, as published, exists for few of the languages. Position 0 is kept.
    """
    section = config.unlearn
    log_probs = unigram_log_probs(data, rows.domain)
    losses = []
    for i in range(section.neighbours):
        seed = seed_of(config.seed, "neighbours", rows.domain, rows.split, i)
        ids = swapped(rows.input_ids, log_probs, section.neighbour_swaps, seed)
        losses.append(score(ids).astype(np.float64).mean(1))
    return np.mean(losses, 0)


def swapped(ids: np.ndarray, log_probs: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A copy of ids (R, T) with a share of each row's tokens, at least one, drawn anew."""
    generator, (count, length) = np.random.default_rng(seed), ids.shape
    swaps = max(1, round(share * (length - 1)))
    places = 1 + np.argsort(generator.random((count, length - 1)), 1)[:, :swaps]
    weights = np.exp(log_probs)
    drawn = generator.choice(len(weights), size=places.shape, p=weights / weights.sum())
    copy = ids.copy()
    np.put_along_axis(copy, places, drawn, 1)
    return copy


def recall_losses(
    prefix: np.ndarray, rows: Rows, plain: np.ndarray, score: Score
) -> dict[str, np.ndarray]:
    """Mean nats of each row's beginning with and without a prefix (arXiv:2406.15968), (R,).

    prefix (P,): tokens of a text that nobody trained on. Prefix and beginning share a window of T
    tokens, so that no model is read beyond the length it was trained at: the row's first T - P
    tokens count. plain (R, S): the rows' nll without the prefix, of which the beginning is a part.
    """
    kept = rows.input_ids.shape[1] - len(prefix)
    joined = np.concatenate(
        [np.broadcast_to(prefix, (len(rows.input_ids), len(prefix))), rows.input_ids[:, :kept]], 1
    )
    conditional = score(joined)[:, len(prefix) :]  # tokens 1.. of the row, as without the prefix
    return {
        "conditional_loss": conditional.astype(np.float64).mean(1),
        "unconditional_loss": plain[:, : kept - 1].astype(np.float64).mean(1),
    }


def gradient_norms(
    model: TieredForCausalLM, input_ids: np.ndarray, partition: np.ndarray
) -> np.ndarray:
    """L2 norm of the gradient of L(x) in all parameters of the row's partition model, (R,).

    partition (R,): the model that reads the row. In evaluation mode: BatchNorm must not move.
    """
    norms = []
    for ids, k in zip(input_ids, partition.tolist(), strict=True):
        own = model.partitions[str(k)].eval()
        parameters = [p for p in own.parameters() if p.requires_grad]
        batch = torch.from_numpy(ids[None]).to(parameters[0].device)
        logits = own(input_ids=batch[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits[0], batch[0, 1:])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares = [g.double().square().sum() for g in found if g is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())
    return np.array(norms)


# --- the study's own MIA efficacy ------------------------------------------------------------


def svc_non_members(
    members: np.ndarray, non_members: np.ndarray, forget: np.ndarray, seed: int
) -> np.ndarray:
    """Forget rows (R,) bool that a support vector classifier takes for non-members; their share is
    the MIA efficacy of arXiv:2304.04934.

    As there: trained on confidences (R,) of retained training rows against rows of no
    training set, equally many. Domain-shifted: the retained rows are of other domains.
    """
    count = min(len(members), len(non_members))
    generator = np.random.default_rng(seed)
    a, b = (generator.permutation(values)[:count] for values in (members, non_members))
    labels = np.repeat([1, 0], count)
    classifier = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate([a, b])[:, None], labels)
    return classifier.predict(forget[:, None]) == 0


def attack_scores(
    names: Iterable[str],
    members: RowScores,
    non_members: RowScores,
    reference: tuple[RowScores, RowScores] | None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(members, non-members) of every named attack that can be computed.

    reference: the same rows under the reference model; None leaves the attack out.
    """
    found = {}
    for name in names:
        if name == "reference" and reference is None:
            continue
        # what was not computed: GradNorm of rows beyond its share, ReCaLL without a prefix
        if NEEDS.get(name, "") in {"", *members.extra} & {"", *non_members.extra}:
            a, b = reference or (members, non_members)
            found[name] = ATTACKS[name](members, a), ATTACKS[name](non_members, b)
    return found
