"""Membership attacks on hand-computed tables and tiny models."""

import dataclasses
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tiered.config import Config, DataConfig, UnlearnConfig
from tiered.data import Rows
from tiered.evaluation import RowScores
from tiered.scoring import TokenScores, score_prefixes, token_statistics
from tiered.unlearning import attacks, sets

V, T = 13, 9


def tokens(nll, correct=None, z=None) -> TokenScores:
    nll = np.array(nll, dtype=np.float32)
    hits = np.zeros(nll.shape, dtype=bool) if correct is None else np.array(correct)
    return TokenScores(nll, hits, np.ones(nll.shape, dtype=bool), z)


def rows(ids: np.ndarray, split: str = "holdout") -> Rows:
    n = len(ids)
    ones = np.ones_like(ids)
    names = tuple(map(str, range(n)))
    return Rows("hi", split, names, ids, ones, ones, np.zeros(n, dtype=np.int64), np.zeros(n))


def scored(mean_losses, **extra) -> RowScores:
    n = len(mean_losses)
    ids = np.ones((n, T), dtype=np.int64)
    count = np.full(n, T - 1)
    total = np.array(mean_losses) * (T - 1)
    values = {k: np.array(v, dtype=float) for k, v in extra.items()}
    return RowScores(rows(ids), "token", total, count, count, count, count, count, values)


def test_z_is_the_log_probability_standardised_over_the_vocabulary():
    g = torch.Generator().manual_seed(0)
    logits, targets = 3 * torch.randn(7, V, generator=g), torch.randint(0, V, (7,), generator=g)
    log_p = logits.double().log_softmax(-1)
    mean = (log_p.exp() * log_p).sum(-1)
    sigma = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(-1).sqrt()
    own = log_p.gather(-1, targets[:, None])[:, 0]
    found = token_statistics(logits.clone(), targets, z=True)
    assert torch.allclose(found["nll"].double(), -own, atol=1e-5)
    assert torch.allclose(found["z"].double(), (own - mean) / sigma, atol=1e-4)
    assert torch.equal(found["correct"], logits.argmax(-1) == targets)


def test_uniform_logits_have_loss_ln_v_everywhere():
    """I6: L = ln V = Min-K; z = 0 / sqrt(1e-6): its variance is clamped; the first token wins."""
    found = token_statistics(torch.zeros(4, V), torch.arange(4), z=True)
    table = tokens(found["nll"][None].numpy(), found["correct"][None].numpy())
    statistics = attacks.row_statistics(table, 0.2)
    assert found["nll"].numpy() == pytest.approx(math.log(V), abs=1e-6)
    assert statistics["min_k"][0] == pytest.approx(math.log(V), abs=1e-6)
    assert found["z"].abs().max() == 0
    assert found["correct"].tolist() == [True, False, False, False]
    assert statistics["confidence"][0] == pytest.approx(1 / V)


def test_a_peaked_distribution_keeps_its_variance():
    """A margin of 30 nats: log p = -1e-13, where naive moments cancel."""
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    found = token_statistics(logits, torch.tensor([1]), z=True)
    assert found["z"].item() == pytest.approx(-30 / math.sqrt(1e-6), rel=1e-3)  # clamped


