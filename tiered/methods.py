"""Names in YAML -> code: the only place where a name becomes a class or a function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.baselines.modeling_demix import DemixConfig, DemixForCausalLM
from tiered.baselines.modeling_domain_token import DomainTokenConfig, DomainTokenForCausalLM
from tiered.baselines.modeling_moe import MoeConfig, MoeForCausalLM
from tiered.config import Config, ModelConfig, plain
from tiered.data import ProcessedData
from tiered.store import UserError


@dataclass(frozen=True)
class ModelKind:
    """A model family: config from our section, model from its config, parameter card.

    `card(model, blocks)` gives parameter counts and FLOPs per token; what depends on routing is
    measured on the first blocks (rows, T). shared: one model of all partitions, with a part for
    each (`remove_part`, `part_parameters`, `part`: that of one as a model of its own); the card is
    of a part.
    """

    config_from: Callable[[Config, ProcessedData], PreTrainedConfig]
    build: Callable[[PreTrainedConfig], PreTrainedModel]
    card: Callable[[PreTrainedModel, np.ndarray], dict[str, Any]]
    shared: bool = False


OWN_FIELDS = {  # of the model section, by family; the others are of all families
    "monet": (
        *("moe_dim", "moe_heads", "moe_experts", "moe_topk", "moe_groups", "moe_decompose"),
        *("uniformity_loss_coef", "ambiguity_loss_coef", "freeze_router"),
    ),
    **dict.fromkeys(("llama", "demix", "domain_token"), ("intermediate_size",)),
    "lora": (
        *("intermediate_size", "lora_rank", "lora_alpha"),
        *("lora_gate_steps", "lora_gate_learning_rate"),
    ),
    "mixtral": (
        *("intermediate_size", "num_experts", "num_experts_per_tok"),
        "router_aux_loss_coef",
    ),
    "moe": (
        *("intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("num_shared_experts", "num_dense_layers", "dense_intermediate_size"),
        *(
            "router_aux_loss_coef",
            "router_aux_loss_per_layer",
            "router_z_loss_coef",
            "balance_update_rate",
            "freeze_router",
        ),
        *("routing_stream_size", "routing_offset_coef", "expert_bank_layers"),
        *("tree_depth", "tree_branching"),
    ),
}


def model_section(config: Config) -> dict[str, Any]:
    """The fields of a config's model section that its family reads; what it starts from apart."""
    others = {name for names in OWN_FIELDS.values() for name in names}
    others -= set(OWN_FIELDS[config.model.type])
    section = plain(config.model)
    return {n: v for n, v in section.items() if n not in others and n != "init_from"}


def _model_config(
    config: Config, data: ProcessedData, kind: type[PreTrainedConfig], **own: Any
) -> PreTrainedConfig:
    """A family's configuration: what all families share, in the names of transformers, and `own`;
    0 stands for what data or other fields fix."""
    section = plain(config.model)
    vocabulary = data.vocab_size
    if 0 < section["vocab_size"] < vocabulary:
        raise UserError(
            f"model.vocab_size: {section['vocab_size']} is smaller than the tokenizer"
            f" ({vocabulary} tokens)"
        )
    heads = section["num_attention_heads"]
    if not section["head_dim"] and section["hidden_size"] % heads:
        raise UserError(
            f"model.hidden_size: {section['hidden_size']} is not a multiple of"
            f" model.num_attention_heads ({heads})"
        )
    if heads % (section["num_key_value_heads"] or heads):
        raise UserError(
            f"model.num_key_value_heads: {section['num_key_value_heads']} does not divide"
            f" model.num_attention_heads ({heads})"
        )
    same = ("hidden_size", "num_hidden_layers", "rms_norm_eps", "initializer_range")
    values = {name: section[name] for name in (*same, "tie_word_embeddings")} | {
        "vocab_size": section["vocab_size"] or vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": section["num_key_value_heads"] or heads,
        **({} if kind is MoeConfig else {"head_dim": section["head_dim"] or None}),
        "max_position_embeddings": section["max_position_embeddings"] or config.data.block_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": section["rope_theta"]},
        "pad_token_id": data.pad_id,
        "eos_token_id": data.separator_id,
        "bos_token_id": None,
    }
    try:
        made = kind(**values, **own)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None
    made._attn_implementation = section["attn_implementation"]
    return made


def monet_config(config: Config, data: ProcessedData) -> MonetConfig:
    """MonetConfig of a config's model section."""
    own = {name: getattr(config.model, name) for name in OWN_FIELDS["monet"]}
    return _model_config(config, data, MonetConfig, **own)


def _feed_forward_width(config: Config, parts: int = 1) -> int:
    """Width of a SwiGLU block with the parameters of a plain one of 4 d, 8/3 d, in so many parts;
    to eights."""
    return config.model.intermediate_size or 8 * math.ceil(config.model.hidden_size / 3 / parts)


