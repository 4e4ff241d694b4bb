"""A few-shot classification task for EleutherAI's lm-evaluation-harness, from a run's own data.

Which domain (language) is a snippet of text from? Snippets of the test split are the questions,
snippets of the validation split the examples; the choices are the names of the domains.

    python scripts/fewshot_task.py runs/cbtm-k16 tasks --rows 8
    python scripts/export_tiered.py runs/cbtm-k16 exported
    lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True,dtype=float32 \\
        --tasks domain_of_text --include_path tasks --num_fewshot 8 --device cpu

Writes OUT/domain_of_text.yaml, OUT/questions.jsonl, OUT/examples.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiered.config import Config, load_run  # noqa: E402
from tiered.data import ProcessedData  # noqa: E402
from tiered.store import UserError, write_text  # noqa: E402


def snippets(data: ProcessedData, split: str, rows: int, tokens: int) -> list[dict[str, str | int]]:
    """The beginnings of `rows` documents of every domain, domains taking turns."""
    if min(rows, tokens) < 1:
        raise UserError("--rows and --tokens must be at least 1")
    by_domain = []
    for label, domain in enumerate(data.domains):
        found = data.rows(domain, split, rows).input_ids[:, :tokens]
        texts = [" ".join(data.tokenizer.decode(ids).split()) for ids in found]
        if len(texts) < rows:
            raise UserError(
                f"--rows: domain {domain} has {len(texts)} rows in split {split}, not {rows}"
            )
        by_domain.append([{"text": text, "label": label} for text in texts])
    return [row for turn in zip(*by_domain, strict=True) for row in turn]


def write_task(config: Config, out: Path, rows: int, tokens: int) -> Path:
    """Write the task's rows and its definition; the file that defines it."""
    data = ProcessedData(config)
    for name, split in (("questions", "test"), ("examples", "validation")):
        lines = snippets(data, split, rows, tokens)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(out / f"{name}.jsonl", text)
    files = {name: str((out / f"{name}.jsonl").resolve()) for name in ("questions", "examples")}
    task = {
        "task": "domain_of_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": files["questions"], "dev": files["examples"]}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "dev",
        "doc_to_text": "{{text}} =",
        "doc_to_choice": [f" {domain}" for domain in data.domains],
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = out / "domain_of_text.yaml"
    write_text(path, json.dumps(task, indent=1) + "\n")  # JSON is YAML
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, runs/<experiment>")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--rows", type=int, default=16, help="questions per domain (default 16)")
    parser.add_argument("--tokens", type=int, default=10, help="tokens per snippet (default 10)")
    given = parser.parse_args()
    try:
        config = load_run(given.run)
        path = write_task(config, given.out, given.rows, given.tokens)
    except UserError as error:
        print(f"fewshot_task.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{path}: chance is 1 in {len(config.present_domains)}")


if __name__ == "__main__":
    main()
