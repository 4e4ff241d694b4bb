"""Gradient methods: losses by hand, the loop's books, what an edit must not touch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiered.config import load
from tiered.data import ProcessedData, Rows
from tiered.metrics import NOT_APPLICABLE
from tiered.partition import make_partition_map
from tiered.router import run_models
from tiered.store import UserError, read_json
from tiered.unlearning import gradient
from tiered.unlearning.measures import Judge
from tiered.unlearning.operations import METHODS, OPERATIONS
from tiered.unlearning.protocol import Measured, scored_rows
from tiered.unlearning.systems import Context, Forget, NotApplicable

V, T = 11, 7


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_attention_heads=2, **shape)).eval()


def blocks(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, T)).astype(np.int32)


def test_sequence_log_probs_are_sums_over_all_but_the_first_token():
    model, ids = tiny_llama(), torch.from_numpy(blocks(0, 3)).long()
    log_p = model(input_ids=ids).logits.log_softmax(-1)
    for row in range(3):
        expected = sum(log_p[row, t, ids[row, t + 1]] for t in range(T - 1))
        found = gradient.sequence_log_probs(model, ids)[row]
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    own = model(input_ids=ids, labels=ids).loss
    assert gradient.nll(model, ids).item() == pytest.approx(own.item(), rel=1e-5)


def test_npo_by_hand():
    own, reference = torch.tensor([-10.0, -30.0]), torch.tensor([-12.0, -12.0])
    beta = 0.5
    # (2 / beta) mean log(1 + (p / p_o)^beta): exponents 1 and -9
    expected = 4 * np.mean([math.log(1 + math.e), math.log(1 + math.exp(-9))])
    assert gradient.npo_loss(own, reference, beta).item() == pytest.approx(expected, rel=1e-6)
    # at the original model its gradient is gradient ascent's: d/dl = 2 * 1/2
    x = reference.clone().requires_grad_()
    gradient.npo_loss(x, reference, beta).backward()
    assert x.grad.tolist() == pytest.approx([0.5, 0.5])  # mean over two
    # and fades where the forget set has become improbable, where ascent's does not
    x = (reference - 100).requires_grad_()
    gradient.npo_loss(x, reference, beta).backward()
    assert x.grad.abs().max() < 1e-20


def test_simnpo_by_hand():
    own = torch.tensor([-12.0, -24.0])
    # -(2 / beta) mean log sigma(-(beta / 6) l - gamma): arguments 4 and 9 at beta 2.5, gamma 1
    expected = -0.8 * np.mean([math.log(1 / (1 + math.exp(-x))) for x in (4.0, 9.0)])
    assert gradient.simnpo_loss(own, 6, 2.5, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_subtracting_a_vector_of_a_model_by_hand():
    model, tuned = tiny_llama(0), tiny_llama(1)
    name = "model.embed_tokens.weight"
    o, t = (dict(m.named_parameters())[name].detach().clone() for m in (model, tuned))
    gradient.subtract(model, tuned, 0.5)
    assert torch.allclose(dict(model.named_parameters())[name], o - 0.5 * (t - o))
    gradient.subtract(model, model, 3.0)
    assert torch.allclose(dict(model.named_parameters())[name], o - 0.5 * (t - o))


def test_batches_go_round_in_whole_permutations():
    rows = np.arange(5)[:, None]
    made = gradient.cycled(rows, 2, np.random.default_rng(0))
    drawn = np.concatenate([next(made) for _ in range(5)])[:, 0].tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5)) and drawn[:5] != drawn[5:]
    assert next(gradient.cycled(rows[:0], 2, np.random.default_rng(0))).shape == (0, 1)


def test_the_early_stop_looks_at_auc_and_at_what_is_retained():
    model, g = tiny_llama(), blocks
    stop = gradient.EarlyStop(g(1, 8), g(2, 8), g(3, 8), gold_auc=0.5, max_loss=0.02, batch_rows=4)
    own = gradient.loss_auc(model, stop.members, stop.others, 4)
    stop.gold_auc = own
    assert stop.reason(model) == "AUC at gold's"
    stop.gold_auc = own - 0.01
    assert stop.reason(model) is None and stop.first_accuracy is not None
    stop.first_accuracy += 0.03
    assert stop.reason(model) == "retain accuracy lost"
    stop.retain = stop.retain[:0]
    assert stop.reason(model) is None


@pytest.fixture(scope="module")
def run(tiny) -> Context:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        yield context_of("n2")


def context_of(name: str, **unlearn) -> Context:
    config = load(f"configs/{name}.yaml")
    section = dataclasses.replace(config.unlearn, max_steps=12, check_steps=4, **unlearn)
    config = dataclasses.replace(config, unlearn=section)
    data, partitions = ProcessedData(config), make_partition_map(config)
    models = run_models(config, partitions, data)
    return Context(config, data, partitions, models, config.run_dir / "router")


HI = Forget("hi", "hi")
BOTH = ("GradDiff", "NPO", "SimNPO", "RMU", "UNDIAL", "SEUF")  # methods that read both sides


def weights(outcome, k: int) -> dict[str, torch.Tensor]:
    return load_file(outcome.models[k] / "model.safetensors")


def loss_on(folder, ids: np.ndarray) -> float:
    from tiered.router import load_models

    with torch.no_grad():
        return gradient.nll(load_models({0: folder})[0], torch.from_numpy(ids).long()).item()


def test_every_method_moves_its_losses_as_it_should(run):
    forget, retain = gradient.forget_and_retain_blocks(run, HI, 0)
    before = [loss_on(run.models[0], ids) for ids in (forget, retain)]
    after = {}
    for name in METHODS:
        outcome = OPERATIONS[name](run, HI)
        assert outcome.changed == ["model/0"] and outcome.models[1] == run.models[1]
        assert not outcome.weights_removed and outcome.router == run.router
        after[name] = [loss_on(outcome.models[0], ids) for ids in (forget, retain)]
        record = read_json(outcome.models[0] / "record.json")
        sides = 1 + (name in BOTH)
        assert record["tokens"] == record["steps"] * sides * 8 * 32 == outcome.tokens > 0
    for name in ("GA", "GradDiff", "NPO", "SimNPO", "SEUF", "task-vector"):
        assert after[name][0] > before[0] + 0.01, name
    for name in ("RMU", "UNDIAL"):  # their aims are states and a bounded target, not this loss
        assert after[name][0] > before[0], name
    for name in ("fine-tune", "l1-sparse"):
        assert after[name][1] < before[1], name
    for name in BOTH:  # what retain blocks are for
        assert after[name][1] - before[1] < after["GA"][1] - before[1]


def test_running_statistics_never_move(run):
    """They hold the forget set's share of the router's inputs, and training mode would update."""
    outcome = OPERATIONS["GA"](run, HI)
    before, after = load_file(run.models[0] / "model.safetensors"), weights(outcome, 0)
    buffers = [n for n in before if "running" in n or "num_batches" in n]
    assert buffers and all(torch.equal(before[n], after[n]) for n in buffers)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_method_is_a_function_of_its_inputs(run):
    """Done again from nothing: the same bytes; another setting: another place in the store."""
    first = OPERATIONS["NPO"](run, HI)
    anew = dataclasses.replace(run, config=dataclasses.replace(run.config, overwrite=True))
    one = weights(first, 0)
    second = weights(OPERATIONS["NPO"](anew, HI), 0)
    assert all(torch.equal(one[n], second[n]) for n in one)
    section = dataclasses.replace(run.config.unlearn, npo_beta=0.2)
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, unlearn=section))
    assert OPERATIONS["NPO"](other, HI).models[0] != first.models[0]


def test_blocks_are_those_of_the_partition(run):
    """n = 2 by family: hi and si are one partition; all their blocks are one side or the other."""
    from tiered.blocks import partition_blocks

    forget, retain = gradient.forget_and_retain_blocks(run, HI, 0)
    whole, counts = partition_blocks(run.config, run.data, run.partitions, 0)
    assert (len(forget), len(retain)) == (counts["hi"], counts["si"])
    assert np.array_equal(np.concatenate([forget, retain]), whole)


def test_some_documents_are_their_own_forget_set(run, tmp_path):
    trained = run.members(HI, 0)
    names = trained.document_ids[:3]
    path = tmp_path / "some.txt"
    path.write_text("".join(f"hi/{n}\n" for n in names))
    some = Forget("some", "hi", frozenset(names), str(path))
    forget, retain = gradient.forget_and_retain_blocks(run, some, 0)
    order = [n for n in run.data.document_ids("hi", "train") if n in names]
    stream = np.concatenate([documents_of(run, "hi")[n] for n in order])
    times = dict(zip(names, trained.occurrences[:3], strict=True))
    size = run.data.block_size
    packed = stream[: len(stream) // size * size].reshape(-1, size)
    extra = [documents_of(run, "hi")[n][:size] for n in order for _ in range(times[n] - 1)]
    assert np.array_equal(forget, np.concatenate([packed, extra]))  # whole documents
    kept = {tuple(b) for b in retain}
    assert not {tuple(b) for b in forget} & kept  # a repeated row's own blocks are gone too
    members = run.retained_members(some, "hi", 0)
    assert set(members.document_ids) == set(trained.document_ids) - set(names)
    assert run.touched(some) == (0,) and run.neighbours(some)[0] == ["hi", "si"]


def documents_of(run: Context, domain: str) -> dict[str, np.ndarray]:
    """Train documents with their separators."""
    ids, end = run.data.document_ids(domain, "train"), run.data.separator_id
    return {n: np.r_[d, end] for n, d in zip(ids, run.data.documents(domain, "train"), strict=True)}


def test_a_forget_file_of_short_documents_fills_a_block_and_untouched_partitions_stay(
    tiny, monkeypatch, tmp_path
):
    """Random documents, n = 2: a document of less than a block, in one of the partitions."""
    monkeypatch.chdir(tiny)
    r2 = context_of("r2")
    found, size = documents_of(r2, "hi"), r2.data.block_size
    name = min(found, key=lambda n: len(found[n]))
    cut = found[name][: size - 5]
    monkeypatch.setattr(
        r2.data, "documents", lambda *_: [cut if n == name else d[:-1] for n, d in found.items()]
    )
    monkeypatch.setattr(r2.data, "blocks", lambda *_, **__: np.zeros((0, size), dtype=np.int32))
    (tmp_path / "one.txt").write_text(f"hi/{name}\n")
    one = Forget("one", "hi", frozenset([name]), str(tmp_path / "one.txt"))
    (k,) = r2.touched(one)
    blocks_of = [gradient.document_blocks(r2, one, i) for i in (k, 1 - k)]
    assert blocks_of[0].tolist() == [[*cut, *cut[:5]]] and len(blocks_of[1]) == 0


def test_forget_files_touch_only_partitions_that_hold_a_document(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny)
    r2 = context_of("r2")
    names = r2.members(HI, 0).document_ids
    own = r2.partitions.assign("hi", list(names))
    chosen = [n for n, k in zip(names, own, strict=True) if k == 1][:3]
    (tmp_path / "some.txt").write_text("".join(f"hi/{n}\n" for n in chosen))
    some = Forget("some", "hi", frozenset(chosen), str(tmp_path / "some.txt"))
    outcome = OPERATIONS["GA"](r2, some)
    assert outcome.changed == ["model/1"] and outcome.models[0] == r2.models[0]


@pytest.mark.parametrize("name", ["r2", "k4"])
def test_the_early_stop_of_a_partition_looks_at_its_own_rows(tiny, monkeypatch, name):
    monkeypatch.chdir(tiny)
    where = context_of(name)
    seen, members = [], where.members(HI, 0)
    for k in where.touched(HI):
        stop = gradient.early_stop(where, HI, k, None)
        own = where.partitions.assign("hi", list(members.document_ids)) == k
        assert np.array_equal(stop.members, members.input_ids[own][: len(stop.members)])
        assert len(stop.members) == min(own.sum(), where.config.unlearn.check_rows)
        seen += [tuple(row) for row in stop.retain]
        near = [d for d in where.neighbours(HI)[0] if d in where.partitions.members[k]]
        here = set()
        for rows in (where.retained_members(HI, d, 0) for d in near):
            own = where.partitions.assign(rows.domain, list(rows.document_ids)) == k
            here |= {tuple(row) for row in rows.input_ids[own]}
        assert {tuple(row) for row in stop.retain} <= here
        others = where.data.rows("hi", "validation")
        if name == "k4":
            others = others.only(where.partitions.assign("hi", list(others.document_ids)) == k)
        assert np.array_equal(stop.others, others.input_ids[: where.config.unlearn.check_rows])
    assert seen or name == "k4"  # its clusters are languages: nothing is near


def test_an_edit_that_is_there_costs_no_pass(run, monkeypatch):
    """Its address needs no score and no model: gold is read only for an edit that is made."""
    first = OPERATIONS["GradDiff"](run, HI)

    def never(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr(gradient, "score_prefixes", never)
    monkeypatch.setattr(gradient, "load_models", never)
    again = OPERATIONS["GradDiff"](run, HI)
    assert again.models == first.models and again.reused == ["model/0"]


def test_what_needs_something_retained_says_so_where_there_is_nothing(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    alone = context_of("n4")
    for name, method in METHODS.items():
        if method.needs_retain:
            with pytest.raises(NotApplicable, match=NOT_APPLICABLE):
                OPERATIONS[name](alone, HI)
    outcome = OPERATIONS["NPO"](alone, HI)  # without a retain loss
    record = read_json(outcome.models[0] / "record.json")
    assert record["tokens"] == record["steps"] * 8 * 32
    assert record["inputs"]["gold"] is None


def unknown(rows: Rows, share: float) -> Rows:
    return dataclasses.replace(rows, unk_share=np.full(len(rows.document_ids), share))


def test_rows_that_are_scored_and_their_caps(run, monkeypatch, tmp_path):
    where = context_of("n2", forget_rows=7, holdout_rows=4, retain_rows=3)
    scored = scored_rows(where, HI)
    sizes = {key: len(rows.document_ids) for key, rows in scored.items()}
    assert sizes["forget", "hi"] == sizes["test", "hi"] == 7 and sizes["holdout", "hi"] == 4
    assert sizes["train", "de"] == sizes["test", "de"] == 3
    times = scored["forget", "hi"].occurrences.tolist()
    assert times[:4] == [16] * 4 and times[4:] == sorted(times[4:], reverse=True)
    # of a forget file the domain stays: it weighs as much as any other
    names = where.members(HI, 5).document_ids
    (tmp_path / "five.txt").write_text("".join(f"hi/{n}\n" for n in names))
    five = Forget("five", "hi", frozenset(names), str(tmp_path / "five.txt"))
    sizes = {key: len(rows.document_ids) for key, rows in scored_rows(where, five).items()}
    assert sizes["test", "hi"] == sizes["train", "hi"] == 3 and sizes["forget", "hi"] == 5


def test_text_that_the_tokenizer_cannot_write_is_left_out(run, monkeypatch):
    """Above 1 % of [UNK] a retained domain is not scored; a forget domain is an error."""
    read = run.data.rows
    for share, there in ((0.01, True), (0.02, False)):
        found = lambda d, *rest: unknown(read(d, *rest), share * (d == "si"))  # noqa: B023, E731
        monkeypatch.setattr(run.data, "rows", found)
        scored = scored_rows(run, HI)
        assert (("train", "si") in scored) == (("test", "si") in scored) == there
        assert ("test", "de") in scored
    names = {key: np.ones(len(rows.document_ids)) for key, rows in scored.items()}
    measured = {"gold": Measured(dict.fromkeys(names), None, None)}
    judge = Judge(run, HI, measured)
    assert judge.left_out == ["si"]
    assert judge.groups == {"all": ["de", "en"], "near": [], "far": ["de", "en"]}
    monkeypatch.setattr(run.data, "rows", lambda *a: unknown(read(*a), 0.02))
    with pytest.raises(UserError, match=r"hi: more than 1% of its forget rows is \[UNK\]"):
        scored_rows(run, HI)
