"""What an experiment costs, on paper: parameters, FLOPs, tokens, steps, memory, hours, disk.

    python -m tiered.cost configs/quickstart/n16.yaml
    python -m tiered.cost configs/c4/trained/n01.yaml configs/c4/trained/n16.yaml --utilisation 0.3
    python -m tiered.cost configs/c4/trained/n16.yaml partition.method=random --partitions 16,1024

Nothing is read but the configs and, where it is there, the processed data's manifest; nothing is
trained. Several experiments, or one at several numbers of partitions, are set side by side too.
How FLOPs, bytes and tokens are counted is said in tiered/flops.py, memory.py and workload.py; what
was assumed stands under the tables.

Flags (their defaults and reasons: Assumptions in tiered/workload.py):
  --utilisation SHARE            of the bfloat16 peak that training and scoring reach (0.2)
  --tokens-per-document NUMBER   where the processed data is not there (500)
  --bytes-per-token NUMBER       UTF-8 bytes of text under a token (4.7)
  --partitions N,N,..            partition.n, in place of the config's; the comparison alone
"""

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import replace

from tiered.config import Config, run_script
from tiered.estimate import FILES_PER_MODEL, Estimate, Trained, estimate, evaluation_memory
from tiered.flops import DEVICES, float32_flops, forward_flops, hours, training_flops
from tiered.memory import USABLE, model_bytes
from tiered.store import UserError
from tiered.workload import Assumptions

GIGABYTES = (40, 80)  # of the GPUs that a training is fitted into
MOST_ROWS = 16  # partitions beyond which equal ones share a line
FLAGS = {f"--{f.name.replace('_', '-')}": f.name for f in dataclasses.fields(Assumptions)}
FLAGS["--partitions"] = "partitions"


# ---------------------------------------------------------------- how numbers are written


def count(value: float) -> str:
    """A whole number."""
    return "unknown" if math.isnan(value) else f"{value:,.0f}"


def short(value: float) -> str:
    """A number in three digits."""
    if math.isnan(value):
        return "unknown"
    return f"{value:.3g}" if value < 1e3 or value >= 1e6 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    if math.isnan(value):
        return "unknown"
    unit = next(((n, u) for n, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if value >= n), None)
    return f"{short(value / unit[0])} {unit[1]}" if unit else f"{short(value / 1e3)} kB"


def duration(value: float) -> str:
    """Hours in the unit that suits them."""
    if math.isnan(value):
        return "unknown"
    units = ((1.0, "h"), (1 / 60, "min"), (1 / 3600, "s"))
    unit = next(((n, u) for n, u in units if value >= n), (1 / 3.6e6, "ms"))
    return f"{short(value / unit[0])} {unit[1]}"


def table(title: str, rows: list[dict[str, str]]) -> str:
    """A Markdown table under its title; nothing for no rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"\n### {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row[c] for c in columns)} |" for row in rows]
    return "\n".join(lines)


def times(value: float, found: Estimate) -> dict[str, str]:
    """Time that one GPU of each kind takes for so many FLOPs."""
    share = found.assumed.utilisation
    return {d.name: duration(hours(value, d.bfloat16, share)) for d in DEVICES}


# ---------------------------------------------------------------- tables of one experiment


def model_rows(found: Estimate) -> list[dict[str, str]]:
    """Parameters and FLOPs per token of every kind of model."""
    kinds = {"a partition's model": (found.model.counts, found.model.parts)}
    if found.model.own != found.model.counts["total"]:
        own = count(found.model.own)
        kinds = {f"a partition's model ({own} its own)": kinds["a partition's model"]}
    for name, made in (("seed LM", found.seed), ("Level-1 embedder", found.embedder)):
        if made:
            kinds[name] = (made.counts, made.parts)
    return [
        {
            "model": name,
            "parameters": count(counts["total"]),
            "without embeddings": count(counts["non_embedding"]),
            "computed per token": count(counts["computed_per_token"]),
            "FLOPs per training token": short(training_flops(parts)),
            "6 x computed": short(6 * counts["computed_per_token"]),
            "forward alone": short(forward_flops(parts)),
        }
        for name, (counts, parts) in kinds.items()
    ]


def part_rows(found: Estimate) -> list[dict[str, str]]:
    """FLOPs of a training token of a partition's model, by part."""
    parts, whole = found.model.parts, training_flops(found.model.parts)
    return [
        {
            "part": name,
            "forward": short(part.forward),
            "backward": short(part.backward),
            "share": f"{part.total / whole:.1%}",
            "under autocast": "float32" if part.float32 else "bfloat16",
        }
        for name, part in parts.items()
    ]