def llama_config(config: Config, data: ProcessedData) -> LlamaConfig:
    """LlamaConfig (a dense model) of a config's model section."""
    return _model_config(config, data, LlamaConfig, intermediate_size=_feed_forward_width(config))


def mixtral_config(config: Config, data: ProcessedData) -> MixtralConfig:
    """MixtralConfig (a mixture of feed-forward experts) of a config's model section."""
    section = config.model
    if section.num_experts_per_tok > section.num_experts:
        raise UserError(
            f"model.num_experts_per_tok: {section.num_experts_per_tok} of {section.num_experts}"
            " experts"
        )
    return _model_config(
        config,
        data,
        MixtralConfig,
        intermediate_size=_feed_forward_width(config),
        num_local_experts=section.num_experts,
        num_experts_per_tok=section.num_experts_per_tok,
        router_aux_loss_coef=section.router_aux_loss_coef,
        output_router_logits=section.router_aux_loss_coef > 0,  # the loss is made from them
    )


def moe_config(config: Config, data: ProcessedData) -> MoeConfig:
    """MoeConfig (OLMoE and its variants) of a config's model section."""
    section = config.model
    if section.head_dim not in (0, section.hidden_size // section.num_attention_heads):
        raise UserError("model.head_dim: a moe's heads fill hidden_size; leave it 0")
    own = {name: getattr(section, name) for name in OWN_FIELDS["moe"]}
    if section.tree_depth:
        if section.norm_topk_prob:
            raise UserError("model.norm_topk_prob: a tree's leaves are always scaled to sum to 1")
        edges = sum(section.tree_branching**d for d in range(1, section.tree_depth + 1))
        if section.num_experts not in (ModelConfig().num_experts, edges):
            raise UserError(
                f"model.num_experts: {section.num_experts}, but the tree has {edges} edges, each"
                " with an expert"
            )
    own["intermediate_size"] = _feed_forward_width(config, section.num_experts_per_tok)
    return _model_config(config, data, MoeConfig, **own)


def demix_config(config: Config, data: ProcessedData) -> DemixConfig:
    """DemixConfig (a feed-forward expert for every founding partition) of a model section."""
    own = {"domain_experts": list(range(config.partition.n))}
    width = _feed_forward_width(config)
    return _model_config(config, data, DemixConfig, intermediate_size=width, **own)


def domain_token_config(config: Config, data: ProcessedData) -> DomainTokenConfig:
    """DomainTokenConfig (a token for every founding partition) of a model section."""
    own = {"domains": list(range(config.partition.n))}
    width = _feed_forward_width(config)
    return _model_config(config, data, DomainTokenConfig, intermediate_size=width, **own)


def plain_card(model: PreTrainedModel, blocks: np.ndarray) -> dict[str, Any]:
    """Parameter counts of a dense model or a mixture of experts: what a token's pass multiplies is
    all of it but the input embedding and the experts that are not chosen."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    config = model.config
    table = config.vocab_size * config.hidden_size
    embedding = table if config.tie_word_embeddings else 2 * table
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    computed = total - (0 if config.tie_word_embeddings else table)
    if experts:
        computed -= round(experts * (1 - config.num_experts_per_tok / config.num_local_experts))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # scores and values over (T + 1) / 2 keys on average
    attention = 2 * config.num_attention_heads * head_dim * (blocks.shape[1] + 1)
    return {
        "total": total,
        "embedding": embedding,
        "non_embedding": total - embedding,
        "computed_per_token": computed,
        "selected_per_token": computed,
        "forward_flops_per_token": 2 * computed + config.num_hidden_layers * attention,
    }


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


def moe_card(model: MoeForCausalLM, blocks: np.ndarray) -> dict[str, Any]:
    """Parameter counts of a mixture of experts, by part, and FLOPs per token."""
    counts = model.config.parameter_counts()
    flops = model.config.flops_per_token(blocks.shape[1])
    selected = counts["computed_per_token"]
    return {**counts, "selected_per_token": selected, "forward_flops_per_token": flops}


MODELS: dict[str, ModelKind] = {
    "monet": ModelKind(monet_config, MonetForCausalLM, monet_card),
    "llama": ModelKind(llama_config, LlamaForCausalLM, plain_card),
    "moe": ModelKind(moe_config, MoeForCausalLM, moe_card),
    "mixtral": ModelKind(mixtral_config, MixtralForCausalLM, plain_card),
    "lora": ModelKind(llama_config, LlamaForCausalLM, plain_card),  # merged; trained by peft
    "demix": ModelKind(demix_config, DemixForCausalLM, plain_card, shared=True),
    "domain_token": ModelKind(domain_token_config, DomainTokenForCausalLM, plain_card, shared=True),
}
