"""A Monet or a model of the OLMoE family trained on one process or several, in several ways.

usage: [torchrun --nproc_per_node=2] tests/fit_ranks.py OUTPUT JSON...

Each JSON is a training: family, folder, micro_rows, accumulation, and if wanted sharded, stop (the
step at which it is killed), logging and saving (every so many steps), checkpointing (of gradients),
rows (of all steps), own_mean (of each rank's tokens as its loss). OUTPUT gets what rank 0 saw of
each layer's weights while it trained: whether they were shards.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered import branching, checkpoint
from tiered.baselines.modeling_moe import MoeConfig, MoeForCausalLM
from tiered.blocks import training_arguments
from tiered.config import Config, TrainingConfig
from tiered.fitting import Fit, LossGuard, OrderedBlocks, fit

ROWS, T, V = 48, 12, 50


def make(family: str) -> torch.nn.Module:
    """Both have auxiliary losses; Monet's last two layers share their routers' group."""
    shape = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if family == "monet":
        sizes = {"moe_experts": 4, "moe_topk": 2, "moe_heads": 2, "moe_dim": 4, "moe_groups": 2}
        return MonetForCausalLM(MonetConfig(**shape, **sizes, tie_word_embeddings=False))
    sizes = {"intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 2}
    options = {"bank": {"expert_bank_layers": 3}, "stream": {"routing_stream_size": 8}}
    options |= {"loss_free": {"balance_update_rate": 0.01}}
    model = MoeForCausalLM(MoeConfig(**shape, **sizes, **options.get(family, {})))
    branching.add_dropout(model, 0.3 if family == "dropout" else 0.0)
    return model


def train(
    family: str,
    folder: str,
    micro_rows: int,
    accumulation: int,
    sharded: bool = False,
    stop: int = 0,
    logging: int = 1,
    saving: int = 2,
    checkpointing: bool = False,
    rows: int = ROWS,
    own_mean: bool = False,
) -> list[bool]:
    """Six steps of eight rows, the last of fewer where `rows` are; whether each weight was a shard
    in the last of them."""
    blocks = np.random.default_rng(0).integers(1, V, (rows, T))
    section = TrainingConfig(
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=accumulation,
        logging_steps=logging,
        save_steps=saving,
        learning_rate=1e-2,
        max_grad_norm=0.3,  # below the norms that come up: clipping has to agree
        arguments={
            "gradient_checkpointing": checkpointing,
            "average_tokens_across_devices": not own_mean,
        },
    )
    config = Config(name="ranks", device="cpu", threads=1, training=section)
    arguments = training_arguments(config, 1.0)
    job = Fit(Path(folder) / "model", "ranks", 0, arguments, sharded=sharded)
    seen: list[bool] = []

    def look(self, args, state, control, model=None, **kwargs):
        seen[:] = [isinstance(p, DTensor) for p in model.parameters()]
        if stop and state.global_step == stop:
            generators = checkpoint.of_ranks(torch.get_rng_state())
            print(f"killed; generators: {len(generators.unique(dim=0))} of {len(generators)}")
            raise KeyboardInterrupt

    LossGuard.on_step_begin = look
    with contextlib.suppress(KeyboardInterrupt):
        fit(config, job, lambda: make(family), OrderedBlocks(blocks, 1.0, 0), lambda m, p: {})
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = [train(**json.loads(job)) for job in sys.argv[2:]]
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's teardown can wait for a peer that has gone
