"""A domain that comes later: a partition of its own, and nothing of the others changes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modeling_monet  # noqa: F401 (registers the partition models)
from tests.conftest import run_stages, tiny_project
from tiered.config import load
from tiered.data import ProcessedData
from tiered.partition import make_partition_map
from tiered.router import load_models, load_router, run_models, tiered_model
from tiered.store import UserError, read_json

STAGES = ("process_dset", "train_det_router", "run_clm")


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """Runs of three languages (before) and of the same with English added (after)."""
    folder = tmp_path_factory.mktemp("grown")
    tiny_project(folder)
    tail = "partition: {method: language, n: 3}\n"
    (folder / "configs/before.yaml").write_text(
        f"base: base.yaml\nname: before\ndata: {{domains: [hi, si, de]}}\n{tail}"
    )
    (folder / "configs/after.yaml").write_text(
        "base: before.yaml\nname: after\ndata: {added_domains: en}\nunlearn: {forget: [en, hi]}\n"
    )
    run_stages(folder, STAGES, "configs/before.yaml")
    removal = "unlearn.operations=original,gold,delete-S1"
    both = (*STAGES, "eval_det_router", "unlearn_benchmarks")
    run_stages(folder, both, "configs/after.yaml", removal)
    return folder


def opened(name: str):
    config = load(f"configs/{name}.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    models = load_models(run_models(config, partitions, data))
    router = load_router(config.run_dir / "router", "")
    return tiered_model(config, partitions, router, models)


def test_models_and_embedder_are_those_that_stood_before(grown):
    for part in ("models/0", "models/1", "models/2", "router/embedder"):
        files = [grown / f"runs/{n}/{part}/model.safetensors" for n in ("before", "after")]
        assert files[0].stat().st_ino == files[1].stat().st_ino  # found in the store, not remade
    centroids = [
        load_file(grown / f"runs/{n}/router/centroids.safetensors")["centroids"]
        for n in ("before", "after")
    ]
    assert torch.equal(centroids[0], centroids[1][:3]) and len(centroids[1]) == 4
    provenance = read_json(grown / "runs/after/provenance.json")
    assert provenance["model/3"] == ["en"]
    for shared in ("tokenizer", "router"):
        assert provenance[shared] == ["de", "hi", "si"]
    assert read_json(grown / "runs/after/eval/utility.json")["domains"].keys() == {
        *("hi", "si", "de", "en")
    }


@torch.inference_mode()
def test_outputs_without_the_new_partition_are_those_from_before(grown, monkeypatch):
    monkeypatch.chdir(grown)
    before, after = opened("before"), opened("after")
    ids = torch.randint(3, 400, (6, 32), generator=torch.Generator().manual_seed(0))
    expected = before(ids)
    found = after(ids, allowed_partitions=[0, 1, 2])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.partition, expected.partition)
    scores = after.partition_scores(ids)
    assert torch.equal(scores[..., :3], before.partition_scores(ids))
    # the same by hand: add it to the old model, and take it away again
    module, centroid = after.partitions["3"], after.router.centroids[3:]
    assert before.add_partition(module, ["en"], centroid) == 3
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert 3 in before(ids, allowed_partitions=[3]).partition
    before.remove_partition(3)
    assert torch.equal(before(ids).logits, expected.logits)
    with pytest.raises(ValueError, match="index 0 is taken"):
        before.add_partition(module, ["en"], centroid, index=0)
    assert before.add_partition(module, ["en"], centroid) == 4  # an old index is not given again
    assert before.add_partition(module, ["en"], centroid, index=3) == 3  # unless asked for


def test_removing_what_was_added_is_exact_without_conditions(grown):
    """Nothing that stays ever saw it: not even the tokenizer or the embedder."""

    def result(forget: str) -> dict:
        return read_json(grown / f"runs/after/unlearn/{forget}/delete-S1/metrics.json")

    assert result("en")["exact"] and result("en")["exact_given"] == []
    assert result("en")["router_AUC"] == "not applicable"
    assert result("hi")["exact"] and result("hi")["exact_given"] == ["tokenizer", "router"]


def test_a_map_by_document_has_no_partition_to_add(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\ndata: {domains: [hi], added_domains: [en]}\npartition: {method: random, n: 2}\n"
    )
    with pytest.raises(UserError, match="by random have no domain of their own to add"):
        load(tmp_path / "a.yaml")
