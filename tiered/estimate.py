"""The cost of an experiment as numbers: its trainings, its evaluation, its golds, its disk.

NaN stands for what nobody can know yet.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tiered import memory
from tiered.blueprint import (
    Blueprint,
    Trained,
    blueprint,
    disk_of,
    embedder_training,
    memory_of,
)
from tiered.config import ROUTED_INSIDE, SPLITS, Config
from tiered.data import listed_documents
from tiered.evaluation import stream_of
from tiered.flops import forward_flops, training_flops
from tiered.memory import Memory
from tiered.partition import PartitionMap
from tiered.shared_trunk import is_shared
from tiered.workload import Assumptions, Corpus, Job, jobs_of, partition_map, seed_job

FILES_PER_MODEL = 11  # of a published Monet: weights, configs, code, tokenizer, records, hashes


@dataclass(frozen=True)
class Gold:
    """Golds of one forget set, over all their seeds.

    retrained: partitions that the run's own seed trains anew; anew: FLOPs of what the store lacks;
    scratch: of one gold with nothing to take from the store; longest: of the largest training of
    that; checkpoints: bytes published.
    """

    forget: str
    retrained: tuple[int, ...]
    anew: float
    scratch: float
    longest: float
    checkpoints: float


@dataclass
class Estimate:
    """An experiment on paper. evaluation: FLOPs of eval_det_router.py; router: FLOPs per token of
    the embedder, and of comparing a prefix with all centroids; disk: bytes by what they hold."""

    config: Config
    assumed: Assumptions
    corpus: Corpus
    partitions: PartitionMap
    model: Blueprint
    trained: list[Trained]
    seed: Trained | None = None
    embedder: Trained | None = None
    evaluation: float = 0.0
    router: tuple[float, float] = (0.0, 0.0)
    golds: list[Gold] = field(default_factory=list)
    disk: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed twice to save memory."""
        return bool(self.config.training.arguments.get("gradient_checkpointing"))

    @property
    def models(self) -> int:
        """Partitions that have a model."""
        return sum(len(t.job.partitions) for t in self.trained)

    @property
    def parameters(self) -> float:
        """Parameters of all partitions' models; what they share counts once."""
        total, own = self.model.counts["total"], self.model.own
        if self.config.model.type == "lora":
            return total + self.models * own
        return total - own + self.models * own

    @property
    def before(self) -> list[Trained]:
        """Trainings that partition models wait for."""
        return [t for t in (self.embedder, self.seed) if t]

    @property
    def serial(self) -> float:
        """FLOPs of embedder, seed LM, partition models and evaluation."""
        return sum(t.flops for t in (*self.before, *self.trained)) + self.evaluation

    @property
    def wall(self) -> float:
        """FLOPs one after another where every partition has a device."""
        longest = max((t.flops for t in self.trained), default=0.0)
        return sum(t.flops for t in self.before) + longest + self.evaluation


def estimate(config: Config, assumed: Assumptions) -> Estimate:
    """The cost of an experiment."""
    corpus = Corpus(config, assumed)
    partitions = partition_map(config, corpus.notes)
    found = Estimate(
        config,
        assumed,
        corpus,
        partitions,
        blueprint(config, corpus.vocabulary),
        [],
        notes=corpus.notes,
    )
    train = Trainer(found)
    found.trained = [train(job) for job in jobs_of(config, corpus, partitions)]
    found.seed = train.seed(config)
    found.embedder = embedder_training(config, corpus)
    found.router = router_flops(found)
    found.evaluation = evaluation_flops(found)
    found.golds = golds(found, train)
    found.disk = disk(found)
    found.notes += _unknown(found)
    return found


