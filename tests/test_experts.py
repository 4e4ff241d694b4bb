"""Expert statistics against brute force, and the purge rule of the paper."""

import numpy as np
import pytest
import torch

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.experts import experts_of, mean_expert_weights, purge, record_gates


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
