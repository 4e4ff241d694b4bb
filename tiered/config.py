"""The configuration: one YAML file per experiment, one grammar for all scripts.

    python run_clm.py configs/quickstart/n16.yaml partition.index=3 training.learning_rate=5e-4

* `base:` names a file (or a list) that is merged first; mappings merge deeply, the child wins.
* `a.b=value` overrides come last and apply to every config file of the call.
* A default lives in one place, the dataclass field below, beside its meaning and unit.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from safetensors import SafetensorError

from tiered import stopping
from tiered.domains import CODES
from tiered.store import UserError, read_sealed

ROUTED_INSIDE = ("base", "phatgoose", "glider", "average_activation", "arrow")  # of LoRA experts
MAX_BASE_LEVELS = 3
_NOVEL_TOO = ("tokenizer.train_domains", "data.tokens_per_domain")  # may name novel domains
FAMILIES = ("monet", "llama", "moe", "mixtral", "demix", "domain_token", "lora")
HAVE_EXPERTS = ("monet", "moe")  # their experts' routing is read, and they are purged
SHARED_TRUNK = ("demix", "domain_token")  # one training makes the models of all partitions
SPLITS = ("train", "validation", "test", "router", "holdout", "calibration")
CANARY = "canary"  # a split of rows of random tokens, where data.canaries asks for them
OPERATIONS = (  # of unlearning, in the order of tables
    *("original", "gold", "gold-recluster"),
    *("delete-S0", "delete-S1", "delete-S2", "sisa"),
    *("mask-skew", "mask-topshare", "mask-mass", "mask-random", "mask-massmatched", "reinit"),
    *("fine-tune", "l1-sparse", "GA", "GradDiff", "NPO", "SimNPO", "task-vector"),
    *("RMU", "UNDIAL", "SEUF"),
)
# TrainingArguments that this project sets itself, and where the user sets them instead.
RESERVED_ARGUMENTS = {
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "output_dir",
    "run_name": "name",
    "use_cpu": "device",
    "resume_from_checkpoint": "(none: the newest complete checkpoint is always resumed)",
    "max_steps": "training.num_train_epochs",
    "per_device_eval_batch_size": "eval.batch_rows",
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end", "do_train"),
        "(none: training sees no evaluation data; eval_det_router.py scores the result)",
    ),
    "save_strategy": "training.save_steps",
    "do_eval": "(none)",
    "do_predict": "(none)",
    "train_sampling_strategy": "(none: the order is a function of the seed)",
    "remove_unused_columns": "(none)",
    "disable_tqdm": "(none: bars are drawn on a terminal only)",
}


def opt(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A config field: its default, its meaning with unit, and the allowed values."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """Raw text -> cleaned, tokenised, split documents per domain (process_dset.py)."""

    source: str = opt(
        "data/sample", "hub dataset name or local folder (c4 layout, or a folder per domain)"
    )
    revision: str = opt("", "hub revision (commit or tag) to pin; empty: the default branch")
    config_name: str = opt("{domain}", "load_dataset configuration of a domain")
    source_split: str = opt("train", "split of the source that is read")
    text_column: str = opt("text", "column that holds the text")
    text_unit: str = opt(
        "file", "what one document is in .txt sources", choices=("file", "paragraph", "line")
    )
    domains: tuple[str, ...] = opt(
        CODES, "configured domains; fixes partition map, indices and seeds"
    )
    added_domains: tuple[str, ...] = opt(
        (),
        "domains that came later: a partition of its own for each, after the others; what others"
        " share (tokenizer, embedder, seed LM) is not trained on them, so nothing of it changes",
    )
    novel_domains: tuple[str, ...] = opt(
        (),
        "domains that no model is trained on: eval_det_router.py scores them beside the others"
        " (tokenizer.train_domains may name them all the same)",
    )
    exclude_domains: tuple[str, ...] = opt(
        (), "domains whose data is left out; nothing else changes"
    )
    exclude_documents: str = opt(
        "",
        "file of train documents left out of training, `domain/document_id` a line; nothing else"
        " changes",
    )
    first_document: int = opt(0, "first raw record of a domain that is read", low=0)
    num_documents: int = opt(0, "raw records read per domain; 0: all", low=0)
    normalize: str = opt("NFC", "Unicode normal form", choices=("NFC", "NFKC", "none"))
    strip_control: bool = opt(True, "remove control characters other than newline and tab")
    min_characters: int = opt(200, "shortest document kept, in characters", low=0)
    min_script_share: float = opt(
        0.5, "least share of letters in the domain's script; 0: no filter", low=0, high=1
    )
    exact_duplicates: bool = opt(True, "drop exact duplicates inside a domain")
    near_duplicate_threshold: float = opt(
        0.8,
        "estimated Jaccard similarity from which a near duplicate is dropped; 0: off",
        low=0,
        high=1,
    )
    max_unk_share: float = opt(
        0.5,
        "largest share of unknown tokens of a kept document (tokenizers with [UNK])",
        low=0,
        high=1,
    )
    max_broken_records: int = opt(
        100, "records per domain that may be unreadable before an error", low=0
    )
    block_size: int = opt(128, "tokens per block and per scored row", low=4)
    separate_documents: bool = opt(
        False,
        "positions and attention restart at each document of a block (off: published behaviour)",
    )
    tokens_per_domain: int | dict[str, int] = opt(
        0, "training tokens per domain, one number or a map; 0: all", low=0
    )
    split_shares: dict[str, float] = opt(
        {
            **{"train": 60.0, "validation": 4.0, "test": 8.0},
            **{"router": 8.0, "holdout": 16.0, "calibration": 4.0},
        },
        "share of documents per split, in percent; sums to 100",
    )
    split_seed: int = opt(0, "salt of the hash that assigns documents to splits", low=0)
    repeats: dict[int, int] = opt(
        {}, "times -> member rows per domain that occur that often in train"
    )
    canaries: dict[int, int] = opt(
        {}, "times -> rows of random tokens per domain that occur that often in train (exposure)"
    )
    canary_references: int = opt(
        99,
        "rows of random tokens per domain that train never holds, beside canaries",
        low=1,
    )
    repeat_domains: tuple[str, ...] = opt((), "domains with repeated rows and canaries; empty: all")
    num_proc: int = opt(2, "worker processes (never changes a result)", low=1)
    task: str = opt(
        "all",
        "what this call does: read (source files into shards), merge (shards into cleaned text, and"
        " the tokenizer), tokenise, or all that is left (never changes a result)",
        choices=("all", "read", "merge", "tokenise"),
    )
    task_count: int = opt(
        1, "calls, on any machines, that share the files to read or the domains to tokenise", low=1
    )
    task_index: int = opt(0, "which of them this is, from 0", low=0)
    arriving: float = opt(
        0.0,
        "task=read: source files still arrive; read each as it is whole, until no file has come or"
        " grown for so many seconds (0: read what is there)",
        low=0,
    )
    processed_dir: str = opt("data/processed", "where processed data is kept, by hash")


@dataclass(frozen=True)
class TokenizerConfig:
    """One tokenizer shared by all partitions."""

    name: str = opt("bpe", "`bpe` (trained on the router split), `bytes`, a hub name, or a folder")
    revision: str = opt("", "hub revision to pin")
    vocab_size: int = opt(4096, "size of a trained bpe vocabulary, in tokens", low=260)
    train_domains: tuple[str, ...] = opt(
        (), "domains whose router split trains bpe; empty: data.domains, excluded ones too"
    )
    train_documents: int = opt(
        0, "documents of each of their router splits that train bpe, at most; 0: all", low=0
    )


@dataclass(frozen=True)
class PartitionConfig:
    """Level 1: which partition a domain or document belongs to."""

    method: str = opt(
        "language",
        "how the partitions are made; cluster: balanced k-means on router.embedder's vectors",
        choices=("language", "family", "random_language", "random", "cluster"),
    )
    n: int = opt(1, "number of partitions", low=1)
    index: tuple[int, ...] = opt(
        (), "partitions this call trains; empty: all, one after another", low=0
    )
    seed: int = opt(0, "seed of random_language, random and cluster", low=0)
    fit_documents: int = opt(
        100_000,
        "router-split documents per domain that clusters are fitted on, at most (their vectors are"
        " held); others go to the nearest centre",
        low=1,
    )


@dataclass(frozen=True)
class RouterConfig:
    """Level 1: deterministic router (prefix embedding against centroids)."""

    embedder: str = opt(
        "transformer",
        "prefix embedding: a small causal LM's hidden states, untrained hashed n-grams of tokens,"
        " or tf-idf of character n-grams with a truncated SVD",
        choices=("transformer", "hashed_ngrams", "tfidf"),
    )
    hidden_size: int = opt(64, "embedder width", low=2)
    num_hidden_layers: int = opt(1, "embedder layers", low=1)
    num_attention_heads: int = opt(2, "embedder heads", low=1)
    num_train_epochs: float = opt(1.0, "passes over the router split", low=1e-6)
    batch_rows: int = opt(16, "rows per optimizer step", low=1)
    learning_rate: float = opt(1e-2, "peak learning rate of the embedder (AdamW)", low=0)
    tokens_per_domain: int = opt(0, "router-split tokens used per domain; 0: all", low=0)
    ngram_buckets: int = opt(4096, "hash buckets of hashed_ngrams", low=2)
    ngram_max: int = opt(2, "longest token n-gram of hashed_ngrams", low=1)
    tfidf_buckets: int = opt(32768, "hash buckets of tfidf", low=2)
    tfidf_analyzer: str = opt(
        "char",
        "terms of tfidf: character n-grams; or c-BTM's words, two letters or more, in lower case,"
        " without English stop words and numbers (wrong for scripts without spaces)",
        choices=("char", "word"),
    )
    tfidf_ngram_max: int = opt(3, "longest character n-gram of tfidf", low=1)
    tfidf_min_df: int = opt(2, "documents that must hold an n-gram of tfidf, at least", low=1)
    tfidf_dimensions: int = opt(100, "dimensions kept by the SVD of tfidf", low=1)
    tfidf_documents: int = opt(
        2000, "documents per domain that the SVD of tfidf is fitted on, at most (all held)", low=1
    )
    scope: str = opt("token", "routing used outside of eval", choices=("oracle", "token", "sample"))
    context_tokens: int = opt(32, "tokens that decide sample routing", low=1)
    early_positions: str = opt(
        "token",
        "positions before context_tokens under sample routing: routed by token, or not scored",
        choices=("token", "skip"),
    )


@dataclass(frozen=True)
class ModelConfig:
    """Level 2: the model one partition trains (Monet, arXiv:2412.04139; or a plain one)."""

    type: str = opt(
        "monet",
        "model family (tiered/methods.py); llama: dense; moe: OLMoE's mixture of feed-forward"
        " experts and its variants; mixtral: transformers' one;"
        " of one trunk that all partitions share, demix: a feed-forward expert per partition,"
        " domain_token: a token per partition before every row; lora: low-rank updates of a frozen"
        " seed LM (init_from)",
        choices=FAMILIES,
    )
    init_from: str = opt(
        "",
        "what a partition's model starts from; empty: random weights; seed: the seed LM (seed_lm);"
        " or a folder or hub name of a model of this shape",
    )
    vocab_size: int = opt(0, "rows of the embedding; 0: the tokenizer's size", low=0)
    hidden_size: int = opt(64, "width d", low=2)
    num_hidden_layers: int = opt(2, "layers", low=1)
    num_attention_heads: int = opt(2, "attention heads", low=1)
    num_key_value_heads: int = opt(0, "key/value heads; 0: as attention heads", low=0)
    head_dim: int = opt(0, "width of a head; 0: hidden_size // num_attention_heads", low=0)
    attn_implementation: str = opt(
        "sdpa",
        "attention kernel of transformers",
        choices=("sdpa", "eager", "flash_attention_2"),
    )
    max_position_embeddings: int = opt(0, "longest input, tokens; 0: data.block_size", low=0)
    rope_theta: float = opt(10000.0, "rotary base", low=1)
    rms_norm_eps: float = opt(1e-6, "epsilon of RMSNorm", low=0)
    initializer_range: float = opt(0.02, "standard deviation of initial weights", low=0)
    tie_word_embeddings: bool = opt(False, "share embedding and head")
    moe_dim: int = opt(8, "expert width m", low=2)
    moe_heads: int = opt(4, "router heads H", low=1)
    moe_experts: int = opt(16, "experts per axis E (E^2 experts per layer)", low=1)
    moe_topk: int = opt(4, "experts kept per head and axis on average", low=1)
    moe_groups: int = opt(2, "consecutive layers that share a router", low=1)
    moe_decompose: str = opt("vertical", "expert decomposition", choices=("vertical", "horizontal"))
    uniformity_loss_coef: float = opt(1e-3, "weight of the uniformity loss", low=0)
    ambiguity_loss_coef: float = opt(1e-3, "weight of the ambiguity loss", low=0)
    freeze_router: bool = opt(
        False, "monet, moe: the routers stay at their random start (an ablation)"
    )
    intermediate_size: int = opt(
        0,
        "all but monet: feed-forward width, of moe and mixtral one expert's; 0: 8/3 of hidden_size"
        " (moe: that over num_experts_per_tok), to a multiple of 8",
        low=0,
    )
    num_experts: int = opt(8, "moe, mixtral: experts per layer", low=1)
    num_experts_per_tok: int = opt(2, "moe, mixtral: experts per token (a tree's leaves)", low=1)
    norm_topk_prob: bool = opt(False, "moe: weights of a token's experts sum to 1")
    num_shared_experts: int = opt(0, "moe: experts that every token uses, ungated", low=0)
    num_dense_layers: int = opt(0, "moe: leading layers with one feed-forward block", low=0)
    dense_intermediate_size: int = opt(
        0, "moe: its width; 0: that of all experts of a token together", low=0
    )
    router_aux_loss_per_layer: bool = opt(
        False,
        "moe: that loss is of every layer (arXiv:2101.03961); off: of the sum of all layers, as in"
        " transformers, where layers may take turns",
    )
    router_z_loss_coef: float = opt(1e-3, "moe: weight of the router z-loss", low=0)
    balance_update_rate: float = opt(
        0.0,
        "moe: loss-free balancing, what a step adds to an expert's bias (published: 1e-3, with"
        " router_aux_loss_coef 0); 0: none",
        low=0,
    )
    routing_stream_size: int = opt(
        0, "moe: width Z of a routing stream with one gate for all layers; 0: none", low=0
    )
    routing_offset_coef: float = opt(
        0.1, "moe: weight of the layers' squared offsets to that gate", low=0
    )
    expert_bank_layers: int = opt(1, "moe: consecutive layers that use the same experts", low=1)
    tree_depth: int = opt(
        0, "moe: depth of a tree whose edges are the experts (num_experts of them); 0: none", low=0
    )
    tree_branching: int = opt(2, "moe: branches of a tree's node", low=2)
    lora_rank: int = opt(16, "lora: rank of the updates", low=1)
    lora_alpha: float = opt(1.0, "lora: their scale is lora_alpha / lora_rank", low=0)
    lora_gate_steps: int = opt(100, "lora: steps in which the gates are trained", low=1)
    lora_gate_learning_rate: float = opt(5e-3, "lora: peak learning rate of the gates", low=0)
    router_aux_loss_coef: float = opt(
        1e-2, "moe, mixtral: weight of the load-balancing loss", low=0
    )


@dataclass(frozen=True)
class SeedConfig:
    """Branch-train-merge (arXiv:2208.03306): the seed LM of model.init_from: seed."""

    type: str = opt(
        "",
        "family; empty: model.type (of lora: llama); llama for model.type mixtral: upcycling",
        choices=("", *FAMILIES),
    )
    split: str = opt(
        "train",
        "documents it is trained on; train: seed_lm.share of them, which partitions then leave out",
        choices=("train", "router"),
    )
    share: float = opt(0.5, "its share of the training documents (split train)", low=0, high=1)
    num_train_epochs: float = opt(0.0, "passes over them; 0: as training", low=0)
    learning_rate: float = opt(0.0, "its peak learning rate; 0: as training", low=0)
    domains: tuple[str, ...] = opt((), "domains that it is trained on; empty: all")


@dataclass(frozen=True)
class TrainingConfig:
    """Training of one partition model; every TrainingArguments field is a key too."""

    split: str = opt("train", "split whose documents are trained on", choices=("train", "router"))
    documents: tuple[float, ...] = opt(
        (0.0, 1.0),
        "interval of [0, 1) of the documents used, each at a place that its id gives",
        low=0,
        high=1,
    )
    dropout: float = opt(
        0.0, "share dropped of what every attention and feed-forward block adds", low=0, high=0.99
    )
    schedule: str = opt(
        "constant_steps",
        "constant_steps: the batch shrinks with the partition; constant_batch: the step count does",
        choices=("constant_steps", "constant_batch"),
    )
    min_batch_rows: int = opt(1, "floor of the constant_steps batch, rows", low=1)
    routing_steps: int = opt(
        0,
        "monet, moe: every so many steps, note what each expert does with validation rows (the"
        " report draws it); 0: never",
        low=0,
    )
    expert_devices: int = opt(
        1,
        "moe: GPUs that the experts of every layer are shared out over while a model is trained by"
        " one process; the rest of it is on the first (on a CPU: parts that it holds)",
        low=1,
    )
    shard: bool = opt(
        False,
        "under torchrun, weights, gradients and optimizer state of a partition's model are split"
        " over the processes (FSDP2) instead of copied to each (DDP)",
    )
    balanced: bool = opt(
        False,
        "every optimizer step holds as many rows of each domain of the partition, and an epoch is a"
        " pass over the largest (demix and domain_token: always, of each partition)",
    )
    added_from: str = opt(
        "",
        "what the model of an added domain starts from; empty: what the others start from;"
        " nearest: the partition's that the domain's validation rows make most probable (DEMix's"
        " domain-adaptive pretraining; of a shared trunk only the partition's own part is trained)",
        choices=("", "nearest"),
    )
    added_learning_rate: float = opt(
        0.1,
        "share of learning_rate at which a model that starts from the nearest one learns",
        low=0,
    )
    per_device_train_batch_size: int = opt(16, "rows per device and micro-batch at n = 1", low=1)
    gradient_accumulation_steps: int = opt(
        1, "micro-batches per optimizer step, of all processes together", low=1
    )
    num_train_epochs: float = opt(1.0, "passes over the partition's blocks", low=1e-6)
    learning_rate: float = opt(4e-3, "peak learning rate", low=0)
    lr_scheduler_type: str = opt("cosine", "learning-rate schedule")
    warmup_steps: float = opt(0.05, "warm-up: steps, or a share of all steps if below 1", low=0)
    weight_decay: float = opt(0.0, "AdamW weight decay", low=0)
    adam_beta2: float = opt(0.95, "AdamW second-moment decay", low=0, high=1)
    max_grad_norm: float = opt(1.0, "gradient norm at which gradients are clipped", low=0)
    logging_steps: int = opt(50, "optimizer steps between lines of metrics.jsonl", low=1)
    save_steps: int = opt(0, "optimizer steps between resume checkpoints; 0: none", low=0)
    num_proc: int = opt(
        1, "models trained at the same time, a process each (CPU; never changes a result)", low=1
    )
    report_to: tuple[str, ...] = opt((), "trackers besides metrics.jsonl: wandb, tensorboard")
    arguments: Mapping[str, Any] = opt({}, "(filled in) other TrainingArguments set in the file")


@dataclass(frozen=True)
class EvalConfig:
    """Utility and routing quality of the tiered model (eval_det_router.py)."""

    split: str = opt("test", "split that is scored", choices=SPLITS)
    rows_per_domain: int = opt(64, "scored rows per domain, one per document; 0: all", low=0)
    batch_rows: int = opt(16, "rows per forward pass", low=1)
    scopes: tuple[str, ...] = opt(
        ("oracle", "token", "sample"), "routing scopes", choices=("oracle", "token", "sample")
    )
    mixtures: tuple[str, ...] = opt(
        (),
        "mixtures of all partition models' probabilities (n forward passes): weights by distance"
        " (c-BTM), Bayes posteriors (DEMix, BTM), equal; hindsight: the row's best partition, a"
        " bound; parameter_average: one model of mean weights; of model.type lora, experts chosen"
        " in every linear map (one forward pass): base (none of them),"
        " phatgoose, glider, average_activation, arrow",
        choices=(
            *("distance", "bayes_uniform", "bayes_updating", "bayes_cached"),
            *("average", "hindsight", "parameter_average"),
            *ROUTED_INSIDE,
        ),
    )
    temperatures: tuple[float, ...] = opt(
        (0.1,), "temperatures T of the distance mixture, exp(-distance^power / T)", low=1e-9
    )
    top_k: tuple[int, ...] = opt(
        (0,), "partitions mixed by distance and Bayes, the heaviest ones; 0: all", low=0
    )
    distance_power: int = opt(
        2, "power of the distance (c-BTM's public code has 4)", choices=(2, 4)
    )
    routing_fraction: float = opt(
        1.0, "share of a row after which distance weights are kept", low=1e-6, high=1
    )
    likelihood: str = opt(
        "cumulative",
        "evidence of Bayes posteriors: all earlier tokens, or the last one (DEMix's public code)",
        choices=("cumulative", "last_token"),
    )
    experts_per_token: int = opt(
        2, "phatgoose, glider, average_activation, arrow: experts of a token; 0: all", low=0
    )
    glider_threshold: float = opt(
        0.8, "glider: cosine from which a query is taken for one that an expert was trained on"
    )
    glider_alphas: tuple[float, ...] = opt(
        (100.0, 3.0), "glider: weight of the global score from the threshold on, and below", low=0
    )
    glider_encoder: str = opt(
        "",
        "glider: folder or hub name of a sentence-embedding model (mean of the last layer) that"
        " compares queries with experts; empty: the Level-1 embedder",
    )
    glider_descriptions: str = opt(
        "",
        "glider_encoder: YAML file, domain to a description that is embedded for its expert, as an"
        " LLM or a person wrote it; empty: beginnings of its router-split documents",
    )
    expert_rows: int = opt(
        0, "monet, moe: rows per domain whose routing is recorded for the expert pages", low=0
    )
    expert_ablations: int = opt(
        0, "experts per layer, the busiest, that are left out one at a time on those rows", low=0
    )
    flow_tokens: int = opt(24, "tokens per domain whose way through the layers is drawn", low=1)
    flow_texts: dict[str, str] = opt(
        {},
        "expert pages: name -> a text of yours, at most data.block_size tokens of it, whose way"
        " through the layers is drawn as well",
    )
    cached_rows: int = opt(100, "validation rows that make the cached prior", low=1)
    context_lengths: tuple[int, ...] = opt(
        (1, 2, 4, 8, 16, 32, 64),
        "prefix lengths at which routing accuracy is read, tokens; those beyond a row are left out",
        low=1,
    )


@dataclass(frozen=True)
class UnlearnConfig:
    """Removal of domains and its measurement (unlearn_benchmarks.py)."""

    forget: tuple[str, ...] = opt(
        (),
        "forget domains, removed one at a time; or files of train documents of one domain,"
        " `domain/document_id` a line",
    )
    operations: tuple[str, ...] = opt(
        (
            *("original", "gold", "delete-S0", "delete-S1", "delete-S2", "sisa"),
            *("mask-skew", "mask-random", "mask-massmatched"),
        ),
        "operations that are run, in this order; gold-recluster: a gold whose cluster map is fitted"
        " anew without the domain",
        choices=OPERATIONS,
    )
    gold_seeds: int = opt(
        1,
        "golds, each of another seed, the first of the run's: three or more span an envelope",
        low=1,
    )
    forget_rows: int = opt(200, "member and test rows of the forget domain, at most", low=2)
    holdout_rows: int = opt(
        400,
        "holdout rows of the forget domain, at most; TPR at 1 % FPR needs 300",
        low=2,
    )
    retain_rows: int = opt(32, "member and test rows of every other domain", low=1)
    bootstrap_samples: int = opt(1000, "resamples of an interval, shuffles of a test", low=10)
    attacks: tuple[str, ...] = opt(
        ("LOSS", "zlib", "Min-K", "Min-K++", "reference"),
        "membership attacks; neighbourhood, ReCaLL and GradNorm cost passes of their own",
        choices=(
            *("LOSS", "zlib", "Min-K", "Min-K++", "reference"),
            *("neighbourhood", "ReCaLL", "GradNorm"),
        ),
    )
    max_overlap: float = opt(
        0.5,
        "holdout rows and members are left out of whose token 13-grams more than this share stand"
        " in the domain's train split (a member's: in another document of it)",
        low=0,
        high=1,
    )
    min_k_share: float = opt(0.2, "share of a row's tokens in Min-K and Min-K++", low=0, high=1)
    neighbours: int = opt(4, "neighbours of a row in the neighbourhood attack", low=1)
    neighbour_swaps: float = opt(0.15, "share of tokens a neighbour swaps", low=0, high=1)
    grad_norm_rows: int = opt(200, "member and holdout rows of GradNorm, at most each", low=2)
    target: str = opt(
        "", "--target: folder of a causal LM that is measured in place of a run's operations"
    )
    gold: str = opt("", "--gold: with a target, the model retrained without the forget set")
    original: str = opt(
        "",
        "--original: with a target, the model before unlearning; without it the power of attacks"
        " and every change are undefined",
    )
    rows: str = opt("", "with a target: file of rows to score (docs/unlearning.md)")
    single_run: str = opt(
        "",
        "folder of a finished run with one domain per partition on the same data: what a domain's"
        " own model reaches, for the model utility (empty: none is computed)",
    )
    verbatim_rows: int = opt(
        100,
        "member (most repeated first) and holdout rows that are continued from their first half,"
        " at most each; 0: none",
        low=0,
    )
    mask_ratio: float = opt(
        2.0,
        "mask-skew: an expert is the domain's from so many times every other domain's weight"
        " (arXiv:2412.04139)",
        low=1,
    )
    mask_topshare: float = opt(
        5.0, "mask-topshare: percent of experts purged, those most the domain's", low=0, high=100
    )
    mask_mass: float = opt(
        0.5, "mask-mass: share of the domain's routing mass that is purged", low=0, high=1
    )
    random_masks: int = opt(10, "draws of the random controls of mask-skew, each kind", low=1)
    learning_rate: float = opt(5e-4, "gradient methods: constant learning rate (AdamW)", low=0)
    learning_rates: dict[str, float] = opt(
        {}, "gradient methods: operation -> learning rate, where it is another", low=0
    )
    max_steps: int = opt(100, "gradient methods: optimizer steps at most, per partition", low=1)
    batch_rows: int = opt(8, "gradient methods: forget and retain blocks per step, each", low=1)
    check_steps: int = opt(
        5,
        "gradient methods: steps between checks of the early stop (AUC at gold's, RA lost)",
        low=1,
    )
    check_rows: int = opt(64, "gradient methods: member, validation, retain rows of a check", low=2)
    max_retain_loss: float = opt(
        0.02, "gradient methods: accuracy on retained members that may be lost", low=0, high=1
    )
    retain_weight: float = opt(
        1.0,
        "GradDiff, NPO, SimNPO, UNDIAL, SEUF: weight of the retain loss, where there is anything to"
        " retain",
        low=0,
    )
    compartments: bool = opt(
        False, "measure how far partitions and experts keep domains apart, once per run"
    )
    sequence: tuple[str, ...] = opt(
        (), "compartments: domains that are removed one after another, in this order"
    )
    robustness: tuple[str, ...] = opt(
        (),
        "what may come back: relearn (fine-tuning on a share of the members), int8 and int4"
        " (rounded weights)",
        choices=("relearn", "int8", "int4"),
    )
    relearn_share: float = opt(0.05, "share of the members that is relearnt", low=0, high=1)
    relearn_steps: int = opt(64, "last step of the relearn curve", low=1)
    relearn_learning_rate: float = opt(5e-4, "constant learning rate of relearning (AdamW)", low=0)
    l1_weight: float = opt(1e-5, "l1-sparse: first weight of the L1 norm, falling to 0", low=0)
    npo_beta: float = opt(0.1, "NPO: inverse temperature beta", low=1e-9)
    simnpo_beta: float = opt(2.5, "SimNPO: inverse temperature beta", low=1e-9)
    simnpo_gamma: float = opt(0.0, "SimNPO: margin gamma")
    task_vector_scale: float = opt(
        1.0, "task-vector: share of the vector that is subtracted", low=0
    )
    rmu_layer: int = opt(0, "RMU: layers whose output is steered; 0: half of them", low=0)
    rmu_steering: float = opt(
        5.0, "RMU: length of the target, in lengths of the original state", low=0
    )
    rmu_retain_weight: float = opt(100.0, "RMU: weight of the retained states' distance", low=0)
    undial_strength: float = opt(
        10.0, "UNDIAL: what is taken off the right token's logit, nats", low=0
    )
    seuf_experts: int = opt(8, "SEUF: experts per router group that are trained", low=1)
    seuf_anchor_weight: float = opt(1.0, "SEUF: weight of the routers' anchor", low=0)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = opt("", "experiment name; its run folder is output_dir/name")
    output_dir: str = opt("runs", "folder of run folders")
    seed: int = opt(0, "the one seed; every generator is derived from it", low=0)
    threads: int = opt(
        0, "CPU threads of torch, recorded; 0: all cores (not reproducible elsewhere)", low=0
    )
    device: str = opt("auto", "auto: cuda when present, else cpu", choices=("auto", "cpu", "cuda"))
    overwrite: bool = opt(False, "redo finished stages")
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed_lm: SeedConfig = field(default_factory=SeedConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of this experiment."""
        return Path(self.output_dir) / self.name

    @property
    def store_dir(self) -> Path:
        """Artefacts shared by experiments, addressed by the hash of their inputs."""
        return Path(self.output_dir) / ".store"

    @property
    def all_domains(self) -> tuple[str, ...]:
        """Configured domains that are trained on, those that were added last."""
        return (*self.data.domains, *self.data.added_domains)

    @property
    def present_domains(self) -> tuple[str, ...]:
        """Configured domains whose data is trained on."""
        return tuple(d for d in self.all_domains if d not in self.data.exclude_domains)

    @property
    def processed_domains(self) -> tuple[str, ...]:
        """Domains whose data is used: trained on, or novel."""
        return (*self.present_domains, *self.data.novel_domains)

    @property
    def num_partitions(self) -> int:
        """Partitions, those of added domains included."""
        return self.partition.n + len(self.data.added_domains)

    def without(self, *domains: str) -> "Config":
        """The same experiment with these domains' data left out."""
        excluded = tuple(d for d in self.all_domains if d in {*self.data.exclude_domains, *domains})
        return dataclasses.replace(
            self, data=dataclasses.replace(self.data, exclude_domains=excluded)
        )