class Trainer:
    """Trainings of an experiment on paper; models of a kind are built once."""

    def __init__(self, found: Estimate) -> None:
        self.found, self.config, self.corpus = found, found.config, found.corpus
        self.half = found.config.device != "cpu"
        self.models = {(False, False): found.model}
        self.memories: dict[tuple[bool, bool, int], Memory] = {}

    def __call__(self, job: Job, config: Config | None = None) -> Trained:
        """A job's training; config: the seed LM's own, if it is that."""
        adapted = bool(self.config.training.added_from)
        adapted = adapted and any(k >= self.config.partition.n for k in job.partitions)
        kind = (config is not None, adapted)
        if kind not in self.models:
            made = blueprint(config or self.config, self.corpus.vocabulary, adapted)
            self.models[kind] = made
        model, length = self.models[kind], self.config.data.block_size
        if (*kind, job.batch_rows) not in self.memories:
            made = memory_of(model, job.batch_rows, length, self.half)
            self.memories[*kind, job.batch_rows] = made
        per_token = training_flops(model.parts)
        per_token += forward_flops(model.parts) if self.found.checkpointing else 0.0
        rows = job.rows
        if model.updates:  # then the gates are trained, through the same products
            section = self.config.training
            steps = self.config.model.lora_gate_steps
            rows += steps * job.batch_rows * section.gradient_accumulation_steps
        return Trained(
            job,
            model.counts,
            model.parts,
            rows * length,
            rows * length * per_token,
            self.memories[*kind, job.batch_rows],
            *disk_of(model, kind[1]),
        )

    def seed(self, config: Config) -> Trained | None:
        """The seed LM's training, where there is one."""
        made = seed_job(config, self.corpus)
        return made and self(made[1], made[0])


def router_flops(found: Estimate) -> tuple[float, float]:
    """FLOPs per token of the embedder's pass (no head), and of a comparison with every centroid."""
    section, config = found.config.router, found.config
    widths = {
        "transformer": section.hidden_size,
        "hashed_ngrams": section.ngram_buckets,
        "tfidf": section.tfidf_dimensions,
    }
    by_document = found.partitions.by_document
    centroids = found.partitions.n if by_document else len(config.present_domains)
    parts = dict(found.embedder.parts) if found.embedder else {}
    parts.pop("LM head", None)
    return forward_flops(parts), 2.0 * centroids * widths[section.embedder]


def evaluation_rows(found: Estimate) -> tuple[float, float]:
    """Rows that are routed, and rows that every partition's model reads for mixtures."""
    config, section, corpus = found.config, found.config.eval, found.corpus
    domains = config.processed_domains
    routed = sum(corpus.rows(d, section.split, section.rows_per_domain) for d in domains)
    whole = [m for m in section.mixtures if m not in (*ROUTED_INSIDE, "parameter_average")]
    mixed = routed if whole else 0.0
    if "bayes_cached" in whole:
        mixed += sum(corpus.rows(d, stream_of(config), section.cached_rows) for d in domains)
    return routed, mixed


def evaluation_flops(found: Estimate) -> float:
    """FLOPs of eval_det_router.py, at least: every row read by the router and by one model, and by
    all of them for mixtures of all."""
    routed, mixed = evaluation_rows(found)
    section, length = found.config.eval, found.config.data.block_size - 1
    single = sum(m in ROUTED_INSIDE or m == "parameter_average" for m in section.mixtures)
    passes = routed * (1 + single) + mixed * found.models
    router = (routed + mixed) * sum(found.router) if found.partitions.n > 1 else 0.0
    return length * (passes * forward_flops(found.model.parts) + router)


def evaluation_memory(found: Estimate) -> tuple[float, float]:
    """Bytes of main memory that grow with n while runs are evaluated: the router's float32 scores
    of a domain's rows, and for mixtures their float64 log probabilities (0: none).
    """
    routed, mixed = evaluation_rows(found)
    each = (found.config.data.block_size - 1) * found.partitions.n
    numbers = routed / len(found.config.processed_domains) * each
    return 4 * numbers, 8 * numbers if mixed else 0.0


def golds(found: Estimate, train: Trainer) -> list[Gold]:
    """What the golds of every forget set cost."""
    if "gold" not in found.config.unlearn.operations:
        return []
    return [_gold(found, train, name) for name in found.config.unlearn.forget]


