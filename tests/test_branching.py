"""Branch-train-merge: seed LM, its copies, sparse upcycling, and what deletion says of them."""

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from tests.conftest import ROOT, run_stages
from tiered import branching
from tiered.blocks import partition_blocks, trained_rows, training_arguments
from tiered.config import Config, ModelConfig, TrainingConfig, load
from tiered.data import ProcessedData
from tiered.fitting import Fit, OrderedBlocks, fit
from tiered.methods import MODELS
from tiered.partition import make_partition_map
from tiered.store import UserError, read_json, write_json
from tiered.training import check_models, seed_inputs

DATA = types.SimpleNamespace(vocab_size=40, pad_id=0, separator_id=1)
IDS = torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(0))


def made(kind: str, **values):
    """A tiny model of a family, in training mode, with its config."""
    section = ModelConfig(type=kind, hidden_size=24, initializer_range=0.2, **values)
    family = MODELS[kind]
    torch.manual_seed(0)
    return family.build(family.config_from(Config(name="x", model=section), DATA))


# ---------------------------------------------------------------- models


EXPERIMENTS = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if "\nname: " in p.read_text()]
PUBLISHED = {  # of Monets whose routers are not counted, V = 119,547
    **{"c4-n01": 766_556_160, "c4-n02": 382_931_320, "c4-n04": 198_689_656},
    **{"c4-n08": 99_883_648, "c4-n16": 48_925_020},
}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_every_shipped_config_makes_a_model_config(path):
    """What a family refuses comes to light before data and a router are made for it."""
    config = load(path)
    vocabulary = config.model.vocab_size or config.tokenizer.vocab_size
    if config.tokenizer.name == "bert-base-multilingual-cased":
        vocabulary = 119_547
    data = types.SimpleNamespace(vocab_size=vocabulary, pad_id=0, separator_id=1)
    built = MODELS[config.model.type].config_from(config, data)
    assert built.hidden_size == config.model.hidden_size
    if config.name == "c4-olmoe-1b-7b":
        with torch.device("meta"):
            model = MODELS["moe"].build(built)
        size = sum(p.numel() for p in model.parameters())
        assert size == 6_919_161_856 and built.parameter_counts()["active"] == 1_282_017_280
        assert built.flops_per_token(1024) == 2_424_897_536  # by hand as in test_modeling_moe
        assert size * 2 / 1e9 == pytest.approx(14, rel=0.02)  # bytes: bfloat16; float32 and AdamW
        assert size * 16 / 1e9 == pytest.approx(111, rel=0.01)
    if config.name in PUBLISHED:
        counts = built.parameter_counts()
        assert counts["total"] - counts["routers"] == PUBLISHED[config.name]


def test_upcycling_begins_as_the_dense_model(tmp_path):
    """Experts are copies and their weights sum to 1: the same function, up to rounding."""
    dense = made("llama").eval()
    dense.save_pretrained(tmp_path)
    sparse = made("mixtral", num_experts=4).eval()
    routers = {n: p.clone() for n, p in sparse.named_parameters() if "mlp.gate.weight" in n}
    before = sparse(IDS).logits
    branching.initialise(sparse, tmp_path)
    assert torch.allclose(sparse(IDS).logits, dense(IDS).logits, atol=1e-5)
    assert not torch.allclose(before, dense(IDS).logits, atol=1e-2)
    assert len(routers) == 2
    assert all(torch.equal(sparse.state_dict()[n], v) for n, v in routers.items())
    # experts are free to differ: none shares memory with another
    experts = sparse.model.layers[0].mlp.experts.down_proj
    experts.data[1].zero_()
    assert experts[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["monet", "llama", "moe", "mixtral"])
def test_a_copy_is_bit_identical_and_another_shape_is_refused(kind, tmp_path):
    seed = made(kind)
    seed.save_pretrained(tmp_path)
    model = made(kind)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    branching.initialise(model, tmp_path)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in seed.state_dict().items())
    with pytest.raises(UserError, match=r"has \(40, 24\) for lm_head.weight, .* makes \(44, 24\)"):
        branching.initialise(made(kind, vocab_size=44), tmp_path)


def test_transformers_olmoe_is_a_start_for_moe(tmp_path):
    """A folder as transformers saves it, with a tensor for every expert."""
    sizes = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 40}
    sizes |= {"num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6, "initializer_range": 0.2}
    theirs = OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model = made("moe", intermediate_size=8, num_experts=8, num_experts_per_tok=2).eval()
    branching.initialise(model, tmp_path)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6)
    for own, message in (
        ({"norm_topk_prob": True}, "norm_topk_prob False, the model section True"),
        ({"num_shared_experts": 1}, "nothing for model.layers.0.mlp.shared_experts"),
    ):
        other = made("moe", intermediate_size=8, num_experts=8, num_experts_per_tok=2, **own)
        with pytest.raises(UserError, match=message):
            branching.initialise(other, tmp_path)


