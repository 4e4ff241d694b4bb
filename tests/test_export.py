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


def test_lm_evaluation_harness_runs_on_a_local_task(exported, tmp_path):
    """`lm_eval --model hf` scores and samples: 2-shot classification from a local file."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (pip install lm_eval)")
    rows = [
        {"text": "The house is big.", "label": 0},
        {"text": "यह एक घर है", "label": 1},
        {"text": "We went home early.", "label": 0},
        {"text": "मैं घर जाता हूँ", "label": 1},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    task = {
        "task": "language_of",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "doc_to_text": "{{text}}\nLanguage:",
        "doc_to_choice": [" English", " Hindi"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "language_of.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={exported},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "language_of", "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path, check=True, env=outside(tmp_path), capture_output=True)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["language_of"]
    assert found["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