def training_rows(found: Estimate) -> list[dict[str, str]]:
    """Every training: its data, steps, time and memory; equal ones of many on one line."""
    rows: list[dict[str, str]] = []
    for made in (*found.before, *found.trained):
        job, held = made.job, made.memory
        row = {
            "training": job.name if not job.name.isdigit() else f"partition {job.name}",
            "domains": " ".join(job.domains),
            "parameters": count(made.counts["total"]),
            "tokens": count(made.tokens),
            "steps": count(job.steps),
            "rows of a micro-batch": count(job.batch_rows),
            "FLOPs": short(made.flops),
            **times(made.flops, found),
            "memory": size(held.total(found.checkpointing)),
            **{f"{g} GB GPUs": count(held.devices(g, found.checkpointing)) for g in GIGABYTES},
        }
        if found.models > MOST_ROWS and rows and _alike(rows[-1], row):
            first = rows[-1]["training"].split(" to ")[0]
            rows[-1]["training"] = f"{first} to {job.name}, each"
            if rows[-1]["domains"] != row["domains"]:
                rows[-1]["domains"] = "their own"
            continue
        rows.append(row)
    return rows


def _alike(one: dict[str, str], other: dict[str, str]) -> bool:
    names = ("training", "domains")
    kinds = {row["training"].split(" ")[0] for row in (one, other)}
    return kinds == {"partition"} and all(one[c] == other[c] for c in one if c not in names)


def memory_rows(found: Estimate) -> list[dict[str, str]]:
    """What the largest training of a partition's model holds on a device."""
    held = largest(found).memory
    parts = {
        "weights, float32": held.weights,
        "gradients, float32": held.gradients,
        "AdamW's two moments": held.optimizer,
        "bfloat16 copies of weights": held.copies,
        "kept for the backward pass": held.activations,
        "the loss": held.loss,
    }
    checkpointed = {**parts, "kept for the backward pass": held.checkpointed}
    rows = [
        {"what": n, "bytes": size(v), "with gradient checkpointing": size(checkpointed[n])}
        for n, v in parts.items()
    ]
    both = {"bytes": held.total(), "with gradient checkpointing": held.total(True)}
    rows.append({"what": "sum", **{name: size(value) for name, value in both.items()}})
    for gigabytes in GIGABYTES:
        needed = (held.devices(gigabytes, c) for c in (False, True))
        cells = dict(zip(both, map(count, needed), strict=True))
        rows.append({"what": f"GPUs of {gigabytes} GB", **cells})
    return rows


def largest(found: Estimate) -> Trained:
    """The training of a partition's model that holds most."""
    return max(found.trained, key=lambda t: t.memory.total())


def total_rows(found: Estimate) -> list[dict[str, str]]:
    """FLOPs and time of the experiment."""
    sums = {t.job.name: t.flops for t in found.before}
    sums["partition models"] = sum(t.flops for t in found.trained)
    sums["evaluation, at least"] = found.evaluation
    sums["all, one after another"] = found.serial
    sums["all, a GPU for every partition"] = found.wall
    return [{"what": n, "FLOPs": short(v), **times(v, found)} for n, v in sums.items()]


def gold_rows(found: Estimate) -> list[dict[str, str]]:
    """What retraining costs that a deletion saves, per forget set."""
    return [
        {
            "forget set": gold.forget,
            "partitions trained anew": f"{len(gold.retrained)} of {found.partitions.n}",
            "FLOPs anew": short(gold.anew),
            **times(gold.anew, found),
            "FLOPs of one from scratch": short(gold.scratch),
            "longest training": short(gold.longest),
        }
        for gold in found.golds
    ]


