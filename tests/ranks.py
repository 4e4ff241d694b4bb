"""One of two gloo ranks: gradients under DDP of its half of the rows, and biases of loss-free
balancing after some steps; saved by rank 0.

usage: torchrun --nproc_per_node=2 tests/ranks.py FOLDER
"""

import os
import sys

import torch
from safetensors.torch import save_file

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.baselines.modeling_moe import MoeConfig, MoeForCausalLM


def model() -> MonetForCausalLM:
    """All experts are kept, so that no rank's batch statistics decide anything."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "moe_groups": 1}
    sizes |= {"num_attention_heads": 2, "moe_experts": 4, "moe_topk": 4, "moe_heads": 2}
    made = MonetConfig(**sizes, moe_dim=4, uniformity_loss_coef=0.0, ambiguity_loss_coef=0.0)
    return MonetForCausalLM(made).train()


def balanced_model() -> MoeForCausalLM:
    """Experts that are balanced without a loss, fast enough to change who is chosen."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_experts": 6, "num_experts_per_tok": 2}
    sizes |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "initializer_range": 0.3}
    return MoeForCausalLM(MoeConfig(**sizes, balance_update_rate=0.05)).train()


def balancing_steps(
    model: torch.nn.Module, moe: MoeForCausalLM, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Biases after six steps of two micro-batches each, by layer; loads before the last update."""
    optimizer, found = torch.optim.SGD(moe.parameters(), lr=0.1), {}
    for step in range(6):
        for half in ids.chunk(2):
            (model(input_ids=half, labels=half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found |= {f"load.{i}": r.load.clone() for i, r in enumerate(moe.model.routers())}
        moe.after_optimizer_step()
        found |= {f"{step}.{i}": r.balance.clone() for i, r in enumerate(moe.model.routers())}
    return found


def rows() -> torch.Tensor:
    return torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(1))


def main(folder: str) -> None:
    """Gradients of this rank, averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    wrapped = torch.nn.parallel.DistributedDataParallel(model(), broadcast_buffers=False)
    half = rows()[2 * rank : 2 * rank + 2]
    wrapped(input_ids=half, labels=half).loss.backward()
    if rank == 0:
        gradients = {name: p.grad for name, p in wrapped.module.named_parameters()}
        save_file(gradients, f"{folder}/gradients.safetensors")
    # the micro-batches of one process are rows 0, 1 and 2, 3: each rank has one of both
    moe = balanced_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(moe, broadcast_buffers=False)
    found = balancing_steps(wrapped, moe, rows()[rank::2])
    save_file(found, f"{folder}/balance.{rank}.safetensors")
    torch.distributed.barrier()
    os._exit(0)  # gloo's teardown can wait for a peer that has gone


if __name__ == "__main__":
    main(sys.argv[1])