class _Loader(yaml.SafeLoader):
    """YAML in which `no` is a language code and `3e-4` a number (YAML 1.2 scalars)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping in which no key stands twice (YAML would silently keep the last)."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"key `{key.value}` stands twice, line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping of one YAML file; scalars stay text until they are cast to a field's type."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: config file not found") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: a config is a mapping, found {type(value).__name__}")
    return value


def merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of two mappings; the child wins, lists are replaced, `{}` empties a map."""
    sections = {f.name for f in fields(Config) if is_dataclass(f.type)}
    merged = dict(base)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        both = both and (bool(value) or key in sections)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_with_base(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file merged onto its `base:` files; keys are checked file by file."""
    path = Path(path)
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"{path}: `base:` leads back to itself ({' -> '.join(map(str, chain))})")
    if len(chain) > MAX_BASE_LEVELS:
        raise UserError(f"{path}: more than {MAX_BASE_LEVELS} levels of `base:`")
    content = read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases or []
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise UserError(f"{path}: `base:` is a file name or a list of them, found {bases!r}")
    check_keys(content, Config, str(path))
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_with_base(path.parent / base, (*chain, path)))
    return merge(merged, content)


@functools.cache
def training_argument_names() -> frozenset[str]:
    """Names of the fields of transformers.TrainingArguments."""
    from transformers import TrainingArguments  # costs seconds: only when such a key occurs

    return frozenset(f.name for f in fields(TrainingArguments) if f.init)


def valid_keys(schema: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """All full keys (`data.block_size`) of a schema with their fields."""
    keys = {}
    for f in fields(schema):
        if is_dataclass(f.type):
            keys |= valid_keys(f.type, f"{prefix}{f.name}.")
        elif f.name != "arguments":
            keys[prefix + f.name] = f
    return keys


def check_keys(content: Mapping[str, Any], schema: type, origin: str, prefix: str = "") -> None:
    """Raise UserError for a key the schema does not know, with the nearest one it does."""
    names = {f.name: f for f in fields(schema) if f.name != "arguments"}
    for key, value in content.items():
        full = f"{prefix}{key}"
        if key in names and is_dataclass(names[key].type):
            if not isinstance(value, Mapping):
                raise UserError(f"{origin}: {full} is a section (a mapping), found {value!r}")
            check_keys(value, names[key].type, origin, f"{full}.")
        elif key not in names:
            if schema is TrainingConfig and key in RESERVED_ARGUMENTS:
                raise UserError(f"{origin}: {full} is not set here; use {RESERVED_ARGUMENTS[key]}")
            if schema is TrainingConfig and key in training_argument_names():
                continue
            raise UserError(f"{origin}: unknown key `{full}`{_nearest(full, schema)}")


def _nearest(full: str, schema: type) -> str:
    known = list(valid_keys(Config)) + [f.name for f in fields(Config)]
    if schema is TrainingConfig:
        known += [f"training.{name}" for name in training_argument_names()]
    matches = difflib.get_close_matches(full, known, n=1, cutoff=0.0)
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == full.rsplit(".", 1)[-1]]
    return f"; did you mean `{(same_leaf or matches)[0]}`?"


def cast(value: Any, kind: Any, key: str) -> Any:
    """The value as the field's type; raises UserError with key, value and what is allowed."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        mapping = isinstance(value, Mapping) or (isinstance(value, str) and value.startswith("{"))
        chosen = [a for a in arguments if (get_origin(a) is dict) == mapping]
        return cast(value, chosen[0], key)
    if origin is dict:
        value = _parse_inline(value, key) if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: expected a mapping, found {value!r}")
        return {
            cast(k, arguments[0], key): cast(v, arguments[1], f"{key}.{k}")
            for k, v in value.items()
        }
    if origin is tuple:
        if isinstance(value, str):
            value = _parse_inline(value, key) if value.startswith("[") else value.split(",")
        value = [] if value is None or value == [""] else value
        if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: expected a list, found {value!r}")
        return tuple(cast(v, arguments[0], key) for v in value)
    return _cast_scalar(value, kind, key)


def _parse_inline(value: str, key: str) -> Any:
    try:
        return yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"{key}: cannot read {value!r} as a list or mapping") from None