def serving_rows(found: Estimate) -> list[dict[str, str]]:
    """Memory (weights in float32) and FLOPs of use: one partition, all of them, the router."""
    one, (embedding, comparing) = model_bytes(found.model.passed), found.router
    forward, (scores, mixed) = forward_flops(found.model.parts), evaluation_memory(found)
    embedder = found.embedder.checkpoint if found.embedder else math.nan
    rows = {
        "one partition's model": (size(one), short(forward)),
        "all partitions' models, loaded apart": (
            size(one * found.models),
            short(forward * found.models),
        ),
        "Level-1 embedder": (size(embedder), short(embedding)),
        "comparison with centroids": ("", short(comparing)),
        "evaluation: router scores of a domain's rows": (size(scores), ""),
        "mixtures: log probabilities of a domain": (size(mixed) if mixed else "none", ""),
    }
    return [{"in use": n, "memory, float32": m, "FLOPs per token": f} for n, (m, f) in rows.items()]


def disk_rows(found: Estimate) -> list[dict[str, str]]:
    """Bytes on disk, and files of partition models."""
    rows = [{"on disk": name, "bytes": size(value)} for name, value in found.disk.items() if value]
    files = count(FILES_PER_MODEL * found.models)
    return [*rows, {"on disk": "files of partition models, about", "bytes": files}]


def notes(found: Estimate) -> list[str]:
    """What was assumed and what is not counted, a line each."""
    assumed, config = found.assumed, found.config
    kind = "float32 on a CPU" if config.device == "cpu" else "bfloat16 autocast on a GPU"
    peaks = " and ".join(f"{d.bfloat16:g} ({d.name})" for d in DEVICES)
    lines = [
        f"times: all FLOPs at {assumed.utilisation:g} of the dense bfloat16 peak, {peaks} TFLOP/s;"
        " nothing was timed",
        f"memory: {kind}; GPUs of so many 1e9 bytes, of which {USABLE:.0%} can be used, if the"
        " training could be cut anywhere",
        "FLOPs: matrix products; the 6 N rule with N = parameters computed per token",
        *found.notes,
    ]
    if not found.corpus.manifest:
        lines.append(f"{assumed.bytes_per_token:g} UTF-8 bytes of text per token")
    if config.device != "cpu":
        lines += _limits(found)
    if found.checkpointing:
        lines.append("training.gradient_checkpointing: a forward pass more is in FLOPs and times")
    return lines


def _limits(found: Estimate) -> list[str]:
    """What makes a GPU slower than the times say."""
    share, parts = found.assumed.utilisation, found.model.parts
    lines, slow = [], float32_flops(parts)
    if slow:
        total = slow * sum(t.tokens for t in found.trained)
        least = " and ".join(
            f"{duration(hours(total, d.float32, 1.0))} ({d.name}, {d.float32:g} TFLOP/s)"
            for d in DEVICES
        )
        lines.append(
            f"{slow / training_flops(parts):.1%} of the FLOPs stay in float32 under autocast: at"
            f" the full float32 peak they alone take {least}, which the times above do not show"
        )
    step = min(t.flops / t.job.steps for t in found.trained)
    least = " and ".join(f"{duration(hours(step, d.bfloat16, share))} ({d.name})" for d in DEVICES)
    lines.append(
        f"the shortest optimizer step so reckoned takes {least}: where that is less than its"
        " kernels take to launch, the real one is longer"
    )
    return lines


def print_estimate(found: Estimate) -> None:
    """All tables of one experiment."""
    config, corpus = found.config, found.corpus
    print(f"\n## {config.name}\n")
    print(
        f"{found.models} models ({config.model.type}, partitions by {config.partition.method}) of"
        f" {count(found.parameters)} parameters in all; vocabulary"
        f" {count(corpus.vocabulary.vocab_size)}, rows of {config.data.block_size} tokens."
        f" Tokens: {corpus.source}."
    )
    held = f"Memory of training partition {largest(found).job.name}"
    held += f" (micro-batches of {largest(found).job.batch_rows} rows)"
    titles = {
        "Models": model_rows,
        "FLOPs of a token in training, a partition's model": part_rows,
        "Trainings": training_rows,
        held: memory_rows,
        "Totals": total_rows,
        "Golds: what a deletion saves": gold_rows,
        "In use": serving_rows,
        "Disk": disk_rows,
    }
    for title, rows in titles.items():
        print(table(title, rows(found)))
    print("\n### Assumed, and not counted\n")
    print("\n".join(f"* {line}" for line in notes(found)))


