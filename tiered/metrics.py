"""Measures: nats, bits per byte, memorisation, exposure, normalised mutual information.

A scored row is T tokens of one document; position 0 is never scored, so a row has T - 1 scored
tokens and its bytes are those under tokens 1..T-1. Low loss means "member" for every attack.
"""

import math

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

# What a cell prints when a number would be a lie.
NOT_APPLICABLE, NONE, UNDEFINED, NO_POWER = "not applicable", "none", "undefined", "no power"


def bits_per_byte(loss_nats: float, num_bytes: float) -> float:
    """Summed loss in nats over UTF-8 bytes, as bits per byte."""
    return loss_nats / (math.log(2) * num_bytes)


def median_efficacy(members: np.ndarray, holdout: np.ndarray) -> float:
    """Within-domain MIA efficacy: share of members with loss at least the holdout median.

    About 0.5 for a model that never saw the members.
    """
    return float(np.mean(members >= np.median(holdout)))


def normalised_unlearning(original: float, unlearnt: float, gold: float) -> float:
    """UA_norm = (acc_o - acc_u) / (acc_o - acc_g): 0 nothing, 1 as gold, above 1 too much."""
    return (original - unlearnt) / (original - gold)


def partition_nmi(domains: np.ndarray, partitions: np.ndarray) -> float:
    """NMI(domain; partition) with arithmetic normalisation."""
    return float(normalized_mutual_info_score(domains, partitions, average_method="arithmetic"))


def maximal_nmi(num_partitions: int, num_domains: int) -> float:
    """The NMI that n partitions of D equal domains cannot exceed: 2 ln n / (ln n + ln D), 1 from
    n = D on; n equal groups of whole domains reach it, unequal ones stay below."""
    if num_domains == 1 or num_partitions == 1:
        return 1.0 if num_domains == num_partitions else 0.0
    num_partitions = min(num_partitions, num_domains)
    return 2 * math.log(num_partitions) / (math.log(num_partitions) + math.log(num_domains))


def token_lcs(a: list[int], b: list[int]) -> float:
    """Longest common subsequence of two id lists as a share of the first, in [0, 1].

    On token ids, because word tokenisers that keep [a-z0-9] see nothing in most scripts.
    """
    if not a:
        return 0.0
    row = np.zeros(len(b) + 1, dtype=np.int64)
    other = np.asarray(b)
    for token in a:
        candidate = np.where(other == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(candidate)
    return float(row[-1] / len(a))


def extraction_strength(correct: np.ndarray) -> np.ndarray:
    """ES = 1 - k*/N per row of correct (rows, N): k* is the first position from which every
    argmax is right, N if the last is wrong."""
    wrong_later = np.flip(np.logical_or.accumulate(np.flip(~correct, 1), axis=1), 1)
    return 1.0 - wrong_later.sum(1) / correct.shape[1]


def exposure(canary: float, references: np.ndarray) -> float:
    """log2 |R| - log2 rank of a canary's loss in R: itself and references it was not trained with.

    (arXiv:1802.08232.) A model that never saw it has 1.40 bits on average at |R| = 100, and
    log2(e) = 1.44 in the limit; log2 |R| is the most. Equal losses rank it in their middle.
    """
    rank = 1 + np.sum(references < canary) + 0.5 * np.sum(references == canary)
    return float(math.log2(len(references) + 1) - math.log2(rank))


def privacy_leak(unlearnt: float, gold: float) -> float:
    """PrivLeak in percent of two AUCs: (AUC'_u - AUC'_g) / AUC'_g, AUC' = 1 - AUC (MUSE,
    arXiv:2407.06460); 0 as gold. Undefined (ZeroDivisionError) at a gold AUC of 1."""
    return 100 * ((1 - unlearnt) - (1 - gold)) / (1 - gold)


def membership_similarity(unlearnt: float, gold: float) -> float:
    """s_MIA in [0, 1] of two AUCs: 1 - min(1, |AUC_u - AUC_g| / max(AUC_g, 1 - AUC_g))."""
    return 1 - min(1.0, abs(unlearnt - gold) / max(gold, 1 - gold))


def relearn_advantage(steps: np.ndarray, unlearnt: np.ndarray, gold: np.ndarray) -> float:
    """Mean over log2(1 + steps) of bpb_gold - bpb_unlearnt by trapezoids; above 0: the unlearnt
    system relearns faster than one that never saw the domain."""
    width = np.log2(1 + np.asarray(steps, dtype=float))
    area = np.trapezoid(np.asarray(gold) - np.asarray(unlearnt), width)
    return float(area / (width[-1] - width[0]))


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Harmonic mean over the first axis of positive values (D, ...)."""
    return len(values) / np.sum(1 / np.asarray(values, dtype=float), axis=0)