def _cast_scalar(value: Any, kind: type, key: str) -> Any:
    if isinstance(value, (list, tuple, Mapping)):
        raise UserError(f"{key}: expected {kind.__name__}, found {value!r}")
    text = "" if value is None else str(value).strip()
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
    except (KeyError, ValueError):
        allowed = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{key}: expected {allowed}, found {text!r}") from None
    return text


def _check_range(value: Any, f: dataclasses.Field, key: str) -> None:
    values = value.values() if isinstance(value, dict) else value
    for item in values if isinstance(value, (tuple, dict)) else [value]:
        choices, low, high = (f.metadata.get(k) for k in ("choices", "low", "high"))
        if choices and item not in choices:
            raise UserError(f"{key}: {item!r} is not one of {', '.join(map(str, choices))}")
        if (low is not None and item < low) or (high is not None and item > high):
            limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise UserError(f"{key}: {item!r} is out of range ({limits})")


def build(schema: type, content: Mapping[str, Any], prefix: str = "") -> Any:
    """The frozen dataclass of a mapping whose keys were checked."""
    values: dict[str, Any] = {}
    for f in fields(schema):
        key = f"{prefix}{f.name}"
        if is_dataclass(f.type):
            values[f.name] = build(f.type, content.get(f.name, {}), f"{key}.")
        elif f.name == "arguments":
            own = {g.name for g in fields(schema)}
            extra = {k: v for k, v in content.items() if k not in own}
            values["arguments"] = _training_arguments(extra)
        elif f.name in content:
            values[f.name] = cast(content[f.name], f.type, key)
            _check_range(values[f.name], f, key)
    return schema(**values)


