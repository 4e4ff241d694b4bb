"""Data order, batch sizes and resume state of training."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered import checkpoint
from tiered.blocks import batch_rows, training_arguments
from tiered.config import Config, DataConfig, PartitionConfig, TrainingConfig
from tiered.fitting import Fit, OrderedBlocks, fit, without_empty
from tiered.partition import make_partition_map
from tiered.record import device_of, environment
from tiered.store import UserError

BLOCKS = np.arange(40).reshape(10, 4)


def test_every_pass_is_a_permutation_and_passes_differ():
    order = OrderedBlocks(BLOCKS, 2.5, 7, None).order
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert len(set(order[20:].tolist())) == 5


def test_order_is_a_function_of_the_seed_alone():
    first = OrderedBlocks(BLOCKS, 1.0, 7, None).order
    np.random.seed(123)
    torch.manual_seed(123)
    assert np.array_equal(first, OrderedBlocks(BLOCKS, 1.0, 7, None).order)
    assert not np.array_equal(first, OrderedBlocks(BLOCKS, 1.0, 8, None).order)
    # a longer training begins with the same passes
    assert np.array_equal(first, OrderedBlocks(BLOCKS, 3.0, 7, None).order[:10])


def test_separate_documents_restart_positions_and_hide_first_tokens():
    blocks = np.array([[5, 6, 0, 7, 8, 0, 9, 5]])  # 0 separates
    item = OrderedBlocks(blocks, 1.0, 0, 0)[0]
    assert item["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert item["labels"].tolist() == [-100, 6, 0, -100, 8, 0, -100, 5]
    assert "position_ids" not in OrderedBlocks(blocks, 1.0, 0, None)[0]


def config(schedule: str, n: int) -> Config:
    return Config(
        name="x",
        partition=PartitionConfig(method="language", n=n),
        training=TrainingConfig(
            schedule=schedule, min_batch_rows=2, per_device_train_batch_size=16
        ),
    )


@pytest.mark.parametrize("n, rows", [(1, 16), (2, 8), (4, 4), (8, 2), (16, 2)])
def test_constant_steps_shrink_the_batch_to_its_floor(n, rows):
    made = config("constant_steps", n)
    share = make_partition_map(made).share(0)
    assert batch_rows(made, share) == rows
    # the batch is a matter of configuration: it does not see that a domain's data is gone
    without = made.without("hi")
    assert batch_rows(without, make_partition_map(without).share(0)) == rows
    assert batch_rows(config("constant_batch", n), share) == 16


def test_training_arguments_come_by_their_own_names():
    made = config("constant_batch", 1)
    section = dataclasses.replace(made.training, arguments={"adam_epsilon": 1e-6})
    values = training_arguments(dataclasses.replace(made, training=section), 1.0)
    assert values["adam_epsilon"] == 1e-6 and values["learning_rate"] == 4e-3
    assert "schedule" not in values and "num_train_epochs" not in values


class State:
    """The parts of a Trainer that a checkpoint reads."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.lr_scheduler = get_cosine_schedule_with_warmup(self.optimizer, 2, 20)
        self.state = self.args = self
        self.should_save = True

    def save_to_json(self, path: str) -> None:
        Path(path).write_text("{}")

    def loss_accumulator(self) -> dict:
        return {"running": [0.5], "total": 1.5, "last_logged_step": 3}

    def step(self) -> torch.Tensor:
        loss = self.model(torch.randn(4, 3)).square().sum()
        loss.backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return loss