def test_min_k_by_hand():
    nll = np.arange(1.0, 11.0)[None]  # 20 % of ten tokens: the two largest, 10 and 9
    z = np.array([[-3.0, 1.0, 0.5, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    found = attacks.row_statistics(tokens(nll, z=z), 0.2)
    assert found["min_k"][0] == 9.5
    assert found["min_k_pp"][0] == 2.0  # minus the mean of -3 and -1
    one = attacks.row_statistics(tokens([[4.0, 1.0]]), 0.2)  # never an empty range: one token
    assert one["min_k"][0] == 4.0 and "min_k_pp" not in one
    whole = attacks.row_statistics(tokens(np.arange(100.0)[None]), 0.29)  # 0.29 * 100 < 29
    assert whole["min_k"][0] == np.arange(71, 100).mean()


def test_positions_that_the_protocol_leaves_out_do_not_count():
    table = tokens([[9.0, 1.0, 2.0]], [[False, True, True]])
    table.scored[:, 0] = False
    found = attacks.row_statistics(table, 0.5)
    assert found["min_k"][0] == 2.0 and found["extraction_strength"][0] == 1.0


def test_attack_scores_by_hand():
    members = scored(
        [2.0, 3.0],
        zlib_bytes=[10, 20],
        min_k=[4.0, 5.0],
        neighbour_loss=[2.5, 2.5],
        conditional_loss=[1.0, 3.0],
        unconditional_loss=[2.0, 3.0],
    )
    reference = scored([2.5, 2.0])
    names = ["LOSS", "zlib", "Min-K", "Min-K++", "reference", "neighbourhood", "ReCaLL"]
    found = attacks.attack_scores(names, members, members, (reference, reference))
    assert {n: v[0].tolist() for n, v in found.items()} == {
        "LOSS": [2.0, 3.0],
        "zlib": [0.2, 0.15],
        "Min-K": [4.0, 5.0],
        "reference": [-0.5, 1.0],
        "neighbourhood": [-0.5, 0.5],
        "ReCaLL": [-0.5, -1.0],
    }  # Min-K++ was not computed
    assert "reference" not in attacks.attack_scores(names, members, members, None)


def test_zlib_counts_bytes_of_compressed_utf8():
    texts = ["नमस्ते" * 9, "a"]
    expected = [len(zlib.compress(t.encode())) for t in texts]
    assert attacks.zlib_bytes(texts).tolist() == expected


def test_neighbours_swap_their_share_and_never_the_first_token():
    ids = np.random.default_rng(0).integers(0, V, (50, 41))
    log_probs = np.full(1000, -np.inf)
    log_probs[500:600] = math.log(0.01)  # draws that no row holds
    found = attacks.swapped(ids, log_probs, 0.15, 3)
    changed = found != ids
    assert changed.sum(1).tolist() == [6] * 50  # 15 % of 40
    assert not changed[:, 0].any() and found[changed].min() >= 500
    assert (attacks.swapped(ids, log_probs, 0.15, 3) == found).all()
    assert (attacks.swapped(ids, log_probs, 0.15, 4) != found).any()


def test_neighbour_loss_is_the_mean_over_neighbours(monkeypatch):
    ids = np.zeros((3, T), dtype=np.int64)
    config = Config(name="x", unlearn=UnlearnConfig(neighbours=3, neighbour_swaps=0.25))
    monkeypatch.setattr(attacks, "unigram_log_probs", lambda *_: np.log(np.full(V, 1 / V)))
    asked = []

    def score(x):
        asked.append(x)
        return np.full((3, T - 1), float(len(asked)))  # 1, 2, 3: mean 2

    assert attacks.neighbour_loss(config, None, rows(ids), score).tolist() == [2.0] * 3
    assert len(asked) == 3 and not np.array_equal(asked[0], asked[1])


def test_recall_compares_the_same_tokens_with_and_without_the_prefix():
    """A model whose loss on a token is the token's id, plus 10 after a prefix token 12."""
    ids = np.random.default_rng(1).integers(0, V - 1, (4, T))
    prefix = np.full(4, 12)

    def score(x):
        assert x.shape[1] == T  # never beyond the window
        return x[:, 1:] + 10.0 * (x[:, :1] == 12)

    found = attacks.recall_losses(prefix, rows(ids), score(ids), score)
    begun = ids[:, 1 : T - 4].mean(1)  # tokens 1.. of the first T - 4
    assert found["unconditional_loss"] == pytest.approx(begun)
    assert found["conditional_loss"] == pytest.approx(begun + 10)


class System(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=V, num_attention_heads=2, **shape)
        self.partitions = nn.ModuleDict({str(k): LlamaForCausalLM(config) for k in range(2)})


def test_gradient_norms_are_those_of_one_row_and_its_model():
    system, ids = System(), np.random.default_rng(2).integers(0, V, (3, T))
    found = attacks.gradient_norms(system, ids, np.array([0, 1, 1]))
    for row, k, norm in zip(ids, (0, 1, 1), found, strict=True):
        model = system.partitions[str(k)]
        model.zero_grad()
        batch = torch.from_numpy(row[None])
        model(input_ids=batch, labels=batch).loss.backward()
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        assert norm == pytest.approx(expected, rel=1e-5)


def test_a_plain_head_is_scored_in_chunks_as_in_one(monkeypatch):
    from tiered import scoring

    model = System().partitions["0"].eval()
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, V, (5, T)))
    whole = score_prefixes(model, ids, T - 1, 2, z=True)
    logits = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    nll = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(whole["nll"], nll, atol=1e-5)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 3)
    for name, values in score_prefixes(model, ids, T - 1, 2, z=True).items():
        assert torch.allclose(values.float(), whole[name].float(), atol=1e-4), name


