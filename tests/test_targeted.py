"""RMU, UNDIAL and SEUF: losses by hand, and exactly which weights an edit may touch."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_monet import MonetConfig, MonetForCausalLM
from tests.test_gradient import HI, blocks, context_of, tiny_llama
from tiered.metrics import NOT_APPLICABLE
from tiered.store import read_json
from tiered.unlearning import targeted
from tiered.unlearning.gradient import Task
from tiered.unlearning.operations import OPERATIONS
from tiered.unlearning.systems import Context, NotApplicable


def tiny_monet(kind: str = "vertical") -> MonetForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "moe_groups": 2}
    shape |= {"moe_experts": 3, "moe_heads": 2, "moe_dim": 4, "moe_topk": 2}
    return MonetForCausalLM(MonetConfig(vocab_size=11, moe_decompose=kind, **shape)).eval()


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=11, **shape)).eval()


def test_undial_by_hand():
    original, own = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.0, -1.0]])
    # the right token is 0: logits become (-1, 1, 0), 3 nats off the first
    weights = np.exp([-1.0, 1.0, 0.0])
    weights /= weights.sum()
    log_q = np.array([0.5, 0.0, -1.0]) - math.log(sum(map(math.exp, (0.5, 0.0, -1.0))))
    found = targeted.undial_loss(own, original, torch.tensor([0]), 3.0)
    assert found.item() == pytest.approx(-(weights * log_q).sum(), rel=1e-6)
    # without adjustment it is least at the original itself: plain distillation
    same = original.clone().requires_grad_()
    targeted.undial_loss(same, original, torch.tensor([0]), 0.0).backward()
    assert same.grad.abs().max() < 1e-6


def test_anchor_by_hand():
    before = [torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75]])]
    after = [torch.tensor([[0.9, 0.1], [1.0, 0.0]]), torch.tensor([[0.25, 0.75]])]
    # tokens of the first router: 0.16 + 0.16 and 0; mean 0.16; the second 0; mean of both
    assert targeted.anchor_loss(after, before).item() == pytest.approx(0.08)
    assert targeted.anchor_loss(before, before).item() == 0


@pytest.mark.parametrize("make", [tiny_monet, lambda: tiny_monet("horizontal"), tiny_mixtral])
def test_the_most_engaged_experts_against_a_loop(make):
    model, ids = make(), torch.from_numpy(blocks(0, 6)).long()
    _, found = targeted.gates(model, ids)
    chosen = targeted.most_engaged(model, ids.split(4), 2)
    if isinstance(model, MixtralForCausalLM):
        totals = [{(x,): z[:, x].sum().item() for x in range(4)} for z in found]
    else:
        totals = [
            {(i, j): (g1[..., i] * g2[..., j]).sum().item() for i in range(3) for j in range(3)}
            for g1, g2 in zip(found[::2], found[1::2], strict=True)
        ]
    assert len(chosen) == len(totals)
    for own, total in zip(chosen, totals, strict=True):
        best = sorted(total, key=total.get, reverse=True)[:2]
        assert [tuple(x) for x in own.tolist()] == best


@pytest.mark.parametrize("make", [tiny_monet, lambda: tiny_monet("horizontal"), tiny_mixtral])
def test_chosen_experts_are_all_that_an_output_of_theirs_depends_on(make):
    """By brute force: with only expert x of layer 0 alive, the block's output moves with exactly
    the entries that `expert_entries` names."""
    model = make()
    (_, block), *_ = targeted.expert_blocks(model)
    mixtral = isinstance(model, MixtralForCausalLM)
    expert = torch.tensor([[2]] if mixtral else [[2, 1]])
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        if mixtral:  # every token to expert 2
            block.gate.weight.zero_()
            block.gate.top_k = 1
            block.gate.weight[2] = 100.0
    x = torch.randn(1, 50, 8)
    if mixtral:
        out = block(x.abs())  # positive states: the gate's row of 100 wins for every token
    else:
        gates = torch.zeros(2, 1, 50, 2, 3)
        gates[0, ..., 2] = gates[1, ..., 1] = 0.5
        out = block(x, gates)
    out.square().sum().backward()
    masks = {id(p): mask.expand_as(p) for p, mask in targeted.expert_entries(block, expert)}
    for name, parameter in block.named_parameters():
        if mixtral and name == "gate.weight":
            continue
        moved = parameter.grad != 0
        assert moved.any(), name
        # a squared ReLU that is off has no gradient, so inside the mask some entries may rest
        assert not (moved & ~masks[id(parameter)]).any(), name


@pytest.fixture(scope="module")
def run(tiny) -> Context:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        yield context_of("n2", seuf_experts=2)


def test_rmu_trains_experts_and_no_router(run, monkeypatch):
    """What `descend` would train, for a Monet and a Mixtral."""
    trained = {}

    def look(model, *_, **__):
        trained[model.config.model_type] = {
            name for name, p in model.named_parameters() if p.requires_grad
        }
        return {"tokens": 0}

    monkeypatch.setattr(targeted, "descend", look)
    for model in (tiny_monet(), tiny_mixtral()):
        targeted.rmu(model, Task(run, HI, 0, blocks(0, 4), blocks(1, 4), None))
    depth = "model.layers.0."  # of two layers, the first is steered
    assert all(name.startswith(depth) for names in trained.values() for name in names)
    assert {n.removeprefix(depth + "mlp.") for n in trained["mixtral"]} == {
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert trained["monet"] and all(".moe." in name for name in trained["monet"])


def edited_tensors(run: Context, outcome) -> set[str]:
    before, after = (
        load_file(folder / "model.safetensors") for folder in (run.models[0], outcome.models[0])
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_rmu_trains_the_experts_up_to_its_layer_and_nothing_else(run):
    outcome = OPERATIONS["RMU"](run, HI)
    layers = len({n.split(".")[2] for n in edited_tensors(run, outcome) if ".layers." in n})
    assert read_json(outcome.models[0] / "record.json")["layer"] == layers == 1  # half of two
    changed = edited_tensors(run, outcome)
    assert changed and all(name.startswith("model.layers.0.moe.") for name in changed)


def test_rmu_turns_states_of_the_forget_set_and_keeps_the_others(run):
    from tiered.router import load_models
    from tiered.unlearning.gradient import forget_and_retain_blocks

    models = [load_models({0: m.models[0]})[0] for m in (run, OPERATIONS["RMU"](run, HI))]
    moved = []
    for rows in forget_and_retain_blocks(run, HI, 0):
        ids = torch.from_numpy(rows).long()
        with torch.no_grad():
            before, after = (targeted.hidden_states(m, ids, 1) for m in models)
        moved.append((after - before).norm(dim=-1).mean() / before.norm(dim=-1).mean())
    assert moved[0] > 2 * moved[1]


def test_seuf_changes_the_chosen_experts_and_routers_alone(run):
    outcome = OPERATIONS["SEUF"](run, HI)
    chosen = read_json(outcome.models[0] / "record.json")["experts"]
    changed = edited_tensors(run, outcome)
    assert changed and all(".moe." in name or ".router.w" in name for name in changed)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (run.models[0], outcome.models[0])
    )
    for group, pairs in enumerate(chosen):  # one layer per group in the tiny profile
        on = sorted({i for i, _ in pairs})
        name = f"model.layers.{group}.moe.b1"
        rows = (before[name] != after[name]).any(1).nonzero()[:, 0].tolist()
        assert set(rows) <= set(on) and rows


def test_families_without_experts_or_layers_are_told():
    with pytest.raises(NotApplicable, match=f"{NOT_APPLICABLE}: a llama has no experts"):
        targeted.seuf(tiny_llama(), _task())
    with pytest.raises(NotApplicable, match="rmu_layer 2 of 1 layers"):
        targeted.rmu(tiny_llama(), _task(rmu_layer=2))


def _task(**unlearn):
    from types import SimpleNamespace

    return SimpleNamespace(section=SimpleNamespace(**unlearn))
