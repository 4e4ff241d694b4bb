"""What every model of an experiment is trained on: documents, blocks, passes, optimizer steps.

Counts are those of the processed data where that is there. Elsewhere they are what the config says,
and stated assumptions of what it does not; NaN stands for what nobody can know before.

Shapes: T tokens of a block (data.block_size).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiered import branching
from tiered.blocks import batch_rows
from tiered.config import Config
from tiered.data import ProcessedData
from tiered.partition import PartitionMap, make_partition_map
from tiered.shared_trunk import founding, is_shared
from tiered.store import UserError, read_json

UNKNOWN = math.nan
# Sizes of tokenizers from the hub that shipped configs name, as their own files say.
VOCABULARIES = {"bert-base-multilingual-cased": 119_547, "bytes": 258}


@dataclass(frozen=True)
class Assumptions:
    """What no config says.

    tokens_per_document: C4's English has 427 (156 billion in 365 million documents,
    arXiv:2104.08758). bytes_per_token: UTF-8, the mean over the languages of data/sample under a
    byte-level BPE of 32,768. utilisation: share of a GPU's bfloat16 peak that training reaches;
    GPT-3 reached 0.21, PaLM 0.46 (arXiv:2204.02311, table 3), and narrow models in a loop that is
    not compiled hardly more than the lower of them. It was not measured here.
    """

    utilisation: float = 0.2
    tokens_per_document: float = 500.0
    bytes_per_token: float = 4.7


@dataclass(frozen=True)
class Vocabulary:
    """What a model's configuration reads of processed data."""

    vocab_size: int
    pad_id: int = 0
    separator_id: int = 0


class Corpus:
    """Documents, tokens and text of a config's domains and splits.

    source: where the numbers come from; notes: what was assumed for them.
    """

    def __init__(self, config: Config, assumed: Assumptions) -> None:
        self.config, self.assumed, self.notes = config, assumed, []
        try:
            data = ProcessedData(config)
        except UserError:
            self.manifest: dict[str, Any] | None = None
            self.vocabulary = Vocabulary(self._vocabulary_size())
            self.source = self._say_source()
            return
        self.manifest = data.manifest["domains"]
        self.vocabulary = Vocabulary(data.vocab_size, data.pad_id, data.separator_id)
        self.source = f"manifest of the processed data ({data.folder})"

    def _vocabulary_size(self) -> int:
        """Size of the tokenizer before it is there."""
        name = self.config.tokenizer.name
        if name == "bpe":
            self.notes.append("the trained tokenizer reaches tokenizer.vocab_size")
            return self.config.tokenizer.vocab_size
        if self.config.model.vocab_size:
            return self.config.model.vocab_size
        if name in VOCABULARIES:
            return VOCABULARIES[name]
        if Path(name).is_dir():
            from tiered.tokenization import load_tokenizer  # transformers: seconds

            return len(load_tokenizer(name, ""))
        raise UserError(
            f"tokenizer.name: the size of {name!r} is not known before process_dset.py has run;"
            " set model.vocab_size"
        )

    def _say_source(self) -> str:
        data, per_document = self.config.data, self.assumed.tokens_per_document
        reads = f"data.num_documents x {per_document:g} tokens per document (assumed)"
        if data.num_documents:
            self.notes.append("no document is dropped by filters or as a duplicate")
        if data.tokens_per_domain:
            more = f", or {reads} if that is less" if data.num_documents else ""
            return f"data.tokens_per_domain{more}; the processed data is not there"
        if data.num_documents:
            return f"{reads}, times the split's share; the processed data is not there"
        return "unknown: the processed data is not there, and the config names no amount"

    def documents(self, domain: str, split: str) -> float:
        """Documents of a split."""
        if self.manifest:
            return self.manifest[domain]["splits"][split]["documents"]
        return self.tokens(domain, split) / self.assumed.tokens_per_document

    def tokens(self, domain: str, split: str) -> float:
        """Tokens of a split, separators included."""
        if self.manifest:
            return self.manifest[domain]["splits"][split]["tokens"]
        data = self.config.data
        share = data.split_shares[split] / 100
        read = data.num_documents * share * self.assumed.tokens_per_document or UNKNOWN
        budget = data.tokens_per_domain
        budget = budget.get(domain, 0) if isinstance(budget, dict) else budget
        if split != "train" or not budget:
            return read
        return budget if math.isnan(read) else min(budget, read)

    def text_bytes(self, domain: str, split: str) -> float:
        """UTF-8 bytes of a split's text."""
        if self.manifest:
            return self.manifest[domain]["splits"][split]["bytes"]
        return self.tokens(domain, split) * self.assumed.bytes_per_token

    def total(self, count: str, splits: Iterable[str], domains: Iterable[str]) -> float:
        """Sum of `documents`, `tokens` or `text_bytes` over splits and domains."""
        count = getattr(self, count)
        return sum(count(d, s) for d in domains for s in splits)

    def repeated_blocks(self, domain: str) -> int:
        """Blocks that repeated rows and canaries add to the train split."""
        if self.manifest:
            repeats = self.manifest[domain]["repeats"].values()
            return sum(t - 1 for t in repeats) + sum(self.manifest[domain]["canaries"].values())
        data = self.config.data
        if data.repeat_domains and domain not in data.repeat_domains:
            return 0
        extra = sum((times - 1) * rows for times, rows in data.repeats.items())
        return extra + sum(times * rows for times, rows in data.canaries.items())

    def blocks(self, domain: str, split: str, share: float = 1.0, limit: int = 0) -> float:
        """Whole blocks of a share of a domain's documents, of at most `limit` tokens (0: all)."""
        tokens = self.tokens(domain, split)
        tokens = min(tokens, limit) if limit and not math.isnan(tokens) else tokens
        found = whole(tokens * share / self.config.data.block_size)
        return found + (share * self.repeated_blocks(domain) if split == "train" else 0)

    def rows(self, domain: str, split: str, count: int) -> float:
        """Scored rows: `count`, or as many as there are documents (0, or fewer)."""
        found = self.documents(domain, split)
        if not count:
            return found
        return count if math.isnan(found) else min(count, found)


