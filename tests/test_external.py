"""Models from elsewhere: equal rows and models give the run's own measures; bad input is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_stages
from tests.test_gradient import tiny_llama
from tiered.config import UnlearnConfig, load, parse_arguments
from tiered.store import UserError, read_json
from tiered.unlearning.external import measure_external


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny run of one partition: its models are plain causal LMs."""
    folder = tmp_path_factory.mktemp("external") / "tiny"
    shutil.copytree(tiny, folder)
    wanted = "unlearn.operations=[original,gold,mask-skew,fine-tune]"
    overrides = (
        wanted,
        "unlearn.max_steps=6",
        "unlearn.attacks=[LOSS,zlib,Min-K,Min-K++,GradNorm]",
    )
    run_stages(folder, ["unlearn_benchmarks"], "configs/n1.yaml", *overrides)
    text = "base: base.yaml\nname: external\n"
    text += "unlearn: {attacks: [LOSS, zlib, Min-K, Min-K++, GradNorm]}"
    (folder / "configs/external.yaml").write_text(text)
    return folder


def system(operation: str) -> str:
    return f"runs/n1/unlearn/hi/{operation}/system/models/0"


def place(operation: str) -> str:
    """Folder of an operation's results: the target's path, so that none overwrites another's."""
    return system(operation).replace("/", "-")


ROWS = "runs/n1/unlearn/hi/rows.jsonl"


def arguments(target: str, original: str = "", rows: str = ROWS) -> list[str]:
    given = [
        "configs/external.yaml",
        "--target",
        target,
        f"--gold={system('gold')}",
        "--rows",
        rows,
    ]
    return given + (["--original", original] if original else [])


def test_a_runs_models_as_models_from_elsewhere_measure_the_same(folder):
    """unlearn_benchmarks.py itself, on the row file that the run wrote."""
    command = [sys.executable, str(ROOT / "unlearn_benchmarks.py")]
    command += arguments(system("fine-tune"), "runs/n1/models/0")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target" in done.stdout and "gold" in done.stdout
    found = read_json(folder / f"runs/external/external/{place('fine-tune')}/metrics.json")
    assert found["forget"] == "hi" and found["shorter_rows_left_out"] == 0
    run = {
        name: read_json(folder / f"runs/n1/unlearn/hi/{operation}/metrics.json")
        for name, operation in {
            "original": "original",
            "gold": "gold",
            "target": "fine-tune",
        }.items()
    }
    for name, measures in found["measures"].items():
        for key, value in measures.items():
            # the run's router is attacked as well; it has no other seed's gold here either
            if key not in ("router_AUC", "exposure"):
                assert value == run[name][key], (name, key)
    assert found["measures"]["target"]["router_AUC"] == "not applicable"
    assert found["measures"]["target"]["domains_left_out"] == []


FLAGS = {f"--{key}": f"unlearn.{key}" for key in ("target", "gold", "original", "rows")}


def external(*given: str):
    return measure_external(parse_arguments(list(given), "", FLAGS)[0])


def test_without_the_original_what_needs_it_is_a_word(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (results,) = external(*arguments(system("mask-skew"))).values()
    assert set(results) == {"gold", "target"}
    target = results["target"]
    assert target["UA_norm"] == target["strongest_attack"] == "undefined"
    assert set(target["bpb_change"].values()) == {"undefined", "none"}
    assert set(target["AUC"]["LOSS"].values()) == {"undefined"}
    assert target["membership_verdict"] == target["PrivLeak"] == "undefined"
    stored = read_json(folder / "runs/n1/unlearn/hi/mask-skew/metrics.json")
    for key in ("UA", "RA", "TA", "bpb", "to_gold", "gap_to_gold", "verbatim"):
        assert target[key] == stored[key], key


def test_texts_are_tokenised_by_the_target_and_short_ones_left_out(folder, monkeypatch, tmp_path):
    """A file of texts gives the rows of which the ids were written."""
    monkeypatch.chdir(folder)
    from tiered.data import ProcessedData

    data = ProcessedData(load("configs/n1.yaml"))
    lines = [json.loads(line) for line in Path(ROWS).read_text().splitlines()]
    whole = {row["document_id"]: row for row in lines}
    texts = []
    for name, row in whole.items():
        # a row's ids may end within a letter: its text, and enough more for as many tokens
        text = data.tokenizer.decode(row["input_ids"]).rstrip("\ufffd")
        texts.append({"split": row["split"], "domain": row["domain"], "text": text + " 0 1 2"})
        texts[-1] |= {"document_id": name, "near": True}
    texts.append({"split": "test", "domain": "de", "text": "zu kurz"})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in texts), encoding="utf-8")
    (results,) = external(*arguments(system("mask-skew"), rows=str(path))).values()
    stored = read_json(folder / f"runs/external/external/{place('mask-skew')}/metrics.json")
    assert stored["shorter_rows_left_out"] == 1
    own = read_json(folder / "runs/n1/unlearn/hi/mask-skew/metrics.json")
    assert results["target"]["UA"]["value"] == pytest.approx(own["UA"]["value"], abs=0.01)


