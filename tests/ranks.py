"""One of two gloo ranks: gradients under DDP of its half of the rows, saved by rank 0.

usage: torchrun --nproc_per_node=2 tests/ranks.py FOLDER
"""

import os
import sys

import torch
from safetensors.torch import save_file

from modeling_monet import MonetConfig, MonetForCausalLM


def model() -> MonetForCausalLM:
    """All experts are kept, so that no rank's batch statistics decide anything."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "moe_groups": 1}
    sizes |= {"num_attention_heads": 2, "moe_experts": 4, "moe_topk": 4, "moe_heads": 2}
    made = MonetConfig(**sizes, moe_dim=4, uniformity_loss_coef=0.0, ambiguity_loss_coef=0.0)
    return MonetForCausalLM(made).train()


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
    torch.distributed.barrier()
    os._exit(0)  # gloo's teardown can wait for a peer that has gone


if __name__ == "__main__":
    main(sys.argv[1])