def whole(value: float) -> float:
    """A number rounded down; NaN stays."""
    return value if math.isnan(value) else math.floor(value)


@dataclass(frozen=True)
class Job:
    """One training: a partition's model, or one of all partitions, or the seed LM.

    partitions: whose models it makes; domains: whose data it reads; blocks: of one pass; rows: read
    in all; batch_rows: of a micro-batch.
    """

    name: str
    partitions: tuple[int, ...]
    domains: tuple[str, ...]
    blocks: float
    rows: float
    steps: float
    batch_rows: int


def partition_map(config: Config, notes: list[str]) -> PartitionMap:
    """The config's map; of clusters that are not fitted yet one of equal shares, which is noted."""
    n, domains = config.partition.n, config.data.domains
    try:
        made = make_partition_map(config)
    except UserError:
        if config.partition.method != "cluster":
            raise
        made = PartitionMap("cluster", (domains,) * n, True, config.partition.seed)
        notes.append("clusters are not fitted yet: every one holds some of every domain")
    if made.clusters is not None:
        notes.append("clusters: tokens of a domain are shared out as its train documents are")
    elif made.by_document:
        notes.append("partitions by document: each holds an equal share of every domain")
    return made


def document_shares(partitions: PartitionMap) -> dict[str, list[float]]:
    """Domain -> the share of its documents that every partition holds, of maps by document."""
    if partitions.clusters is None:
        return {d: [1 / partitions.n] * partitions.n for d in partitions.members[0]}
    counts = read_json(partitions.clusters.folder / "clusters.json")["train_documents"]
    return {d: [c / max(1, sum(found)) for c in found] for d, found in counts.items()}


