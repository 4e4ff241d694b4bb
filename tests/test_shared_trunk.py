"""Models of a shared trunk as partitions of a run: DEMix and domain tokens from raw text to
unlearning."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import ROOT, run_stages, tiny_project
from tests.test_distributed import torchrun
from tiered import shared_trunk
from tiered.baselines.modeling_demix import DemixForCausalLM
from tiered.config import load
from tiered.data import ProcessedData
from tiered.partition import make_partition_map
from tiered.report import build
from tiered.router import load_models, load_router, run_models, tiered_model
from tiered.shared_trunk import OWN, SHARED, own_weights
from tiered.store import UserError, read_json, tree_hashes
from tiered.training import train_partition

EVERY = ("process_dset", "train_det_router", "run_clm", "eval_det_router")
CONFIGS = {
    # three languages, English is novel; then it is added
    "demix": "base: base.yaml\nname: demix\ndata: {domains: [hi, si, de], novel_domains: [en]}\n"
    "tokenizer: {train_domains: [hi, si, de, en]}\n"
    "partition: {method: language, n: 3}\n"
    "model: {type: demix, num_attention_heads: 2}\n"
    "training: {per_device_train_batch_size: 6}\n"
    "eval: {mixtures: [bayes_uniform, bayes_updating, bayes_cached, average], top_k: [0, 1]}\n"
    "unlearn: {operations: [original, gold, delete-S1, sisa, GA, fine-tune]}\n",
    "adapted": "base: demix.yaml\nname: adapted\n"
    "data: {novel_domains: [], added_domains: [en]}\ntraining: {added_from: nearest}\n"
    "unlearn: {forget: [en, hi], operations: [original, gold, delete-S1, sisa]}\n",
    "token": "base: demix.yaml\nname: token\nmodel: {type: domain_token}\n"
    "unlearn: {operations: [original, gold, delete-S1, sisa, reinit, RMU]}\n",
    "balanced": "base: demix.yaml\nname: balanced\nmodel: {type: llama}\n"
    "partition: {n: 1}\ntraining: {balanced: true}\n",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    tiny_project(folder)
    for name, text in CONFIGS.items():
        (folder / f"configs/{name}.yaml").write_text(text)
    run_stages(folder, EVERY, *(f"configs/{name}.yaml" for name in CONFIGS))
    measured = ("demix", "adapted", "token")
    run_stages(folder, ("unlearn_benchmarks",), *(f"configs/{name}.yaml" for name in measured))
    return folder


def models(project: Path, name: str) -> dict[str, Path]:
    return {p.name: p for p in sorted((project / f"runs/{name}/models").iterdir())}


@torch.inference_mode()
def test_parts_are_llamas_that_compute_what_the_whole_does(project):
    record = read_json(project / "runs/demix/models/0/record.json")
    (whole,) = [
        path.parent
        for path in (project / "runs/.store/models").glob("*/config.json")
        if read_json(path)["model_type"] == "demix"
        and read_json(path)["domain_experts"] == [0, 1, 2]
        and "lm_head.weight" in load_file(path.parent / SHARED)
    ][:1]
    demix = AutoModelForCausalLM.from_pretrained(whole)
    assert isinstance(demix, DemixForCausalLM)
    ids = torch.randint(3, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    for k, folder in models(project, "demix").items():
        part = AutoModelForCausalLM.from_pretrained(folder)
        assert type(part) is LlamaForCausalLM
        expected = demix(ids, domain_ids=torch.full((2,), int(k))).logits
        assert torch.equal(part(ids).logits, expected)
        # one file of the trunk for all
        assert (folder / SHARED).stat().st_ino == (whole / SHARED).stat().st_ino
    # an expert's own are gate, up and down of both layers
    own = own_weights(models(project, "demix")["1"])
    parts = ("gate_proj", "up_proj", "down_proj")
    assert own == sorted(f"model.layers.{i}.mlp.{p}.weight" for i in (0, 1) for p in parts)
    assert record["parameters"]["own"] == 2 * 3 * 16 * 48
    assert record["partition"] == {"members": ["hi"], "present": ["de", "hi", "si"]}


def test_tokens_and_seconds_of_the_parts_are_those_of_the_one_training(project):
    found = [read_json(p / "record.json") for p in models(project, "demix").values()]
    # two rows of each language a step, until the one with most blocks has been read
    steps = math.ceil(max(n for r in found for n in r["blocks"].values()) / 2)
    assert [r["optimizer_steps"] for r in found] == [steps] * 3
    assert [r["tokens"] for r in found] == [steps * 2 * 32] * 3
    assert [r["batch_rows"] for r in found] == [2] * 3
    assert len({r["shared_trunk"] for r in found}) == 1


def test_novel_domains_are_scored_and_trained_nowhere(project):
    utility = read_json(project / "runs/demix/eval/utility.json")
    assert utility["novel_domains"] == ["en"]
    assert utility["domains"]["en"]["scopes"]["oracle"] == "undefined"
    assert utility["domains"]["en"]["scopes"]["token"]["bpb"] > 0
    assert utility["macro"]["token"]["domains"] == 3
    novel = utility["novel_macro"]["token"]["bpb"]
    assert novel == utility["domains"]["en"]["scopes"]["token"]["bpb"]
    assert len(utility["routing"]["confusion"]) == 3
    assert sum(utility["routing"]["novel"]["en"]) == 8
    mixtures = utility["mixtures"]
    assert set(mixtures["novel_macro"]) == set(mixtures["macro"])
    assert mixtures["novel_macro"]["average"] == mixtures["domains"]["en"]["average"]
    provenance = read_json(project / "runs/demix/provenance.json")
    saw = {d for n, ds in provenance.items() if n.startswith("model/") for d in ds}
    assert saw == {"hi", "si", "de"} and "en" in provenance["tokenizer"]


def test_adapting_to_a_domain_leaves_every_other_part_as_it_was(project):
    before, after = models(project, "demix"), models(project, "adapted")
    assert set(after) - set(before) == {"3"}
    for k, folder in before.items():
        assert tree_hashes(folder) == tree_hashes(after[k])
    record = read_json(after["3"] / "record.json")
    start = record["started_from"]
    near = after[str(start["partition"])]
    assert (after["3"] / SHARED).stat().st_ino == (near / SHARED).stat().st_ino
    own, old = (load_file(p / OWN) for p in (after["3"], near))
    assert own.keys() == old.keys()
    assert all(not torch.equal(own[n], old[n]) for n in own)
    assert sum(start["posterior"].values()) == pytest.approx(1, abs=1e-5)
    assert start["posterior"][str(start["partition"])] == max(start["posterior"].values())
    assert record["partition"]["present"] == ["de", "en", "hi", "si"]
    # it helps where it was trained
    before, after = (
        read_json(project / f"runs/{n}/eval/utility.json") for n in ("demix", "adapted")
    )
    table = after["mixtures"]["expert_perplexity"]["domain"]
    assert table["en"][3] < table["en"][start["partition"]]
    old = before["mixtures"]["expert_perplexity"]["domain"]
    assert all(table[d][:3] == old[d] for d in ("hi", "si", "de"))


def test_nearest_is_the_part_of_largest_posterior_by_hand(project, monkeypatch):
    """DEMix's cached prior over validation rows, from the loss that transformers computes."""
    monkeypatch.chdir(project)
    config = load("configs/adapted.yaml")
    rows = ProcessedData(config).rows("en", "validation", config.eval.cached_rows).input_ids
    ids = torch.from_numpy(np.ascontiguousarray(rows)).long()
    total = []
    for k in range(3):
        model = AutoModelForCausalLM.from_pretrained(f"runs/adapted/models/{k}")
        with torch.inference_mode():
            loss = [model(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in ids]
        total.append(loss)
    prior = np.full(3, 1 / 3)
    for row in np.array(total).T:
        joint = prior * np.exp(-(row - row.min()))
        prior = 0.7 * prior + 0.3 * joint / joint.sum()
    found = read_json("runs/adapted/models/3/record.json")["started_from"]
    assert [found["posterior"][str(k)] for k in range(3)] == pytest.approx(prior, abs=2e-3)
    assert found["partition"] == int(prior.argmax())


def test_removal_says_what_it_is(project):
    def results(run, forget):
        return {
            p.parent.name: read_json(p)
            for p in (project / f"runs/{run}/unlearn/{forget}").glob("*/metrics.json")
        }

    found = results("demix", "hi")
    # the expert is gone, the trunk has seen the language all the same
    assert found["delete-S1"]["weights_removed"] and not found["delete-S1"]["exact"]
    assert "the trunk that all partitions share" in found["delete-S1"]["residue"]
    assert found["delete-S1"]["cost"]["tokens"] == 0
    # retraining touches every partition, and is gold
    assert found["sisa"]["exact"] and found["sisa"]["cost"]["tokens_relative_to_gold"] == 1
    assert "the trunk that all partitions share" not in found["sisa"]["residue"]
    assert set(found["sisa"]["rebuilt"]) == {"router", "model/1", "model/2"}
    # an expert that was added is removed exactly: the trunk never saw its domain
    added = results("adapted", "en")
    assert added["delete-S1"]["exact"]
    assert "the trunk that all partitions share" not in added["delete-S1"]["residue"]
    both = results("adapted", "hi")
    assert both["sisa"]["exact"] and not both["delete-S1"]["exact"]


def test_an_edit_changes_an_expert_and_never_the_trunk(project):
    edited = project / "runs/demix/unlearn/hi/GA/system/models/0/model.safetensors"
    whole, source = load_file(edited), models(project, "demix")["0"]
    own, shared = load_file(source / OWN), load_file(source / SHARED)
    assert all(torch.equal(whole[n], w) for n, w in shared.items())
    assert any(not torch.equal(whole[n], w) for n, w in own.items())
    words = read_json(project / "runs/demix/unlearn/hi/fine-tune/metrics.json")["result"]
    assert words == "not applicable: its partition holds nothing else to train on"


def test_residue_names_the_descendants_of_a_removed_expert(project):
    start = read_json(project / "runs/adapted/models/3/record.json")["started_from"]["partition"]
    for forget in ("hi",):
        found = read_json(project / f"runs/adapted/unlearn/{forget}/delete-S1/metrics.json")
        named = f"model/3, which started from model/{start}" in found["residue"]
        assert named == (start == 0)


def test_a_gold_expert_begins_where_the_original_did(project, tmp_path, monkeypatch):
    """Trained at a rate too small to move a weight, the others' experts and the trunk are the
    same to the bit with Hindi and without; what is trained then differs."""
    monkeypatch.chdir(project)
    still = [f"output_dir={tmp_path}", "training.learning_rate=1e-30"]
    still.append("training.num_train_epochs=0.05")
    made = {}
    for label, extra in (("all", []), ("without", ["data.exclude_domains=[hi]"])):
        config = load("configs/demix.yaml", (*still, *extra))
        data, partitions = ProcessedData(config), make_partition_map(config)
        folders = (train_partition(config, data, partitions, k) for k in range(3))
        made[label] = {
            str(k): {**load_file(p / OWN), **load_file(p / SHARED)}
            for k, p in enumerate(folders)
            if p is not None
        }
    assert list(made["all"]) == ["0", "1", "2"] and list(made["without"]) == ["1", "2"]
    for k, weights in made["without"].items():
        for name, value in weights.items():
            assert torch.equal(value, made["all"][k][name]), (k, name)
    gold = project / "runs/demix/unlearn/hi/gold/system/models"
    assert sorted(p.name for p in gold.iterdir()) == ["1", "2"]
    name = "model.layers.1.mlp.up_proj.weight"
    trained = [load_file(p / OWN)[name] for p in (gold / "1", models(project, "demix")["1"])]
    first = made["all"]["1"][name]
    assert all((value - first).abs().max() > 1e-3 for value in trained)
    assert not torch.equal(*trained)


def test_domain_tokens_share_everything_else(project):
    parts = {k: load_file(p / OWN) for k, p in models(project, "token").items()}
    assert [list(p) for p in parts.values()] == [
        ["domain_tokens.0"],
        ["domain_tokens.1"],
        ["domain_tokens.2"],
    ]
    record = read_json(project / "runs/token/models/2/record.json")
    assert record["parameters"]["own"] == 16
    shared = {p: (p / SHARED).stat().st_ino for p in models(project, "token").values()}
    assert len(set(shared.values())) == 1
    found = {
        p.parent.name: read_json(p)
        for p in (project / "runs/token/unlearn/hi").glob("*/metrics.json")
    }
    assert not found["delete-S1"]["exact"] and found["sisa"]["exact"]
    assert 0 <= found["original"]["verbatim"]["holdout"]["value"] <= 1
    assert found["RMU"]["result"] == "not applicable: its layers are shared by all partitions"
    # random weights of the one token: everything else is as it was
    edited = load_file(project / "runs/token/unlearn/hi/reinit/system/models/0/model.safetensors")
    source = models(project, "token")["0"]
    assert all(torch.equal(edited[n], w) for n, w in load_file(source / SHARED).items())
    assert not torch.equal(edited["domain_tokens.0"], load_file(source / OWN)["domain_tokens.0"])


@torch.inference_mode()
def test_generation_with_a_cache_reads_every_token_once(project, monkeypatch):
    """A domain token's cache is one longer than what was read of the row."""
    monkeypatch.chdir(project)
    config = load("configs/token.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    found = load_models(run_models(config, partitions, data))
    tiered = tiered_model(config, partitions, load_router(config.run_dir / "router", ""), found)
    ids = torch.from_numpy(data.rows("hi", "test", 3).input_ids[:, :9]).long()
    written = [
        tiered.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=c)
        for c in (True, False)
    ]
    assert torch.equal(*written)
    assert len(tiered(written[0]).partition.unique()) >= 1


def test_families_and_documents_at_random_share_a_trunk(project, tmp_path):
    """Partitions of several domains, and a domain in several partitions."""
    base = ("training.per_device_train_batch_size=4", "partition.n=2", "eval.mixtures=average")
    for method in ("family", "random"):
        own = (f"partition.method={method}", f"name={method}", f"output_dir={tmp_path}")
        stages = ("train_det_router", "run_clm", "eval_det_router", "unlearn_benchmarks")
        fewer = "unlearn.operations=original,gold,delete-S1,sisa"
        run_stages(project, stages, "configs/demix.yaml", *base, *own, fewer)
        records = [read_json(tmp_path / f"{method}/models/{k}/record.json") for k in (0, 1)]
        whole = records[0]["shared_trunk"]
        assert records[1]["shared_trunk"] == whole
        assert all(r["partition"]["present"] == ["de", "hi", "si"] for r in records)
        sisa = read_json(tmp_path / f"{method}/unlearn/hi/sisa/metrics.json")
        assert sisa["exact"] and sisa["cost"]["tokens_relative_to_gold"] == 1


def test_overwrite_trains_the_trunk_once(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    fits, fit = [], shared_trunk.fit
    monkeypatch.setattr(shared_trunk, "fit", lambda *a: fits.append(1) or fit(*a))
    config = load("configs/demix.yaml", (f"output_dir={tmp_path}", "overwrite=true"))
    data, partitions = ProcessedData(config), make_partition_map(config)
    folders = [train_partition(config, data, partitions, k) for k in range(3)]
    assert len(fits) == 1
    trunks = {read_json(p / "record.json")["shared_trunk"] for p in folders}
    assert len(trunks) == 1


def test_configs_that_train_different_trunks_have_different_addresses(project, monkeypatch):
    monkeypatch.chdir(project)
    found = set()
    for rows in (3, 6, 12):
        sizes = (f"training.per_device_train_batch_size={rows}", "training.min_batch_rows=6")
        config = load("configs/demix.yaml", sizes)
        data, partitions = ProcessedData(config), make_partition_map(config)
        found.add(shared_trunk.whole_folder(config, data, partitions))
    assert len(found) == 2  # of 3 rows the floor makes 6


def test_balanced_steps_of_a_dense_model(project):
    record = read_json(project / "runs/balanced/models/0/record.json")
    blocks = max(record["blocks"].values())
    assert record["optimizer_steps"] == math.ceil(blocks / 2) and record["batch_rows"] == 6


def test_mistakes_in_a_config_are_one_line(project, monkeypatch):
    monkeypatch.chdir(project)
    for override, text in (
        ("model.init_from=seed", "model.init_from: a demix is trained from random weights"),
        ("data.added_domains=fr", "training.added_from: a demix's trunk is trained"),
        ("training.added_from=nearest", "training.added_from: data.added_domains names no domain"),
        ("data.novel_domains=hi", "data.domains: names must be given, each once"),
    ):
        with pytest.raises(UserError, match=text):
            load("configs/demix.yaml", (override,))
    config = load("configs/demix.yaml", ("training.per_device_train_batch_size=8",))
    with pytest.raises(UserError, match=r"8 rows per optimizer step .* 3 partitions"):
        shared_trunk.train_whole(config, ProcessedData(config), make_partition_map(config))


def test_report_has_the_tables_of_novel_domains_and_adaptation(project, tmp_path):
    page = build([project / f"runs/{n}" for n in CONFIGS], tmp_path)
    assert "is missing" not in page.read_text(encoding="utf-8")

    def rows(name):
        with (tmp_path / f"tables/{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    (adapted,) = rows("adaptation_to_added_domains__t7__perplexity")
    utility = read_json(project / "runs/adapted/eval/utility.json")
    table = utility["mixtures"]["expert_perplexity"]["domain"]
    start = read_json(project / "runs/adapted/models/3/record.json")["started_from"]["partition"]
    assert adapted["added"] == "en" and adapted["trained parameters"] == "4,608"
    assert adapted["added domain, before"] == f"{table['en'][start]:.1f}"
    assert adapted["added domain, after"] == f"{table['en'][3]:.1f}"
    old = ("hi", "si", "de")[start]
    assert adapted["old domains, adapted model"] == f"{table[old][3]:.1f}"
    novel = rows("novel_domains__t7__bits_per_byte")
    found = {(r["experiment"], r["mixture"]): r for r in novel}
    stored = read_json(project / "runs/demix/eval/utility.json")
    average = stored["mixtures"]["novel_macro"]["average"]["bpb"]
    assert found["demix", "average"]["novel domains"] == f"{average:.3f}"
    # the trunk counts once: 3 experts of 4,608 in 2 layers, and one of everything else
    sizes = {r["experiment"]: r for r in rows("sizes")}
    whole = read_json(project / "runs/demix/models/0/record.json")["parameters"]
    assert sizes["demix"]["parameters, all models"] == f"{whole['total'] + 2 * 4608:,}"
    assert sizes["token"]["parameters, all models"] == f"{whole['total'] + 3 * 16:,}"
    floors = rows("floors")
    assert any("in all 3 domains" in r["floor"] for r in floors if r["experiment"] == "demix")


def test_two_ranks_train_and_publish_what_one_process_does(project, tmp_path):
    """Six rows of three experts a step: two micro-batches of one process, or one on each rank."""
    for name in ("configs", "processed"):
        shutil.copytree(project / name, tmp_path / name)
    step = "training.per_device_train_batch_size=3 training.gradient_accumulation_steps=2"
    sizes, alone = step.split(), f"output_dir={tmp_path / 'alone'}"
    run_stages(tmp_path, ("run_clm",), "configs/demix.yaml", *sizes, alone)
    script = ROOT / "run_clm.py"
    output = torchrun(tmp_path, 29563, script, "configs/demix.yaml", *sizes)
    assert output.count("demix partition 1:") == 1
    for k in range(3):
        one, two = (tmp_path / f"{n}/demix/models/{k}" for n in ("alone", "runs"))
        records = [read_json(p / "record.json") for p in (one, two)]
        assert records[0]["optimizer_steps"] == records[1]["optimizer_steps"]
        assert records[0]["tokens"] == records[1]["tokens"]
        for file in (OWN, SHARED):
            first, second = load_file(one / file), load_file(two / file)
            for name, value in first.items():
                torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-4, msg=name)
    # the trunk is there, its parts are gone; the second rank comes when the first has made them
    # anew, finds every model complete, and must meet the first one all the same
    store = load(tmp_path / "configs/demix.yaml", (f"output_dir={tmp_path}/runs",)).store_dir
    found = sorted((store / "models").glob("[0-9a-f]*"))
    parts = [p for p in found if "shared_trunk" in read_json(p / "record.json")]
    assert len(parts) == 3 and len(found) == 4
    before = [tree_hashes(p) for p in parts]
    for path in parts:
        shutil.rmtree(path)
    late = (ROOT / "tests/late_rank.py", store / "models/*" / OWN, 4, script)
    torchrun(tmp_path, 29564, *late, "configs/demix.yaml", *sizes)
    assert [tree_hashes(p) for p in parts] == before
