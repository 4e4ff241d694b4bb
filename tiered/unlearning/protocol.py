"""What is scored for a forget set, and the pass that scores it.

For a forget set in domain f: members M_f (trained rows that are to go), holdout H_f and test T_f
rows; for every retained domain d members M_d and test rows T_d. One row per document, so rows are
the units of every resampling. Scored rows are keyed by (split, domain), M_f by ("forget", f).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from tiered.config import CANARY
from tiered.data import Rows
from tiered.evaluation import (
    MAX_UNK_SHARE,
    RowScores,
    assignments,
    router_scores,
    score_cache,
    sum_rows,
)
from tiered.modeling_tiered import Level1Embedder, TieredForCausalLM
from tiered.scoring import ScoreCache, TokenScores, score_prefixes, score_rows
from tiered.store import UserError
from tiered.unlearning.attacks import (
    gradient_norms,
    neighbour_loss,
    recall_losses,
    row_statistics,
    zlib_bytes,
)
from tiered.unlearning.sets import distinct_from_train
from tiered.unlearning.systems import Context, Forget
from tiered.unlearning.verbatim import verbatim_overlap

Scores = dict[tuple[str, str], RowScores]  # (split, domain) -> row scores
ScoredRows = dict[tuple[str, str], Rows]  # (split, domain) -> rows
Losses = tuple[np.ndarray | None, np.ndarray | None]  # a router's: trained rows, holdout
ATTACKED = ("forget", "holdout")  # splits whose rows the membership attacks compare


@dataclass
class Measured:
    """Row scores of one system, and its router's losses on f: trained rows against holdout."""

    scores: Scores
    router_members: np.ndarray | None
    router_holdout: np.ndarray | None


def scored_rows(context: Context, forget: Forget) -> ScoredRows:
    """The rows of a forget set's protocol, in a fixed order.

    Retained domains whose text the tokenizer cannot write ([UNK]) are left out.
    """
    unlearn, data, f = context.config.unlearn, context.data, forget.domain
    # of a forget file the domain is retained, and weighs in TA as much as any other
    tested = unlearn.retain_rows if forget.documents else unlearn.forget_rows
    rows = {
        ("forget", f): replace(member_rows(context, forget), split="forget"),
        ("holdout", f): holdout_rows(context, f),
        ("test", f): data.rows(f, "test", tested),
    }
    check_readable(rows.values())
    canaries = data.rows(f, CANARY)
    if canaries.document_ids and not forget.documents:  # they are the domain's, not a document's
        rows[CANARY, f] = canaries
    for d in context.retained(forget):
        members = context.retained_members(forget, d, unlearn.retain_rows)
        test = data.rows(d, "test", unlearn.retain_rows)
        if readable(members) and readable(test):
            rows["train", d], rows["test", d] = members, test
    for (split, domain), found in rows.items():
        if not found.document_ids:
            kind = "member" if split in ("forget", "train") else split
            apart = " of its own" if split in ATTACKED else ""
            raise UserError(
                f"unlearn.forget: domain {domain} has no {kind} row of {data.block_size} tokens"
                f"{apart}; lower data.block_size or give it more text"
            )
    return rows


def readable(rows: Rows) -> bool:
    """Whether the tokenizer can write the rows: [UNK] hides the text that it replaces."""
    return not len(rows.unk_share) or float(rows.unk_share.mean()) <= MAX_UNK_SHARE


def check_readable(parts: Iterable[Rows]) -> None:
    """UserError where rows of the forget domain are not `readable`."""
    for rows in parts:
        if not readable(rows):
            raise UserError(
                f"{rows.domain}: more than {MAX_UNK_SHARE:.0%} of its {rows.split} rows is [UNK];"
                " nothing measured on them would mean anything: take another tokenizer"
            )


def member_rows(context: Context, forget: Forget) -> Rows:
    """M_f: trained rows of the forget set that share no passage with other training text."""
    section, rows = context.config.unlearn, context.members(forget, 0)
    chosen = distinct_from_train(context.data, rows, section.max_overlap)
    return rows.only(chosen, section.forget_rows)


def holdout_rows(context: Context, domain: str) -> Rows:
    """H_f: rows of the same pool that no model read, and that share no passage with train."""
    section, rows = context.config.unlearn, context.data.rows(domain, "holdout")
    chosen = distinct_from_train(context.data, rows, section.max_overlap)
    return rows.only(chosen, section.holdout_rows)


