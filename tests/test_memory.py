"""Bytes on paper against real tensors: a training's memory, what autograd keeps, files."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.test_flops import MODELS, V, monet
from tests.test_training import State
from tiered import checkpoint, memory, modeling_tiered
from tiered.baselines.modeling_lora_experts import linear_names
from tiered.blueprint import Blueprint, memory_of
from tiered.cleaning import clean_folder
from tiered.config import SPLITS, load
from tiered.data import processed_folder
from tiered.estimate import FILES_PER_MODEL
from tiered.flops import model_flops
from tiered.memory import (
    ID_BYTES,
    LOSS_ELEMENTS,
    LOSS_ROWS,
    Memory,
    checkpoint_bytes,
    clean_bytes,
    layer_bytes,
    loss_bytes,
    model_bytes,
    processed_bytes,
    resume_bytes,
    score_bytes,
    training_memory,
)
from tiered.modeling_tiered import Level1Config, Level1Embedder

ROWS, LENGTH = 5, 32
LONG = torch.randint(1, V, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def kept_bytes(model, half: bool = False, **inputs) -> int:
    """Bytes of the storages that autograd keeps in one forward pass, parameters and buffers apart,
    each counted once."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage  # alive: its address is not given away again
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.train()(input_ids=LONG, labels=LONG, **inputs)
    return sum(storage.nbytes() for storage in found.values())


def level1() -> Level1Embedder:
    config = Level1Config(vocab_size=V, hidden_size=16, num_hidden_layers=3)
    config.max_position_embeddings = LENGTH
    return Level1Embedder(config)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", [*MODELS, "Level-1 embedder"])
def test_what_autograd_keeps_is_what_the_formula_says(name, half):
    """Within 4 %: small vectors (balancing losses, rotary angles, indices) are left out, and inputs
    of frozen routers counted; of a tree, which keeps every level's probabilities, within 15 %.
    Under autocast the copies of weights are among it."""
    model, inputs, passed = level1() if name not in MODELS else MODELS[name](), {}, None
    if name == "demix":
        inputs, passed = {"domain_ids": torch.tensor([0, 0, 0, 1, 1])}, model.part(0)
    held = training_memory(model, ROWS, LENGTH, half, passed)
    kept = loss_bytes(passed or model, ROWS, LENGTH, half)[0]
    measured = kept_bytes(model, half, **inputs)
    bound = 0.15 if name == "moe, tree" else 0.04
    assert held.activations + held.copies + kept == pytest.approx(measured, rel=bound)