def test_any_causal_lm_is_read(folder, monkeypatch, tmp_path):
    """A Llama of another architecture as the target, with the run's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(folder)
    tokenizer = AutoTokenizer.from_pretrained(system("gold"))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (results,) = external(*arguments(str(tmp_path / "llama"))).values()
    # untrained: about uniform over the vocabulary
    assert 0.9 < results["target"]["UA"]["value"] <= 1
    (found,) = (folder / "runs/external/external").glob("*-llama/metrics.json")
    assert read_json(found)["models"]["target"].endswith("llama")


def test_a_models_generation_settings_do_not_change_what_it_remembers(
    folder, monkeypatch, tmp_path
):
    """No repeated token at all, hot sampling: the continuation is the greedy one all the same."""
    monkeypatch.chdir(folder)
    shutil.copytree(system("gold"), tmp_path / "odd")
    settings = {"no_repeat_ngram_size": 1, "do_sample": True, "temperature": 9.0}
    settings |= {"repetition_penalty": 5.0, "max_new_tokens": 2}
    (tmp_path / "odd/generation_config.json").write_text(json.dumps(settings))
    (results,) = external(*arguments(str(tmp_path / "odd"))).values()
    assert results["target"]["verbatim"] == results["gold"]["verbatim"]


def test_all_rows_of_a_file_are_scored_and_train_rows_of_f_make_it_retained(
    folder, monkeypatch, tmp_path
):
    """`forget_rows` cuts a run's rows, not a file's; of a forget file f stays in part."""
    monkeypatch.chdir(folder)
    lines = [json.loads(line) for line in Path(ROWS).read_text().splitlines()]
    f = [row for row in lines if row["domain"] == "hi"]
    kept = [row | {"split": "train"} for row in f if row["split"] == "forget"][:5]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in lines + kept))
    (results,) = external(
        *arguments(system("mask-skew"), rows=str(path)), "unlearn.forget_rows=2"
    ).values()
    counts = {s: sum(row["split"] == s for row in f) for s in ("forget", "holdout")}
    assert list(results["target"]["rows"].values()) == list(counts.values())
    assert min(counts.values()) > 2
    own = read_json(folder / "runs/n1/unlearn/hi/mask-skew/metrics.json")
    assert results["target"]["UA"] == own["UA"]
    assert results["target"]["RA"]["all"] != own["RA"]["all"]  # with f's rows that stay


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"split": "forget"', "no JSON"),
        ('{"split": "forget", "domain": "hi", "txt": ""}', "'txt'; keys are"),
        ('{"split": "members", "domain": "hi", "text": ""}', "a split of forget, holdout"),
        ('{"split": "forget", "domain": "hi", "input_ids": [1]}', "neither text nor token_bytes"),
        (
            '{"split": "forget", "domain": "hi", "input_ids": [9999], "token_bytes": [1],'
            ' "token_chars": [1]}',
            "outside the vocabulary",
        ),
        ('{"split": "forget", "domain": "hi", "text": "x"}', "must be of one domain"),
    ],
)
def test_bad_row_files_are_named(folder, monkeypatch, tmp_path, line, message):
    monkeypatch.chdir(folder)
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        external(*arguments(system("gold"), rows=str(tmp_path / "rows.jsonl")))


def test_bad_models_and_flags_are_named(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"unlearn.gold: .* name it"):
        external("configs/external.yaml", "--target", system("gold"))
    with pytest.raises(UserError, match="--target: needs a value"):
        external("configs/external.yaml", "--target", "--gold", "x")
    shutil.copytree(system("gold"), tmp_path / "weights")
    (tmp_path / "weights/config.json").unlink()
    with pytest.raises(UserError, match=r"unlearn.target: .* is no causal LM folder"):
        external(*arguments(str(tmp_path / "weights")))
    small = tiny_llama()
    small.save_pretrained(tmp_path / "small")
    for path in (folder / system("gold")).glob("tokenizer*"):
        shutil.copy(path, tmp_path / "small")
    with pytest.raises(UserError, match="token ids, the rows use"):
        external(*arguments(str(tmp_path / "small")))
    assert UnlearnConfig().target == ""
