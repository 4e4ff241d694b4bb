"""The pipeline from raw text to report on a tiny profile, in a subprocess, with real stages."""

import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import STAGES, TINY_EXPERIMENTS, run_stages, start_stages, tiny_project
from tiered import training
from tiered.blocks import partition_blocks
from tiered.config import Config, load
from tiered.data import ProcessedData, unigram_log_probs
from tiered.evaluation import assignments, first_position, unigram_bpb
from tiered.partition import make_partition_map
from tiered.runs import point
from tiered.store import is_complete, tree_hashes
from tiered.training import model_folder
from tiered.unlearning.benchmark import forget_sets, missing_golds, open_run, seeded
from tiered.unlearning.deletion import models_without

OPERATIONS = Config().unlearn.operations


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def unlearning(folder: Path, experiment: str) -> dict:
    return read(folder / "runs" / experiment / "metrics.json")["unlearning"]["hi"]


def test_models_are_published_with_records_and_provenance(tiny):
    for name, count in {"n1": 1, "n2": 2, "n4": 4, "r2": 2}.items():
        run = tiny / "runs" / name
        assert sorted(p.name for p in (run / "models").iterdir()) == [str(k) for k in range(count)]
        provenance = read(run / "provenance.json")
        assert provenance["tokenizer"] == ["de", "en", "hi", "si"]
        for k in range(count):
            record = read(run / "models" / str(k) / "record.json")
            assert provenance[f"model/{k}"] == record["partition"]["present"]
            assert record["tokens"] == sum(record["blocks"].values()) * 32
            assert not list((run / "models" / str(k)).glob("*.bin"))
    assert read(tiny / "runs/n4/provenance.json")["model/0"] == ["hi"]
    assert read(tiny / "runs/r2/provenance.json")["model/1"] == ["de", "en", "hi", "si"]
    assert not list((tiny / "runs/.store/models/.checkpoints").glob("*"))