def _gold(found: Estimate, train: Trainer, name: str) -> Gold:
    config, partitions = found.config, found.partitions
    listed = Path(name).is_file()
    domain = next(iter(listed_documents(name))) if listed else name
    # of listed documents nothing is known but their domain: the rest trains as before
    without = config if listed else config.without(domain)
    trained = [train(job) for job in jobs_of(without, found.corpus, partitions)]
    seed, router = train.seed(without), embedder_training(without, found.corpus)
    touched, everything = set(partitions.touched(domain)), {*range(partitions.n)}
    if is_shared(config) or (found.seed and domain in found.seed.job.domains):
        touched = everything  # a trunk, or what all models start from, saw it
    anew = [t for t in trained if touched & {*t.job.partitions}]
    shared = [t for t in (router, seed) if t]
    scratch = sum(t.flops for t in (*shared, *trained))
    others = (config.unlearn.gold_seeds - 1) * scratch
    published = sum(t.checkpoint for t in (*shared, *anew))
    published += (config.unlearn.gold_seeds - 1) * sum(t.checkpoint for t in (*shared, *trained))
    return Gold(
        Path(name).stem if listed else name,
        tuple(sorted(k for t in anew for k in t.job.partitions)),
        sum(t.flops for t in (*shared, *anew)) + others,
        scratch,
        max((t.flops for t in anew), default=0.0),
        published,
    )


def disk(found: Estimate) -> dict[str, float]:
    """Bytes on disk by what they hold."""
    config, corpus, domains = found.config, found.corpus, found.config.processed_domains
    documents, tokens, text = (
        corpus.total(what, SPLITS, domains) for what in ("documents", "tokens", "text_bytes")
    )
    published = sum(t.checkpoint for t in found.trained)
    if is_shared(config):  # the trunk is one file; the parts have their own beside it
        published += 4.0 * found.model.own * found.models
    resume = max(t.resume for t in (*found.before, *found.trained))
    resume *= bool(config.training.save_steps)
    entries = {
        "cleaned text, before its compression": memory.clean_bytes(text, documents),
        "processed data": memory.processed_bytes(tokens, documents),
        "partition models": published,
        "seed LM": found.seed.checkpoint if found.seed else 0.0,
        "Level-1 embedder": found.embedder.checkpoint if found.embedder else 0.0,
        "resume state of a training in progress (two)": 2 * resume,
        "golds": sum(gold.checkpoints for gold in found.golds),
        "scores cached by the evaluation": _evaluation_scores(found),
        "scores cached by unlearning, at most": _unlearning_scores(config),
    }
    if config.partition.method == "cluster":
        entries["cluster labels"] = documents * (8 + 2)  # an int64 hash of the id, an int16
    return entries


def _evaluation_scores(found: Estimate) -> float:
    routed, mixed = evaluation_rows(found)
    length = found.config.data.block_size - 1
    return memory.score_bytes(length * (routed + mixed * found.models))


def _unlearning_scores(config: Config) -> float:
    section, others = config.unlearn, len(config.present_domains) - 1
    systems = len(section.operations) + section.gold_seeds - 1
    attacked = section.forget_rows + section.holdout_rows
    plain = section.forget_rows + 2 * section.retain_rows * others
    length = config.data.block_size - 1
    each = memory.score_bytes(length * attacked, True) + memory.score_bytes(length * plain)
    return each * systems * len(section.forget)


def _unknown(found: Estimate) -> list[str]:
    """What is not counted, as far as this config has it."""
    config, notes = found.config, []
    if config.router.embedder != "transformer":
        notes.append(f"the {config.router.embedder} embedder is made on the CPU: not counted")
    if config.data.exclude_documents:
        notes.append("data.exclude_documents: not subtracted")
    if config.eval.expert_rows:
        notes.append("expert pages (eval.expert_rows): not counted")
    if config.unlearn.forget:
        notes.append("of unlearning the golds alone are counted: no scoring, no other operation")
    if config.model.attn_implementation == "eager":
        notes.append("eager attention keeps T scores per head and token more: not counted")
    return notes
