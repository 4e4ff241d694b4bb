"""What a domain's text is worth alone: floors and models of one domain, for the model utility.

u_d = (bpb_unigram - bpb) / (bpb_unigram - bpb_single): 0 at the domain's unigram, 1 at a model that
was trained on the domain alone, above 1 where sharing helped.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tiered.config import Config, load_run
from tiered.data import ProcessedData, processed_key, unigram_log_probs
from tiered.evaluation import first_position
from tiered.partition import make_partition_map
from tiered.record import SCORING_CODE, device_of, training_environment
from tiered.router import load_models, run_models
from tiered.scoring import score_prefixes
from tiered.store import UserError, code_hash, content_hash, digest, read_json, write_json
from tiered.unlearning.systems import Context

LEAST_UTILITY = 1e-3  # a harmonic mean needs positive values: one this low already decides it


@dataclass
class Alone:
    """Nats per test row (R,) of one domain: under its unigram, and under its own model."""

    unigram: np.ndarray
    single: np.ndarray


def open_single(config: Config) -> tuple[Config, ProcessedData, dict[str, Path]]:
    """Config and data of `unlearn.single_run`, and domain -> the model of that domain alone."""
    folder, where = Path(config.unlearn.single_run), "unlearn.single_run"
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{where}: {folder} is no run folder; run the stages of its config first")
    single = load_run(folder)
    if processed_key(single) != processed_key(config):
        raise UserError(f"{where}: {folder} was trained on other data or another tokenizer")
    data, partitions = ProcessedData(single), make_partition_map(single)
    models = run_models(single, partitions, data)
    held = {k: [d for d in data.domains if k in partitions.touched(d)] for k in models}
    if max(map(len, held.values())) > 1:
        raise UserError(f"{where}: {folder} has partitions of several domains")
    for k, domains in held.items():
        record = read_json(models[k] / "record.json")
        saw = {*record["partition"]["present"], *((record["seed"] or {}).get("domains") or [])}
        if saw != set(domains):
            raise UserError(
                f"{where}: {folder}'s model of {domains[0]} was not trained on it alone"
            )
    present = set(config.all_domains) - set(config.data.exclude_domains)
    missing = sorted(present - {d for domains in held.values() for d in domains})
    if missing:
        raise UserError(f"{where}: {folder} has no model of {', '.join(missing)}")
    return single, data, {domains[0]: models[k] for k, domains in held.items()}


def alone(context: Context) -> dict[str, Alone] | None:
    """Per domain the nats of its test rows without others' data; None without `single_run`.

    Kept in unlearn/alone.json: one pass per run, whatever is forgotten.
    """
    config = context.config
    if not config.unlearn.single_run:
        return None
    _, data, models = open_single(config)
    section, batch_rows = config.unlearn, config.eval.batch_rows
    first = first_position(config, config.router.scope)
    count = max(section.forget_rows, section.retain_rows)  # fewer rows are the first of these
    path = config.run_dir / "unlearn" / "alone.json"
    key = digest(
        {
            "models": {d: content_hash(folder) for d, folder in models.items()},
            "rows": {d: [data.split_hash(d, s) for s in ("train", "test")] for d in models},
            "settings": [first, count, batch_rows],
            "environment": training_environment(config),
            "code": code_hash(*SCORING_CODE, "tiered/unlearning/utility.py"),
        }
    )
    if not path.is_file() or config.overwrite or read_json(path)["key"] != key:
        found = {}
        for d, folder in models.items():
            rows = data.rows(d, "test", count)
            ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids))
            (model,) = load_models({0: folder}).values()
            model.to(device_of(config))
            nll = score_prefixes(model, ids, ids.shape[1] - 1, batch_rows)["nll"].double()
            unigram = -unigram_log_probs(data, d)[rows.input_ids[:, 1 + first :]].sum(1)
            found[d] = {"unigram": unigram.tolist(), "single": nll[:, first:].sum(1).tolist()}
        write_json(path, {"key": key, "nats": found})
    stored = read_json(path)["nats"]
    return {d: Alone(np.array(v["unigram"]), np.array(v["single"])) for d, v in stored.items()}
