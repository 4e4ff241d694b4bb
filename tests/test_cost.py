"""The cost of experiments: every shipped config, numbers by hand and of real runs, error lines."""

import json
import math
import re
import sys

import pytest

from tests.test_config import ROOT, SHIPPED
from tiered.config import load
from tiered.cost import command_line, comparison_row, duration, print_estimate, short, size
from tiered.estimate import estimate, evaluation_memory
from tiered.flops import forward_flops, training_flops
from tiered.memory import checkpoint_bytes
from tiered.workload import Assumptions

# Sections whose figures hang on how much raw text there is.
TITLES = ("Models", "Trainings", "Totals", "In use", "Disk", "Assumed, and not counted")


def of(name: str, *overrides: str, **assumed):
    """The estimate of a shipped config."""
    return estimate(load(ROOT / f"configs/{name}.yaml", overrides), Assumptions(**assumed))


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["cost.py", *map(str, arguments)])
    command_line()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_shipped_config_has_a_cost(path, capsys, monkeypatch):
    """Every family; what is unknown is a word, no NaN, no infinity."""
    monkeypatch.chdir(ROOT)
    base = () if "\nname:" in path.read_text(encoding="utf-8") else ("name=base",)
    found = estimate(load(path, base), Assumptions())
    print_estimate(found)
    text = capsys.readouterr().out
    assert all(f"\n### {title}" in text for title in TITLES)
    assert not {"nan", "inf"} & set(re.findall(r"\w+", text))
    config = found.config
    assert comparison_row(found)["n"] == f"{config.num_partitions:,}"
    if config.data.tokens_per_domain or config.data.num_documents:
        assert math.isfinite(sum(t.flops for t in found.trained))
        assert math.isfinite(found.evaluation) or not config.eval.rows_per_domain
    else:
        assert "Tokens: unknown" in text
    # what is trained is what the configured partitions have
    made = sorted(k for t in found.trained for k in t.job.partitions)
    assert made == list(range(config.num_partitions))


def test_the_quick_start_by_hand():
    """D = 32, 2 layers, E = 8, m = 8, H = 4: parameters as in modeling_monet.py's own count; 76,800
    tokens per language, Hindi and German 12 x 3 + 12 x 15 blocks of 128 more."""
    found = of("quickstart/n16")
    table, layer = 4096 * 32, 4 * 32 * 32 + 8 * (2 * 8 * 32 + 8 + 32) + 2 * 32
    routers = 2 * 2 * 32 * 4 * 8
    one = 2 * table + 2 * layer + routers + 32
    assert found.model.counts["total"] == one == 283_424
    assert found.parameters == 16 * one and found.models == 16
    per_token = 2 * (
        2 * (4 * 32 * 32 + 8 * (2 * 8 * 32 + 32) + 2 * 32 * 64.5 + 2 * 2 * 4 * 8 * 4)
        + routers
        + table * 127 / 128
    )
    assert forward_flops(found.model.parts) == per_token
    tokens = {t.job.domains[0]: t.tokens for t in found.trained}
    assert tokens["si"] == 76_800 and tokens["hi"] == 76_800 + 128 * (12 * 3 + 12 * 15)
    flops = 3 * per_token * sum(tokens.values())
    assert sum(t.flops for t in found.trained) == pytest.approx(flops, rel=1e-12)
    # steps: 600 blocks, one row per sixteenth of 16, not fewer than 2
    assert found.trained[1].job.steps == 300 and found.trained[1].job.batch_rows == 2
    held = found.trained[1].memory
    # two tables of eight rotary frequencies; statistics of two routers' two norms
    assert held.weights == 4 * one + 2 * 8 * 4 + 2 * 2 * (2 * 4 * 4 + 8)
    assert held.gradients == 4 * one and held.optimizer == 8 * one + 4 * (3 + 2 * 18)
    # the processed data is not there: of the router split, and so of the embedder, nobody knows
    assert math.isnan(found.embedder.tokens) and math.isnan(found.serial)
    assert math.isfinite(found.evaluation)


