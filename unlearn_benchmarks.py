"""Remove each forget domain by each operation and measure it against a gold retrain.

Reads   runs/<experiment>/router/, models/, data/processed/<key>/
Writes  runs/<experiment>/unlearn/<forget>/<operation>/{metrics.json, rows.parquet, system/},
        metrics.json

    python unlearn_benchmarks.py configs/quickstart/n16.yaml          # CPU, minutes
    python unlearn_benchmarks.py configs/c4/trained/n16.yaml unlearn.forget=hi   # one GPU
    python unlearn_benchmarks.py configs/external.yaml --rows ROWS --target MODEL --gold MODEL

With --target (and --original: the model before unlearning), folders of any Hugging Face causal LMs
are measured on a file of rows (docs/unlearning.md); writes
runs/<experiment>/external/<target>/metrics.json.
"""

from tqdm import tqdm

from tiered.config import Config, run_script
from tiered.record import set_up_process, start, timed
from tiered.store import read_json, write_json
from tiered.training import train_at_once
from tiered.unlearning.benchmark import (
    Bench,
    forget_sets,
    missing_gold_seeds,
    missing_golds,
    open_run,
    print_table,
)
from tiered.unlearning.checks import checks
from tiered.unlearning.compartments import compartments
from tiered.unlearning.external import measure_external


def prepare(configs: list[Config]) -> None:
    """With training.num_proc above 1: train the golds of all experiments, several at a time."""
    configs = [config for config in configs if not config.unlearn.target]
    train_at_once(configs, missing_gold_seeds)
    train_at_once(configs, missing_golds)


def main(config: Config) -> None:
    """All operations on all forget domains of one experiment, or a model from elsewhere."""
    if config.unlearn.target:
        set_up_process(config)
        print_table(config, measure_external(config))
        return
    # 1. the finished run that everything starts from
    context = open_run(config)
    start(config, "unlearn_benchmarks")
    results = {}
    sets = forget_sets(context)
    bar = tqdm(sets, desc=f"{config.name} unlearning", unit="forget set", disable=None)
    for forget in bar:
        # 2. operations, scores and measures of one forget set, each resumed by hash
        with timed(config, f"unlearn_benchmarks/{forget.name}"):
            results[forget.name] = Bench(context, forget, bar).run()
    if config.unlearn.compartments:
        # 3. how far the run keeps its domains apart
        with timed(config, "unlearn_benchmarks/compartments"):
            compartments(context, lambda text: bar.set_postfix_str(f"compartments: {text}"))
    # 4. one file for the report: utility and unlearning of the experiment
    utility = config.run_dir / "eval" / "utility.json"
    utility = read_json(utility) if utility.is_file() else None
    value = {"utility": utility, "unlearning": results, "checks": checks(results)}
    write_json(config.run_dir / "metrics.json", value)
    # 5. what a reader wants to see at once
    print_table(config, results)


if __name__ == "__main__":
    flags = {f"--{key}": f"unlearn.{key}" for key in ("target", "gold", "original", "rows")}
    run_script(main, __doc__, prepare, flags)
