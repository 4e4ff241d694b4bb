"""Expert statistics against brute force, and the purge rule of the paper."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.experts import (
    block_expert_weights,
    divergences,
    effective_numbers,
    experts_of,
    joint_of,
    mean_expert_weights,
    normalised_information,
    permuted_information,
    purge,
    record_gates,
)


@pytest.fixture(scope="module")
def model() -> MonetForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "moe_groups": 2}
    sizes |= {"num_attention_heads": 2, "moe_experts": 5, "moe_topk": 2, "moe_heads": 2}
    return MonetForCausalLM(MonetConfig(**sizes, moe_dim=4, initializer_range=0.3)).eval()


def ids(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(1, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))


def test_mean_expert_weights_by_loops(model):
    """In uneven batches, against the sum over heads token by token."""
    x = ids(0, 5)
    found = mean_expert_weights(model, x.split(2))
    expected = np.zeros((2, 5, 5))
    with torch.no_grad():
        probs = model(x, output_router_probs=True).router_probs
    for group, (g1, g2) in enumerate(probs):
        for row in range(5):
            for t in range(9):
                for h in range(2):
                    for i in range(5):
                        for j in range(5):
                            expected[group, i, j] += float(g1[row, t, h, i] * g2[row, t, h, j])
    assert found.dtype == torch.float64
    assert np.allclose(found.numpy(), expected / 45, atol=1e-6)
    assert torch.allclose(found.sum((1, 2)), torch.tensor(2.0).double(), atol=1e-5)
    for nothing in ([], x[:0].split(2)):
        with pytest.raises(ValueError, match="no tokens"):
            mean_expert_weights(model, nothing)
    # a model in training mode is read as in evaluation, and left as it was
    statistics = model.model.layers[0].router.norm1.running_mean.clone()
    model.train()
    assert torch.equal(mean_expert_weights(model, x.split(2)), found) and model.training
    assert torch.equal(model.model.layers[0].router.norm1.running_mean, statistics)
    model.eval()


def test_block_weights_are_the_mean_weights_of_every_row(model):
    x = ids(3, 4)
    found = block_expert_weights(model, x)
    assert found.shape == (4, 2, 5, 5)
    for row in range(4):
        assert torch.allclose(found[row], mean_expert_weights(model, [x[row : row + 1]]), atol=1e-6)


def test_an_expert_is_a_domains_from_twice_every_others_score():
    scores = {
        "a": torch.tensor([[[0.4, 0.39, 0.0, 0.1]]]),
        "b": torch.tensor([[[0.2, 0.20, 0.0, 0.0]]]),
        "c": torch.tensor([[[0.1, 0.00, 0.0, 0.3]]]),
    }
    assert experts_of(scores, "a").tolist() == [[[True, False, False, False]]]
    assert experts_of(scores, "b").any().item() is False
    assert experts_of(scores, "c").tolist() == [[[False, False, False, True]]]
    with pytest.raises(ValueError, match="domain: 'x' and at least one other"):
        experts_of(scores, "x")
    assert experts_of(scores, "a", 1.5).tolist() == [[[True, True, False, False]]]


def test_purge_leaves_out_the_domains_experts_and_hurts_it_most(model):
    """Domains that differ in their tokens; purging one changes its own logits more."""
    texts = {"low": ids(1, 30) % 10 + 1, "high": ids(2, 30) % 10 + 25}
    scores = {name: mean_expert_weights(model, [x]) for name, x in texts.items()}
    before = {name: model(x).logits for name, x in texts.items()}
    purged = purge(model, scores, "low", ratio=2.0)
    assert 0 < purged.sum() < purged.numel()
    moved = {n: (model(x).logits - before[n]).abs().mean().item() for n, x in texts.items()}
    assert moved["low"] > moved["high"] > 0
    model.purge_experts(None)
    assert torch.equal(model(texts["low"]).logits, before["low"])


def test_recorded_gates_of_a_generation_are_those_of_its_text(model):
    with record_gates(model) as gates:
        out = model.generate(ids(3, 2), max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        whole = model(out[:, :-1], output_router_probs=True).router_probs
    assert len(gates) == 2 and gates[0][0].shape == (2, 13, 2, 5)
    for found, expected in zip(gates, whole, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    model(out)  # the hooks are gone
    assert gates[0][0].shape[1] == 13


# --- how experts divide domains ---------------------------------------------------------------

APART = np.array([[0.5, 0.0, 0.0, 0.0], [0.0, 0.25, 0.25, 0.0]])  # 1 expert, 2 experts, 1 unused
ALIKE = np.array([[0.25, 0.25, 0.0, 0.0], [0.25, 0.25, 0.0, 0.0]])


def test_information_of_domains_and_experts_by_hand():
    # H(d) = ln 2, H(x) = 1.5 ln 2, I = ln 2: 1 / 1.25
    assert normalised_information(APART) == pytest.approx(0.8)
    assert normalised_information(7 * APART) == pytest.approx(0.8)
    assert normalised_information(ALIKE) == pytest.approx(0, abs=1e-12)
    assert normalised_information(np.eye(4)) == pytest.approx(1)
    assert normalised_information(np.ones((1, 1))) == 0


def test_hard_counts_have_the_information_of_scikit_learn():
    from sklearn.metrics import normalized_mutual_info_score

    g = np.random.default_rng(0)
    table = g.integers(0, 6, (3, 5))
    rows, columns = table.nonzero()
    times = table[rows, columns]
    expected = normalized_mutual_info_score(np.repeat(rows, times), np.repeat(columns, times))
    assert normalised_information(table.astype(float)) == pytest.approx(expected)


def test_shuffled_labels_show_what_chance_gives():
    """Few documents over many experts share no domain, and still have information."""
    g = np.random.default_rng(1)
    labels = np.repeat(["a", "b", "c"], 6)
    noise = g.dirichlet(np.full(40, 0.1), 18)
    found = permuted_information(noise, labels, 50, g)
    assert found.shape == (50,) and 0.1 < found.mean() < 0.9
    joint = np.stack([noise[labels == d].sum(0) for d in "abc"])
    own = normalised_information(joint)
    assert abs(own - found.mean()) < 4 * found.std()
    # documents that no expert is left to take no part, nor does a domain of such alone
    more = np.concatenate([noise, np.zeros((4, 40))])
    with_dead = np.concatenate([labels, ["a", "d", "d", "d"]])
    same = permuted_information(more, with_dead, 20, np.random.default_rng(3))
    assert np.array_equal(same, permuted_information(noise, labels, 20, np.random.default_rng(3)))
    real = np.kron(np.eye(3), np.ones((6, 1)))  # an expert for every domain
    assert permuted_information(real, labels, 20, g).max() < 0.7


def test_effective_numbers_by_hand():
    assert effective_numbers(APART) == pytest.approx((1.0, 1.5))  # experts: (1 + 2) / 2
    assert effective_numbers(ALIKE) == pytest.approx((2.0, 2.0))


def test_divergences_by_hand():
    found = divergences(APART)
    assert found == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]), abs=1e-12)
    half = divergences(np.array([[1.0, 0.0], [0.5, 0.5]]))
    # mixture (3/4, 1/4): 0.5 log2(4/3) + 0.5 (0.5 log2(2/3) + 0.5 log2 2)
    expected = 0.5 * np.log2(4 / 3) + 0.25 * np.log2(2 / 3) + 0.25
    assert half[0, 1] == pytest.approx(expected)
    joint = np.random.default_rng(0).random((4, 300)) ** 4 * (np.arange(300) % 3 > 0)
    p = joint / joint.sum(1, keepdims=True)
    published = [[jensenshannon(a, b, base=2) ** 2 for b in p] for a in p]
    np.testing.assert_allclose(divergences(joint), published, atol=1e-12)


def test_divergences_of_nearly_equal_rows_are_numbers():
    """scipy's distance takes the root of a sum that may end just below 0."""
    row = np.random.default_rng(1).random(500)
    near = [row * (1 + 1e-16 * k) for k in range(20)] + [np.nextafter(row, 1)]
    found = divergences(np.array(near))
    assert np.isfinite(found).all() and 0 <= found.min() <= found.max() < 1e-12


def test_joints_give_every_domain_the_same_weight():
    scores = {"a": torch.full((2, 2, 2), 3.0), "b": torch.tensor([[[1.0, 0], [0, 0]]] * 2)}
    first, second = joint_of(scores)
    assert first.tolist() == [[0.125] * 4, [0.5, 0, 0, 0]] and np.array_equal(first, second)
