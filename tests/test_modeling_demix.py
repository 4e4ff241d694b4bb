"""DEMix layers: one expert per row, exactly; experts that come and go without touching others."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tiered.baselines.modeling_demix import DemixConfig, DemixForCausalLM, Dispatch

V, T, EXPERTS = 50, 9, [0, 1, 3]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "pad_token_id": 0}


@pytest.fixture
def model() -> DemixForCausalLM:
    torch.manual_seed(0)
    config = DemixConfig(vocab_size=V, domain_experts=list(EXPERTS), **SHAPE)
    model = DemixForCausalLM(config).eval()
    for parameter in model.parameters():  # apart from one another, and far from small
        torch.nn.init.normal_(parameter, std=0.3)
    return model


IDS = torch.randint(0, V, (5, T), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([3, 0, 1, 0, 3])


def test_every_row_is_read_by_the_llama_of_its_expert(model):
    """Against transformers' Llama with the expert's weights copied under its names."""
    found = model(IDS, domain_ids=ROWS).logits
    for k in EXPERTS:
        state = {}
        for name, value in model.state_dict().items():
            before, _, after = name.partition(".experts.")
            if not after:
                state[name] = value.clone()
            elif after.startswith(f"{k}."):
                state[f"{before}.{after.split('.', 1)[1]}"] = value.clone()
        llama = LlamaForCausalLM(model.part(k).config)
        llama.load_state_dict(state)
        own = k == ROWS
        torch.testing.assert_close(llama.eval()(IDS[own]).logits, found[own], rtol=0, atol=1e-5)
        dense = model.part(k)
        assert dense.lm_head.weight is model.lm_head.weight
        assert torch.equal(dense(IDS).logits, llama(IDS).logits)


def test_the_order_of_rows_changes_nothing(model):
    found = model(IDS, domain_ids=ROWS).logits
    order = torch.tensor([1, 3, 2, 0, 4])  # by expert: nothing has to be moved
    assert Dispatch.of(ROWS[order]).order is None is not Dispatch.of(ROWS).order
    assert Dispatch.of(ROWS).sizes == (2, 1, 2)
    again = model(IDS[order], domain_ids=ROWS[order]).logits
    torch.testing.assert_close(again, found[order], rtol=0, atol=1e-5)


def test_experts_get_gradient_from_rows_of_their_own_domain_alone(model):
    model.train()
    chosen = torch.tensor([0, 1, 1, 0, 0])
    model(IDS, domain_ids=chosen, labels=IDS).loss.backward()
    assert all(p.grad is None for p in model.part_parameters(3))
    # the gradient of expert 1 is that of its rows: two of five of the mean loss
    whole = [p.grad.clone() for p in model.part_parameters(1)]
    model.zero_grad()
    own = chosen == 1
    model(IDS[own], domain_ids=chosen[own], labels=IDS[own]).loss.backward()
    for both, alone in zip(whole, model.part_parameters(1), strict=True):
        torch.testing.assert_close(both, alone.grad * 2 / 5, rtol=1e-4, atol=1e-6)


def test_mixing_is_of_probabilities(model):
    weights = torch.tensor([0.5, 0.2, 0.3])
    found = model(IDS, domain_weights=weights, labels=IDS)
    probs = torch.stack([model.part(k)(IDS).logits.softmax(-1) for k in EXPERTS])
    expected = torch.einsum("k,kbtv->btv", weights, probs)
    torch.testing.assert_close(found.logits.exp(), expected, rtol=1e-4, atol=1e-7)
    nats = -expected[:, :-1].gather(-1, IDS[:, 1:, None]).log().mean()
    assert found.loss.item() == pytest.approx(nats.item(), rel=1e-5)
    equal = model(IDS, domain_weights=torch.full((3,), 1 / 3)).logits
    assert torch.equal(model(IDS).logits, equal)
    # all weight on one expert is that expert
    one = model(IDS, domain_weights=torch.tensor([0.0, 1.0, 0.0])).logits
    alone = model.part(1)(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-5)
    by_row = torch.eye(3)[[2, 0, 1, 0, 2]]
    rows = model(IDS, domain_weights=by_row).logits
    routed = model(IDS, domain_ids=ROWS).logits.log_softmax(-1)
    torch.testing.assert_close(rows, routed, rtol=0, atol=1e-5)


def test_all_experts_in_one_pass_are_n_passes(model):
    found = model.expert_logits(IDS).logits.view(3, 5, T, V)
    for place, k in enumerate(EXPERTS):
        single = model(IDS, domain_ids=torch.full((5,), k)).logits
        torch.testing.assert_close(found[place], single, rtol=0, atol=1e-5)
    few = model.expert_logits(IDS, experts=[3]).logits
    assert torch.equal(few, model(IDS, domain_ids=torch.full((5,), 3)).logits)


def test_training_a_new_expert_leaves_old_domains_bit_identical(model):
    before = model(IDS, domain_ids=ROWS).logits
    dense = {k: model.part(k)(IDS).logits for k in EXPERTS}
    assert model.add_expert(1) == 4 and model.domain_experts == [0, 1, 3, 4]
    assert torch.equal(model.part(4)(IDS).logits, dense[1])  # it begins as its source
    new = list(model.part_parameters(4))
    model.train().requires_grad_(False)
    for parameter in new:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(new, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, domain_ids=torch.full((5,), 4), labels=IDS).loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model(IDS, domain_ids=ROWS).logits, before)
    assert all(torch.equal(model.part(k)(IDS).logits, dense[k]) for k in EXPERTS)
    assert not torch.equal(model.part(4)(IDS).logits, dense[1])


def test_removing_an_expert_leaves_the_others(model):
    dense = {k: model.part(k)(IDS).logits for k in EXPERTS}
    model.remove_part(1)
    model.remove_part(1)  # again: nothing
    assert model.domain_experts == [0, 3]
    assert not [name for name in model.state_dict() if ".experts.1." in name]
    assert all(torch.equal(model.part(k)(IDS).logits, dense[k]) for k in (0, 3))
    with pytest.raises(ValueError, match=r"expert 1 is not there \(present: \[0, 3\]\)"):
        model(IDS, domain_ids=ROWS)
    model.remove_part(0)
    assert torch.equal(model(IDS).logits, dense[3])  # the only one needs no name
    with pytest.raises(ValueError, match="last expert"):
        model.remove_part(3)


def test_cached_generation_is_that_of_full_passes(model):
    for given in ({"domain_ids": ROWS}, {}):
        written = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, **given)
        for t in range(T, T + 5):
            logits = model(written[:, :t], **given).logits[:, -1]
            assert torch.equal(logits.argmax(-1), written[:, t])


def test_a_checkpoint_loads_anywhere(model, tmp_path):
    """In this process, and in a fresh one outside the project, from its own code."""
    model.add_expert(0)
    model.remove_part(3)
    model.save_pretrained(tmp_path / "demix")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "demix")
    assert again.domain_experts == [0, 1, 4]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'demix')!r}, trust_remote_code=True);"
        f"print(m(torch.tensor({IDS.tolist()})).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = model(IDS).logits.double().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)


def test_a_copy_shares_nothing(model):
    twin = copy.deepcopy(model)
    twin.remove_part(0)
    assert model.domain_experts == EXPERTS