def test_the_order_of_a_map_changes_no_block(tiny, monkeypatch):
    """Maps that agree on a partition's members share its address, so they must share its data."""
    monkeypatch.chdir(tiny)
    config = load("configs/n2.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    turned = replace(partitions, members=tuple(m[::-1] for m in partitions.members))
    assert turned.members != partitions.members
    for k in range(2):
        found, same = (partition_blocks(config, data, p, k) for p in (partitions, turned))
        assert np.array_equal(found[0], same[0]) and found[1] == same[1]
        folders = [model_folder(config, data, p, k) for p in (partitions, turned)]
        assert folders[0] == folders[1] and is_complete(folders[0])


def test_the_unigram_is_read_on_the_scored_positions(tiny, monkeypatch):
    """early_positions: skip leaves the same positions out of model and unigram."""
    monkeypatch.chdir(tiny)
    config = load("configs/n4.yaml", ("router.early_positions=skip",))
    data = ProcessedData(config)
    rows = data.rows("hi", "test", 4)
    log_probs = unigram_log_probs(data, "hi")
    first = first_position(config, "sample")
    assert (first, first_position(config, "token")) == (7, 0)
    nats = num_bytes = 0
    for row, widths in zip(rows.input_ids, rows.token_bytes, strict=True):
        for t in range(8, 32):  # tokens 0..7 decide; token 8 is the first that is predicted
            nats -= log_probs[row[t]]
            num_bytes += widths[t]
    assert unigram_bpb(log_probs, rows, first) == pytest.approx(nats / num_bytes / math.log(2))
    scores = torch.zeros(4, 31, 4)
    assert (assignments(scores, ["sample"], config, 0)["sample"][0] == -1).sum() == first


def test_constant_steps_shrink_the_batch_and_keep_the_steps(tiny):
    records = {
        name: read(tiny / "runs" / name / "models/1/record.json") for name in ("n2", "n4")
    } | {"n1": read(tiny / "runs/n1/models/0/record.json")}
    assert {n: r["batch_rows"] for n, r in records.items()} == {"n1": 8, "n2": 4, "n4": 2}
    steps = {n: r["optimizer_steps"] for n, r in records.items()}
    for name, record in records.items():
        rows = sum(record["blocks"].values())
        assert steps[name] == -(-rows // record["batch_rows"])


def test_models_learn(tiny):
    """Even the tiny profile predicts better than it began: ln V at initialisation."""
    for line in (tiny / "runs/n1/models/0/metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
    first = json.loads((tiny / "runs/n1/models/0/metrics.jsonl").read_text().splitlines()[0])
    assert entry["loss"] < first["loss"] - 0.2


def test_one_partition_routes_everything_to_itself(tiny):
    utility = read(tiny / "runs/n1/eval/utility.json")
    assert utility["routing"]["sample_accuracy"] == 1.0
    for entry in utility["domains"].values():
        scopes = entry["scopes"]
        assert scopes["oracle"] == scopes["token"] == scopes["sample"]


def test_oracle_is_undefined_for_random_documents(tiny):
    utility = read(tiny / "runs/r2/eval/utility.json")
    assert utility["macro"]["oracle"] == "undefined"
    assert utility["routing"]["sample_accuracy"] == "undefined"
    assert utility["macro"]["token"]["bpb"] > 0


def test_macro_is_the_mean_over_domains(tiny):
    utility = read(tiny / "runs/n4/eval/utility.json")
    values = [d["scopes"]["token"]["bpb"] for d in utility["domains"].values()]
    assert utility["macro"]["token"]["bpb"] == pytest.approx(sum(values) / 4, abs=1e-6)


def test_gold_against_itself_and_original_against_itself(tiny):
    """I5: gold has no gap to gold, D = 0, p = 1, PrivLeak 0; original has UA_norm 0."""
    for name in TINY_EXPERIMENTS:
        results = unlearning(tiny, name)
        gold, original = results["gold"], results["original"]
        assert gold["gap_to_gold"]["high"] == 0 and gold["to_gold"]["KS"] == {"D": 0.0, "p": 1.0}
        for result, value in ((gold, 1.0), (original, 0.0)):
            found = result["UA_norm"]
            assert found == "undefined" or found["value"] == found["low"] == value
        assert gold["PrivLeak"] == "no power" or point(gold["PrivLeak"]) == 0
        assert gold["AUC"]["reference"]["all"] == "undefined"
        assert original["weights_removed"] is False and original["exact"] is False


def test_words_stand_where_numbers_would_lie(tiny):
    assert unlearning(tiny, "n1")["delete-S1"]["result"] == "not applicable: removes all 1 models"
    for name in ("delete-S0", "delete-S1", "delete-S2"):
        word = unlearning(tiny, "r2")[name]["result"]
        assert word == "not applicable: removes all 2 models"
    assert unlearning(tiny, "n1")["original"]["RA"]["far"] == "none"
    assert unlearning(tiny, "n4")["original"]["RA"]["near"] == "none"
    assert unlearning(tiny, "n4")["original"]["RA"]["far"]["value"] > 0


def test_exact_flags_tell_what_they_rest_on(tiny):
    results = unlearning(tiny, "n4")
    numbers = {n: r for n, r in results.items() if "result" not in r}
    flags = {n: (r["exact"], r["exact_given"], r["weights_removed"]) for n, r in numbers.items()}
    assert flags["original"] == (False, [], False)
    assert flags["delete-S0"] == (False, [], False)
    assert flags["delete-S1"] == (True, ["tokenizer", "router"], True)
    assert flags["delete-S2"] == flags["sisa"] == flags["gold"] == (True, ["tokenizer"], True)
    assert results["delete-S2"]["system"] == results["gold"]["system"]
    assert results["delete-S1"]["cost"]["tokens"] == 0


def test_random_partitions_make_sisa_retrain_every_model(tiny):
    results = unlearning(tiny, "r2")
    assert results["sisa"]["cost"]["models_trained"] == 2
    assert results["sisa"]["cost"]["tokens_relative_to_gold"] == 1.0
    family = unlearning(tiny, "n2")
    assert family["sisa"]["cost"]["models_trained"] == 1
    # si alone is left of {hi, si}: about a third of the retained tokens, the router's on top
    assert 0.3 < family["sisa"]["cost"]["tokens_relative_to_gold"] < 0.7
    assert family["delete-S1"]["rebuilt"] == []


def test_collateral_of_dropping_a_shared_partition_is_counted(tiny):
    results = unlearning(tiny, "n2")
    names = ("original", "delete-S1", "sisa")
    near = {n: results[n]["bpb"]["retain"]["near"]["value"] for n in names}
    changes = results["delete-S1"]["bpb_change"]
    assert changes["near"]["value"] == pytest.approx(near["delete-S1"] - near["original"], abs=2e-6)
    assert changes["near"]["low"] > 0
    assert near["delete-S1"] > near["original"]
    assert abs(near["sisa"] - near["original"]) < abs(near["delete-S1"] - near["original"])


def test_system_folders_hold_only_what_is_left_and_the_run_is_untouched(tiny):
    run = tiny / "runs/n4"
    for name in ("delete-S1", "delete-S2", "gold", "sisa"):
        models = run / "unlearn/hi" / name / "system/models"
        assert sorted(p.name for p in models.iterdir()) == ["1", "2", "3"]
    assert len(list((run / "models").iterdir())) == 4
    system = run / "unlearn/hi/delete-S1/system/router/router.json"
    assert read(system)["domains"] == ["si", "de", "en"]


def test_timings_stand_apart_from_metrics(tiny):
    for name in TINY_EXPERIMENTS:
        text = (tiny / "runs" / name / "metrics.json").read_text()
        assert not re.search(r"second|host|20\d\d-\d\d", text)
        timings = read(tiny / "runs" / name / "unlearn/hi/gold/timings.json")
        assert timings["RTE_relative_to_gold"] == 1.0 and timings["RTE_seconds"] > 0


def test_rerun_trains_nothing_and_repeats_every_metric(tiny):
    models = {p: p.stat().st_mtime_ns for p in tiny.glob("runs/.store/models/*/model.safetensors")}
    made = {p: p.stat().st_mtime_ns for p in tiny.glob("runs/*/eval/utility.json")}
    made |= {p: p.stat().st_mtime_ns for p in tiny.glob("runs/.store/routers/*/*.safetensors")}
    assert len(made) > 2 * len(TINY_EXPERIMENTS)
    before = {n: (tiny / "runs" / n / "metrics.json").read_bytes() for n in TINY_EXPERIMENTS}
    output = run_stages(tiny, STAGES, *[f"configs/{n}.yaml" for n in TINY_EXPERIMENTS])
    assert "resuming" not in output
    assert models == {p: p.stat().st_mtime_ns for p in models}
    assert made == {p: p.stat().st_mtime_ns for p in made}
    assert len(list(tiny.glob("runs/.store/models/*/model.safetensors"))) == len(models)
    after = {n: (tiny / "runs" / n / "metrics.json").read_bytes() for n in TINY_EXPERIMENTS}
    assert before == after


@pytest.mark.slow
def test_models_trained_at_the_same_time_are_the_same(tiny, tmp_path):
    """training.num_proc = 2: partition models, gold models and metrics bit for bit."""
    tiny_project(tmp_path)
    shutil.copytree(tiny / "processed", tmp_path / "processed")
    stages = ("train_det_router", "run_clm", "eval_det_router", "unlearn_benchmarks")
    output = run_stages(tmp_path, stages, "configs/n2.yaml", "training.num_proc=2")
    for name in ("models", "unlearn/hi/gold/system/models", "unlearn/hi/gold/system/router"):
        found, expected = (folder / "runs/n2" / name for folder in (tmp_path, tiny))
        assert tree_hashes(found) == tree_hashes(expected), output
    for name in ("metrics.json", "eval/utility.json"):
        assert (tmp_path / "runs/n2" / name).read_bytes() == (tiny / "runs/n2" / name).read_bytes()


def test_gold_takes_models_that_another_machine_computed(tiny, tmp_path, monkeypatch):
    """What the domain never touched is the run's own, whatever computed it; only under another seed
    or `overwrite` is it trained again."""
    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    config = load("configs/n2.yaml", ("training.num_proc=2",))
    context = open_run(config)
    (forget,) = forget_sets(context)
    (touched,) = context.touched(forget)
    before, _ = models_without(context, forget)
    assert not missing_golds(config)
    monkeypatch.setattr(training, "training_environment", lambda config: ["another machine"])
    (call,) = missing_golds(config).values()
    assert call[0] is training.train_apart and call[2] == touched
    models, _ = models_without(context, forget)
    made = list(Path("runs/.store/models").glob("*/model.safetensors"))
    for k, path in models.items():
        assert tree_hashes(path) == tree_hashes(before[k])
        assert (path == context.models[k]) == (k != touched)
    assert len(made) == 1 + len(list((tiny / "runs/.store/models").glob("*/model.safetensors")))
    standing = context.standing(context.without(forget))
    assert standing == {k: p for k, p in context.models.items() if k != touched}
    assert not seeded(context, 1).standing(seeded(context, 1).without(forget))
    assert not context.standing(replace(context.without(forget), overwrite=True))


def test_some_documents_are_removed_by_retraining_what_held_them(tiny, tmp_path):
    """A forget file: sisa retrains one partition of two, and equals gold; all else is untouched."""
    shutil.copytree(tiny, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    table = pq.read_table(folder / "runs/n2/unlearn/hi/original/rows.parquet")
    rows = [r for r in table.to_pylist() if r["split"] == "forget"][:6]
    (folder / "some.txt").write_text("".join(f"hi/{r['document_id']}\n" for r in rows))
    operations = "unlearn.operations=original,gold,delete-S1,sisa,mask-skew,GA"
    wanted = ("configs/n2.yaml", "unlearn.forget=some.txt", operations)
    before = {p for p in folder.glob("runs/.store/models/*")}
    run_stages(folder, ["unlearn_benchmarks"], *wanted)
    made = {p for p in folder.glob("runs/.store/models/*")} - before
    (model,) = (p for p in made if is_complete(p))  # partition 0 without them, once
    results = read(folder / "runs/n2/metrics.json")["unlearning"]["some"]
    sisa, gold = results["sisa"], results["gold"]
    assert sisa["system"] == gold["system"] and sisa["exact"] and sisa["exact_given"] == []
    assert sisa["cost"]["models_trained"] == 1
    one, other = sisa["system"], results["original"]["system"]
    assert one["router"] == other["router"] and one["models"]["1"] == other["models"]["1"]
    assert one["models"]["0"] != other["models"]["0"]
    assert results["original"]["rows"]["members"] == 6
    assert read(model / "record.json")["blocks"]["hi"] < blocks_of(tiny, "n2", "hi")
    assert results["mask-skew"]["result"].endswith("experts are told apart by domain")
    assert results["delete-S1"]["bpb_change"]["near"]["low"] > 0  # all neighbours went too
    assert sisa["UA"]["value"] > results["original"]["UA"]["value"]
    # others of the language stay, and are counted among what is retained
    table = pq.read_table(folder / "runs/n2/unlearn/some/sisa/rows.parquet").to_pylist()
    kept = {r["document_id"] for r in table if (r["split"], r["domain"]) == ("train", "hi")}
    assert kept and not kept & {r["document_id"] for r in rows}
    assert "is no train document" in failing(folder, "hi/unknown\n", wanted)
    assert "one domain per file" in failing(folder, "hi/a\nde/b\n", wanted)


def test_other_domains_are_processed_while_a_model_trains(tmp_path):
    """The same folder of processed data grows under a training, and shrinks by an overwriting of
    what it does not read: the model is the one of a calm training."""
    few = ("configs/n1.yaml", "data.domains=[hi,de]", "tokenizer.train_domains=[hi,de]")
    more = ("configs/n1.yaml", "tokenizer.train_domains=[hi,de]")
    models = []
    for disturbed in (False, True):
        folder = tmp_path / str(disturbed)
        folder.mkdir()
        tiny_project(folder)
        run_stages(folder, ("process_dset", "train_det_router"), *few)
        before = tree_hashes(folder / "processed")
        training = start_stages(folder, ("run_clm",), *few, "training.num_train_epochs=4")
        checkpoints = (folder / "runs/.store/models/.checkpoints").glob
        while disturbed and not list(checkpoints("*/*/hashes.json")):
            assert training.poll() is None, training.communicate()
            time.sleep(0.01)
        if disturbed:
            run_stages(folder, ("process_dset",), *more)
            assert training.poll() is None, "the training ended too soon"
            grown = tree_hashes(folder / "processed")
            manifests = {n for n in before if n.count("/") == 1 and n.endswith("manifest.json")}
            assert {n for n in before if grown[n] != before[n]} == manifests
            assert len(grown) > 1.5 * len(before)
        output, _ = training.communicate(timeout=300)
        assert training.returncode == 0, output
        models.append(tree_hashes(folder / "runs/n1/models"))
    assert models[0] == models[1]


def blocks_of(folder: Path, run: str, domain: str) -> int:
    return read(folder / "runs" / run / "models/0/record.json")["blocks"][domain]


def failing(folder: Path, text: str, arguments) -> str:
    (folder / "some.txt").write_text(text)
    process = start_stages(folder, ["unlearn_benchmarks"], *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    return output