def jobs_of(config: Config, corpus: Corpus, partitions: PartitionMap) -> list[Job]:
    """Trainings of a config's partition models, in order; partitions without data have none."""
    shared, founders = is_shared(config), founding(partitions)
    found = [_joint(config, corpus, partitions)] if shared else []
    shares = document_shares(partitions) if partitions.by_document else None
    for k in range(partitions.n):
        if not (shared and k in founders):
            job = _alone(config, corpus, partitions, k, shares)
            found += [job] if job.domains else []
    return found


def seed_job(config: Config, corpus: Corpus) -> tuple[Config, Job] | None:
    """The seed LM's config and training, where the experiment trains one itself."""
    if not branching.has_own_seed(config):
        return None
    own = branching.seed_config(config)
    job = _alone(own, corpus, make_partition_map(own), 0)
    return own, replace(job, name="seed LM", partitions=())


Shares = dict[str, list[float]] | None  # of a domain's documents that every partition holds


def _domain_blocks(
    config: Config, corpus: Corpus, partitions: PartitionMap, k: int, shares: Shares = None
) -> dict[str, float]:
    """Blocks of every present domain of partition k; shares None: whole domains."""
    low, high = branching.document_interval(config)
    present = [d for d in sorted(partitions.members[k]) if d in config.present_domains]
    own = {d: (high - low) * (shares[d][k] if shares else 1.0) for d in present}
    return {d: corpus.blocks(d, config.training.split, share) for d, share in own.items()}


def _alone(
    config: Config, corpus: Corpus, partitions: PartitionMap, k: int, shares: Shares = None
) -> Job:
    section = config.training
    found = _domain_blocks(config, corpus, partitions, k, shares)
    blocks, micro = sum(found.values()), batch_rows(config, partitions.share(k))
    passes = section.num_train_epochs * blocks
    rows = UNKNOWN if math.isnan(passes) else max(1, round(passes))
    if section.balanced and found:  # of the configured domains each has as many rows per step
        each = micro * section.gradient_accumulation_steps // len(partitions.members[k])
        rows, micro = _balanced(found.values(), each, section)
    steps = steps_of(rows, micro, section.gradient_accumulation_steps)
    return Job(str(k), (k,), tuple(found), blocks, rows, steps, micro)


def _joint(config: Config, corpus: Corpus, partitions: PartitionMap) -> Job:
    """The one training of a trunk and its parts: as many rows of each partition in every step."""
    section, own = config.training, founding(partitions)
    shares = document_shares(partitions) if partitions.by_document else None
    found = {k: _domain_blocks(config, corpus, partitions, k, shares) for k in own}
    found = {k: blocks for k, blocks in found.items() if blocks}
    per_step = batch_rows(config, 1.0) * section.gradient_accumulation_steps
    sizes = [sum(blocks.values()) for blocks in found.values()]
    rows, micro = _balanced(sizes, per_step // len(own), section)
    domains = tuple(d for blocks in found.values() for d in blocks)
    steps = steps_of(rows, micro, section.gradient_accumulation_steps)
    return Job("all", tuple(found), domains, sum(sizes), rows, steps, micro)


def _balanced(sizes: Iterable[float], each: int, section: Any) -> tuple[float, int]:
    """Rows in all and of a micro-batch, where a step holds `each` rows of every one of sizes and an
    epoch is a pass over the largest."""
    sizes = list(sizes)
    micro = max(1, each * len(sizes) // section.gradient_accumulation_steps)
    if any(math.isnan(size) for size in sizes):
        return UNKNOWN, micro
    steps = max(1, math.ceil(section.num_train_epochs * max(sizes) / max(1, each)))
    return steps * max(1, each) * len(sizes), micro


def steps_of(rows: float, micro: int, accumulation: int) -> float:
    """Optimizer steps of so many rows, in micro-batches of `micro`; the last may be smaller."""
    if math.isnan(rows):
        return UNKNOWN
    return max(1, math.ceil(math.ceil(rows / micro) / accumulation))
