"""Model utility against hand-made rows and tiny runs; verbatim continuation against full reads."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.test_gradient import T, V, context_of, tiny_llama
from tests.test_robustness import system
from tests.test_unlearning import HI, context, measured, metrics  # noqa: F401
from tiered.metrics import token_lcs
from tiered.store import UserError
from tiered.unlearning.measures import Judge
from tiered.unlearning.protocol import Scorer
from tiered.unlearning.utility import Alone, alone, open_single
from tiered.unlearning.verbatim import verbatim_overlap


def utility(measured, alone):  # noqa: F811
    return Judge(context(2), HI, measured, alone).metrics("original")


def test_model_utility_by_hand(measured):  # noqa: F811
    """Rows have 40 nats; utilities (U - 40) / (U - S): 20/20, 10/20 and, sharing helped, 20/10."""
    rows = np.ones(5)
    known = {
        "si": Alone(60 * rows, 40 * rows),
        "de": Alone(50 * rows, 30 * rows),
        "en": Alone(60 * rows, 50 * rows),
    }
    found = utility(measured, known)
    assert found["utility"] == {"si": 1.0, "de": 0.5, "en": 2.0}
    assert found["model_utility"]["value"] == pytest.approx(3 / (1 + 2 + 0.5), abs=1e-6)
    # equal rows: every resample is the same
    assert found["model_utility"]["low"] == found["model_utility"]["high"]
    # worse than the unigram: the least there is, and it decides the mean
    known["de"] = Alone(39 * rows, 30 * rows)
    found = utility(measured, known)
    assert found["utility"]["de"] == 1e-3
    assert found["model_utility"]["value"] == pytest.approx(3 / (1 + 1000 + 0.5), abs=1e-6)
    known["de"] = Alone(30 * rows, 30 * rows)
    found = utility(measured, known)
    assert found["utility"]["de"] == found["model_utility"] == "undefined"
    assert utility(measured, None)["model_utility"] == "none"


def test_a_run_of_single_domains_is_its_own_scale(tiny, monkeypatch, tmp_path):
    """With its own models and oracle-like routing u_d is 1; another run is measured against it."""
    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    where = context_of("n2", single_run="runs/n4")
    found = alone(where)
    assert set(found) == {"hi", "si", "de", "en"}
    single = context_of("n4")
    rows = single.data.rows("si", "test", where.config.unlearn.forget_rows)
    k = single.partitions.partition_of("si")
    plain = Scorer(single, system(single), None, [k]).rows(rows, attacked=False)
    np.testing.assert_allclose(found["si"].single, plain.loss_nats, rtol=1e-6)
    assert (found["si"].unigram > 0).all() and len(found["si"].unigram) == len(rows.document_ids)
    # kept: a second call reads the file
    path = where.config.run_dir / "unlearn/alone.json"
    written = path.stat().st_mtime_ns
    np.testing.assert_array_equal(alone(where)["de"].single, found["de"].single)
    assert path.stat().st_mtime_ns == written
    assert alone(context_of("n2")) is None
    with pytest.raises(UserError, match="several domains"):
        open_single(context_of("n4", single_run="runs/n2").config)
    with pytest.raises(UserError, match="no run folder"):
        open_single(context_of("n4", single_run="runs/nowhere").config)
    other = context_of("n2", single_run="runs/n4").config
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, block_size=64))
    with pytest.raises(UserError, match="other data"):
        open_single(other)


def test_verbatim_overlap_is_that_of_the_greedy_continuation():
    model = tiny_llama()
    ids = np.random.default_rng(0).integers(0, V, (5, T))
    found = verbatim_overlap(model, ids, 2)
    for row, share in zip(ids.tolist(), found, strict=True):
        written = row[: T // 2]
        while len(written) < T:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([written])).logits[0, -1]
            written.append(int(logits.argmax()))
        assert share == token_lcs(row[T // 2 :], written[T // 2 :])
    # a row that the model wrote itself is found whole
    own = np.array([written], dtype=np.int64)
    assert verbatim_overlap(model, own, 1).tolist() == [1.0]


def test_a_tiered_model_writes_with_what_it_may_route_to(tiny, monkeypatch):
    """Only partition k allowed: the same text as partition k's model alone writes."""
    monkeypatch.chdir(tiny)
    run = context_of("n2")
    model, ids = system(run), run.data.rows("hi", "test", 3).input_ids
    for k in (0, 1):
        alone_k = verbatim_overlap(model.partitions[str(k)], ids, 8)
        np.testing.assert_array_equal(verbatim_overlap(model, ids, 8, [k]), alone_k)


def test_verbatim_is_reported_less_what_holdout_rows_give(measured):  # noqa: F811
    rows = measured["original"].scores
    members = np.full(40, np.nan)
    members[:30] = [0.8] * 20 + [0.4] * 10  # the first 20 occur 16 times
    rows["forget", "hi"].extra["verbatim"] = members
    rows["holdout", "hi"].extra["verbatim"] = np.r_[[0.3] * 30, [np.nan] * 10]
    found = metrics(context(2), measured, "original")["verbatim"]
    values = {k: v["value"] for k, v in found.items()}
    assert values == pytest.approx({"holdout": 0.3, "all": 11 / 30, "16": 0.5, "1": 0.1}, abs=1e-6)
    assert metrics(context(2), measured, "gold")["verbatim"] == "undefined"