def test_the_papers_classifier_separates_confidences():
    g = np.random.default_rng(4)
    members, others = g.normal(0.8, 0.03, 200), g.normal(0.3, 0.03, 90)
    assert not attacks.svc_non_members(members, others, g.normal(0.8, 0.03, 50), 0).any()
    assert attacks.svc_non_members(members, others, g.normal(0.3, 0.03, 50), 0).all()


# --- what holdout rows may share with train --------------------------------------------------


class Documents:
    def __init__(self, *documents) -> None:
        self.found = [np.array(d) for d in documents]

    def documents(self, domain, split):
        assert (domain, split) == ("hi", "train")
        return iter(self.found)


def test_overlap_counts_thirteen_grams_by_brute_force():
    g = np.random.default_rng(5)
    train = [g.integers(0, 50, 60), g.integers(0, 50, 5)]
    ids = g.integers(0, 50, (3, 30))
    ids[0, :20] = train[0][7:27]  # 8 of its 18 runs of 13 tokens
    ids[1] = train[0][:30]
    seen = {tuple(d[i : i + 13]) for d in train for i in range(len(d) - 12)}
    expected = [np.mean([tuple(r[i : i + 13]) in seen for i in range(18)]) for r in ids]
    found = sets.overlap(Documents(*train), rows(ids))
    assert found.tolist() == expected and expected[0] == pytest.approx(8 / 18)
    assert sets.distinct_from_train(Documents(*train), rows(ids), 0.5).tolist() == [
        True,
        False,
        True,
    ]


def test_a_member_is_left_out_for_what_another_document_holds():
    g = np.random.default_rng(6)
    shared = g.integers(0, 50, 30)
    train = [np.r_[shared, g.integers(0, 50, 9)], np.r_[g.integers(0, 50, 4), shared]]
    train.append(np.tile(g.integers(0, 50, 30), 2))  # repeats itself: still its own text alone
    ids = np.stack([train[0][:30], train[1][:30], train[2][:30]])
    holdout = rows(ids)
    members = dataclasses.replace(holdout, split="train")
    assert sets.overlap(Documents(*train), members, documents=2).tolist() == [1.0, 14 / 18, 0.0]
    for found, kept in ((holdout, [False] * 3), (members, [False, False, True])):
        assert sets.distinct_from_train(Documents(*train), found, 0.5).tolist() == kept


def test_rows_shorter_than_a_run_overlap_with_nothing():
    ids = np.ones((2, 9), dtype=np.int64)
    assert sets.overlap(Documents(np.ones(40)), rows(ids)).tolist() == [0.0, 0.0]


def test_chosen_rows_keep_their_columns_together():
    found = rows(np.arange(12).reshape(4, 3)).only(np.array([False, True, True, True]), 2)
    assert found.document_ids == ("1", "2") and found.input_ids.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_forget_files_are_read_line_by_line(tmp_path):
    from tiered.data import listed_documents
    from tiered.store import UserError

    path = tmp_path / "requests.txt"
    path.write_text("hi/a\n\nhi/b/c\nde/d\n")
    assert listed_documents(str(path)) == {"de": {"d"}, "hi": {"a", "b/c"}}
    for text, words in (("hi\n", "line 1"), ("\n", "lists no document")):
        (tmp_path / words[:4]).write_text(text)
        with pytest.raises(UserError, match=words):
            listed_documents(str(tmp_path / words[:4]))
    assert DataConfig().exclude_documents == ""


def test_a_run_that_leaves_documents_out_cannot_forget_others(tmp_path):
    """Gold would bring back what the run itself was never trained on."""
    from tiered.store import UserError
    from tiered.unlearning.benchmark import forget_set

    path = tmp_path / "some.txt"
    path.write_text("hi/a\n")
    config = Config(name="x", data=DataConfig(domains=("hi",), exclude_documents=str(path)))
    with pytest.raises(UserError, match=r"data\.exclude_documents"):
        forget_set(config, None, str(path))
    assert forget_set(config, None, "hi").documents == frozenset()
