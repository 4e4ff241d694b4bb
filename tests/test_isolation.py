"""Invariants I1 and I2: nothing that is kept depends on the forgotten domain's data.

The pipeline runs twice in separate processes and folders. The second time the domain's raw files
are absent, partitions are trained in reverse order and the number of worker processes differs;
the tokenizer is given by path. What must agree is compared byte by byte. Each invariant has a
planted violation that must make its comparison fail.
"""

import functools
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, run_stages, tiny_project
from tiered import cleaning, processing, training
from tiered.config import load
from tiered.data import ProcessedData
from tiered.evaluation import router_scores
from tiered.modeling_tiered import assign
from tiered.partition import make_partition_map
from tiered.router import run_models
from tiered.store import read_json, tree_hashes
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


def test_what_equal_inputs_had_made_before_is_named_as_reused(pair):
    """Gold takes what never saw the domain from the run (I1); S2 and sisa take gold's parts."""
    found = {}
    for run, name in (("n4", "gold"), ("n4", "delete-S2"), ("n2", "gold"), ("n2", "sisa")):
        timings = read_json(pair[0] / "runs" / run / "unlearn/hi" / name / "timings.json")
        found[run, name] = timings["reused"]
    assert found == {
        ("n4", "gold"): ["model/1", "model/2", "model/3"],
        ("n4", "delete-S2"): ["router"],
        ("n2", "gold"): ["model/1"],
        ("n2", "sisa"): ["router", "model/0"],
    }


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


# ---------------------------------------------------------------- planted violations of I1


@pytest.fixture(scope="module")
def worlds(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Projects with and without `hi`; it is the smallest domain and holds a document of `de`."""
    (source,) = tiny.glob("processed/*/tokenizer")
    folders = []
    for languages in (("hi", "si", "de", "en"), ("si", "de", "en")):
        folder = tmp_path_factory.mktemp("world")
        tiny_project(folder, languages)
        shutil.copytree(source, folder / "tok")
        folders.append(folder)
    hindi, german = (folders[0] / "raw" / d / "part-0.jsonl" for d in ("hi", "de"))
    lines = hindi.read_text().splitlines()[:60] + german.read_text().splitlines()[:1]
    hindi.write_text("\n".join(lines) + "\n")
    return folders[0], folders[1]


def run_here(world: Path, stages: tuple[str, ...], monkeypatch, *overrides: str) -> None:
    """Stages in this process (so that a violation can be planted), `hi` absent where it is."""
    monkeypatch.chdir(world)
    if not (world / "raw/hi").exists():
        overrides = (*overrides, "data.exclude_domains=hi")
    config = load("configs/n4.yaml", ("tokenizer.name=tok", "data.min_script_share=0", *overrides))
    threads = torch.get_num_threads()
    for stage in stages:
        runpy.run_path(str(ROOT / f"{stage}.py"))["main"](config)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("planted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_generator_shared_by_partitions_breaks_isolation(worlds, planted, monkeypatch):
    for world in worlds:
        run_here(world, ("process_dset",), monkeypatch)
        if planted:
            running = np.random.default_rng(0)
            draw = functools.partial(running.integers, 2**31)
            monkeypatch.setattr(training, "seed_of", lambda *parts, draw=draw: int(draw()))
        run_here(world, ("run_clm",), monkeypatch, f"output_dir=runs-{planted}")
    for k in ("1", "2", "3"):
        a, b = (world / f"runs-{planted}/n4/models" / k for world in worlds)
        assert same_files(a, b, "*.safetensors") != planted


def same_data(worlds: tuple[Path, Path], name: str, domains: tuple[str, ...]) -> bool:
    return all(
        same_files(*(next(iter(world.glob(f"{name}/*/{domain}"))) for world in worlds))
        for domain in domains
    )


@pytest.mark.parametrize("planted", [False, True])
def test_balancing_by_the_minimum_over_domains_breaks_isolation(worlds, planted, monkeypatch):
    name, honest = f"balanced-{planted}", processing.budget_of
    for world in worlds:
        everything = ("data.tokens_per_domain=0", "data.processed_dir=everything")
        run_here(world, ("process_dset",), monkeypatch, *everything)
        (manifest,) = world.glob("everything/*/manifest.json")
        domains = read_json(manifest)["domains"].values()
        smallest = min(d["splits"]["train"]["tokens"] for d in domains)
        if planted:
            monkeypatch.setattr(processing, "budget_of", lambda *_, least=smallest: least)
        run_here(world, ("process_dset",), monkeypatch, f"data.processed_dir={name}")
        monkeypatch.setattr(processing, "budget_of", honest)
    assert same_data(worlds, name, ("si", "de", "en")) != planted


@pytest.mark.parametrize("planted", [False, True])
def test_deduplication_across_domains_breaks_isolation(worlds, planted, monkeypatch):
    name = f"unique-{planted}"
    for world in worlds:
        if planted:
            seen: set[int] = set()

            def drop_seen_anywhere(chunks, seen=seen):
                for chunk in chunks:
                    chunk.kept &= [i not in seen for i in chunk.index()["id"].tolist()]
                    seen.update(chunk.index()["id"][chunk.kept].tolist())
                return 0

            monkeypatch.setattr(cleaning, "drop_exact_duplicates", drop_seen_anywhere)
        run_here(world, ("process_dset",), monkeypatch, f"data.processed_dir={name}")
    assert same_data(worlds, name, ("si", "en"))
    assert same_data(worlds, name, ("de",)) != planted