def test_evaluation_reads_rows_once_and_for_mixtures_with_every_model():
    found = of("quickstart/n16")
    rows, positions = 16 * 64, 127
    router = sum(found.router)
    assert found.router[1] == 2 * 16 * 64  # sixteen centroids of width 64
    assert found.evaluation == rows * positions * (forward_flops(found.model.parts) + router)
    assert evaluation_memory(found) == (4 * 64 * positions * 16, 0)
    mixed = of("quickstart/n16", "eval.mixtures=[distance,bayes_cached,parameter_average]")
    passes = rows * 2 + 16 * (rows + 16 * 100)
    expected = passes * forward_flops(mixed.model.parts) + (2 * rows + 16 * 100) * router
    assert mixed.evaluation == pytest.approx(positions * expected, rel=1e-12)
    assert evaluation_memory(mixed)[1] == 8 * 64 * positions * 16
    assert mixed.disk["scores cached by the evaluation"] == 5 * positions * (
        rows + 16 * (rows + 16 * 100)
    )


@pytest.mark.parametrize(
    "name, overrides, retrained",
    [
        ("c4/trained/n16", (), ()),  # its partition is dropped, and no other saw it
        ("c4/trained/n04", (), (0,)),
        ("c4/trained/n01", (), (0,)),
        ("c4/trained/n16", ("partition.method=random",), tuple(range(16))),
        ("c4/trained/n16", ("partition.method=cluster",), tuple(range(16))),
        ("shared_trunk/demix", (), tuple(range(1, 12))),  # all that are left of twelve
        ("shared_trunk/lora", (), tuple(range(1, 12))),  # the seed LM saw Hindi
        ("shared_trunk/lora_apart", (), ()),  # and here it did not
    ],
)
def test_golds_retrain_what_saw_the_domain(name, overrides, retrained):
    found = of(name, "unlearn.forget=hi", "unlearn.gold_seeds=1", *overrides)
    (gold,) = found.golds
    assert gold.retrained == retrained
    if "c4" in name:
        tokens = sum(t.tokens for t in found.trained)
        whole = tokens * training_flops(found.model.parts)
        embedder = found.embedder.flops * 15 / 16
        assert gold.scratch == pytest.approx(whole * 15 / 16 + embedder, rel=1e-4)
        share = len(retrained) / found.models - (1 / 16 if retrained else 0)
        assert gold.anew == pytest.approx(whole * share + embedder, rel=1e-4)
    three = of(name, "unlearn.forget=hi", "unlearn.gold_seeds=3", *overrides).golds[0]
    if math.isfinite(gold.scratch):
        assert three.anew == pytest.approx(gold.anew + 2 * gold.scratch)


def test_of_a_trunk_and_of_low_rank_experts_the_shared_parameters_count_once():
    """DEMix: a Llama's feed-forward blocks twelve times; LoRA: rank 16 on seven maps of two layers,
    with a gate each."""
    trunk = of("shared_trunk/demix")
    own = 2 * 3 * 64 * 176
    assert trunk.model.own == own
    assert trunk.parameters == trunk.model.counts["total"] + 11 * own
    assert trunk.trained[0].job.partitions == tuple(range(12))
    assert trunk.trained[0].memory.gradients == 4 * trunk.parameters
    lora = of("shared_trunk/lora")
    widths = 4 * [(64, 64)] + 2 * [(64, 176)] + [(176, 64)]
    updates = 2 * sum(16 * (i + o) for i, o in widths)
    assert lora.model.own == updates + 2 * sum(i for i, _ in widths)
    assert lora.parameters == lora.model.counts["total"] + 12 * lora.model.own
    assert lora.trained[0].memory.gradients == 4 * updates
    # the updates' training, then 100 steps of the gates
    job = lora.trained[0].job
    assert lora.trained[0].tokens == 128 * (job.rows + 100 * job.batch_rows)
    adapted = of("shared_trunk/demix_adapted")
    assert adapted.parameters == adapted.model.counts["total"] + 15 * own
    assert adapted.trained[1].memory.gradients == 4 * own