# ---------------------------------------------------------------- several side by side


def comparison_row(found: Estimate) -> dict[str, str]:
    """What grows with n, and what does not."""
    held, counts = largest(found).memory, found.model.counts
    trained = sum(t.flops for t in found.trained)
    return {
        "experiment": found.config.name,
        "n": count(found.partitions.n),
        "parameters, all": short(found.parameters),
        "one": short(counts["total"]),
        "embeddings": f"{1 - counts['non_embedding'] / counts['total']:.0%}",
        "tokens of one": short(max(t.tokens for t in found.trained)),
        "steps of one": count(max(t.job.steps for t in found.trained)),
        "training, all FLOPs": short(trained),
        **times(found.serial, found),
        **{f"{k}, wall": v for k, v in times(found.wall, found).items()},
        "memory to train": size(held.total(found.checkpointing)),
        "to serve one": size(model_bytes(found.model.passed)),
        "to serve all": size(model_bytes(found.model.passed) * found.models),
        "router FLOPs per token": short(sum(found.router)),
        "router scores of a domain": size(evaluation_memory(found)[0]),
        "evaluation FLOPs": short(found.evaluation),
        "golds, FLOPs anew": short(sum(g.anew for g in found.golds)),
        "checkpoints": size(found.disk["partition models"]),
        "tasks": count(len(found.trained)),
        "model files": count(FILES_PER_MODEL * found.models),
    }


def transposed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows as columns: experiments are fewer than figures."""
    first = next(iter(rows[0]))
    names = [row[first] if len({r[first] for r in rows}) > 1 else row["n"] for row in rows]
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    return [
        {"": key, **{name: row[key] for name, row in zip(names, rows, strict=True)}}
        for key in list(rows[0])[1:]
    ]


# ---------------------------------------------------------------- command line


def split_flags(arguments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Values of this command's own flags (`--flag value`, `--flag=value`), and the other words."""
    found, rest, words = {}, [], iter(arguments)
    for word in words:
        flag, given, value = word.partition("=")
        if flag in FLAGS:
            found[FLAGS[flag]] = value if given else next(words, "")
        else:
            rest.append(word)
    return found, rest


def number(name: str, text: str) -> float:
    """Value of one of this command's flags; UserError where it is no number in range."""
    kind, most = (int if name == "partitions" else float), 1 if name == "utilisation" else 1e12
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value <= most:
        flag = next(flag for flag, field in FLAGS.items() if field == name)
        what = "whole number" if kind is int else "number"
        raise UserError(f"{flag}: {text!r} is not a {what} above 0 and at most {most:g}")
    return value


def command_line() -> None:
    """Print the cost of every config of the call."""
    given, sys.argv[1:] = split_flags(sys.argv[1:])
    several, rows = given.pop("partitions", None), []
    values: dict[str, float] = {}
    sizes: list[int] = []

    def prepare(configs: list[Config]) -> None:  # where a mistake becomes one line
        values.update({name: number(name, text) for name, text in given.items()})
        if several is not None:
            sizes.extend(number("partitions", text) for text in several.split(","))

    def main(config: Config) -> None:
        for n in sizes or [config.partition.n]:
            made = replace(config, partition=replace(config.partition, n=n))
            found = estimate(made, Assumptions(**values))
            rows.append(comparison_row(found))
            if not sizes:
                print_estimate(found)

    run_script(main, __doc__, prepare)
    if len(rows) > 1 or sizes:
        print(table("Side by side", transposed(rows)))


if __name__ == "__main__":
    command_line()