@pytest.mark.parametrize(
    "seed, model, message",
    [
        ({"num_attention_heads": 4}, {}, "has num_attention_heads 4, the model section 2"),
        ({"rope_theta": 5e5}, {}, "has rope_parameters .*500000"),
        ({"tie_word_embeddings": True}, {}, "has tie_word_embeddings True"),
        ({"type": "monet"}, {}, "is a monet, model.type a llama"),
        ({"num_hidden_layers": 1}, {"type": "mixtral"}, "has nothing for model.layers.1"),
    ],
)
def test_a_copy_that_would_be_another_function_is_refused(tmp_path, seed, model, message):
    made(**{"kind": seed.pop("type", "llama"), **seed}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        branching.initialise(made(**{"kind": model.pop("type", "llama"), **model}), tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    made("llama").save_pretrained(tmp_path / "0")
    config = Config(name="x", model=ModelConfig(init_from=str(tmp_path)))
    with pytest.raises(UserError, match="holds no model"):
        branching.outside_hash(config)
    (tmp_path / "0/config.json").write_text("{}")
    with pytest.raises(UserError, match="is no model that loads"):
        branching.initialise(made("llama"), tmp_path / "0")


@pytest.mark.parametrize("kind", ["monet", "llama", "moe", "mixtral"])
def test_dropout_acts_on_blocks_in_training_alone(kind):
    model, share = made(kind), 0.25
    outputs: dict[str, torch.Tensor] = {}

    def watch(module, inputs, output):
        outputs["now"] = output[0] if isinstance(output, tuple) else output

    def hooks() -> dict[str, int]:
        return {name: len(module._forward_hooks) for name, module in model.named_modules()}

    plain = model.eval()(IDS).logits
    before = hooks()  # transformers' own come with the first call
    branching.add_dropout(model, share)
    feed_forward = "moe" if kind == "monet" else "mlp"
    blocks = [f"model.layers.{i}.{block}" for i in (0, 1) for block in ("self_attn", feed_forward)]
    assert {name for name, count in hooks().items() if count > before[name]} == set(blocks)
    assert torch.equal(model(IDS).logits, plain)
    model.model.layers[0].self_attn.register_forward_hook(watch)
    model(IDS)
    intact = outputs["now"]
    torch.manual_seed(1)
    model.train()(IDS)
    dropped = outputs["now"] == 0  # the first block reads embeddings, which are never dropped
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.05)
    assert torch.allclose(outputs["now"][~dropped], intact[~dropped] / (1 - share), atol=1e-6)


def test_dropout_goes_on_where_a_killed_run_stopped(tmp_path, monkeypatch):
    """Its random numbers are part of the resume state: the same weights, to the last bit."""
    blocks = np.random.default_rng(0).integers(2, 40, (24, 12)).astype(np.int32)
    section = TrainingConfig(save_steps=2, logging_steps=1, per_device_train_batch_size=2)
    config = Config(name="x", device="cpu", threads=1, training=section)

    def make(share: float = 0.2):
        model = made("llama")
        branching.add_dropout(model, share)
        return model

    def train(name: str, **options) -> bytes:
        job = Fit(tmp_path / name, name, 0, training_arguments(config, 1.0))
        ordered = OrderedBlocks(blocks, 1.0, 0)
        fit(config, job, lambda: make(**options), ordered, lambda model, path: {})
        return (job.folder / "model.safetensors").read_bytes()

    whole = train("whole")
    with monkeypatch.context() as patch:

        def stop(self, args, state, control, logs=None, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

        patch.setattr("tiered.fitting.LossGuard.on_log", stop)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    assert train("killed") == whole
    assert train("none", share=0.0) != whole


def test_parameters_computed_per_token_leave_out_what_is_not_read():
    dense, sparse = made("llama"), made("mixtral", num_experts=4)
    width, d = 8 * 8, 24  # 8/3 of 24 to eights is 64
    block = 3 * width * d
    cards = [
        MODELS[m].card(x, np.zeros((1, 12))) for m, x in (("llama", dense), ("mixtral", sparse))
    ]
    for card, model in zip(cards, (dense, sparse), strict=True):
        assert card["total"] == sum(p.numel() for p in model.parameters())
    attention, norms = 4 * d * d, 2 * d
    expected = 2 * (attention + block + norms) + d + 40 * d
    assert cards[0]["computed_per_token"] == expected
    assert cards[0]["forward_flops_per_token"] == 2 * expected + 2 * 2 * d * 13
    # two of four experts, and the router
    assert cards[1]["computed_per_token"] == expected + 2 * (block + 4 * d)


# ---------------------------------------------------------------- documents


def test_seed_and_branches_share_out_the_documents():
    ids = [f"doc-{i}" for i in range(4000)]
    config = Config(name="x", model=ModelConfig(init_from="seed"))
    config = dataclasses.replace(config, seed_lm=dataclasses.replace(config.seed_lm, share=0.25))
    seed = branching.seed_config(config)
    parts = [branching.used(c, "hi", ids) for c in (seed, config)]
    assert np.array_equal(parts[0], ~parts[1])
    assert parts[0].mean() == pytest.approx(0.25, abs=0.03)
    assert seed.partition.n == 1 and not seed.model.init_from
    # each document's place is its own affair
    assert np.array_equal(branching.used(config, "hi", ids[::-1]), parts[1][::-1])
    # of half the documents a quarter goes to the seed
    half = dataclasses.replace(config.training, documents=(0.5, 1.0))
    narrow = dataclasses.replace(config, training=half)
    inner = [branching.used(c, "hi", ids) for c in (branching.seed_config(narrow), narrow)]
    place = branching.places(ids)
    assert np.array_equal(inner[0], (place >= 0.5) & (place < 0.625))
    assert np.array_equal(inner[1], place >= 0.625)
    # a seed LM of the router split takes nothing away
    router = dataclasses.replace(config.seed_lm, split="router")
    apart = dataclasses.replace(config, seed_lm=router)
    assert branching.used(apart, "hi", ids) is None
    assert branching.used(branching.seed_config(apart), "hi", ids) is None


@pytest.mark.parametrize(
    "lines, message",
    [
        ("model: {init_from: seed}\nseed_lm: {share: 1}", "leaves nothing for the seed LM"),
        ("model: {init_from: seed}\nseed_lm: {type: llama}", "a monet cannot start from a llama"),
        ("training: {documents: [0.5, 0.5]}", "two shares, the lower first, found 0.5, 0.5"),
    ],
)
def test_contradictions_are_refused(tmp_path, lines, message):
    (tmp_path / "a.yaml").write_text(f"name: a\n{lines}\n")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.yaml")


# ---------------------------------------------------------------- pipeline

EXPERIMENTS = {
    "b2": "partition: {method: family, n: 2}\nmodel: {type: llama, init_from: seed}",
    "up": "model: {type: mixtral, init_from: seed, num_experts: 4}\nseed_lm: {type: llama}",
    "o2": "partition: {method: family, n: 2}\nmodel: {init_from: outside}",
}


@pytest.fixture(scope="module")
def branched(tiny, tmp_path_factory) -> Path:
    """A copy of the tiny pipeline with three runs from seed LMs; `outside` is n1's model without a
    record."""
    folder = tmp_path_factory.mktemp("branched") / "project"
    shutil.copytree(tiny, folder)
    shutil.copytree(folder / "runs/n1/models/0", folder / "outside")
    (folder / "outside/record.json").unlink()
    for name, lines in EXPERIMENTS.items():
        (folder / f"configs/{name}.yaml").write_text(f"base: base.yaml\nname: {name}\n{lines}\n")
    configs = [f"configs/{name}.yaml" for name in EXPERIMENTS]
    stages = ("process_dset", "train_det_router", "run_clm", "eval_det_router")
    run_stages(folder, stages, *configs)
    removal = "unlearn.operations=original,gold,delete-S1,sisa"
    run_stages(folder, ["unlearn_benchmarks"], configs[0], configs[2], removal)
    return folder


def test_seed_lm_is_shared_and_recorded(branched):
    seed, upcycled = (read_json(branched / f"runs/{n}/seed_lm/record.json") for n in ("b2", "up"))
    assert seed == upcycled and seed["seed"] is None
    links = {(branched / f"runs/{n}/seed_lm/model.safetensors").stat().st_ino for n in ("b2", "up")}
    assert len(links) == 1  # trained once
    everyone = ["de", "en", "hi", "si"]
    provenance = read_json(branched / "runs/b2/provenance.json")
    assert provenance["seed_lm"] == provenance["model/0"] == provenance["model/1"] == everyone
    assert read_json(branched / "runs/o2/provenance.json")["seed_lm"] == ["unknown"]
    assert "seed_lm" not in read_json(branched / "runs/n2/provenance.json")
    models = [read_json(branched / f"runs/b2/models/{k}/record.json") for k in range(2)]
    assert [m["seed"]["domains"] for m in models] == [everyone] * 2
    # tokens are split, not added: blocks of both phases against those of one model of all
    whole = read_json(branched / "runs/n1/models/0/record.json")["tokens"]
    spent = seed["tokens"] + sum(m["tokens"] for m in models)
    assert 0.85 * whole < spent <= whole  # less the dropped tails of more streams


def test_trained_rows_are_those_that_stand_in_some_block(branched, monkeypatch):
    monkeypatch.chdir(branched)
    config = load("configs/b2.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    seed = branching.seed_config(config)
    k = partitions.partition_of("de")
    streams = [
        data.blocks("de", "train", keep=branching.used(c, "de", data.document_ids("de", "train")))
        for c in (seed, config)
    ]
    texts = [" ".join(map(str, s.ravel().tolist())) for s in streams]
    found = trained_rows(config, data, partitions, "de")
    rows = data.rows("de", "train", 0)
    assert rows.document_ids
    by_id = dict(zip(data.document_ids("de", "train"), found, strict=True))
    for row, name in zip(rows.input_ids, rows.document_ids, strict=True):
        text = " ".join(map(str, row.tolist()))
        assert by_id[name] == any(f" {text} " in f" {t} " for t in texts)
    # the partition's blocks are its domains' of the second part
    blocks, counts = partition_blocks(config, data, partitions, k)
    assert counts["de"] == len(streams[1])
    assert blocks[: len(streams[1])].tolist() == streams[1].tolist()


def test_deletion_knows_what_the_seed_lm_saw(branched):
    def result(run: str, operation: str) -> dict:
        return read_json(branched / f"runs/{run}/unlearn/hi/{operation}/metrics.json")

    # the seed LM saw hi, so every model did: neither dropping nor retraining one shard is exact
    for operation in ("delete-S1", "sisa"):
        assert not result("b2", operation)["exact"] and not result("b2", operation)["exact_given"]
    gold = result("b2", "gold")
    assert gold["rebuilt"] == ["router", "seed_lm", "model/0", "model/1"] and gold["exact"]
    retrained = read_json(branched / "runs/b2/unlearn/hi/gold/system/models/1/record.json")
    assert retrained["seed"]["domains"] == ["de", "en", "si"]
    # what trained the tokenizer goes with every model
    record = read_json(branched / "runs/b2/models/0/tokenizer_record.json")
    assert sorted(record["trained_on"]) == ["de", "en", "hi", "si"]
    # a seed LM from outside stays as it is, in gold too: exact given it
    assert result("o2", "sisa")["exact"]
    assert result("o2", "sisa")["exact_given"] == ["tokenizer", "seed_lm"]


def test_partitions_that_start_from_different_seed_lms_are_refused(branched, tmp_path, monkeypatch):
    """As nodes of two kinds make them; a seed LM under another name with equal weights is none."""
    monkeypatch.chdir(branched)
    config = load("configs/b2.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    folders = {k: branched / f"runs/b2/models/{k}" for k in (0, 1)}
    check_models(config, data, partitions, folders)
    shutil.copytree(folders[1], tmp_path / "1")
    record = read_json(tmp_path / "1/record.json")
    store = config.store_dir / "models"
    (store / "other").mkdir()
    shutil.copy(store / record["seed"]["from"] / "hashes.json", store / "other")
    record["seed"]["from"] = "other"
    write_json(tmp_path / "1/record.json", record)
    check_models(config, data, partitions, {**folders, 1: tmp_path / "1"})
    shutil.rmtree(store / "other")
    with pytest.raises(UserError, match="start from 2 different seed LMs"):
        check_models(config, data, partitions, {**folders, 1: tmp_path / "1"})


def test_another_seed_lm_is_another_model(branched, monkeypatch):
    monkeypatch.chdir(branched)
    config = load("configs/b2.yaml")
    data = ProcessedData(config)
    inputs = {
        seed_inputs(load("configs/b2.yaml", extra), data)
        for extra in ((), ("seed_lm.share=0.4",), ("seed_lm.split=router",), ("model.init_from=",))
    }
    assert len(inputs) == 4 and None in inputs
    with pytest.raises(UserError, match="neither a folder nor a model that the hub gives"):
        seed_inputs(load("configs/b2.yaml", ("model.init_from=no/such",)), data)
