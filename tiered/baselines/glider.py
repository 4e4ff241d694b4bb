"""Glider's global score (arXiv:2410.07172): a query's cosine with what stands for each LoRA expert.

Embeddings are the Level-1 router's, or a sentence-embedding model's (eval.glider_encoder). There an
expert stands for its domains: for their descriptions, which some LLM or a person wrote
(eval.glider_descriptions), else for the beginnings of their router-split documents.

Shapes: B batch, T tokens, K experts, N texts, E embedding.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from tiered.branching import outside
from tiered.config import Config
from tiered.data import ProcessedData
from tiered.modeling_tiered import Level1Router
from tiered.partition import PartitionMap
from tiered.record import device_of
from tiered.store import UserError, atomic_folder, digest, is_complete, verify

Cosines = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, T) -> (B, T, K)
ROWS = 64  # documents of a domain that stand for it where nobody has described it
MOST_TOKENS = 512  # of a text that is embedded
FILE = "embeddings.safetensors"


@dataclass(frozen=True)
class Inside:
    """The model of all LoRA experts that routes them itself, and Glider's cosines of its tokens."""

    model: PreTrainedModel
    cosines: Cosines


def router_cosines(config: Config, router: Level1Router, experts: list[int]) -> Cosines:
    """Cosines by the Level-1 embedder: the query is what the router reads before it decides, the
    first router.context_tokens tokens, and for the positions among them what there is so far."""
    decides = config.router.context_tokens - 1

    def cosines(tokens: torch.Tensor) -> torch.Tensor:
        scores = router.scores(tokens)[..., experts]
        scores[:, decides:] = scores[:, decides : decides + 1]
        return scores

    return cosines


def sentence_cosines(
    config: Config, data: ProcessedData, partitions: PartitionMap, experts: list[int]
) -> Cosines:
    """Cosines by a sentence-embedding model: the query is the text of the first
    router.context_tokens tokens. Positions among them have none yet: their scores are 0, so that
    the local score alone decides."""
    encode = functools.partial(sentence_embeddings, *_encoder(config))
    described = domain_embeddings(config, data)
    of_experts = torch.stack(
        [sum(described[d] for d in partitions.members[k] if d in described) for k in experts]
    )
    of_experts = F.normalize(of_experts, dim=-1)  # (K, E)
    context = config.router.context_tokens

    def cosines(tokens: torch.Tensor) -> torch.Tensor:
        texts = data.tokenizer.batch_decode(tokens[:, :context].tolist())
        query = encode(texts) @ of_experts.T  # (B, K)
        scores = query.new_zeros(*tokens.shape, len(experts))
        scores[:, context - 1 :] = query[:, None]
        return scores.to(tokens.device)

    return cosines


@torch.inference_mode()
def sentence_embeddings(
    model: PreTrainedModel, tokenizer: object, texts: list[str]
) -> torch.Tensor:
    """Embeddings (N, E) of length 1, float32 on the CPU: the mean of the last layer over a text's
    own tokens."""
    read = tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=_length(model)
    )
    read = {n: read[n].to(model.device) for n in ("input_ids", "attention_mask")}
    mask = read["attention_mask"][..., None]
    hidden = model(**read).last_hidden_state.float()
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return F.normalize(mean, dim=-1).cpu()


def domain_embeddings(config: Config, data: ProcessedData) -> dict[str, torch.Tensor]:
    """Domain -> (E,) of length 1; kept in the store, by the encoder and the texts."""
    texts = _descriptions(config, data.domains) or {
        d: data.tokenizer.batch_decode(list(_beginnings(config, data, d))) for d in data.domains
    }
    name = digest([encoder_hash(config), texts, MOST_TOKENS])
    folder = config.store_dir / "descriptions" / name
    if is_complete(folder):
        verify(folder)
        return load_file(folder / FILE)
    model, tokenizer = _encoder(config)
    found = {}
    for domain, own in texts.items():
        parts = (own[i : i + 8] for i in range(0, len(own), 8))
        vectors = torch.cat([sentence_embeddings(model, tokenizer, part) for part in parts])
        found[domain] = F.normalize(vectors.mean(0), dim=-1)
    with atomic_folder(folder) as path:
        save_file(found, path / FILE, metadata={"format": "pt"})
    return found


def _beginnings(config: Config, data: ProcessedData, domain: str) -> Iterable[list[int]]:
    rows = data.rows(domain, "router", ROWS).input_ids
    if not len(rows):
        raise UserError(f"eval.glider_encoder: the router split of {domain} has no row to embed")
    return rows[:, : config.router.context_tokens].tolist()


def _descriptions(config: Config, domains: Iterable[str]) -> dict[str, list[str]]:
    """Domain -> its description, from a YAML file; empty where none is named."""
    path = config.eval.glider_descriptions
    if not path:
        return {}
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"eval.glider_descriptions: {path} cannot be read ({text})") from None
    # PyYAML reads the language code `no` as False; quoted it is text
    if not isinstance(value, dict) or not all(isinstance(t, str) for i in value.items() for t in i):
        raise UserError(f"eval.glider_descriptions: {path} is no mapping of domain to text")
    missing = sorted(set(domains) - value.keys())
    if missing:
        raise UserError(f"eval.glider_descriptions: {path} says nothing of {' '.join(missing)}")
    return {d: [value[d]] for d in domains}


def encoder_hash(config: Config) -> str:
    """Content hash of the sentence-embedding model and its tokenizer."""
    return _outside(config)[1]


def glider_inputs(config: Config, data: ProcessedData) -> list[object] | None:
    """What Glider's scores depend on beside the models and eval's own keys; None: the router's."""
    if not config.eval.glider_encoder:
        return None
    splits = {d: data.split_hash(d, "router") for d in data.domains}
    return [encoder_hash(config), _descriptions(config, data.domains) or splits]


def _outside(config: Config) -> tuple[Path, str]:
    wanted = (".json", ".txt", ".model", ".safetensors")
    return outside(config.eval.glider_encoder, "eval.glider_encoder", wanted)


def _encoder(config: Config) -> tuple[PreTrainedModel, object]:
    folder = _outside(config)[0]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(device_of(config))
    return model, AutoTokenizer.from_pretrained(folder)


def _length(model: PreTrainedModel) -> int:
    return min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))
