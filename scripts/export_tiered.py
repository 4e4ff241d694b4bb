"""A run as one Hugging Face model that loads anywhere, with a model card.

Reads   runs/<experiment>/ (config.yaml, router/, models/, provenance.json, eval/)
Writes  OUT/: weights, configuration, tokenizer, the code of the models, README.md

    python scripts/export_tiered.py runs/quickstart-n16 exported
    python -c "from transformers import pipeline; \\
        print(pipeline('text-generation', 'exported', trust_remote_code=True)('Once upon'))"

The folder needs torch and transformers, not this project.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiered.config import SHARED_TRUNK, Config, load_run  # noqa: E402
from tiered.data import ProcessedData  # noqa: E402
from tiered.partition import make_partition_map  # noqa: E402
from tiered.router import (  # noqa: E402
    check_router,
    load_models,
    load_router,
    run_models,
    tiered_model,
)
from tiered.store import TOKENIZER_RECORD, UserError, read_json, write_text  # noqa: E402


def card(config: Config, run: Path, model: Any) -> str:
    """README.md of the exported folder, from the run's own records."""
    utility_path = run / "eval" / "utility.json"
    utility = read_json(utility_path) if utility_path.is_file() else None
    provenance = read_json(run / "provenance.json")
    parameters = {k: sum(p.numel() for p in m.parameters()) for k, m in model.partitions.items()}
    sizes = sorted(set(parameters.values()))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"language: [{', '.join(config.present_domains)}]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"A tiered language model: a deterministic router over {len(parameters)} partition models,"
        f" {_training(config)} (partition method `{config.partition.method}`). Each token is"
        " predicted by the model of the partition that the text so far is nearest to.",
        "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
        "    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)",
        "    model.remove_partition(3)                             # delete a partition",
        "    model.generate(ids, allowed_partitions=[0, 1])        # or forbid it to a request",
        "",
        "| partition | domains | parameters |",
        "|---|---|---|",
    ]
    for k, count in parameters.items():
        domains = ", ".join(model.config.partitions[int(k)])
        lines.append(f"| {k} | {domains} | {count:,} |")
    lines += [
        "",
        f"Parameters in all: {sum(parameters.values()):,} ({len(parameters)} models of"
        f" {' to '.join(f'{s:,}' for s in dict.fromkeys((sizes[0], sizes[-1])))}), and the router's"
        f" {sum(p.numel() for p in model.router.parameters()):,}.",
        "",
        "## Data and provenance",
        "",
        f"Source: `{config.data.source}`. Domains whose data touched each part:",
        "",
        *(f"* {name}: {_domains(value)}" for name, value in sorted(provenance.items())),
        "",
        "## Utility",
        "",
    ]
    if utility is None:
        lines.append("Not evaluated.")
    else:
        domains = len(utility["routing"]["confusion"])  # novel ones apart
        lines += ["| routing | bits per byte | below the unigram |", "|---|---|---|"]
        for scope, figures in utility["macro"].items():
            if isinstance(figures, dict):
                gain = f"{figures['gain_over_unigram']:.1%}"
                lines.append(f"| {scope} | {figures['bpb']:.3f} | {gain} |")
        lines += [
            "",
            f"Macro mean over {domains} domains, split `{utility['split']}`.",
        ]
    lines += [
        "",
        "## Licence",
        "",
        "Code: Apache-2.0. The weights derive from the data above and are bound by its terms.",
    ]
    return "\n".join(lines) + "\n"


def _training(config: Config) -> str:
    """How the partition models came to be, in words."""
    if config.model.type in SHARED_TRUNK:
        return "trained together with a trunk that all of them share"
    if config.model.init_from:
        return "started from one seed LM and trained apart from then on"
    return "trained apart from one another"


def _domains(value: list[Any]) -> str:
    """Domains of a provenance entry: names, or a list of names per centroid."""
    lists = [v if isinstance(v, list) else [v] for v in value]
    names = sorted({name for part in lists for name in part})
    return ", ".join(names) if names else "none"


def main() -> None:
    """Export one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run, runs/<experiment>")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    given = parser.parse_args()
    try:
        if given.out.exists():
            raise UserError(f"{given.out}: exists already; remove it or name another folder")
        export(given.run, given.out)
    except UserError as error:
        print(f"export_tiered.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{given.out}: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")


def export(run: Path, out: Path) -> None:
    """Write the tiered model of a run, its tokenizer and its card."""
    config = load_run(run)
    data, partitions = ProcessedData(config), make_partition_map(config)
    router = load_router(run / "router", "python train_det_router.py CONFIG")
    check_router(config, data, partitions)
    folders = run_models(config, partitions, data)
    model = tiered_model(config, partitions, router, load_models(folders)).cpu()
    model.save_pretrained(out)
    data.tokenizer.save_pretrained(out)
    shutil.copy(data.folder / "tokenizer" / TOKENIZER_RECORD, out)
    write_text(out / "README.md", card(config, run, model))


if __name__ == "__main__":
    main()
