"""Branch-train-merge: what a partition's model starts from (BTM, arXiv:2208.03306; c-BTM,
arXiv:2303.14177).

The seed LM is one model of all domains, trained on a share of the documents or on the router
split. Every partition's model begins as its copy and goes on with its own documents: what the seed
read is then in every model. `model.init_from: seed` trains it here; a folder or hub name gives one
from outside.
"""

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiered.config import Config, PartitionConfig
from tiered.data import ProcessedData, listed_documents
from tiered.store import UserError, digest, read_json, tree_hashes

FUNCTION = (  # fields that no shape of a weight shows
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "hidden_act"),
    *("rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("clip_qkv", "norm_topk_prob", "routing_stream_size", "tree_depth"),
    *("num_experts_per_tok", "moe_heads", "moe_topk", "moe_decompose", "moe_groups"),
)
UPCYCLED = ("llama", "mixtral")  # model types: a seed and what starts from it
SAME_WEIGHTS = ("olmoe", "tiered_moe")
SEED = "seed"  # the value of model.init_from that stands for this experiment's own seed LM


def has_own_seed(config: Config) -> bool:
    """Whether the experiment trains its seed LM itself."""
    return config.model.init_from == SEED


def seed_config(config: Config) -> Config:
    """The seed LM as an experiment of its own: one partition, from scratch, its share of data."""
    section = config.seed_lm
    low, middle, _ = _bounds(config)
    training = replace(
        config.training,
        split=section.split,
        documents=(low, middle) if section.split == config.training.split else (0.0, 1.0),
        num_train_epochs=section.num_train_epochs or config.training.num_train_epochs,
    )
    if section.learning_rate:
        training = replace(training, learning_rate=section.learning_rate)
    domains = config.data.domains
    left_out = set(domains) - set(section.domains) if section.domains else set()
    excluded = tuple(d for d in domains if d in left_out | set(config.data.exclude_domains))
    if set(excluded) == set(domains):
        raise UserError(
            "seed_lm.domains: the seed LM has no data, as data.exclude_domains leaves none of its"
            " domains"
        )
    own = "llama" if config.model.type == "lora" else config.model.type
    return replace(
        config,
        data=replace(config.data, added_domains=(), novel_domains=(), exclude_domains=excluded),
        partition=PartitionConfig(method="language", n=1),
        model=replace(config.model, init_from="", type=section.type or own),
        training=replace(training, added_from=""),
    )


def _bounds(config: Config) -> tuple[float, float, float]:
    """The documents in use, [low, high), and where the seed LM's end and the branches' begin."""
    low, high = config.training.documents
    return low, low + config.seed_lm.share * (high - low), high


def document_interval(config: Config) -> tuple[float, float]:
    """The interval of document places (see `places`) that partition models are trained on."""
    low, middle, high = _bounds(config)
    own = has_own_seed(config) and config.seed_lm.split == config.training.split
    return (middle if own else low), high


def places(document_ids: list[str]) -> np.ndarray:
    """A number in [0, 1) for every document, uniform, a function of its id alone."""
    digests = (hashlib.sha256(b"documents:" + i.encode()).digest()[:8] for i in document_ids)
    # 53 bits: what a float64 holds exactly, so no place rounds up to 1
    return np.array([(int.from_bytes(d, "big") >> 11) / 2**53 for d in digests])


def used(config: Config, domain: str, document_ids: list[str]) -> np.ndarray | None:
    """Documents (documents,) bool of a domain that partition models are trained on; None: all."""
    low, high = document_interval(config)
    excluded = excluded_documents(config).get(domain, frozenset())
    if (low, high) == (0.0, 1.0) and not excluded:
        return None
    place = places(document_ids)
    return (place >= low) & (place < high) & ~np.isin(document_ids, sorted(excluded))


def excluded_documents(config: Config) -> dict[str, frozenset[str]]:
    """Domain -> ids of the documents that data.exclude_documents leaves out of training."""
    path = config.data.exclude_documents
    return listed_documents(path) if path else {}


