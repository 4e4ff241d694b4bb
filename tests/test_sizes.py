"""Widths that spend a budget: counted again from the models themselves."""

import pytest
import torch

from modeling_monet import MonetForCausalLM
from tests.test_config import ROOT
from tiered.config import load
from tiered.sizes import (
    COUNTED,
    print_smallest,
    published_size,
    smallest_size,
    solve_width,
)

VOCABULARY = {"A": 119547, "B": 119547, "D": 32768}


@pytest.mark.parametrize("head_dim", [0, 32, 64])
@pytest.mark.parametrize("budget", ["A", "B", "D"])
def test_n_models_spend_what_one_does(budget, head_dim):
    """Within 1 %, for every n; the count is the sum over a real model's parameters."""
    reference = published_size(VOCABULARY[budget], head_dim)
    target = reference.parameter_counts()[COUNTED[budget]]
    for n in (1, 2, 4, 8, 16):
        size = solve_width(n, budget, reference, head_dim)
        with torch.device("meta"):
            model = MonetForCausalLM(size)
        spent = sum(
            p.numel()
            for name, p in model.named_parameters()
            if budget != "B" or not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        )
        assert abs(n * spent / target - 1) < 0.01, (n, size.hidden_size)
        assert size.moe_experts == 512 // n
        assert head_dim in (0, size.head_dim)


def test_equal_totals_are_the_published_widths_or_nearer():
    """Widths of the study with routers counted: 2048, 1246, 706, 384, 200 (within 0.7 %)."""
    reference = published_size(119547)
    whole = reference.parameter_counts()["total"]
    for n, hidden in {2: 1246, 4: 706, 8: 384, 16: 200}.items():
        size = solve_width(n, "A", reference)
        assert abs(size.hidden_size - hidden) <= 6
        assert abs(n * size.parameter_counts()["total"] / whole - 1) < 0.007


def test_equal_computation_keeps_the_size_and_bad_budgets_are_named():
    reference = published_size(8192)
    assert solve_width(16, "C", reference).to_dict() == reference.to_dict()
    with pytest.raises(ValueError, match="budget: 'E' is not one of A, B, C, D"):
        solve_width(2, "E", reference)
    with pytest.raises(ValueError, match="n: 257 must be between 1 and 256"):
        solve_width(257, "A", reference)
    assert published_size(8192, 100).head_dim == 100


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_configs_of_the_study_have_the_solved_sizes(n):
    model = load(ROOT / f"configs/c4/trained/n{n:02}.yaml").model
    size = solve_width(n, "D", published_size(32768, 64), 64)
    found = (model.hidden_size, model.moe_experts, model.num_attention_heads, model.head_dim)
    wanted = (size.hidden_size, size.moe_experts, size.num_attention_heads, size.head_dim)
    assert found == wanted


def test_the_narrowest_model_bounds_what_a_budget_can_buy(capsys):
    """By hand: two tables of V x 2, per layer four maps of 2 x 64, two experts per axis with 2 m d
    + m + d entries each, two norms; two routers; the final norm."""
    reference = published_size(32768, 64)
    counts = smallest_size(1024, reference, 64).parameter_counts()
    layer = 4 * 2 * 64 + 2 * (2 * 8 * 2 + 8 + 2) + 2 * 2
    assert counts["total"] == 2 * 32768 * 2 + 8 * layer + 2 * 2 * 2 * 8 * 2 + 2
    with torch.device("meta"):
        model = MonetForCausalLM(smallest_size(1024, reference, 64))
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    print_smallest("D", [64, 1024], reference, 64)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][2] == "98" and rows[1][2] == "none: fewer than 2 experts per axis"
    budget = reference.parameter_counts()["total"] / 1024
    assert rows[1][1] == f"{budget:,.0f}"
    assert rows[1][-1].split()[0] == f"{counts['total'] / budget:.2f}"
    with pytest.raises(ValueError, match="budget C sets no number"):
        print_smallest("C", [1], reference, 64)
