"""The converter of public checkpoints proves itself on the golden folders (their form)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiered.convert import convert
from tiered.store import UserError, verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["monet-vd", "monet-hd"])
def test_a_converted_checkpoint_predicts_what_the_public_one_does(name, tmp_path):
    source = ROOT / "tests/golden" / name
    count = convert(str(source), tmp_path / "out")
    weights = load_file(source / "model.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert count == sum(t.numel() for n, t in weights.items() if not n.endswith(statistics))
    verify(tmp_path / "out")
    expected = load_file(source / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(expected["input_ids"]).logits
    largest = expected["eval.logits"].abs().max()
    assert (found - expected["eval.logits"]).abs().max() <= 2e-5 * largest


def test_a_tensor_too_few_or_of_another_shape_is_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "tests/golden/monet-vd", source)
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.moe.b1"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: model\.layers\.1\.moe\.b1"):
        convert(str(source), tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "moe_topk": 99}))
    with pytest.raises(UserError, match="moe_topk"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
