"""Invariants I1 and I2: nothing that is kept depends on the forgotten domain's data.

The pipeline runs twice in separate processes and folders. The second time the domain's raw files
are absent, partitions are trained in reverse order and the number of worker processes differs;
the tokenizer is given by path. What must agree is compared byte by byte. Each invariant has a
planted violation that must make its comparison fail.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run_stages, tiny_project
from tiered.config import load
from tiered.data import ProcessedData
from tiered.evaluation import router_scores
from tiered.modeling_tiered import assign
from tiered.partition import make_partition_map
from tiered.router import run_models
from tiered.store import tree_hashes
from tiered.training import OrderedBlocks
from tiered.unlearning.systems import Context, load_system


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a run with `hi` and of one that never had its files."""
    (source,) = tiny.glob("processed/*/tokenizer")
    folders = []
    for name, languages in (("with", ("hi", "si", "de", "en")), ("without", ("si", "de", "en"))):
        folder = tmp_path_factory.mktemp(name)
        tiny_project(folder, languages)
        shutil.copytree(source, folder / "tok")
        folders.append(folder)
    stages = ("process_dset", "train_det_router", "run_clm")
    both = ("configs/n4.yaml", "configs/n2.yaml", "tokenizer.name=tok")
    run_stages(folders[0], (*stages, "unlearn_benchmarks"), *both)
    run_stages(folders[1], stages[:2], *both, "data.exclude_domains=hi", "data.num_proc=2")
    for config, order in (("n4", "3,2,1"), ("n2", "1,0")):
        run_stages(
            folders[1],
            stages[2:],
            f"configs/{config}.yaml",
            "tokenizer.name=tok",
            "data.exclude_domains=hi",
            "data.num_proc=2",
            f"partition.index={order}",
        )
    return folders[0], folders[1]


def same_files(a: Path, b: Path, pattern: str = "*") -> bool:
    """Whether two folders hold the same files with the same bytes (timings apart)."""
    left = {n: h for n, h in tree_hashes(a).items() if Path(n).match(pattern)}
    right = {n: h for n, h in tree_hashes(b).items() if Path(n).match(pattern)}
    return bool(left) and left == right


def test_the_second_run_never_saw_the_domain(pair):
    assert not (pair[1] / "raw/hi").exists()
    assert not list(pair[1].glob("processed/*/hi"))
    assert not (pair[1] / "runs/n4/models/0").exists()


def test_models_of_other_partitions_are_bit_identical(pair):
    """I1, buffers included: safetensors hold weights and BatchNorm statistics."""
    for run, k in (("n4", 1), ("n4", 2), ("n4", 3), ("n2", 1)):
        a, b = (folder / "runs" / run / "models" / str(k) for folder in pair)
        assert same_files(a, b, "*.safetensors"), (run, k)
        assert any("running_mean" in name for name in load_file(a / "model.safetensors"))


def test_sisa_and_gold_equal_the_run_without_the_files(pair):
    """Where f shares a partition, the retrained model is the one of a world without f."""
    for name in ("sisa", "gold"):
        a = pair[0] / "runs/n2/unlearn/hi" / name / "system/models/0"
        assert same_files(a, pair[1] / "runs/n2/models/0", "*.safetensors")


def test_data_of_other_domains_is_bit_identical(pair):
    for domain in ("si", "de", "en"):
        (a,), (b,) = (list(folder.glob(f"processed/*/{domain}")) for folder in pair)
        assert same_files(a, b)


def test_router_rebuilt_by_s2_equals_gold_tensor_by_tensor(pair):
    """I2 for the router: embedder, centroids and their partitions."""
    for run in ("n4", "n2"):
        rebuilt = pair[0] / "runs" / run / "unlearn/hi/delete-S2/system/router"
        assert same_files(rebuilt, pair[1] / "runs" / run / "router", "*.safetensors")
        original = pair[0] / "runs" / run / "router"
        assert not same_files(rebuilt, original, "*.safetensors")


