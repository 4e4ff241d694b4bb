"""The measures of one operation, from row scores alone: numbers with intervals, or words.

`not applicable`, `none` (no such domain), `undefined` (original and gold agree, too few rows) and
`no power` (the attack fails on the original already) are words: no number stands in for them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tiered.config import CANARY
from tiered.evaluation import RowScores
from tiered.metrics import (
    NO_POWER,
    NONE,
    NOT_APPLICABLE,
    UNDEFINED,
    bits_per_byte,
    exposure,
    harmonic_mean,
    median_efficacy,
    membership_similarity,
    normalised_unlearning,
    privacy_leak,
    relearn_advantage,
)
from tiered.statistics import (
    LEAST_NON_MEMBERS,
    Interval,
    auc,
    auc_draws,
    bootstrap_auc,
    bootstrap_ratios,
    bootstrap_true_positive_rate,
    chance_p,
    equivalence_p,
    has_power,
    kolmogorov_smirnov,
    mean_difference,
    median_difference,
    paired_error,
    permuted_maximum,
    resampled_counts,
    wilcoxon_p,
)
from tiered.store import seed_of
from tiered.unlearning.attacks import attack_scores, svc_non_members
from tiered.unlearning.protocol import ATTACKED, Measured, Scores
from tiered.unlearning.systems import Context, Forget
from tiered.unlearning.utility import LEAST_UTILITY, Alone

OVER, LEAKS, AS_GOLD = "over-unlearning", "leaks", "as gold"
UNLIKE = "unlike gold"


class Judge:
    """Measures of every operation on one forget set; what they share is computed once.

    measured: operation -> row scores; holds at least gold. Golds of other seeds are called
    gold-seed-<seed>. Without original, what needs it is `undefined`: changes, the power of attacks.
    alone: what every domain is worth by itself, for the model utility.
    """

    def __init__(
        self,
        context: Context,
        forget: Forget,
        measured: dict[str, Measured],
        alone: dict[str, Alone] | None = None,
    ) -> None:
        self.context, self.forget, self.measured, self.alone = context, forget, measured, alone
        self.section = context.config.unlearn
        self.has_original = "original" in measured
        self.golds = [name for name in measured if is_gold_name(name)]
        read = {d for split, d in measured["gold"].scores if split == "test"}
        near, far = ([d for d in group if d in read] for group in context.neighbours(forget))
        self.left_out = [d for d in context.retained(forget) if d not in read]
        self.groups = {"all": near + far, "near": near, "far": far}
        self._power: dict[tuple[str, str], Interval | None] = {}

    # --- all of it ----------------------------------------------------------------------------

    def metrics(self, operation: str, edited: bool = False) -> dict[str, Any]:
        """All measures of one operation, JSON-ready; edited: it changed what models compute."""
        u, o = self.scores(operation), self.scores("original") if self.has_original else None
        f = self.forget.domain
        members = u["forget", f]
        result: dict[str, Any] = {
            "UA": self.mean([members], _wrong, _tokens),
            "UA_norm": self.ua_norm(operation),
            "RA": {n: self.accuracy(u, "train", ds) for n, ds in self.groups.items()},
            "TA": {n: self.accuracy(u, "test", ds) for n, ds in self.groups.items()},
            "TA_f": self.mean([u["test", f]], _correct, _tokens),
            "MIA_efficacy": self.efficacy(operation),
            "MIA_efficacy_domain_shifted": self.shifted_efficacy(operation),
            "bpb": {
                "members": self.bpb([members]),
                "holdout": self.bpb([u["holdout", f]]),
                "test": self.bpb([u["test", f]]),
                "retain": {n: self.bpb_over(u, ds) for n, ds in self.groups.items()},
            },
            "bpb_change": {
                "test": self.bpb_change_over(o, u, [f]),
                **{n: self.bpb_change_over(o, u, ds) for n, ds in self.groups.items()},
            },
            "far_rows_changed": changed_rows(o, u, self.groups["far"]) if o else UNDEFINED,
            **self.utility(operation),
            "extraction_strength": self.extraction_strength(operation),
            "verbatim": self.verbatim(operation),
            "exposure": self.exposure(operation),
            "domains_left_out": self.left_out,  # [UNK]
            "rows": {
                "members": len(members.tokens),
                "holdout": len(u["holdout", f].tokens),
            },
        }
        result["gap_to_gold"] = self.gap_to_gold(operation)
        result["to_gold"] = self.distance_to_gold(operation)
        result["AUC"] = self.membership(operation)
        result["AUC_minus_gold"] = {t: self.beyond_gold(operation, t) for t in self.times()}
        result["TPR_at_1_FPR"] = self.true_positive_rates(operation)
        result["strongest_attack"] = self.strongest_attack(operation)
        result |= self.privacy(operation)
        result["router_AUC"] = self.router_membership(operation)
        result["membership_verdict"] = self.membership_verdict(operation)
        result["verdict"] = self.verdict(result) if edited else result["membership_verdict"]
        return result

    def scores(self, operation: str) -> Scores:
        """Row scores of an operation."""
        return self.measured[operation].scores

    def seed(self, *parts: Any) -> int:
        """Seed of a resampling; the same for all operations, so that their draws are paired."""
        return seed_of(self.context.config.seed, "bootstrap", self.forget.identity(), *parts)

    def rows_seed(self, *parts: RowScores) -> int:
        """Seed of a resampling of rows: theirs, whichever system scored them."""
        return self.seed("rows", *((p.rows.split, p.rows.domain) for p in parts))

    # --- accuracy and loss ---------------------------------------------------------------------

    def mean(self, parts: Sequence[RowScores], top, bottom) -> Any:
        """sum(top) / sum(bottom) over the union of rows, with a bootstrap over rows."""
        return Interval.of(*self._drawn(parts, top, bottom)).as_json()

    def _drawn(self, parts: Sequence[RowScores], top, bottom) -> tuple[float, np.ndarray]:
        """sum(top) / sum(bottom) over the union of rows, and its resamples."""
        a, b = (np.concatenate([f(p) for p in parts]).astype(float) for f in (top, bottom))
        samples, seed = self.section.bootstrap_samples, self.rows_seed(*parts)
        return float(a.sum() / b.sum()), bootstrap_ratios(a, b, samples, seed)

    def accuracy(self, scores: Scores, split: str, domains: list[str]) -> Any:
        """Accuracy on the union of the domains' rows; the word `none` without domains."""
        parts = [scores[split, d] for d in domains]
        return self.mean(parts, _correct, _tokens) if parts else NONE

    def bpb(self, parts: Sequence[RowScores]) -> Any:
        """Macro mean over parts of bits per byte, with a bootstrap over the rows of each."""
        drawn = [self._bpb_draws(p) for p in parts]
        return Interval.of(np.mean([p.bpb() for p in parts]), np.mean(drawn, 0)).as_json()

    def _bpb_draws(self, part: RowScores) -> np.ndarray:
        samples, seed = self.section.bootstrap_samples, self.rows_seed(part)
        drawn = bootstrap_ratios(part.loss_nats, part.num_bytes, samples, seed)
        return drawn * bits_per_byte(1.0, 1.0)

    def bpb_over(self, scores: Scores, domains: list[str]) -> Any:
        """Macro bits per byte on the domains' test rows; the word `none` without domains."""
        return self.bpb([scores["test", d] for d in domains]) if domains else NONE

    def bpb_change(self, before: Sequence[RowScores], after: Sequence[RowScores]) -> Any:
        """Macro mean of bits per byte after minus before, on the same rows, drawn together."""
        pairs = list(zip(before, after, strict=True))
        value = np.mean([b.bpb() - a.bpb() for a, b in pairs])
        drawn = np.mean([self._bpb_draws(b) - self._bpb_draws(a) for a, b in pairs], 0)
        return Interval.of(value, drawn).as_json()

    def bpb_change_over(self, o: Scores | None, u: Scores, domains: list[str]) -> Any:
        """`bpb_change` on the domains' test rows: the collateral of an operation."""
        if not domains or o is None:
            return NONE if not domains else UNDEFINED
        return self.bpb_change([o["test", d] for d in domains], [u["test", d] for d in domains])

    def utility(self, operation: str) -> dict[str, Any]:
        """Model utility: harmonic mean over retained domains of u_d, and each u_d.

        `none` without a run of single domains or retained domains; `undefined` where a domain's own
        model is no better than its unigram: u_d has no scale there.
        """
        retained, samples = self.groups["all"], self.section.bootstrap_samples
        if self.alone is None or not retained:
            return {"model_utility": NONE, "utility": NONE}
        found, drawn = {}, []
        for d in retained:
            part = self.scores(operation)["test", d]
            unigram, single = (
                nats[: len(part.tokens)] for nats in (self.alone[d].unigram, self.alone[d].single)
            )
            if single.sum() >= unigram.sum():
                found[d] = UNDEFINED
                continue
            top, bottom = unigram - part.loss_nats, unigram - single
            found[d] = max(LEAST_UTILITY, top.sum() / bottom.sum())
            drawn.append(bootstrap_ratios(top, bottom, samples, self.rows_seed(part)))
        words = [d for d, u in found.items() if u == UNDEFINED]
        utility = {d: u if d in words else number(u) for d, u in found.items()}
        if words:
            return {"model_utility": UNDEFINED, "utility": utility}
        value = harmonic_mean(np.array(list(found.values())))
        resampled = harmonic_mean(np.maximum(LEAST_UTILITY, np.array(drawn)))
        interval = Interval.of(value, resampled).as_json()
        return {"model_utility": interval, "utility": utility}

    def ua_norm(self, operation: str) -> Any:
        """UA_norm on member rows; `undefined` where original and gold differ by less than 2 SE."""
        if not self.has_original:
            return UNDEFINED
        f = self.forget.domain
        parts = [self.scores(n)["forget", f] for n in ("original", operation, "gold")]
        shares = [p.correct / p.tokens for p in parts]
        error = paired_error(shares[0], shares[2])
        accuracies = [p.accuracy() for p in parts]
        if abs(shares[0].mean() - shares[2].mean()) < 2 * error or accuracies[0] == accuracies[2]:
            return UNDEFINED
        samples, seed = self.section.bootstrap_samples, self.rows_seed(parts[0])
        drawn = [bootstrap_ratios(p.correct, p.tokens, samples, seed) for p in parts]
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = normalised_unlearning(*drawn)
        resampled = resampled[np.isfinite(resampled)]
        return Interval.of(normalised_unlearning(*accuracies), resampled).as_json()

    def extraction_strength(self, operation: str) -> Any:
        """Mean extraction strength of members, and what it is on holdout rows."""
        u, f = self.scores(operation), self.forget.domain
        found = {}
        for name, split in (("members", "forget"), ("holdout", "holdout")):
            part = u[split, f]
            if "extraction_strength" not in part.extra:
                return UNDEFINED
            found[name] = self.mean([part], lambda p: p.extra["extraction_strength"], _one)
        return found

    def verbatim(self, operation: str) -> Any:
        """Share of a row's second half that is written on from its first, as a subsequence: on
        holdout rows, and on members, by how often they occur, less that."""
        u, f = self.scores(operation), self.forget.domain
        parts = [u[split, f] for split in ("forget", "holdout")]
        if any("verbatim" not in p.extra for p in parts):
            return UNDEFINED
        members, holdout = (p.extra["verbatim"] for p in parts)
        occurrences, samples = parts[0].rows.occurrences, self.section.bootstrap_samples
        base = holdout[np.isfinite(holdout)]
        floor = bootstrap_ratios(base, np.ones(len(base)), samples, self.rows_seed(parts[1]))
        found: dict[str, Any] = {"holdout": Interval.of(base.mean(), floor).as_json()}
        for times in self.times():
            chosen = np.isfinite(members)
            chosen &= (occurrences == int(times)) if times != "all" else True
            own = members[chosen]
            if not len(own):
                found[times] = UNDEFINED
                continue
            seed = self.seed("verbatim", times)
            drawn = bootstrap_ratios(own, np.ones(len(own)), samples, seed)
            found[times] = Interval.of(own.mean() - base.mean(), drawn - floor).as_json()
        return found

    def draws(self, scores: Sequence[Scores]) -> dict[str, list[Any]]:
        """Change of bits per byte on test rows under every draw of a random control."""
        o, f = self.scores("original"), self.forget.domain
        found: dict[str, list[Any]] = {"test": [], **{name: [] for name in self.groups}}
        for u in scores:
            found["test"].append(number(u["test", f].bpb() - o["test", f].bpb()))
            for name, domains in self.groups.items():
                changes = [u["test", d].bpb() - o["test", d].bpb() for d in domains]
                found[name].append(number(np.mean(changes)) if changes else NONE)
        return found

    def exposure(self, operation: str) -> Any:
        """Mean exposure in bits of canaries, by how often they occur in training, and what a model
        that never saw them has; `none` without canaries."""
        part = self.scores(operation).get((CANARY, self.forget.domain))
        if part is None:
            return NONE
        times, samples = part.rows.occurrences, self.section.bootstrap_samples
        references = part.mean_loss[times == 0]
        generator = np.random.default_rng(self.seed(CANARY, "references"))
        redrawn = resampled_counts(len(references), samples, generator)
        ranks = np.arange(1, len(references) + 2)
        found: dict[str, Any] = {"clean": number(np.mean(np.log2(len(ranks)) - np.log2(ranks)))}
        for t in np.unique(times[times > 0]):
            own = part.mean_loss[times == t]
            value = np.mean([exposure(loss, references) for loss in own])
            # references are a sample as well: their ranks above the canaries, in every resample
            below = (references[:, None] < own) + 0.5 * (references[:, None] == own)
            bits = np.log2(len(ranks)) - np.log2(1 + redrawn @ below)  # (samples, canaries)
            generator = np.random.default_rng(self.seed(CANARY, int(t)))
            weights = resampled_counts(len(own), samples, generator) / len(own)
            found[str(t)] = Interval.of(value, (bits * weights).sum(1)).as_json()
        return found

    def rounded(self, operation: str, scores: Scores) -> dict[str, Any]:
        """What a system says once its weights are rounded: whether it remembers again."""
        self.measured[operation] = Measured(scores, None, None)
        f = self.forget.domain
        found = {
            "UA": self.mean([scores["forget", f]], _wrong, _tokens),
            "bpb_members": self.bpb([scores["forget", f]]),
            "bpb_retain": self.bpb_over(scores, self.groups["all"]),
            "AUC_LOSS": {t: self._cell(operation, "LOSS", t) for t in self.times()},
        }
        del self.measured[operation]
        return found

    def relearnt(self, curve: dict[str, Any], gold: dict[str, Any]) -> dict[str, Any]:
        """A system's relearn curve with its advantage over gold's, on the same rows."""
        drawn = []
        for own in (curve, gold):
            seed = self.seed("relearn")
            nats = [
                bootstrap_ratios(row, own["num_bytes"], self.section.bootstrap_samples, seed)
                for row in own["loss_nats"]
            ]
            drawn.append(bits_per_byte(1.0, 1.0) * np.array(nats).T)  # (samples, steps)
        advantages = [relearn_advantage(curve["steps"], u, g) for u, g in zip(*drawn, strict=True)]
        value = relearn_advantage(curve["steps"], curve["bpb"], gold["bpb"])
        interval = Interval.of(value, np.array(advantages)).as_json()
        shown = {key: curve[key] for key in ("steps", "bpb", "models")}
        return shown | {"advantage_bpb": interval}

    # --- distance to gold ------------------------------------------------------------------------

    def gap_to_gold(self, operation: str, gold: str = "gold") -> dict[str, float]:
        """Mean absolute gap to gold over UA, RA, TA and MIA efficacy.

        Resamples of a mean of absolute values lie above it where the gaps are small: the interval
        is widened to hold the value.
        """
        pairs = zip(self._headline(operation), self._headline(gold), strict=True)
        known = [(a, b) for a, b in pairs if a is not None]
        value = np.mean([abs(a - b) for (a, _), (b, _) in known])
        drawn = np.mean([np.abs(a - b) for (_, a), (_, b) in known], 0)
        found = Interval.of(value, drawn)
        low, high = min(found.low, found.value), max(found.high, found.value)
        return Interval(found.value, low, high, found.standard_error).as_json()

    def _headline(self, operation: str) -> list[tuple[float, np.ndarray] | None]:
        """UA, RA, TA and MIA efficacy, each with its resamples; None without retained domains."""
        u, f, retained = self.scores(operation), self.forget.domain, self.groups["all"]
        found: list[tuple[float, np.ndarray] | None] = [
            self._drawn([u["forget", f]], _wrong, _tokens)
        ]
        for split in ("train", "test"):
            parts = [u[split, d] for d in retained]
            found.append(self._drawn(parts, _correct, _tokens) if parts else None)
        return [*found, self._efficacy(operation)]

    def distance_to_gold(self, operation: str) -> dict[str, Any]:
        """Losses of the members against gold's, row by row: KS, paired tests, equivalence.

        The margin of equivalence is the largest difference of mean loss between two golds.
        """
        f = self.forget.domain
        u = self.scores(operation)["forget", f].mean_loss
        g = self.scores("gold")["forget", f].mean_loss
        if len(u) < 2:
            names = ("median_difference_nats", "mean_difference_nats", "wilcoxon_p")
            found = dict.fromkeys((*names, "margin_nats", "equivalence_p"), UNDEFINED)
            word = {"D": UNDEFINED, "p": UNDEFINED}
            return found | {"KS": word, "gold_seeds": len(self.golds)}
        d, p = kolmogorov_smirnov(u, g)
        generator = np.random.default_rng(self.seed("median"))
        median = median_difference(u, g, self.section.bootstrap_samples, generator)
        margin = self.margin()
        return {
            "KS": {"D": number(d), "p": number(p)},
            "median_difference_nats": median.as_json(),
            "mean_difference_nats": mean_difference(u, g).as_json(),
            "wilcoxon_p": number(wilcoxon_p(u, g)),
            "margin_nats": margin if isinstance(margin, str) else number(margin),
            "equivalence_p": margin
            if isinstance(margin, str)
            else number(equivalence_p(u, g, margin)),
            "gold_seeds": len(self.golds),
        }

    def margin(self) -> float | str:
        """Largest difference of mean member loss between two golds; `undefined` with one."""
        f = self.forget.domain
        means = [self.scores(name)["forget", f].mean_loss.mean() for name in self.golds]
        return float(max(means) - min(means)) if len(means) > 1 else UNDEFINED

    def envelope(self) -> dict[str, Any]:
        """Spread of the headline measures over golds: lowest, highest, standard deviation."""
        if len(self.golds) < 2:
            return {"seeds": len(self.golds), "spread": UNDEFINED}
        f, names = self.forget.domain, ("UA", "RA", "TA", "MIA_efficacy")
        headlines = [[x and x[0] for x in self._headline(name)] for name in self.golds]
        columns = dict(zip(names, zip(*headlines, strict=True), strict=True))
        columns["bpb_members"] = tuple(self.scores(n)["forget", f].bpb() for n in self.golds)
        columns["bpb_test"] = tuple(self.scores(n)["test", f].bpb() for n in self.golds)
        columns["AUC_LOSS"] = tuple(auc(*self.attack(n, "LOSS")) for n in self.golds)
        spread = {
            name: NONE
            if values[0] is None
            else {
                "low": number(min(values)),
                "high": number(max(values)),
                "standard_deviation": number(np.std(values, ddof=1)),
            }
            for name, values in columns.items()
        }
        gaps = [self.gap_to_gold(name)["value"] for name in self.golds[1:]]
        return {"seeds": len(self.golds), "spread": spread, "gap_to_gold": number(np.mean(gaps))}

    # --- membership -------------------------------------------------------------------------------

    def reference_of(self, operation: str) -> str | None:
        """The gold whose loss the reference attack subtracts: of another seed where there is one,
        never the attacked system itself."""
        if operation not in self.golds:
            return self.golds[1 if len(self.golds) > 1 else 0]
        other = self.golds[(self.golds.index(operation) + 1) % len(self.golds)]
        return None if other == operation else other

    def attack(
        self, operation: str, name: str, times: str = "all"
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Scores of members that occur `times` times and of holdout rows; None: no such attack."""
        f, u = self.forget.domain, self.scores(operation)
        members, holdout = u["forget", f], u["holdout", f]
        reference = self.reference_of(operation)
        rows = self.scores(reference) if reference else None
        pair = (rows["forget", f], rows["holdout", f]) if rows else None
        if name == "reference" and pair and np.array_equal(pair[0].mean_loss, members.mean_loss):
            return None  # the system is the reference
        found = attack_scores([name], members, holdout, pair).get(name)
        if found is None:
            return None
        occurrences = members.rows.occurrences
        chosen = np.full(len(occurrences), True) if times == "all" else occurrences == int(times)
        a, b = found[0][chosen], found[1]
        return a[np.isfinite(a)], b[np.isfinite(b)]

    def times(self) -> list[str]:
        """`all`, and how often members occur in training."""
        members = self.scores("gold")["forget", self.forget.domain].rows
        return ["all", *(str(t) for t in np.unique(members.occurrences))]

    def power(self, name: str, times: str) -> Interval | None:
        """AUC of an attack on the original system; None where it has too few rows, or is not
        known."""
        if not self.has_original:
            return None
        if (name, times) not in self._power:
            pair = self.attack("original", name, times)
            enough = pair is not None and min(map(len, pair)) >= 2
            self._power[name, times] = self._auc(pair, name, times) if enough else None
        return self._power[name, times]

    def _auc(self, pair: tuple[np.ndarray, np.ndarray], name: str, times: str) -> Interval:
        generator = np.random.default_rng(self.seed(name, times))
        return bootstrap_auc(*pair, self.section.bootstrap_samples, generator)

    def membership(self, operation: str) -> dict[str, dict[str, Any]]:
        """AUC of every attack, by how often a member occurred in training: an interval with its
        p-value against 0.5, or `undefined` (no rows, no reference) or `no power`."""
        return {
            name: {times: self._cell(operation, name, times) for times in self.times()}
            for name in self.section.attacks
        }

    def _cell(self, operation: str, name: str, times: str) -> Any:
        pair = self.attack(operation, name, times)
        if pair is None or min(map(len, pair)) < 2 or self.power(name, times) is None:
            return UNDEFINED
        if not has_power(self.power(name, times)):
            return NO_POWER
        interval = self._auc(pair, name, times)
        p = chance_p(interval.value, len(pair[0]), len(pair[1]))
        return interval.as_json() | {"p": number(p)}

    def beyond_gold(self, operation: str, times: str) -> Any:
        """LOSS AUC minus gold's, on the same rows drawn together; a word where there is no AUC."""
        cells = [self._cell(name, "LOSS", times) for name in (operation, "gold")]
        for cell in cells:
            if isinstance(cell, str):
                return cell
        draws = [
            auc_draws(
                *self.attack(name, "LOSS", times),
                self.section.bootstrap_samples,
                np.random.default_rng(self.seed("LOSS", times)),
            )
            for name in (operation, "gold")
        ]
        value = cells[0]["value"] - cells[1]["value"]
        return Interval.of(value, draws[0] - draws[1]).as_json()

    def true_positive_rates(self, operation: str) -> dict[str, Any]:
        """TPR at 1 % FPR of every attack on all members; `undefined` below 300 non-members."""
        found: dict[str, Any] = {}
        for name in self.section.attacks:
            pair = self.attack(operation, name)
            power = self.power(name, "all")
            if pair is None or power is None or len(pair[1]) < LEAST_NON_MEMBERS:
                found[name] = UNDEFINED
            elif not has_power(power):
                found[name] = NO_POWER
            else:
                generator = np.random.default_rng(self.seed(name, "tpr"))
                samples = self.section.bootstrap_samples
                found[name] = bootstrap_true_positive_rate(*pair, samples, generator).as_json()
        return found

    def strongest_attack(self, operation: str) -> Any:
        """The largest AUC over attacks with power, with what chance gives the largest of so many.

        Attacks that look at a share of the rows are left out: labels are shuffled together.
        """
        pairs = {}
        for name in self.section.attacks:
            power, pair = self.power(name, "all"), self.attack(operation, name)
            if pair is not None and power is not None and has_power(power):
                pairs[name] = pair
        sizes = max((tuple(map(len, pair)) for pair in pairs.values()), default=None)
        pairs = {name: pair for name, pair in pairs.items() if tuple(map(len, pair)) == sizes}
        if not pairs:
            return NO_POWER if self.has_original else UNDEFINED
        generator = np.random.default_rng(self.seed("permutation"))
        found = permuted_maximum(pairs, self.section.bootstrap_samples, generator)
        return {
            "attack": found.attack,
            "AUC": number(found.value),
            "chance_95": number(found.null_quantile),
            "p": number(found.p),
        }

    def privacy(self, operation: str) -> dict[str, Any]:
        """PrivLeak (percent) and s_MIA of the LOSS attack, against gold."""
        power = self.power("LOSS", "all")
        if power is None or not has_power(power):
            word = UNDEFINED if power is None else NO_POWER
            return {"PrivLeak": word, "s_MIA": word}
        pairs = [self.attack(name, "LOSS") for name in (operation, "gold")]
        u, g = (auc(*pair) for pair in pairs)
        drawn = [
            auc_draws(
                *pair,
                self.section.bootstrap_samples,
                np.random.default_rng(self.seed("LOSS", "all")),
            )
            for pair in pairs
        ]
        found: dict[str, Any] = {}
        for name, measure in (("PrivLeak", privacy_leak), ("s_MIA", membership_similarity)):
            if name == "PrivLeak" and max(g, drawn[1].max()) == 1:
                found[name] = UNDEFINED
                continue
            values = [measure(a, b) for a, b in zip(*drawn, strict=True)]
            found[name] = Interval.of(measure(u, g), np.array(values)).as_json()
        return found

    def efficacy(self, operation: str) -> dict[str, float]:
        """Within-domain MIA efficacy: 0.5 for a system that never saw the members."""
        return Interval.of(*self._efficacy(operation)).as_json()

    def _efficacy(self, operation: str) -> tuple[float, np.ndarray]:
        """`median_efficacy`, and its resamples over members (those that UA has) and holdout."""
        u, f, samples = self.scores(operation), self.forget.domain, self.section.bootstrap_samples
        parts = [u[split, f] for split in ATTACKED]
        members, holdout = (part.mean_loss for part in parts)
        generators = [np.random.default_rng(self.rows_seed(part)) for part in parts]
        drawn = generators[1].integers(len(holdout), size=(samples, len(holdout)))
        above = members >= np.median(holdout[drawn], 1)[:, None]  # (samples, members)
        counts = resampled_counts(len(members), samples, generators[0])
        return median_efficacy(members, holdout), (above * counts).sum(1) / len(members)

    def shifted_efficacy(self, operation: str) -> Any:
        """MIA efficacy as arXiv:2304.04934 has it, trained on retained domains; its interval is of
        the forget rows alone."""
        u, retained = self.scores(operation), self.groups["all"]
        if not retained:
            return NONE
        train, test = (np.concatenate([_confidence(u[s, d]) for d in retained]) for s in _SEEN)
        part = u["forget", self.forget.domain]
        taken = svc_non_members(train, test, _confidence(part), self.seed("svc"))
        return self.mean([part], lambda _: taken, _one)

    def router_membership(self, operation: str) -> Any:
        """LOSS AUC of the Level-1 embedder: its training rows of f against f's holdout."""
        pairs = []
        for name in ("original", operation):
            measured = self.measured.get(name, Measured({}, None, None))
            if measured.router_members is None or measured.router_holdout is None:
                return NOT_APPLICABLE
            pairs.append((measured.router_members, measured.router_holdout))
        if min(len(part) for pair in pairs for part in pair) < 2:
            return UNDEFINED
        if not has_power(self._auc(pairs[0], "router", "all")):
            return NO_POWER
        return self._auc(pairs[1], "router", "all").as_json()

    # --- words ---------------------------------------------------------------------------------

    def membership_verdict(self, operation: str) -> str:
        """What the LOSS attack says of a system, on all members and on those repeated most, where
        it has power: it leaks, is as gold is, or went beyond it (over-unlearning)."""
        words = []
        for times in dict.fromkeys(("all", self.times()[-1])):
            cell, difference = (
                self._cell(operation, "LOSS", times),
                self.beyond_gold(operation, times),
            )
            if isinstance(cell, dict) and isinstance(difference, dict):
                below = cell["value"] < 0.5 - 1.96 * cell["standard_error"]
                beyond = difference["high"] < 0 and below
                words.append(LEAKS if difference["low"] > 0 else OVER if beyond else AS_GOLD)
        none = NO_POWER if self.has_original else UNDEFINED
        return next((word for word in (LEAKS, OVER, AS_GOLD) if word in words), none)

    def verdict(self, result: dict[str, Any]) -> str:
        """Membership's word for an edited model, unless the loss on members is surely further from
        gold's than golds are from one another: above it is over-unlearning, below it `unlike gold`
        (f is still known, or gold errs where this system only guesses). With one gold nobody knows
        how far golds differ, and membership alone decides.
        """
        word, margin = result["membership_verdict"], self.margin()
        difference = result["to_gold"]["mean_difference_nats"]
        if word == LEAKS or isinstance(margin, str) or isinstance(difference, str):
            return word
        if difference["low"] > margin:
            return OVER
        return UNLIKE if difference["high"] < -margin else word


_SEEN = ("train", "test")


def is_gold_name(operation: str) -> bool:
    """Whether an operation is a gold: the run's own, or one of another seed."""
    return operation == "gold" or operation.startswith("gold-seed-")


def changed_rows(original: Scores, unlearnt: Scores, domains: Iterable[str]) -> str:
    """How many test rows have another loss than before, bit for bit, of how many."""
    domains = list(domains)
    if not domains:
        return NONE
    before = np.concatenate([original["test", d].loss_nats for d in domains])
    after = np.concatenate([unlearnt["test", d].loss_nats for d in domains])
    return f"{int((before != after).sum())} of {len(before)}"


def number(value: float) -> float:
    """Rounded to 6 decimals, for metrics.json."""
    return round(float(value), 6)


def _correct(part: RowScores) -> np.ndarray:
    return part.correct


def _wrong(part: RowScores) -> np.ndarray:
    return part.tokens - part.correct


def _tokens(part: RowScores) -> np.ndarray:
    return part.tokens


def _one(part: RowScores) -> np.ndarray:
    return np.ones(len(part.tokens))


def _confidence(part: RowScores) -> np.ndarray:
    """A row's confidence: the geometric mean probability of its tokens."""
    return np.exp(-part.mean_loss)