def test_an_embedder_of_a_large_vocabulary_keeps_states_for_its_loss(monkeypatch):
    """And no logits: a fourth of the logits is more than is made at once. 4 % as above."""
    assert memory.WHOLE_LOGITS == modeling_tiered.WHOLE_LOGITS
    whole = loss_bytes(level1(), ROWS, LENGTH, False)
    for module in (memory, modeling_tiered):
        monkeypatch.setattr(module, "WHOLE_LOGITS", ROWS * LENGTH * V // 4)
    kept, passing = loss_bytes(level1(), ROWS, LENGTH, False)
    assert kept == 4 * 16 * ROWS * (LENGTH - 1) and passing < whole[1] / 16
    held = training_memory(level1(), ROWS, LENGTH, False)
    assert held.activations + kept == pytest.approx(kept_bytes(level1().train(), False), rel=0.04)


@pytest.mark.parametrize("name", ["monet", "monet, horizontal", "llama", "moe"])
def test_with_gradient_checkpointing_layers_keep_their_inputs(name):
    """Measured is the forward pass alone, before any layer is computed again: the formula without
    its one layer is that within 3 % (angles, labels)."""
    model = MODELS[name]().train()
    held = training_memory(model, ROWS, LENGTH, False)
    one = max(layer_bytes(model.config, i, False) for i in range(model.config.num_hidden_layers))
    model.gradient_checkpointing_enable()
    measured = kept_bytes(model) - loss_bytes(model, ROWS, LENGTH, False)[0]
    assert held.checkpointed - ROWS * LENGTH * one == pytest.approx(measured, rel=0.03)
    assert held.checkpointed < held.activations


def test_low_rank_updates_keep_their_own_and_train_nothing_else():
    """Rank 3 on seven maps of each of three layers, by hand. Of what autograd keeps under peft the
    formula is above, by less than a fifth: frozen norms keep one tensor, not two."""
    rank, base = 3, MODELS["llama"]().requires_grad_(False)
    names = linear_names(base)
    widths = [(m.in_features, m.out_features, rank) for m in map(base.get_submodule, names)]
    parts = model_flops(base, LENGTH)
    held = memory_of(Blueprint(base, base, {}, 0, parts, tuple(widths)), ROWS, LENGTH, False)
    updates = 3 * rank * (4 * (16 + 16) + 3 * (16 + 40))
    assert held.gradients == 4 * updates and held.weights == model_bytes(base) + 4 * updates
    assert held.optimizer == 8 * updates + 4 * 2 * 21
    kept = loss_bytes(base, ROWS, LENGTH, False)[0]
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM"))
    assert 1 < (held.activations + kept) / kept_bytes(model) < 1.2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == updates


@pytest.mark.parametrize("name", ["monet", "monet, frozen routers", "moe, all options", "llama"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(name):
    """To the byte, after one step of the Trainer's optimizer; so is a resume checkpoint's, but for
    the headers of its files."""
    model = MODELS[name]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(input_ids=LONG, labels=LONG).loss.backward()
    optimizer.step()
    held = training_memory(model, ROWS, LENGTH, False)
    assert held.weights == sum(nbytes(t) for t in (*model.parameters(), *model.buffers()))
    assert held.gradients == sum(nbytes(p.grad) for p in model.parameters() if p.grad is not None)
    moments = itertools.chain.from_iterable(s.values() for s in optimizer.state.values())
    assert held.optimizer == sum(nbytes(t) for t in moments)


def nbytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_files_hold_what_was_reckoned(tmp_path):
    """model.safetensors and the optimizer's tensors, headers apart; a tied head is stored once."""
    state = State(0)
    state.model = MODELS["monet, tied"]()
    state.optimizer = torch.optim.AdamW(state.model.parameters(), lr=0.1)
    state.model.train()(input_ids=LONG, labels=LONG).loss.backward()
    state.optimizer.step()
    state.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(state.optimizer)
    checkpoint.save(tmp_path / "checkpoint-00000001", state, 0.0)
    files = [tmp_path / "checkpoint-00000001" / f"{n}.safetensors" for n in ("model", "optimizer")]
    assert tensors(files[0]) == checkpoint_bytes(state.model)
    assert sum(map(tensors, files)) == resume_bytes(state.model)


def tensors(path) -> int:
    """Bytes of a safetensors file without its header."""
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def test_losses_and_devices_by_hand():
    """Monet: gradients of the head and of the states, and logits of some rows; others: four bytes
    per logit kept, eight beside it."""
    kept, passing = loss_bytes(monet(), ROWS, LENGTH, False)
    assert kept == 4 * 16 * (V + ROWS * (LENGTH - 1))
    assert passing == 4 * V * min(LOSS_ROWS, LOSS_ELEMENTS // V)
    assert loss_bytes(monet(), ROWS, LENGTH, True)[1] == 2 * passing
    logits = ROWS * LENGTH * V
    assert loss_bytes(MODELS["llama"](), ROWS, LENGTH, True) == (4 * logits, 8 * logits)
    held = Memory(20 * 10**9, 20 * 10**9, 40 * 10**9, 0, 30 * 10**9, 10**9, 10**9)
    assert held.total() == 111 * 10**9 and held.total(checkpointing=True) == 82 * 10**9
    # of 80 GB 72 can be used
    assert (held.devices(40), held.devices(80), held.devices(80, True)) == (4, 2, 2)


def test_processed_data_takes_what_was_reckoned(tiny, monkeypatch):
    """Arrow's buffers of every split to the byte; its files add padding and messages."""
    monkeypatch.chdir(tiny)
    folder = processed_folder(load("configs/n4.yaml"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for domain, split in itertools.product(("hi", "en"), SPLITS):
        counts = manifest["domains"][domain]["splits"][split]
        expected = processed_bytes(counts["tokens"], counts["documents"])
        path = folder / domain / split / "data-00000-of-00001.arrow"
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        assert table.nbytes == expected  # pyarrow leaves out the last offset of a list, as we do
        assert len(table["document_id"][0].as_py()) == ID_BYTES
        assert expected < path.stat().st_size < 1.1 * expected + 4096


def test_cleaned_text_scores_and_models_take_what_was_reckoned(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    config = load("configs/n4.yaml")
    folder = clean_folder(config, "de")
    table = pq.read_table(folder / "part-00000.parquet")
    text = sum(len(t.encode()) for t in table["text"].to_pylist())
    reckoned = clean_bytes(text, table.num_rows)
    offsets = table.num_rows * (4 + 8)  # of ids and of texts, in memory only
    assert table.nbytes == pytest.approx(reckoned + offsets, rel=1e-3)
    assert (folder / "part-00000.parquet").stat().st_size < reckoned  # snappy
    for path in (tiny / "runs/.store/scores").glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        rows, length = shapes["nll"]
        assert tensors(path) == score_bytes(rows * length, "z" in shapes)
    model = tiny / "runs/n4/models/0"
    assert len([p for p in model.rglob("*") if p.is_file()]) == FILES_PER_MODEL
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert tensors(model / "model.safetensors") == checkpoint_bytes(loaded)