def _training_arguments(extra: dict[str, Any]) -> dict[str, Any]:
    """Other TrainingArguments, cast to the type their own dataclass states."""
    if not extra:
        return {}
    from transformers import TrainingArguments

    kinds = {f.name: f.type for f in fields(TrainingArguments)}
    values = {}
    for name, value in extra.items():
        options = [a for a in (get_args(kinds[name]) or (kinds[name],)) if a in (bool, int, float)]
        values[name] = value
        if isinstance(value, str) and options:
            values[name] = _cast_first(value, options, f"training.{name}")
    return values


def _cast_first(value: str, kinds: list[type], key: str) -> Any:
    for kind in kinds:
        try:
            return _cast_scalar(value, kind, key)
        except UserError:
            if kind is kinds[-1]:
                raise
    return value


def plain_name(key: str, name: str, taken: tuple[str, ...] = ()) -> str:
    """A name that a folder gets; UserError unless every shell takes it as one, in its place."""
    if not re.fullmatch(r"[\w+][\w.+-]*", name) or len(name.encode()) > 100:
        raise UserError(
            f"{key}: {name!r} must be a plain name of at most 100 letters, digits and . _ + -"
        )
    if name in taken:
        raise UserError(f"{key}: {name!r} is the name of something else in that folder")
    return name


