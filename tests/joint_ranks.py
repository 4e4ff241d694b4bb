"""A DEMix of four experts trained on one process or several, killed and resumed if asked.

usage: torchrun --nproc_per_node=2 tests/joint_ranks.py FOLDER MICRO_ROWS ACCUMULATION [STOP]
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from tiered.baselines.modeling_demix import DemixConfig, DemixForCausalLM
from tiered.blocks import training_arguments
from tiered.config import Config, TrainingConfig
from tiered.fitting import Fit, LossGuard, fit
from tiered.joint import JointTrainer, LabelledBlocks

ROWS, T, V = 48, 12, 50


def train(folder: Path, micro_rows: int, accumulation: int, stop: int = 0) -> None:
    """Six steps of two rows per expert; with `stop`, killed at that step."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(1, V, (ROWS, T))
    partition = np.repeat([0, 1, 2, 3], ROWS // 4)
    section = TrainingConfig(
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.3,  # below the norms that come up: clipping has to agree
    )
    config = Config(name="joint", device="cpu", threads=1, training=section)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "pad_token_id": 0, "vocab_size": V}
    made = DemixConfig(domain_experts=[0, 1, 2, 3], **shape)
    job = Fit(folder / "model", "joint", 0, training_arguments(config, 1.0))
    data = LabelledBlocks(blocks, partition, 2, 1.0, 0)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == stop:
            raise KeyboardInterrupt

    if stop:
        LossGuard.on_step_begin = kill
    try:
        fit(config, job, lambda: DemixForCausalLM(made), data, lambda m, p: {}, JointTrainer)
    except KeyboardInterrupt:
        print("killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    sys.stdout.flush()
    os._exit(0)  # gloo's teardown can wait for a peer that has gone