class Scorer:
    """Scores rows of tokens under one system and the run's routing scope."""

    def __init__(
        self,
        context: Context,
        model: TieredForCausalLM,
        cache: ScoreCache | None,
        allowed: list[int] | None,
    ) -> None:
        self.context, self.model, self.cache, self.allowed = context, model, cache, allowed

    def tokens(self, ids: np.ndarray, z: bool = False) -> tuple[TokenScores, torch.Tensor]:
        """Scores of every position of ids (R, T), and its partition (R, S)."""
        config = self.context.config
        scope, batch_rows = config.router.scope, config.eval.batch_rows
        routed = router_scores(self.model, ids, batch_rows, self.allowed)
        chosen = assignments(routed, (scope,), config, None)
        found = score_rows(self.model, ids, chosen, batch_rows, self.cache, z=z)
        return found[scope], chosen[scope]

    def rows(self, rows: Rows, attacked: bool) -> RowScores:
        """Sums of every row; attacked: with the statistics that membership attacks need."""
        tokens, assignment = self.tokens(rows.input_ids, z=attacked)
        sums = sum_rows(rows, self.context.config.router.scope, tokens, assignment)
        if attacked:
            sums.extra = self._statistics(rows, tokens, sums)
        return sums

    def _statistics(
        self, rows: Rows, tokens: TokenScores, sums: RowScores
    ) -> dict[str, np.ndarray]:
        section, context = self.context.config.unlearn, self.context
        texts = context.data.tokenizer.batch_decode(rows.input_ids)
        found = row_statistics(tokens, section.min_k_share) | {"zlib_bytes": zlib_bytes(texts)}

        def score(ids: np.ndarray) -> np.ndarray:
            return self.tokens(ids)[0].nll

        whole = tokens.scored.all()
        if "neighbourhood" in section.attacks and whole:
            found["neighbour_loss"] = neighbour_loss(context.config, context.data, rows, score)
        prefix = context.data.rows(rows.domain, "calibration", 1).input_ids
        if "ReCaLL" in section.attacks and whole and len(prefix):
            half = prefix[0, : rows.input_ids.shape[1] // 2]
            found |= recall_losses(half, rows, tokens.nll, score)
        count = len(rows.input_ids)
        if section.verbatim_rows:  # members that occur most often come first
            few = rows.input_ids[: section.verbatim_rows]
            overlap = verbatim_overlap(
                self.model, few, context.config.eval.batch_rows, self.allowed
            )
            found["verbatim"] = np.pad(overlap, (0, count - len(few)), constant_values=np.nan)
        if "GradNorm" in section.attacks:
            chosen = np.linspace(0, count - 1, min(count, section.grad_norm_rows)).astype(int)
            found["grad_norm"] = np.full(count, np.nan)
            found["grad_norm"][chosen] = gradient_norms(
                self.model, rows.input_ids[chosen], sums.last_partition[chosen]
            )
        return found


def measure(
    context: Context,
    scored: ScoredRows,
    model: TieredForCausalLM,
    hashes: dict[int, str],
    allowed: list[int] | None,
    splits: Iterable[str] = ("forget", "holdout", "test", "train", CANARY),
) -> Scores:
    """Row scores of a system under the run's routing scope; hashes: what each model is."""
    scorer = Scorer(context, model, score_cache(context.config, hashes), allowed)
    wanted = set(splits)
    return {
        key: scorer.rows(rows, key[0] in ATTACKED)
        for key, rows in scored.items()
        if key[0] in wanted
    }


def router_losses(context: Context, forget: Forget, model: TieredForCausalLM) -> Losses:
    """Mean nats per row of the Level-1 embedder LM: its training rows of f, holdout rows of f."""
    embedder = model.router.embedder
    losses, data, config = [], context.data, context.config
    untrained = forget.documents or forget.domain in config.data.added_domains
    if not isinstance(embedder, Level1Embedder) or untrained:
        return None, None  # it is no language model, or was not trained on the forget set
    limit = config.router.tokens_per_domain
    trained = data.packed(forget.domain, "router", limit_tokens=limit)
    for split, only in (("router", trained), ("holdout", None)):
        rows = data.rows(forget.domain, split, config.unlearn.forget_rows, only)
        ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids))
        nll = score_prefixes(embedder, ids, ids.shape[1] - 1, config.eval.batch_rows)["nll"]
        losses.append(nll.double().mean(1).numpy())
    return losses[0], losses[1]