def check(config: Config) -> Config:
    """Raise UserError where fields contradict one another; return the config."""
    data = config.data
    if not config.name:
        raise UserError("name: an experiment needs a name (its run folder)")
    plain_name("name", config.name, ("report",))  # of several runs, beside them
    named = (*config.all_domains, *data.novel_domains)
    for code in named:  # it names folders, columns, axes
        plain_name("data.domains", code, ("tokenizer", "manifest.json"))
    if len(set(named)) != len(named) or not data.domains:
        raise UserError(f"data.domains: names must be given, each once, found {list(named)}")
    if data.added_domains and config.partition.method in ("random", "cluster"):
        raise UserError(
            f"data.added_domains: partitions by {config.partition.method} have no domain of their"
            " own to add; use language, family or random_language"
        )
    known = {
        "data.exclude_domains": data.exclude_domains,
        "data.repeat_domains": data.repeat_domains,
        "tokenizer.train_domains": config.tokenizer.train_domains,
        # the others are files, read where the run is opened
        "unlearn.sequence": config.unlearn.sequence,
        "seed_lm.domains": config.seed_lm.domains,
        "unlearn.forget": tuple(f for f in config.unlearn.forget if not Path(f).is_file()),
    }
    if isinstance(data.tokens_per_domain, dict):
        known["data.tokens_per_domain"] = tuple(data.tokens_per_domain)
    for key, names in known.items():
        if len(set(names)) != len(names):
            raise UserError(f"{key}: each name once, found {', '.join(names)}")
        allowed = named if key in _NOVEL_TOO else config.all_domains
        allowed = data.domains if key == "seed_lm.domains" else allowed
        for name in names:
            if name not in allowed:
                raise UserError(f"{key}: {name!r} is not in data.domains ({', '.join(allowed)})")
    for name in config.eval.flow_texts:
        if name in named:
            raise UserError(f"eval.flow_texts: {name!r} is a domain, whose text is drawn anyway")
    if not config.present_domains:
        raise UserError("data.exclude_domains: every domain is excluded")
    _check_splits(data)
    if config.tokenizer.name == "bpe" and not data.split_shares["router"]:
        raise UserError("data.split_shares: the bpe tokenizer is trained on split router, share 0")
    if config.router.scope not in config.eval.scopes:
        raise UserError(
            f"eval.scopes: {config.router.scope!r} (router.scope) must be among them, found"
            f" {', '.join(config.eval.scopes) or 'none'}"
        )
    for index in config.partition.index:
        if index >= config.num_partitions:
            added = f" and {len(data.added_domains)} are added" if data.added_domains else ""
            raise UserError(
                f"partition.index: {index} is out of range (partition.n is"
                f" {config.partition.n}{added})"
            )
    _check_training(config)
    for key in ("temperatures", "top_k"):
        if not getattr(config.eval, key):
            raise UserError(f"eval.{key}: needs at least one value")
    if (
        config.model.max_position_embeddings
        and data.block_size > config.model.max_position_embeddings
    ):
        raise UserError(
            f"data.block_size: {data.block_size} is beyond model.max_position_embeddings"
            f" ({config.model.max_position_embeddings})"
        )
    if config.router.context_tokens >= data.block_size:
        raise UserError(
            f"router.context_tokens: {config.router.context_tokens} must be below data.block_size"
            f" ({data.block_size})"
        )
    return config