def test_resumed_state_continues_bit_for_bit(tmp_path):
    """Weights, both Adam moments, step counts, schedule and the random generator."""
    kept = State(0)
    for _ in range(3):
        kept.step()
    checkpoint.save(tmp_path / "checkpoint-00000003", kept, 1.0)
    expected = [kept.step().item() for _ in range(4)]
    resumed = State(1)
    folder = checkpoint.newest(tmp_path)
    checkpoint.load_weights(folder, resumed.model)
    checkpoint.load_optimizer(folder, resumed)
    checkpoint.load_random_state(folder)
    assert [resumed.step().item() for _ in range(4)] == expected
    for a, b in zip(kept.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert kept.lr_scheduler.get_last_lr() == resumed.lr_scheduler.get_last_lr()


def test_empty_rows_are_in_no_micro_batch_that_has_others():
    ordered = OrderedBlocks(BLOCKS, 1.0, 7)
    shared = ordered.for_ranks(4, 2)
    assert (len(ordered), len(shared)) == (10, 16)
    assert np.array_equal(ordered.for_ranks(4, 1).order, ordered.order)
    # as one process that drops the last two rows
    dropped = [ordered.for_ranks(4, ranks, drop_last=True) for ranks in (1, 2, 3)]
    assert [len(d) for d in dropped] == [8, 8, 12] and {d.tokens for d in dropped} == {32}
    assert shared.tokens == ordered.tokens == BLOCKS.size
    batches = [without_empty([shared[i] for i in range(j, j + 4)]) for j in range(0, 16, 4)]
    rows = np.concatenate([batch["input_ids"] for batch in batches[:3]])
    assert np.array_equal(rows, BLOCKS[ordered.order])  # 4, 4 and 2
    assert [("empty" in batch) for batch in batches] == [False, False, False, True]
    assert batches[3]["input_ids"].shape == (1, 2) and (batches[3]["labels"] == -100).all()


def test_ranks_that_a_checkpoint_does_not_know_draw_numbers_of_their_own(tmp_path):
    """The first of them goes on with the numbers of the process that wrote it."""
    checkpoint.save(tmp_path / "checkpoint-00000001", State(0), 0.0)
    after = torch.rand(8)
    drawn = []
    for rank in range(4):
        checkpoint.load_random_state(tmp_path / "checkpoint-00000001", rank, 4)
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], after)
    assert len(torch.stack(drawn).unique(dim=0)) == 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path / "checkpoint-00000001", State(0), 0.0)
    with pytest.raises(UserError, match="checkpoint of another model"):
        checkpoint.load_weights(tmp_path / "checkpoint-00000001", torch.nn.Embedding(3, 2))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / f"checkpoint-{step:08d}", State(0), 0.0)
        checkpoint.prune(tmp_path)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "4"]
    names = {p.name for p in (tmp_path / "checkpoint-00000004").iterdir()}
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pth"))}


def test_defaults_cover_all_sixteen_languages():
    assert len(DataConfig().domains) == 16


def test_cuda_is_never_replaced_silently(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Config(name="x", device="auto")).type == "cpu"
    with pytest.raises(UserError, match="device: cuda is asked for"):
        environment(Config(name="x", device="cuda"))


def test_the_number_of_processes_is_part_of_an_address(monkeypatch):
    first = environment(Config(name="x"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment(Config(name="x")) == {**first, "processes": 4}


def test_an_unknown_tracker_is_one_line(tmp_path):
    made = Config(name="x", device="cpu", training=TrainingConfig(report_to=("foo",)))
    job = Fit(tmp_path / "m", "x", 0, training_arguments(made, 1.0))
    with pytest.raises(UserError, match="training: foo is not supported"):
        ordered = OrderedBlocks(BLOCKS, 1.0, 0)
        fit(made, job, lambda: torch.nn.Linear(2, 2), ordered, lambda model, path: {})


def test_trackers_get_one_run_per_model_and_keep_it(tmp_path, monkeypatch, request):
    """wandb offline without a key, tensorboard in the run folder; neither goes with the
    checkpoints, neither changes what is trained."""
    import wandb

    # its service ends here, and WANDB_SERVICE: processes of later tests would take that for theirs
    request.addfinalizer(wandb.teardown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "x")  # so that what training sets is taken back
        monkeypatch.delenv(name)
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"moe_experts": 4, "moe_topk": 2, "moe_heads": 1, "moe_dim": 4}
    weights = []
    for report_to in (("tensorboard", "wandb"), ()):
        section = TrainingConfig(report_to=report_to, logging_steps=1)
        made = Config(name="x", device="cpu", threads=1, training=section)
        for k in (0, 1):
            arguments = training_arguments(made, 1.0)
            job = Fit(tmp_path / f"{len(report_to)}{k}", f"x partition {k} [hi]", k, arguments)
            build = lambda: MonetForCausalLM(MonetConfig(**sizes))  # noqa: E731
            fit(made, job, build, OrderedBlocks(BLOCKS, 2.0, k), lambda model, path: {})
            weights.append((job.folder / "model.safetensors").read_bytes())
    assert weights[:2] == weights[2:]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
    logs = sorted(tmp_path.glob("runs/x/tensorboard/*/events.out.tfevents.*"))
    assert sorted({p.parent.name for p in logs}) == ["x-partition-0-hi", "x-partition-1-hi"]
    assert all(p.stat().st_size > 200 for p in logs)
