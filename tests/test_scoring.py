"""Scores of routed rows against brute force over every partition model."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from tiered.scoring import ScoreCache, score_prefixes, score_rows

V, T = 11, 9


class Counting(nn.Module):
    """A causal toy model; remembers the lengths it was asked to read."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(V, V)
        self.lengths: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        self.lengths += [input_ids.shape[1]] * len(input_ids)
        return CausalLMOutput(logits=self.table(input_ids).cumsum(1))


class System(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.partitions = nn.ModuleDict({str(k): Counting(k) for k in range(3)})


def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (6, T))


def test_uniform_logits_cost_ln_v_per_token():
    """I6: L = ln V."""
    model = Counting(0)
    nn.init.zeros_(model.table.weight)
    nll = score_prefixes(model, torch.from_numpy(rows()), T - 1, 4)["nll"]
    assert nll.shape == (6, T - 1)
    assert torch.allclose(nll, torch.full_like(nll, math.log(V)), atol=1e-6)


def test_each_position_is_scored_by_the_partition_that_was_chosen():
    system, ids = System(), rows()
    generator = torch.Generator().manual_seed(1)
    assignments = {
        "token": torch.randint(0, 3, (6, T - 1), generator=generator),
        "oracle": torch.full((6, T - 1), 2),
    }
    assignments["token"][0, :3] = -1  # left out by the protocol
    found = score_rows(system, ids, assignments, 4)
    for name, chosen in assignments.items():
        for r in range(6):
            for t in range(T - 1):
                k = int(chosen[r, t])
                assert found[name].scored[r, t] == (k >= 0)
                if k < 0:
                    assert np.isnan(found[name].nll[r, t])
                    continue
                table = system.partitions[str(k)].table.weight
                logits = table[torch.from_numpy(ids[r, : t + 1])].sum(0)
                expected = -logits.log_softmax(-1)[ids[r, t + 1]].item()
                assert found[name].nll[r, t] == pytest.approx(expected, abs=1e-5)
                assert found[name].correct[r, t] == (logits.argmax().item() == ids[r, t + 1])


def test_a_partition_reads_no_further_than_the_last_position_that_chose_it():
    system = System()
    chosen = torch.zeros(6, T - 1, dtype=torch.long)
    chosen[0, 1] = 1  # two positions of one row; partition 2 is never chosen
    score_rows(system, rows(), {"token": chosen}, 4)
    read = {k: system.partitions[str(k)].lengths for k in range(3)}
    assert read == {0: [T - 1] * 6, 1: [2], 2: []}


def test_cached_scores_are_the_same_bits_and_run_no_model(tmp_path):
    system, chosen = System(), {"token": torch.ones(6, T - 1, dtype=torch.long)}
    cache = ScoreCache(tmp_path, {k: f"hash{k}" for k in range(3)})
    first = score_rows(system, rows(), chosen, 4, cache)["token"]
    system.partitions["1"].lengths.clear()
    again = score_rows(system, rows(), chosen, 4, cache)["token"]
    assert np.array_equal(first.nll, again.nll) and not system.partitions["1"].lengths
    other = ScoreCache(tmp_path, {k: f"other{k}" for k in range(3)})  # another model: no hit
    score_rows(system, rows(), chosen, 4, other)
    assert system.partitions["1"].lengths == [T - 1] * 6
    # nor for another environment; `renew` scores once more and then reads
    for more in ({"environment": "gpu"}, {"renew": True}):
        cache = ScoreCache(tmp_path, {k: f"hash{k}" for k in range(3)}, **more)
        for expected in ([T - 1] * 6, []):
            system.partitions["1"].lengths.clear()
            score_rows(system, rows(), chosen, 4, cache)
            assert system.partitions["1"].lengths == expected