def own_micro_batches(count: int, ranks: int) -> int:
    """Micro-batches of each process, of `count` per step: a step has as many as the config says,
    whatever number of processes shares them. UserError where they cannot have as many each.
    """
    if count % ranks:
        raise UserError(
            f"training.gradient_accumulation_steps: {count} micro-batches per optimizer step cannot"
            f" be shared by {ranks} processes; give a multiple of {ranks}"
            " (with fewer rows per micro-batch: training.per_device_train_batch_size)"
        )
    return count // ranks


def _check_training(config: Config) -> None:
    section, seed = config.training, config.seed_lm
    if len(section.documents) != 2 or not section.documents[0] < section.documents[1]:
        raise UserError(
            "training.documents: two shares, the lower first, found"
            f" {', '.join(map(str, section.documents)) or 'none'}"
        )
    if section.split != "train" and config.partition.method == "cluster":
        raise UserError(
            "training.split: a cluster's domains are counted in the train split; train on that"
        )
    if config.model.type == "lora" and not config.model.init_from:
        raise UserError("model.init_from: lora needs a seed LM to update (`seed`, or a folder)")
    if config.model.type == "lora" and section.added_from:
        raise UserError(
            "training.added_from: an added domain of model.type lora gets an expert on the same"
            " seed LM as the others; leave it empty"
        )
    inside = [m for m in config.eval.mixtures if m in ROUTED_INSIDE]
    if inside and config.model.type != "lora":
        raise UserError(f"eval.mixtures: {inside[0]} routes experts of model.type lora")
    if "glider" in inside and config.partition.method == "cluster":
        raise UserError("eval.mixtures: glider needs cosines; a cluster map's router has distances")
    if config.eval.glider_encoder and "glider" not in inside:
        raise UserError("eval.glider_encoder: eval.mixtures has no glider that would use it")
    if config.eval.glider_descriptions and not config.eval.glider_encoder:
        raise UserError("eval.glider_descriptions: needs eval.glider_encoder to embed them")
    if len(config.eval.glider_alphas) != 2:
        raise UserError("eval.glider_alphas: two numbers, from the threshold on and below it")
    if config.model.type not in HAVE_EXPERTS:
        for key in ("eval.expert_rows", "training.routing_steps"):
            if getattr(getattr(config, key.split(".")[0]), key.split(".")[1]):
                raise UserError(
                    f"{key}: a {config.model.type} has no experts to watch; set it to 0"
                )
    if section.expert_devices > 1 and config.model.type != "moe":
        raise UserError("training.expert_devices: only the experts of model.type moe are spread")
    if section.shard:
        for key, wrong in (
            (f"model.type: {config.model.type}", config.model.type in (*SHARED_TRUNK, "lora")),
            ("training.routing_steps", section.routing_steps > 0),
            ("training.expert_devices", section.expert_devices > 1),
        ):
            if wrong:
                raise UserError(f"training.shard: cannot be combined with {key}")
    if config.model.type in SHARED_TRUNK:
        _check_shared_trunk(config)
    if section.added_from and not config.data.added_domains:
        raise UserError("training.added_from: data.added_domains names no domain")
    if config.model.init_from == "seed":
        if seed.split == section.split and not 0 < seed.share < 1:
            raise UserError(
                f"seed_lm.share: {seed.share:g} leaves nothing for the seed LM or the partitions"
                " (model.init_from: seed); it must be between 0 and 1"
            )
        pair = (seed.type or config.model.type, config.model.type)
        known = (("llama", "mixtral"), ("llama", "lora"))
        if pair not in known and (pair[0] != pair[1] or seed.type == "lora"):
            raise UserError(
                f"seed_lm.type: a {config.model.type} cannot start from a {seed.type}"
                " (a mixtral and lora can from a llama)"
            )


