"""The exported folder: loads without this project, equals the run, and says what it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modeling_monet  # noqa: F401 (registers the partition models)
import tiered.modeling_tiered  # noqa: F401 (registers the tiered model)
from tests.conftest import ROOT
from tiered.config import load
from tiered.data import ProcessedData

OUTSIDE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.arange(3, 35)[None].repeat(2, 1)
ids[1] += 40
with torch.inference_mode():
    routed = model(ids)
    model.remove_partition(int(routed.partition[0, -1]))
    removed = model(ids)
save_file({"logits": routed.logits, "partition": routed.partition, "removed": removed.logits}, out)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("one two", max_new_tokens=4)
assert text[0]["generated_text"].startswith("one two")
"""


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> Path:
    """The tiny cluster run as one model."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    command = [sys.executable, str(ROOT / "scripts/export_tiered.py"), "runs/k4", str(folder)]
    subprocess.run(command, cwd=tiny, check=True, capture_output=True)
    return folder


def outside(folder: Path) -> dict[str, str]:
    """Environment of a process that does not see this project."""
    hidden = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {**hidden, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}


def test_exported_folder_loads_in_a_fresh_process_outside_the_repository(exported, tmp_path):
    command = [sys.executable, "-c", OUTSIDE, str(exported), str(tmp_path / "out.safetensors")]
    subprocess.run(command, cwd=tmp_path, check=True, env=outside(tmp_path))
    found = load_file(tmp_path / "out.safetensors")
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.arange(3, 35)[None].repeat(2, 1)
    ids[1] += 40
    with torch.inference_mode():
        expected = model(ids)
        assert torch.equal(found["logits"], expected.logits)
        assert torch.equal(found["partition"], expected.partition)
        model.remove_partition(int(expected.partition[0, -1]))
        assert torch.equal(found["removed"], model(ids).logits)
    assert not torch.equal(found["removed"], found["logits"])


def test_the_card_is_written_from_the_run(exported, tiny):
    card = (exported / "README.md").read_text()
    utility = json.loads((tiny / "runs/k4/eval/utility.json").read_text())
    assert f"| token | {utility['macro']['token']['bpb']:.3f} |" in card
    assert "* tokenizer: de, en, hi, si" in card and "* map: de, en, hi, si" in card
    assert "partition method `cluster`" in card
    assert "| 0 | " in card and "16,624 |" in card


def test_an_existing_folder_is_not_written_over(exported, tiny):
    command = [sys.executable, str(ROOT / "scripts/export_tiered.py"), "runs/k4", str(exported)]
    found = subprocess.run(command, cwd=tiny, capture_output=True, text=True)
    assert found.returncode == 2 and "exists already" in found.stderr


@pytest.fixture(scope="module")
def task(tiny, tmp_path_factory) -> Path:
    """The few-shot task of the tiny cluster run."""
    folder = tmp_path_factory.mktemp("task")
    command = [sys.executable, str(ROOT / "scripts/fewshot_task.py"), "runs/k4", str(folder)]
    subprocess.run([*command, "--rows", "2", "--tokens", "6"], cwd=tiny, check=True)
    return folder


def test_few_shot_task_asks_for_the_domain_of_test_snippets(task, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    data = ProcessedData(load("configs/k4.yaml"))
    for name, split in (("questions", "test"), ("examples", "validation")):
        rows = [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]
        assert [row["label"] for row in rows] == [0, 1, 2, 3] * 2
        ids = data.rows("si", split, 2).input_ids[:, :6]
        texts = [" ".join(data.tokenizer.decode(row).split()) for row in ids]
        assert [row["text"] for row in rows if row["label"] == 1] == texts
    made = json.loads((task / "domain_of_text.yaml").read_text())
    assert made["doc_to_choice"] == [" hi", " si", " de", " en"]


def test_lm_evaluation_harness_runs_on_a_local_task(exported, task, tmp_path):
    """`lm_eval --model hf` scores and samples: 2-shot classification from a local file."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install lm_eval)")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={exported},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "domain_of_text", "--include_path", str(task), "--num_fewshot", "2"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path, check=True, env=outside(tmp_path), capture_output=True)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["domain_of_text"]
    assert found["acc,none"] in [i / 8 for i in range(9)]
