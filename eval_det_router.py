"""Utility and routing quality of the tiered model, per domain and macro.

Reads   runs/<experiment>/router/, models/, data/processed/<key>/
Writes  runs/<experiment>/eval/utility.json, rows.parquet (mixtures.parquet, experts.json)

    python eval_det_router.py configs/quickstart/n16.yaml             # CPU, seconds
    python eval_det_router.py configs/c4/trained/n16.yaml eval.rows_per_domain=0   # one GPU
"""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from tiered.baselines.glider import Inside, router_cosines, sentence_cosines
from tiered.branching import has_own_seed, outside_folder
from tiered.config import HAVE_EXPERTS, ROUTED_INSIDE, Config, run_script
from tiered.data import ProcessedData
from tiered.evaluation import (
    evaluate,
    evaluate_mixtures,
    evaluation_key,
    finished,
    score_cache,
)
from tiered.inspection import write_experts
from tiered.modeling_tiered import Level1Router
from tiered.partition import PartitionMap, make_partition_map
from tiered.record import device_of, start, timed
from tiered.router import check_router, load_models, load_router, run_models, tiered_model
from tiered.sealed import write_table
from tiered.store import UserError, read_json, verify, write_json
from tiered.training import seed_inputs


def routes_inside(config: Config) -> bool:
    """Whether a mixture chooses experts in every linear map."""
    return any(name in ROUTED_INSIDE for name in config.eval.mixtures)


def experts_inside(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    router: Level1Router,
    folders: dict[int, Path],
) -> Inside:
    """The model of all of a run's LoRA experts, on the config's device, and its queries."""
    from tiered.baselines.lora_experts import load_experts  # peft takes seconds to import

    base = config.run_dir / "seed_lm" if has_own_seed(config) else outside_folder(config)
    if has_own_seed(config):
        verify(base)
        if read_json(base / "record.json")["inputs"] != seed_inputs(config, data):
            raise UserError(
                f"{base}: of another config or other data; run: python run_clm.py CONFIG"
            )
    section = config.eval
    high, low = section.glider_alphas
    model = load_experts(
        base,
        folders,
        experts_per_token=section.experts_per_token,
        threshold=section.glider_threshold,
        alpha_high=high,
        alpha_low=low,
    )
    model = model.to(device_of(config))
    if config.eval.glider_encoder:
        return Inside(model, sentence_cosines(config, data, partitions, model.experts))
    return Inside(model, router_cosines(config, router, model.experts))


def main(config: Config) -> None:
    """Score one experiment's test rows under every routing scope."""
    # 1. what earlier stages made
    partitions = make_partition_map(config)
    data = ProcessedData(config)
    router = load_router(config.run_dir / "router", "python train_det_router.py CONFIG")
    check_router(config, data, partitions)
    folders = run_models(config, partitions, data)
    start(config, "eval_det_router")
    # nothing is scored again where a finished evaluation had the same inputs
    hashes = {k: verify(folder) for k, folder in folders.items()}

    def progress(items: Iterable, what: str, unit: str) -> Iterable:
        return tqdm(items, desc=f"{config.name} {what}", unit=unit, disable=None)

    inputs = evaluation_key(config, data, partitions, hashes)
    path = config.run_dir / "eval" / "utility.json"
    result = None if config.overwrite else finished(path, inputs)
    if result is None:
        with timed(config, "eval_det_router"):
            # 2. one model of all parts
            model = tiered_model(config, partitions, router, load_models(folders))
            cache = score_cache(config, hashes)
            # 3. scores of every domain, routed partitions only
            result, table = evaluate(config, data, partitions, model, cache, progress)
            # 4. mixtures: every partition's model on every row
            if config.eval.mixtures:
                inside = None
                if routes_inside(config):
                    inside = experts_inside(config, data, partitions, model.router, folders)
                result["mixtures"], mixed = evaluate_mixtures(
                    config, data, partitions, model, cache, progress, inside
                )
                write_table(path.with_name("mixtures.parquet"), mixed)
            result["models"], result["inputs"] = {str(k): h for k, h in hashes.items()}, inputs
            # 5. rows first, so that utility.json stands for a finished stage
            write_table(path.with_name("rows.parquet"), table)
            write_json(path, result)
    # 6. what the experts of every model did
    if config.eval.expert_rows and config.model.type in HAVE_EXPERTS:
        write_experts(config, data, partitions, folders, progress)
    # 7. what a reader wants to see at once
    for scope, figures in result["macro"].items():
        if isinstance(figures, dict):
            gain = figures["gain_over_unigram"]
            print(
                f"{config.name} {scope}: {figures['bpb']:.3f} bits per byte,"
                f" {abs(gain):.1%} {'below' if gain >= 0 else 'above'} the unigram,"
                f" accuracy {figures['accuracy']:.3f}"
            )
    for label, figures in result.get("mixtures", {}).get("macro", {}).items():
        if isinstance(figures, dict):
            novel = result["mixtures"].get("novel_macro", {}).get(label)
            apart = f", {novel['bpb']:.3f} on novel domains" if isinstance(novel, dict) else ""
            print(f"{config.name} mixture {label}: {figures['bpb']:.3f} bits per byte{apart}")
    print(f"{config.name} routing accuracy: {result['routing']['sample_accuracy']}")


if __name__ == "__main__":
    run_script(main, __doc__)