def _check_shared_trunk(config: Config) -> None:
    kind = config.model.type
    if config.model.init_from:
        raise UserError(f"model.init_from: a {kind} is trained from random weights; leave it empty")
    if config.data.added_domains and config.training.added_from != "nearest":
        raise UserError(
            f"training.added_from: a {kind}'s trunk is trained, an added domain can only start from"
            " the nearest partition's part; set it to nearest"
        )
    if kind == "domain_token" and config.data.separate_documents:
        raise UserError(
            "data.separate_documents: a domain token stands before a whole block, not before each"
            " document of it"
        )


def _check_splits(data: DataConfig) -> None:
    if set(data.split_shares) != set(SPLITS):
        raise UserError(f"data.split_shares: needs exactly the splits {', '.join(SPLITS)}")
    total = sum(data.split_shares.values())
    if abs(total - 100) > 1e-9 or min(data.split_shares.values()) < 0:
        raise UserError(f"data.split_shares: shares are >= 0 and sum to 100, found {total:g}")
    if data.task_index >= data.task_count:
        raise UserError(
            f"data.task_index: {data.task_index} is not below data.task_count = {data.task_count}"
        )
    if data.task_count > 1 and data.task not in ("read", "tokenise"):
        raise UserError(f"data.task_count: calls share read or tokenise, not data.task={data.task}")
    if data.arriving and data.task != "read":
        raise UserError(f"data.arriving: is for data.task=read, not data.task={data.task}")
    if not data.split_shares["train"]:
        raise UserError("data.split_shares: train must be above 0")
    for key, least in (("repeats", 2), ("canaries", 1)):
        for times, rows in getattr(data, key).items():
            if times < least or rows < 0:
                raise UserError(
                    f"data.{key}: {times} must be at least {least} occurrences, of at least 0 rows"
                    f" (found {rows})"
                )


