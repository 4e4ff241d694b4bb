"""Names in YAML -> code: the only place where a name becomes a class or a function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.config import Config, plain
from tiered.data import ProcessedData
from tiered.store import UserError


@dataclass(frozen=True)
class ModelKind:
    """A model family: config from our section, model from its config, parameter card.

    `card(model, blocks)` gives parameter counts and FLOPs per token; what depends on routing is
    measured on the first blocks (rows, T).
    """

    config_from: Callable[[Config, ProcessedData], PreTrainedConfig]
    build: Callable[[PreTrainedConfig], PreTrainedModel]
    card: Callable[[PreTrainedModel, np.ndarray], dict[str, Any]]


def monet_config(config: Config, data: ProcessedData) -> MonetConfig:
    """MonetConfig of a config's model section; 0 stands for what data or other fields fix."""
    section = plain(config.model)
    del section["type"]
    attention = section.pop("attn_implementation")
    section["head_dim"] = section["head_dim"] or None
    vocabulary = data.vocab_size
    section["vocab_size"] = section["vocab_size"] or vocabulary
    if section["vocab_size"] < vocabulary:
        raise UserError(
            f"model.vocab_size: {section['vocab_size']} is smaller than the tokenizer"
            f" ({vocabulary} tokens)"
        )
    heads = section["num_attention_heads"]
    section["num_key_value_heads"] = section["num_key_value_heads"] or heads
    section["max_position_embeddings"] = (
        section["max_position_embeddings"] or config.data.block_size
    )
    theta = section.pop("rope_theta")
    section["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    tokens = {"pad_token_id": data.pad_id, "eos_token_id": data.separator_id, "bos_token_id": None}
    try:
        made = MonetConfig(**section, **tokens)
        made._attn_implementation = attention
        return made
    except ValueError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None


@torch.no_grad()
def monet_card(model: MonetForCausalLM, blocks: np.ndarray, rows: int = 8) -> dict[str, Any]:
    """Parameter counts of a Monet; `selected_per_token` counts factor parameters of kept experts.

    The kept share is the mean number of non-zero gates per head and axis, over E, on `rows`
    blocks in evaluation mode.
    """
    counts = model.config.parameter_counts()
    ids = torch.from_numpy(np.asarray(blocks[:rows], dtype=np.int64))
    probs = model.eval()(input_ids=ids, output_router_probs=True).router_probs
    # an expert row is selected if any head keeps it
    kept = (
        torch.stack([(g > 0).any(2).float().mean() for pair in probs for g in pair]).mean().item()
    )
    gates = torch.stack([(g > 0).float().sum(-1).mean() for pair in probs for g in pair]).mean()
    experts = counts["experts"]
    return {
        **counts,
        "kept_gates_per_head_and_axis": round(gates.item(), 4),
        "selected_per_token": round(counts["computed_per_token"] - experts * (1 - kept)),
        "forward_flops_per_token": model.config.flops_per_token(blocks.shape[1]),
    }


MODELS: dict[str, ModelKind] = {
    "monet": ModelKind(monet_config, MonetForCausalLM, monet_card),
}
