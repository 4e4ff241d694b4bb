"""Train partition models, each in isolation: one, several, or all one after another.

Reads   data/processed/<key>/ (process_dset.py)
Writes  runs/<experiment>/models/<k>/, seed_lm/ (links into runs/.store/models), provenance.json

    python run_clm.py configs/quickstart/n16.yaml                     # CPU, all partitions
    python run_clm.py configs/c4/n16.yaml partition.index=3          # one GPU, bfloat16 autocast
"""

import shutil
from collections.abc import Iterable

from tiered.branching import has_own_seed, seed_domains
from tiered.config import Config, run_script
from tiered.data import ProcessedData
from tiered.partition import make_partition_map
from tiered.record import is_main_process, leave_ranks, note_provenance, start, timed
from tiered.router import check_clusters
from tiered.store import link_if_changed, read_json
from tiered.training import (
    forget_other_partitions,
    missing_models,
    missing_seeds,
    train_at_once,
    train_partition,
    train_seed,
)


def wanted(config: Config) -> Iterable[int]:
    """Partitions this call trains."""
    return config.partition.index or range(config.num_partitions)


def prepare(configs: list[Config]) -> None:
    """With training.num_proc above 1: train the models of all experiments, several at a time."""
    for config in configs:
        make_partition_map(config)
        check_clusters(config, ProcessedData(config))
        start(config, "run_clm")
    train_at_once(configs, missing_seeds)
    train_at_once(configs, lambda config: missing_models(config, wanted(config)))


def make_seed(config: Config, data: ProcessedData) -> list[str]:
    """Train the seed LM or find it, and link it into the run folder; the domains it saw."""
    if not config.model.init_from:
        if is_main_process():
            shutil.rmtree(config.run_dir / "seed_lm", ignore_errors=True)
        return []
    with timed(config, "run_clm/seed_lm", wait=True):  # partitions trained apart share it
        folder = train_seed(config, data)
    if not is_main_process():
        return []
    if has_own_seed(config):
        link_if_changed(folder, config.run_dir / "seed_lm")
        print(f"{config.name} seed LM: {read_json(folder / 'record.json')['tokens']:,} tokens")
    domains = seed_domains(folder) or ["unknown"]
    note_provenance(config, {"seed_lm": domains})
    return domains


def main(config: Config) -> None:
    """Models of one experiment's partitions."""
    # 1. which partitions
    partitions = make_partition_map(config)
    # 2. processed data
    data = ProcessedData(config)
    check_clusters(config, data)
    start(config, "run_clm")
    if is_main_process():
        forget_other_partitions(config)
    # 3. the model that all of them start from, if any
    seen = make_seed(config, data)
    for k in wanted(config):
        # 4. train partition k, or take it from the store if its inputs are unchanged
        with timed(config, f"run_clm/{k}"):
            folder = train_partition(config, data, partitions, k)
        if not is_main_process():
            continue
        if folder is None:
            shutil.rmtree(config.run_dir / "models" / str(k), ignore_errors=True)
            print(f"{config.name} partition {k}: no data (its domains are excluded), no model")
            continue
        # 5. link it into the run folder
        link_if_changed(folder, config.run_dir / "models" / str(k))
        record = read_json(folder / "record.json")
        note_provenance(config, {f"model/{k}": sorted({*record["partition"]["present"], *seen})})
        print(
            f"{config.name} partition {k}: {record['parameters']['total']:,} parameters,"
            f" {record['optimizer_steps']} steps, {record['tokens']:,} tokens,"
            f" final training loss {record['final_training_loss_nats']} nats"
        )


if __name__ == "__main__":
    run_script(main, __doc__, prepare)
    leave_ranks()
