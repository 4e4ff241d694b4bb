"""Relearning and rounding: known answers, and what must not depend on the system."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from tests.test_gradient import HI, context_of, tiny_llama
from tests.test_targeted import tiny_monet
from tiered import scoring
from tiered.router import load_models, load_router, tiered_model
from tiered.store import content_hash
from tiered.unlearning import benchmark, robustness
from tiered.unlearning.protocol import Scorer, scored_rows
from tiered.unlearning.systems import Forget


def test_rounding_by_hand():
    model = torch.nn.Linear(3, 2, bias=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[7.0, 3.4, -0.4], [0.0, 0.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.123, 4.0]))
    robustness.round_weights(model, 4)  # scale 7 / 7 = 1; a row of zeros stays
    assert model.weight.tolist() == [[7.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    assert model.bias.tolist() == pytest.approx([0.123, 4.0])


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_moves_no_weight_by_more_than_half_a_step_and_is_done_once(bits):
    model = tiny_llama()
    before = copy.deepcopy(model)
    robustness.round_weights(model, bits)
    for (name, own), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if own.ndim < 2:
            assert torch.equal(own, old), name
            continue
        step = old.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((own - old).abs() <= step / 2 + 1e-6).all(), name
        assert len((own / step).round().unique()) <= 2**bits - 1
    again = copy.deepcopy(model)
    robustness.round_weights(again, bits)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", ["vertical", "horizontal"])
def test_biases_of_experts_stay_though_they_are_matrices(kind):
    model = tiny_monet(kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    robustness.round_weights(model, 4)
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    matrices = {n for n, p in before.items() if p.ndim > 1}
    biases = {n for n in matrices if n.rpartition(".")[2].startswith("b")}
    assert biases and same & matrices == biases


def test_tied_weights_are_rounded_as_one():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    robustness.round_weights(model, 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_curve_is_read_at_powers_of_two():
    assert robustness.relearn_steps(1) == [0, 1]
    assert robustness.relearn_steps(9) == [0, 1, 2, 4, 8]
    assert robustness.relearn_steps(16) == [0, 1, 2, 4, 8, 16]


@pytest.fixture(scope="module")
def run(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        yield context_of("n2", relearn_share=0.25, relearn_steps=4, relearn_learning_rate=2e-3)


def system(run):
    router = load_router(run.router, "")
    return tiered_model(run.config, run.partitions, router, load_models(run.models))


def test_relearnt_rows_and_others_share_nothing_and_are_the_same_for_all(run):
    relearnt, others = robustness.relearn_rows(run, HI)
    again, _ = robustness.relearn_rows(run, HI)
    members = set(run.members(HI, 0).document_ids)
    assert again.document_ids == relearnt.document_ids
    assert set(relearnt.document_ids) | set(others.document_ids) == members
    assert not set(relearnt.document_ids) & set(others.document_ids)
    assert len(relearnt.document_ids) == round(0.25 * len(members))


def test_relearning_starts_at_the_systems_loss_and_lowers_it_on_what_it_reads(run):
    model, untouched = system(run), system(run)
    curve = robustness.relearn_curve(run, HI, model)
    relearnt, others = robustness.relearn_rows(run, HI)
    first = Scorer(run, untouched, None, None).rows(others, attacked=False).bpb()
    assert curve["steps"] == [0, 1, 2, 4] and curve["bpb"][0] == pytest.approx(first, abs=1e-6)
    last = Scorer(run, model, None, None).rows(others, attacked=False).bpb()
    assert curve["bpb"][-1] == pytest.approx(last, abs=1e-6)
    own = [Scorer(run, m, None, None).rows(relearnt, False).bpb() for m in (untouched, model)]
    assert own[1] < own[0]
    # only models that the rows reach are tuned; statistics stay
    for k in run.models:
        pairs = zip(
            model.partitions[str(k)].state_dict().items(),
            untouched.partitions[str(k)].state_dict().values(),
            strict=True,
        )
        changed = {name for (name, a), b in pairs if not torch.equal(a, b)}
        assert bool(changed) == (k in curve["models"]), k
        assert not [name for name in changed if "running" in name]
    again = robustness.relearn_curve(run, HI, system(run))
    assert again == curve


def test_what_is_not_allowed_is_not_relearnt(run):
    """A deleted partition: the model that the text reaches instead learns."""
    model = system(run)
    curve = robustness.relearn_curve(run, HI, model, allowed=[1])
    assert curve["models"] == [1]


def test_a_rounded_system_is_scored_once_and_the_system_stays(run, monkeypatch):
    model, hashes = system(run), {k: content_hash(path) for k, path in run.models.items()}
    rows = {("test", "de"): run.data.rows("de", "test", 4)}
    before = {n: v.clone() for n, v in model.state_dict().items()}
    plain = Scorer(run, model, None, None).rows(rows["test", "de"], False).mean_loss
    losses = {
        b: robustness.rounded_scores(run, rows, model, hashes, None, b)["test", "de"].mean_loss
        for b in (4, 8, 16)
    }
    gaps = [np.abs(losses[b] - plain).max() for b in (16, 8, 4)]
    assert gaps[0] < 1e-3 and gaps[0] < gaps[1] < gaps[2]
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    monkeypatch.setattr(scoring, "score_prefixes", None)  # systems share models: from the store
    again = robustness.rounded_scores(run, rows, model, hashes, None, 4)["test", "de"]
    assert np.array_equal(again.mean_loss, losses[4])


def test_rounding_is_read_on_members_holdout_and_what_is_retained(run, tmp_path):
    scored = scored_rows(run, HI)
    found = set(robustness.rounded_rows(run, HI, scored))
    assert found == {("forget", "hi"), ("holdout", "hi")} | {
        ("test", d) for d in ("si", "de", "en")
    }
    names = run.members(HI, 2).document_ids
    two = Forget("two", "hi", frozenset(names), "")
    assert ("test", "hi") in robustness.rounded_rows(run, two, scored)


def test_the_bench_measures_what_returns(tiny, tmp_path, monkeypatch):
    import shutil

    from tiered.store import read_json
    from tiered.unlearning.benchmark import Bench

    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    wanted = {"operations": ("original", "gold", "delete-S1", "sisa"), "relearn_steps": 2}
    context = context_of("n2", robustness=("relearn", "int4"), relearn_share=0.25)
    section = dataclasses.replace(context.config.unlearn, **wanted)
    config = dataclasses.replace(context.config, unlearn=section)
    calls = {"measure": 0, "relearn_curve": 0}
    for name in calls:
        found = getattr(benchmark, name)

        def counted(*arguments, name=name, found=found):
            calls[name] += 1
            return found(*arguments)

        monkeypatch.setattr(benchmark, name, counted)
    shutil.rmtree("runs/n2/unlearn")
    results = Bench(dataclasses.replace(context, config=config), HI).run()
    assert calls == {"measure": 3, "relearn_curve": 3}  # sisa makes gold: the same system
    same = ("UA", "AUC", "to_gold", "robustness", "system")
    assert all(results["sisa"][key] == results["gold"][key] for key in same)
    gold = results["gold"]["robustness"]
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "standard_error": 0.0}
    assert gold["relearn"]["advantage_bpb"] == nothing
    # a model that knows the domain is ahead from step 0 on
    original = results["original"]["robustness"]
    differences = np.array(gold["relearn"]["bpb"]) - original["relearn"]["bpb"]
    assert (differences > 0).all()
    advantage = original["relearn"]["advantage_bpb"]
    assert differences.min() <= advantage["value"] <= differences.max()
    assert 0 < advantage["low"] < advantage["value"] < advantage["high"]
    assert 0 < original["int4"]["UA"]["value"] <= 1
    assert set(original["int4"]["AUC_LOSS"]) == {"all", "1", "4", "16"}
    stored = read_json(context.config.run_dir / "unlearn/hi/original/robustness.json")
    curve = stored["relearn"]
    assert curve["bpb"] == original["relearn"]["bpb"]
    # the curve is that of its rows
    bits = np.array(curve["loss_nats"]).sum(1) / np.log(2) / sum(curve["num_bytes"])
    assert bits == pytest.approx(curve["bpb"], abs=1e-5)