@functools.cache
def outside(name: str, key: str, kept: tuple[str, ...]) -> tuple[Path, str]:
    """Folder and content hash of a checkpoint given by folder or hub name.

    kept: endings of the files that are hashed; key: the config's, for UserError where there is no
    such model.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            from tiered.hub import snapshot  # its client takes a second to import

            wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            folder = Path(snapshot(name, "", wanted))
        except UserError:  # the hub does not answer
            raise
        except Exception as error:  # the hub client has a dozen of them
            raise UserError(
                f"{key}: {name!r} is neither a folder nor a model that the hub gives"
                f" ({' '.join(str(error).split())[:160]})"
            ) from None
    hashes = {n: h for n, h in tree_hashes(folder).items() if n.endswith(kept)}
    if "config.json" not in hashes or not list(folder.glob("*.safetensors")):
        raise UserError(f"{key}: {folder} holds no model (config.json and .safetensors files)")
    return folder, digest(hashes)


def _outside(config: Config) -> tuple[Path, str]:
    return outside(config.model.init_from, "model.init_from", ("config.json", ".safetensors"))


def outside_folder(config: Config) -> Path:
    """Folder of a seed LM that comes from outside."""
    return _outside(config)[0]


def outside_hash(config: Config) -> str:
    """Content hash of a seed LM that comes from outside."""
    return _outside(config)[1]


def seed_domains(folder: Path) -> list[str] | None:
    """Domains whose data a seed LM saw, by its record; None where nothing is known of it."""
    record = folder / "record.json"
    if not record.is_file():
        return None
    value = read_json(record)
    if "partition" not in value:
        return None
    before = (value.get("seed") or {}).get("domains") or []
    return sorted({*value["partition"]["present"], *before})


def check_tokenizer(folder: Path, data: ProcessedData) -> None:
    """Raise UserError if a seed LM from outside was trained with another tokenizer."""
    try:
        same = AutoTokenizer.from_pretrained(folder).get_vocab() == data.tokenizer.get_vocab()
    except (OSError, ValueError):
        return  # it comes without one: nothing to compare
    if not same:
        raise UserError(
            f"model.init_from: {folder} has another tokenizer than the data; set tokenizer.name to"
            " that folder"
        )


def initialise(model: PreTrainedModel, folder: Path) -> None:
    """Give a new model the weights of a seed LM: a copy, or (mixture of experts from a dense seed)
    sparse upcycling. UserError if their shapes differ."""
    try:
        seed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        raise UserError(f"model.init_from: {folder} is no model that loads ({text})") from None
    check_function(seed.config, model.config, folder)
    state = seed.state_dict()
    if (seed.config.model_type, model.config.model_type) == UPCYCLED:
        state = upcycled(state, model)
    expected = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "nothing"
        if expected.get(name, "nothing") != found:
            raise UserError(
                f"model.init_from: {folder} has {found} for {name}, the model section makes"
                f" {expected.get(name, 'nothing')}"
            )
    model.load_state_dict(state)


def check_function(seed: PreTrainedConfig, own: PreTrainedConfig, folder: Path) -> None:
    """Raise UserError where equal weights would not make an equal function: another family (except
    the dense seed of a mixture of experts, and transformers' OLMoE), heads, rotary base, norms,
    experts per token."""
    kinds = (seed.model_type, own.model_type)
    if kinds[0] != kinds[1] and kinds not in (UPCYCLED, SAME_WEIGHTS):
        raise UserError(f"model.init_from: {folder} is a {kinds[0]}, model.type a {kinds[1]}")
    for name in FUNCTION:
        if hasattr(seed, name) and hasattr(own, name):
            theirs, ours = (_plain_rope(getattr(c, name)) for c in (seed, own))
            if name == "head_dim":
                theirs, ours = (_head_dim(c) for c in (seed, own))
            if theirs != ours:
                raise UserError(
                    f"model.init_from: {folder} has {name} {theirs}, the model section {ours}"
                )


def _head_dim(config: PreTrainedConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _plain_rope(value: Any) -> Any:
    """Rotary parameters without entries that say nothing."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def upcycled(dense: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State of a mixture of experts (transformers' Mixtral) from a dense Llama's: every expert is
    a copy of the feed-forward block, routers stay new (arXiv:2212.05055).

    Weights of the chosen experts sum to 1, so the model begins as the dense one.
    """
    experts, state = model.config.num_local_experts, dict(dense)
    for name, own in model.state_dict().items():
        block, _, part = name.rpartition(".mlp.")
        if part == "gate.weight":
            state[name] = own
        elif part == "experts.gate_up_proj":
            halves = [state.pop(f"{block}.mlp.{half}_proj.weight", None) for half in ("gate", "up")]
            if all(half is not None for half in halves):
                state[name] = torch.cat(halves).expand(experts, -1, -1)
        elif part == "experts.down_proj":
            down = state.pop(f"{block}.mlp.down_proj.weight", None)
            if down is not None:
                state[name] = down.expand(experts, -1, -1)
    return state


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """Drop out what each attention and feed-forward block adds to the residual stream (not the
    embeddings), in training mode only: c-BTM's setting, for any family.

    By hooks: nothing of it is in the saved model.
    """

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        dropped = nn.functional.dropout(first, share, module.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    if share:
        for layer in model.model.layers:
            for name, block in layer.named_children():
                if name in ("self_attn", "mlp", "moe"):
                    block.register_forward_hook(drop)
