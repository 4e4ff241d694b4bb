"""The jobs of an experiment: which commands, in which order, on which kind of node.

    python -m tiered.plan configs/c4/n16.yaml                # as a table
    python -m tiered.plan configs/c4/n16.yaml --write        # to runs/<experiment>/jobs/plan-*.tsv

A job is a list of commands that do not depend on one another; it begins when the jobs it names are
done. scripts/run_local.sh runs the commands of a job side by side, scripts/slurm.sh makes them the
tasks of a job array. What they make is what the scripts in order make, byte for byte.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tiered.branching import has_own_seed
from tiered.config import SHARED_TRUNK, Config, load, own_micro_batches
from tiered.partition import make_partition_map
from tiered.store import UserError, digest, write_text

CPU, GPU = "cpu", "gpu"


@dataclass(frozen=True)
class Job:
    """One step of an experiment.

    kind: the node it wants; after: jobs that must be done; commands: what is run, side by side;
    several: whether a command may be spread over several GPUs by torchrun.
    """

    name: str
    kind: str
    after: tuple[str, ...]
    commands: tuple[str, ...]
    several: bool = False


def jobs(config: Config, arguments: str, reading_tasks: int) -> list[Job]:
    """The jobs of an experiment, each behind those it waits for.

    arguments: its config file and overrides, as the scripts take them; reading_tasks: calls that
    share the reading of raw text (0: one call makes all data).
    """
    if config.overwrite:
        raise UserError("overwrite: jobs of one plan use what others have just made; leave it out")
    found = [
        *_data_jobs(config, arguments, reading_tasks),
        Job("router", _node(config), ("data",), (f"train_det_router.py {arguments}",)),
        *_training_jobs(config, arguments),
        Job("eval", _node(config), ("train",), (f"eval_det_router.py {arguments}",)),
        *_unlearning_jobs(config, arguments),
    ]
    report = f"-m tiered.report {shlex.quote(str(config.run_dir))}"
    return [*found, Job("report", CPU, (found[-1].name,), (report,))]


def _node(config: Config) -> str:
    """The kind of node that models are computed on."""
    return CPU if config.device == "cpu" else GPU


def _data_jobs(config: Config, arguments: str, reading_tasks: int) -> list[Job]:
    """Files are shared out while they are read, domains while they are tokenised; without reading
    tasks one call does everything."""
    process = f"process_dset.py {arguments}"
    if not reading_tasks:
        return [Job("data", CPU, (), (process,))]

    def shared(task: str, count: int) -> tuple[str, ...]:
        share = f"{process} data.task={task} data.task_count={count}"
        return tuple(f"{share} data.task_index={i}" for i in range(count))

    return [
        Job("read", CPU, (), shared("read", reading_tasks)),
        Job("merge", CPU, ("read",), (f"{process} data.task=merge",)),
        Job("tokenise", CPU, ("merge",), shared("tokenise", len(config.processed_domains))),
        Job("data", CPU, ("tokenise",), (process,)),
    ]


def _training_jobs(config: Config, arguments: str) -> list[Job]:
    """A command per partition that has data; before them what several partitions start from."""
    present, founding = _present_partitions(config)
    train = f"run_clm.py {arguments}"
    if config.model.type in SHARED_TRUNK:  # one training makes the models of all
        return [Job("train", _node(config), ("router",), (train,), several=True)]
    first, later = [], present
    if has_own_seed(config):  # the first partition's call trains the seed LM
        first, later = present[:1], present[1:]
    if config.training.added_from:  # added domains start from the others' models
        first = [k for k in present if k < founding]
        later = [k for k in present if k >= founding]

    def each(own: list[int]) -> tuple[str, ...]:
        return tuple(f"{train} partition.index={k}" for k in own)

    found, before = [], "router"
    if first and later:
        found = [Job("train-first", _node(config), (before,), each(first), several=True)]
        before = "train-first"
    return [*found, Job("train", _node(config), (before,), each(later or first), several=True)]


def _present_partitions(config: Config) -> tuple[list[int], int]:
    """Partitions that have data, as far as the config alone says it; how many were there before
    domains were added."""
    founding = config.num_partitions - len(config.data.added_domains)
    if config.partition.method == "cluster":  # whose documents they get is not known yet
        return list(range(config.num_partitions)), founding
    members = make_partition_map(config).members
    return [k for k, own in enumerate(members) if set(own) & set(config.present_domains)], founding


def _unlearning_jobs(config: Config, arguments: str) -> list[Job]:
    """A command per forget set; then one that gathers them, and measures compartments."""
    measure, sets = f"unlearn_benchmarks.py {arguments}", config.unlearn.forget
    if not sets:
        return []
    before = "unlearn-sets" if len(sets) > 1 else "eval"
    gather = Job("unlearn", _node(config), (before,), (measure,))
    if len(sets) < 2:
        return [gather]
    one = f"{measure} unlearn.compartments=false"
    # in quotes: `no`, a language, would be read as a truth value
    each = tuple(f"{one} {shlex.quote(f'unlearn.forget={json.dumps([name])}')}" for name in sets)
    return [Job("unlearn-sets", _node(config), ("eval",), each), gather]


def lines(found: list[Job]) -> str:
    """A plan as tab-separated lines: job, node, `several` or `one`, jobs before it, command."""
    return "".join(
        "\t".join(
            [job.name, job.kind, "several" if job.several else "one", ",".join(job.after), command]
        )
        + "\n"
        for job in found
        for command in job.commands
    )


def table(found: list[Job]) -> str:
    """A plan for a reader: a line per job, its first command and how many there are."""
    text = []
    for job in found:
        after = f" after {', '.join(job.after)}" if job.after else ""
        count = f"{len(job.commands)} tasks, " if len(job.commands) > 1 else ""
        text.append(f"{job.name} ({count}{job.kind}){after}\n    python {job.commands[0]}")
        if len(job.commands) > 1:
            text.append(f"    ... python {job.commands[-1]}")
    return "\n".join(text)


def parse(arguments: list[str], program: str, doc: str) -> tuple[argparse.Namespace, Config]:
    """A command line of this module or of tiered.local_run, and the config it names. Raises
    UserError."""
    parser = argparse.ArgumentParser(
        prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--reading-tasks", type=int, default=0, help="calls that share the reading; 0: no sharing"
    )
    if program == "tiered.plan":
        parser.add_argument(
            "--write", nargs="?", const="", metavar="FILE", help="to a file; prints its name"
        )
        parser.add_argument("--folder", action="store_true", help="print the run's folder alone")
        parser.add_argument("--gpus", type=int, default=1, help="that share a partition's training")
    else:
        parser.add_argument("--workers", type=int, default=0, help="tasks at a time; 0: see above")
        parser.add_argument("--dry-run", action="store_true", help="print the plan")
    given = parser.parse_args(arguments)
    for flag in ("reading_tasks", "workers", "gpus"):
        if getattr(given, flag, 0) < 0:
            raise UserError(f"--{flag.replace('_', '-')}: below 0")
    for override in given.overrides:
        if "=" not in override:
            raise UserError(f"{override}: not an override (key=value)")
        if not override.isprintable():  # the plan has a task per line, its parts between tabs
            raise UserError(f"{override!r}: a line break or tab in an override")
    return given, load(given.config, tuple(given.overrides))


def arguments_of(given: argparse.Namespace) -> str:
    """Config file and overrides of a command line, as a shell reads them."""
    return shlex.join([given.config, *given.overrides])


def main() -> None:
    """Command line."""
    try:
        given, config = parse(sys.argv[1:], "tiered.plan", __doc__)
        if given.folder:
            print(config.run_dir)
            return
        found = jobs(config, arguments_of(given), given.reading_tasks)
        if given.gpus > 1:
            own_micro_batches(config.training.gradient_accumulation_steps, given.gpus)
        if given.write is not None:
            # by its content: tasks of an earlier submission read theirs when they begin
            name = f"plan-{digest(lines(found))}.tsv"
            path = Path(given.write or config.run_dir / "jobs" / name)
            write_text(path, lines(found))
    except (UserError, OSError) as error:
        print(f"tiered.plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(table(found) if given.write is None else path)


if __name__ == "__main__":
    main()
