"""Expert masks by hand, and what a purge leaves as it was."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiered.config import load
from tiered.data import ProcessedData
from tiered.partition import make_partition_map
from tiered.router import load_models, run_models
from tiered.unlearning import purge
from tiered.unlearning.systems import Context, Forget, NotApplicable

SCORES = {  # one group of 2 x 2 experts; every domain's weights sum to 1
    "a": torch.tensor([[[0.4, 0.3], [0.2, 0.1]]], dtype=torch.float64),
    "b": torch.tensor([[[0.1, 0.3], [0.0, 0.6]]], dtype=torch.float64),
}


def test_share_and_mass_by_hand():
    assert purge.domain_share(SCORES, "a").flatten().tolist() == pytest.approx([0.8, 0.5, 1, 1 / 7])
    mask = torch.tensor([[[True, False], [True, False]]])
    assert purge.purged_mass(SCORES, "a", mask) == pytest.approx(0.6)
    assert purge.purged_mass(SCORES, "b", mask) == pytest.approx(0.1)


def test_an_expert_that_nobody_uses_has_no_share():
    scores = {"a": torch.zeros(1, 1, 1).double(), "b": torch.zeros(1, 1, 1).double()}
    assert purge.domain_share(scores, "a").item() == 0


def test_most_shared_experts_by_hand():
    # in order of share: (1,0), (0,0), (0,1), (1,1)
    assert purge.most_shared(SCORES, "a", 25).flatten().tolist() == [False, False, True, False]
    assert purge.most_shared(SCORES, "a", 26).flatten().tolist() == [True, False, True, False]
    assert purge.most_shared(SCORES, "a", 0).sum() == 0
    assert purge.most_shared(SCORES, "a", 100).all()
    hundred = {"a": torch.rand(1, 10, 10).double(), "b": torch.rand(1, 10, 10).double()}
    for percent in range(101):  # 7 / 100 * 100 is 7.000000000000001
        assert purge.most_shared(hundred, "a", percent).sum() == percent


def test_most_shared_mass_by_hand():
    # masses in that order 0.2, 0.4, 0.3, 0.1
    for mass, expected in ((0.0, 0), (0.1, 1), (0.2, 1), (0.21, 2), (0.6, 2), (0.9, 3), (1.0, 4)):
        mask = purge.most_shared_mass(SCORES, "a", mass)
        assert mask.sum() == expected, mass
        assert purge.purged_mass(SCORES, "a", mask) >= mass - 1e-9


def test_random_controls_match_size_and_mass_in_every_group():
    g = torch.Generator().manual_seed(0)
    own = torch.rand(3, 12, 12, generator=g).double()
    purged = torch.rand(3, 12, 12, generator=g) < 0.15
    sizes = set()
    for seed in range(5):
        mask = purge.random_of_size(purged, np.random.default_rng(seed))
        assert torch.equal(mask.flatten(1).sum(1), purged.flatten(1).sum(1))
        sizes.add(tuple(mask.flatten().nonzero().flatten().tolist()))
        mask = purge.random_of_mass(own, purged, np.random.default_rng(seed))
        held, wanted = ((own * m).flatten(1).sum(1) for m in (mask, purged))
        assert (held - wanted).abs().max() <= own.max() / 2  # no expert more or less is nearer
    assert len(sizes) == 5


@pytest.fixture(scope="module")
def run(tiny) -> Context:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        config = load("configs/n2.yaml")
        unlearn = dataclasses.replace(config.unlearn, mask_ratio=1.2, random_masks=3)
        config = dataclasses.replace(config, unlearn=unlearn)
        data, partitions = ProcessedData(config), make_partition_map(config)
        models = run_models(config, partitions, data)
        yield Context(config, data, partitions, models, config.run_dir / "router")


HI = Forget("hi", "hi")


def test_a_purge_changes_the_mask_and_no_weight(run):
    """I4: what is stored of the model stays bit for bit; the other partition's is the same."""
    outcome = purge.mask_skew(run, HI)
    assert outcome.changed == ["model/0"] and not outcome.weights_removed and outcome.tokens == 0
    assert outcome.models[1] == run.models[1]
    before, after = (load_file(m[0] / "model.safetensors") for m in (run.models, outcome.models))
    masks = {n for n in after if n.endswith("keep")}
    assert masks and after.keys() - before.keys() == masks
    assert all(torch.equal(before[n], after[n]) for n in before)
    keep = torch.stack([after[n] for n in sorted(masks)])
    scores, purged = purge.skew_masks(run, HI)[0]
    assert torch.equal(~keep, purged) and 0 < purged.sum() < purged.numel()
    others = scores["si"]  # its partition's only other domain
    assert torch.equal(purged, (scores["hi"] > 0) & (scores["hi"] >= 1.2 * others))


def test_a_purge_done_before_is_taken_from_the_store(run):
    first, second = purge.mask_mass(run, HI), purge.mask_mass(run, HI)
    assert second.models == first.models and second.reused == ["model/0"]
    assert second.seconds == first.seconds


def test_random_masks_differ_by_draw_and_repeat(run):
    draws = [purge.random_masks(run, HI, "mask-random", i)[0] for i in range(3)]
    assert len({purge.mask_hash(d) for d in draws}) == 3
    assert torch.equal(draws[1], purge.random_masks(run, HI, "mask-random", 1)[0])
    outcome = purge.mask_random(run, HI)
    model = load_models({0: outcome.models[0]})[0]
    keep = torch.stack([m.keep for m in model.modules() if "keep" in dict(m.named_buffers())])
    assert torch.equal(keep.unique(dim=0), (~draws[0]).unique(dim=0))


def test_a_reset_model_is_the_untrained_one(run):
    outcome = purge.reinit(run, HI)
    assert outcome.weights_removed and outcome.changed == ["model/0"]
    fresh = load_file(outcome.models[0] / "model.safetensors")
    trained = load_file(run.models[0] / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert not torch.equal(fresh[name], trained[name])
    assert fresh[name].std().item() == pytest.approx(0.02, rel=0.05)  # initializer_range
    statistics = [v for n, v in fresh.items() if n.endswith("running_mean")]
    assert statistics and all((v == 0).all() for v in statistics)


def test_what_cannot_be_purged_is_said_in_words(run):
    def words(context, forget, operation=purge.mask_skew):
        with pytest.raises(NotApplicable) as caught:
            operation(context, forget)
        return str(caught.value)

    alone = dataclasses.replace(run, partitions=make_partition_map(with_n(run, 4)))
    assert "no other domain" in words(alone, HI)
    some = Forget("some", "hi", frozenset(run.data.document_ids("hi", "train")[:2]))
    assert "by domain" in words(run, some)
    unlearn = dataclasses.replace(run.config.unlearn, mask_ratio=1e9)
    strict = dataclasses.replace(run, config=dataclasses.replace(run.config, unlearn=unlearn))
    assert "no expert is hi's" in words(strict, HI)
    assert "no expert is hi's" in words(strict, HI, purge.mask_random)
    llama = dataclasses.replace(run.config.model, type="llama")
    dense = dataclasses.replace(run, config=dataclasses.replace(run.config, model=llama))
    assert "a llama has no such experts" in words(dense, HI)


def with_n(run: Context, n: int):
    partition = dataclasses.replace(run.config.partition, method="language", n=n)
    return dataclasses.replace(run.config, partition=partition)