def test_a_published_mixture_needs_what_its_config_says():
    """111 GB with float32 weights, gradients and moments (configs/c4/olmoe_1b_7b.yaml), and a
    forward pass more for gradient checkpointing."""
    found = of("c4/olmoe_1b_7b")
    held = found.trained[0].memory
    assert round((held.weights + held.gradients + held.optimizer) / 1e9) == 111
    assert found.checkpointing
    parts = found.model.parts
    per_token = training_flops(parts) + forward_flops(parts)
    assert found.trained[0].flops == found.trained[0].tokens * per_token
    assert found.trained[0].tokens == 16 * (5_000_000 * 0.6 * 500 // 1024) * 1024


def test_a_finished_run_cost_what_was_reckoned(tiny, monkeypatch):
    """Parameters, tokens and steps of models and embedder, checkpoints and processed data on disk,
    from the data's manifest."""
    monkeypatch.chdir(tiny)
    found = estimate(load("configs/n4.yaml"), Assumptions())
    for k, trained in enumerate(found.trained):
        folder = tiny / f"runs/n4/models/{k}"
        record = json.loads((folder / "record.json").read_text())
        assert trained.tokens == record["tokens"]
        assert trained.counts["total"] == record["parameters"]["total"]
        assert trained.counts["computed_per_token"] == record["parameters"]["computed_per_token"]
        weights = (folder / "model.safetensors").stat().st_size
        assert trained.checkpoint == checkpoint_bytes(found.model.held)
        assert 0 < weights - trained.checkpoint < 8192  # the header
    router = (tiny / "runs/n4/router/embedder/record.json").read_text()
    assert found.embedder.tokens == json.loads(router)["tokens"]
    assert found.embedder.job.steps == json.loads(router)["optimizer_steps"]
    (folder,) = (tiny / "processed").glob("[!.]*")
    files = sum(p.stat().st_size for p in folder.glob("*/*/*.arrow"))
    assert found.disk["processed data"] == pytest.approx(files, rel=0.05)  # messages, padding
    assert "unknown" not in comparison_row(found).values()


def test_many_equal_partitions_share_a_line(monkeypatch, capsys):
    run(
        monkeypatch,
        ROOT / "configs/c4/trained/n16.yaml",
        "partition.method=random",
        "partition.n=1024",
    )
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| partition 0")]
    assert len(lines) == 1 and lines[0].startswith("| partition 0 to 1023, each | ar de en")


def test_several_numbers_of_partitions_stand_side_by_side(monkeypatch, capsys):
    """A model keeps its size, n of them have n times its parameters; the work is the same."""
    run(
        monkeypatch,
        ROOT / "configs/c4/trained/n16.yaml",
        "partition.method=random",
        "--partitions",
        "4,64",
        "--utilisation=0.4",
    )
    text = capsys.readouterr().out
    assert text.count("###") == 1 and "### Side by side" in text
    rows = {r.split(" | ")[0][2:]: r[:-2].split(" | ")[1:] for r in text.splitlines() if r}
    assert rows["n"] == ["4", "64"] and rows["tasks"] == ["4", "64"]
    one = of("c4/trained/n16").model.counts["total"]
    assert rows["parameters, all"] == [short(4 * one), short(64 * one)]
    assert rows["training, all FLOPs"][0] == rows["training, all FLOPs"][1]
    half = of("c4/trained/n16", "partition.method=random", "partition.n=4", utilisation=0.2)
    assert rows["A100"][0] == duration(half.serial / 312e12 / 0.4 / 3600)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("--utilisation", "2"), "--utilisation: '2' is not a number above 0 and at most 1"),
        (("--utilisation", "nan"), "--utilisation: 'nan' is not a number"),
        (("--partitions", "4,x"), "--partitions: 'x' is not a whole number above 0"),
        (("--partitions", "0"), "--partitions: '0' is not a whole number above 0"),
        (("--partitions", "32"), "partition.n: 32 partitions need at least 32 domains"),
        (("--tokens-per-document",), "--tokens-per-document: '' is not a number above 0"),
        (("--flops",), "--flops: neither a config file (.yaml) nor an override"),
        (("model.hiden_size=3",), "did you mean `model.hidden_size`?"),
        (("model.num_attention_heads=7",), "model.hidden_size: 32 is not a multiple"),
        (("tokenizer.name=no/such",), "set model.vocab_size"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, ROOT / "configs/quickstart/n16.yaml", *arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and line in printed.err
    assert printed.err.startswith("cost.py: error: ") and printed.err.count("\n") == 1


def test_help_names_the_flags_and_every_key(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--tokens-per-document" in text and "training.learning_rate (" in text


def test_units():
    assert [duration(h) for h in (25.0, 0.5, 0.01, 1e-6)] == ["25 h", "30 min", "36 s", "3.6 ms"]
    assert [size(b) for b in (3e12, 2.5e9, 1234, math.nan)] == [
        "3 TB",
        "2.5 GB",
        "1.23 kB",
        "unknown",
    ]
    assert [short(v) for v in (12.345, 1234.4, 1.5e9)] == ["12.3", "1,234", "1.5e+09"]