def test_one_ulp_and_a_centroid_left_in_are_noticed(pair, tmp_path):
    """Planted violations of the byte comparison."""
    source = pair[0] / "runs/n4/models/1"
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    weights = load_file(copy / "model.safetensors")
    name = next(n for n in weights if n.endswith("weight"))
    flat = weights[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
    (copy / "model.safetensors").unlink()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert same_files(source, pair[1] / "runs/n4/models/1", "*.safetensors")
    assert not same_files(copy, pair[1] / "runs/n4/models/1", "*.safetensors")
    rebuilt = pair[0] / "runs/n4/unlearn/hi/delete-S2/system/router"
    shutil.copytree(rebuilt, tmp_path / "router")
    kept = load_file(rebuilt / "centroids.safetensors")
    old = load_file(pair[0] / "runs/n4/router/centroids.safetensors")
    kept = {n: torch.cat([old[n][:1], kept[n]]) for n in kept}
    (tmp_path / "router/centroids.safetensors").unlink()
    save_file(kept, tmp_path / "router/centroids.safetensors")
    assert not same_files(tmp_path / "router", pair[1] / "runs/n4/router", "*.safetensors")


def context(folder: Path, run: str, monkeypatch) -> Context:
    monkeypatch.chdir(folder)
    config = load(f"configs/{run}.yaml", ("tokenizer.name=tok",))
    data, partitions = ProcessedData(config), make_partition_map(config)
    models = run_models(config, partitions, data)
    return Context(config, data, partitions, models, config.run_dir / "router")


@torch.inference_mode()
def test_after_s1_text_never_routed_to_the_domain_keeps_every_bit(pair, monkeypatch):
    """I2: equal batches of untouched rows give equal logits; nothing routes to f any more."""
    made = context(pair[0], "n4", monkeypatch)
    root = Path("runs/n4/unlearn/hi")
    before, _ = load_system(made, root / "original/system")
    after, _ = load_system(made, root / "delete-S1/system")
    untouched = 0
    for domain in ("hi", "si", "de", "en"):
        rows = made.data.rows(domain, "test")
        chosen = assign(router_scores(before, rows.input_ids, 8), "token", 8)
        ids = torch.from_numpy(rows.input_ids[:, :-1])
        free = ids[(chosen != 0).all(1)]
        untouched += len(free)
        if len(free):
            assert torch.equal(before(free).logits, after(free).logits)
        assert not (after(ids).partition == 0).any()
    assert untouched >= 10
    hindi = torch.from_numpy(made.data.rows("hi", "test").input_ids)
    assert not torch.equal(before(hindi).logits, after(hindi).logits)


def test_deletions_do_not_depend_on_their_order(pair, monkeypatch):
    """I3 on real systems: hi then si equals si then hi, and twice is once."""
    made = context(pair[0], "n4", monkeypatch)
    states = []
    for order in ((0, 1), (1, 0), (0, 1, 0)):
        model, _ = load_system(made, Path("runs/n4/unlearn/hi/original/system"))
        for k in order:
            model.remove_partition(k)
        states.append(model.state_dict())
    for other in states[1:]:
        assert states[0].keys() == other.keys()
        assert all(torch.equal(v, other[n]) for n, v in states[0].items())


def test_splits_are_disjoint_by_document(pair, monkeypatch):
    """I7, within and across domains."""
    made = context(pair[0], "n4", monkeypatch)
    seen: dict[str, tuple[str, str]] = {}
    for domain in made.data.domains:
        for split in ("train", "validation", "test", "router", "holdout", "calibration"):
            for document in made.data.document_ids(domain, split):
                assert document not in seen, (document, domain, split, seen.get(document))
                seen[document] = (domain, split)
    assert len(seen) > 200


def test_a_generator_shared_by_partitions_would_break_isolation():
    """Planted violation of I1: a running generator depends on what was drawn before."""
    blocks = np.arange(40).reshape(10, 4)

    def orders(partitions: list[str], shared: bool) -> dict[str, list[int]]:
        running = np.random.default_rng(0)
        found = {}
        for name in partitions:
            seed = int(running.integers(2**31)) if shared else sum(name.encode())
            found[name] = OrderedBlocks(blocks, 1.0, seed, None).order.tolist()
        return found

    with_f, without = orders(["hi", "de"], False), orders(["de"], False)
    assert with_f["de"] == without["de"]
    assert orders(["hi", "de"], True)["de"] != orders(["de"], True)["de"]


def test_balancing_by_the_minimum_over_domains_would_break_isolation(pair, monkeypatch):
    """Planted violation of I1: a budget derived from present data moves when a domain goes."""
    made = context(pair[0], "n4", monkeypatch)
    sizes = {
        d: made.data.manifest["domains"][d]["splits"]["router"]["tokens"] for d in made.data.domains
    }
    smallest = min(sizes, key=sizes.get)
    others = [d for d in sizes if d != smallest]
    assert min(sizes.values()) != min(sizes[d] for d in others)
    other = others[0]
    blocks = [
        made.data.blocks(other, "router", limit_tokens=limit)
        for limit in (min(sizes.values()), min(sizes[d] for d in others))
    ]
    assert len(blocks[0]) != len(blocks[1])