def load(path: Path | str, overrides: tuple[str, ...] = ()) -> Config:
    """The checked configuration of one file and `a.b=value` overrides."""
    content = read_with_base(Path(path))
    for override in overrides:
        key, value = override.split("=", 1)
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        check_keys(nested, Config, f"override {override}")
        content = merge(content, nested)
    try:
        return check(build(Config, content))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_run(folder: Path) -> Config:
    """The configuration that a run folder's last stage was called with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (config.yaml is missing)")
    read_sealed(path)
    return load(path, (f"output_dir={folder.parent}", f"name={folder.name}"))


def plain(value: Any) -> Any:
    """A config (or part of one) as JSON-ready mappings and lists."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def as_yaml(config: Config) -> str:
    """The resolved config in the grammar of a config file: loading it gives an equal config."""
    values = plain(config)
    values["training"] |= values["training"].pop("arguments")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def help_text(doc: str) -> str:
    """A script's docstring and every key with type, default, meaning and allowed values."""
    lines = [doc.strip(), "", "Arguments: one or more config files, then key=value overrides.", ""]
    defaults = plain(Config())
    for key, f in valid_keys(Config).items():
        default: Any = defaults
        for part in key.split("."):
            default = default[part]
        kind = f.type.__name__ if isinstance(f.type, type) and not get_args(f.type) else str(f.type)
        default = ",".join(map(str, default)) if isinstance(default, list) else default
        lines.append(f"  {key} ({kind}, default {default!r})")
        limits = f.metadata["choices"] and f" [{', '.join(map(str, f.metadata['choices']))}]"
        lines.append(f"      {f.metadata['help']}{limits or ''}")
    lines.append("  training.<field>: every other field of transformers.TrainingArguments")
    return "\n".join(lines)


def as_overrides(arguments: list[str], flags: Mapping[str, str]) -> list[str]:
    """Arguments with `--flag value` and `--flag=value` as the override of the key it stands for."""
    found, rest = [], iter(arguments)
    for argument in rest:
        flag, given, value = argument.partition("=")
        if flag not in flags:
            found.append(argument)
            continue
        value = value if given else next(rest, "")
        if not value or value.startswith("-"):
            raise UserError(f"{flag}: needs a value")
        found.append(f"{flags[flag]}={value}")
    return found


def parse_arguments(
    arguments: list[str], doc: str, flags: Mapping[str, str] | None = None
) -> list[Config]:
    """Configs of a command line; prints help and exits 0 for --help."""
    arguments = as_overrides(arguments, flags or {})
    if not arguments or "--help" in arguments or "-h" in arguments:
        with contextlib.suppress(BrokenPipeError):  # `--help | head`: the reader has left
            print(help_text(doc), flush=True)
        raise SystemExit(0 if arguments else 2)
    paths = [a for a in arguments if a.endswith((".yaml", ".yml")) and "=" not in a]
    overrides = tuple(a for a in arguments if a not in paths)
    for argument in overrides:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(
                f"{argument}: neither a config file (.yaml) nor an override (key=value)"
            )
    if not paths:
        raise UserError("no config file given; try configs/quickstart/n16.yaml")
    configs = [load(path, overrides) for path in paths]
    folders = [str(c.run_dir) for c in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(
                f"two configs of this call write to {folder}: give them different names"
            )
    return configs


def run_script(
    main: Callable[[Config], None],
    doc: str,
    prepare: Callable[[list[Config]], None] | None = None,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Run `prepare` on all configs of the call, then `main` on each; flags: option -> config key.

    A user's mistake is one line on stderr and exit code 2.
    """
    stopping.install()
    try:
        configs = parse_arguments(sys.argv[1:], doc, flags)
        if prepare is not None:
            prepare(configs)
        for config in configs:
            main(config)
    except (UserError, OSError, SafetensorError) as error:
        # a full disk is an OSError, under safetensors its own error
        text = str(error) or type(error).__name__
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None
