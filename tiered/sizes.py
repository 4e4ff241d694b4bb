"""Model sizes on paper: widths that spend an equal budget at every number of partitions.

    python -m tiered.sizes A --vocab 119547                  # equal totals, published head layout
    python -m tiered.sizes D --vocab 32768 --head-dim 64
    python -m tiered.sizes D --vocab 32768 --head-dim 64 --smallest --n 16 64 256 1024

Budgets (n partition models against the one model of n = 1): A equal total parameters; B equal
parameters without embeddings; C equal computation (every model has the size of n = 1, the tokens
are split by n); D as A with a small vocabulary. Experts per axis shrink with n, as published.
"""

import argparse
import copy
from collections.abc import Iterator

from modeling_monet import MonetConfig

COUNTED = {"A": "total", "B": "non_embedding", "D": "total"}
BUDGETS = ("A", "B", "C", "D")
OVERHANG = 0.005  # how much nearer the count must come for heads that are wider than the model


def published_size(vocab_size: int, head_dim: int = 0) -> MonetConfig:
    """The published model of n = 1; head_dim 0: its 32 heads."""
    return MonetConfig(
        vocab_size=vocab_size,
        hidden_size=2048,
        num_hidden_layers=8,
        num_attention_heads=max(1, 2048 // head_dim) if head_dim else 32,
        head_dim=head_dim or None,
        moe_dim=8,
        moe_heads=8,
        moe_experts=512,
        moe_topk=8,
        moe_groups=4,
    )


def solve_width(n: int, budget: str, reference: MonetConfig, head_dim: int = 0) -> MonetConfig:
    """The size of each of n partition models whose sum comes nearest to the reference's count.

    reference: the model of n = 1. head_dim: width of a head, as many of them as fit; 0: the
    reference's number of heads, as wide as fits (even). One head more, or heads 2 wider, where that
    brings the count 0.5 % nearer. Ties go to the narrower model. Raises ValueError for an unknown
    budget, for n beyond half the experts, and for grouped heads.
    """
    if not 1 <= n <= reference.moe_experts // 2:
        raise ValueError(f"n: {n} must be between 1 and {reference.moe_experts // 2}")
    if reference.num_key_value_heads != reference.num_attention_heads:
        raise ValueError("num_key_value_heads: grouped heads are not solved for")
    if budget not in BUDGETS:
        raise ValueError(f"budget: {budget!r} is not one of {', '.join(BUDGETS)}")
    if n == 1 or budget == "C":
        return copy.deepcopy(reference)
    target = reference.parameter_counts()[COUNTED[budget]] / n

    def distance(size: MonetConfig) -> float:
        spent = size.parameter_counts()[COUNTED[budget]]
        overhang = size.num_attention_heads * size.head_dim > size.hidden_size
        return abs(spent / target - 1) + OVERHANG * overhang

    return min(_sizes(n, reference, head_dim), key=distance)


def _sizes(n: int, reference: MonetConfig, head_dim: int) -> Iterator[MonetConfig]:
    """Every size that could be chosen, from narrow to wide."""
    experts = max(2, reference.moe_experts // n)
    for hidden in range(2, reference.hidden_size + 1, 2):
        if head_dim:
            fits = hidden // head_dim
            layouts = [(count, head_dim) for count in (fits, fits + 1) if count]
        else:
            heads = reference.num_attention_heads
            fits = hidden // heads // 2 * 2
            layouts = [(heads, width) for width in (fits, fits + 2) if width]
        for count, width in layouts:
            size = copy.copy(reference)
            size.hidden_size, size.moe_experts = hidden, experts
            size.moe_topk = min(reference.moe_topk, experts)
            size.num_attention_heads = size.num_key_value_heads = count
            size.head_dim = width
            yield size


def smallest_size(n: int, reference: MonetConfig, head_dim: int = 0) -> MonetConfig:
    """The narrowest model of n partitions that there is: hidden size 2, one head (or the
    reference's number of them, 2 wide), and an n-th of the reference's experts, at least 2."""
    return next(_sizes(n, reference, head_dim))


def main() -> None:
    """Command line: a table of sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("budget", choices=BUDGETS)
    parser.add_argument("--vocab", type=int, default=119547, help="default 119547 (mBERT)")
    parser.add_argument("--head-dim", type=int, default=0, help="0: 32 heads, as published")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--smallest", action="store_true", help="the narrowest model against the budget of one"
    )
    given = parser.parse_args()
    reference = published_size(given.vocab, given.head_dim)
    try:
        show = print_smallest if given.smallest else print_table
        show(given.budget, given.n, reference, given.head_dim)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))


def print_table(budget: str, counts_of_n: list[int], reference: MonetConfig, head_dim: int) -> None:
    """Sizes per n as Markdown, with the sum's distance from the reference's count."""
    sizes = [solve_width(n, budget, reference, head_dim) for n in counts_of_n]
    whole, counted = reference.parameter_counts(), COUNTED.get(budget, "computed_per_token")
    print(
        "| n | hidden | experts | heads x width | parameters, all | without embeddings, all |"
        " computed per token, one | against n = 1 |\n|---|---|---|---|---|---|---|---|"
    )
    for n, size in zip(counts_of_n, sizes, strict=True):
        counts = size.parameter_counts()
        models = 1 if budget == "C" else n
        print(
            f"| {n} | {size.hidden_size} | {size.moe_experts} |"
            f" {size.num_attention_heads} x {size.head_dim} | {n * counts['total']:,} |"
            f" {n * counts['non_embedding']:,} | {counts['computed_per_token']:,} |"
            f" {models * counts[counted] / whole[counted] - 1:+.2%} |"
        )


def print_smallest(
    budget: str, counts_of_n: list[int], reference: MonetConfig, head_dim: int
) -> None:
    """Per n, as Markdown: the parameters that one model may have, the embeddings' share where the
    budget can be spent, and the narrowest model: where that is larger no width spends the budget.
    """
    if budget not in COUNTED:
        raise ValueError(f"--smallest: budget {budget} sets no number of parameters")
    counted = COUNTED[budget]
    print(
        "| n | budget of one | hidden that spends it | its embeddings | narrowest model |"
        " its embeddings | narrowest / budget |\n|---|---|---|---|---|---|---|"
    )
    for n in counts_of_n:
        target = reference.parameter_counts()[counted] / n
        least = smallest_size(n, reference, head_dim).parameter_counts()
        hidden, share = "none: fewer than 2 experts per axis", ""
        if n <= reference.moe_experts // 2:
            size = solve_width(n, budget, reference, head_dim)
            counts = size.parameter_counts()
            hidden, share = str(size.hidden_size), f"{counts['embedding'] / counts['total']:.0%}"
        print(
            f"| {n} | {target:,.0f} | {hidden} | {share} | {least[counted]:,} |"
            f" {least['embedding'] / least['total']:.0%} | {least[counted] / target:.2f} |"
        )


if __name__ == "__main__":
    main()
