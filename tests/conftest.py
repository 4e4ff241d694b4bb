"""Fixtures that several test files share; nothing here needs a network."""

import gzip
import itertools
import json
import os
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.forks import STAGES as STAGES_SCRIPT
from tests.forks import Forked, fork
from tiered.domains import CODES
from tiered.locks import locked

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def sample_texts() -> dict[str, str]:
    """The first document of every language of the sample corpus."""
    texts = {}
    for code in CODES:
        (path,) = (ROOT / "data/sample/multilingual").glob(f"c4-{code}.*.json.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts[code] = json.loads(file.readline())["text"]
    return texts


STAGES = (
    "process_dset",
    "train_det_router",
    "run_clm",
    "eval_det_router",
    "unlearn_benchmarks",
)
# Four languages, two groups of the study, models of a few thousand parameters.
TINY = """
seed: 0
threads: 1
device: cpu
output_dir: runs
data:
  source: raw
  processed_dir: processed
  domains: [hi, si, de, en]
  block_size: 32
  min_characters: 100
  tokens_per_domain: 12000
  repeats: {4: 4, 16: 4}
  repeat_domains: [hi]
  num_proc: 1
tokenizer: {name: bpe, vocab_size: 400}
router: {hidden_size: 16, context_tokens: 8, batch_rows: 8}
model: {hidden_size: 16, moe_experts: 4, moe_topk: 2, moe_heads: 2, moe_dim: 4, moe_groups: 1}
training:
  per_device_train_batch_size: 8
  logging_steps: 5
  save_steps: 10
eval:
  rows_per_domain: 8
  batch_rows: 8
  context_lengths: [1, 8, 16]
  mixtures: [distance, bayes_cached, average, parameter_average]
  top_k: [1, 0]
unlearn: {forget: [hi], forget_rows: 30, retain_rows: 8, bootstrap_samples: 100}
"""
TINY_EXPERIMENTS = {
    "n1": "partition: {method: language, n: 1}",
    "n2": "partition: {method: family, n: 2}",
    "n4": "partition: {method: language, n: 4}",
    "r2": "partition: {method: random, n: 2}",
    "k4": "partition: {method: cluster, n: 4}\nrouter: {embedder: tfidf, tfidf_dimensions: 16}",
}


def tiny_project(folder: Path, languages=("hi", "si", "de", "en"), documents: int = 120) -> None:
    """Raw text (raw/<domain>/) and configs (configs/*.yaml) of the tiny profile in a folder."""
    for code in languages:
        (source,) = (ROOT / "data/sample/multilingual").glob(f"c4-{code}.*.json.gz")
        target = folder / "raw" / code
        target.mkdir(parents=True)
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            text = "".join(line for line, _ in zip(lines, range(documents), strict=False))
        (target / "part-0.jsonl").write_text(text, encoding="utf-8")
    configs = folder / "configs"
    configs.mkdir()
    (configs / "base.yaml").write_text(TINY, encoding="utf-8")
    for name, partition in TINY_EXPERIMENTS.items():
        (configs / f"{name}.yaml").write_text(f"base: base.yaml\nname: {name}\n{partition}\n")


def start_stages(
    folder: Path, stages, *arguments, largest_file: int = 0, forked: bool = True
) -> subprocess.Popen | Forked:
    """Start scripts in a process of their own whose working folder is `folder`.

    largest_file: bytes beyond which a write fails, as on a full disk (0: no limit); forked: from a
    process that has imported torch and the rest (False: started anew, with its own hash seed).
    """
    stages, arguments = list(stages), [str(a) for a in arguments]
    if forked:
        return fork(folder, stages, arguments, largest_file=largest_file)
    return subprocess.Popen(
        [*STAGES_SCRIPT, ",".join(stages), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        start_new_session=True,
    )


def run_stages(folder: Path, stages, *arguments, forked: bool = True) -> str:
    """Run scripts to their end; their output. Fails the test with it if they fail."""
    process = start_stages(folder, stages, *arguments, forked=forked)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A finished tiny pipeline: n = 1, 2 (family), 4 (language), 2 (random documents),
    4 (clusters). Made once; each of pytest-xdist's workers has a copy of its own."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with locked(shared / ".locks/tiny.lock", "tiny pipeline"):
        if not (shared / "tiny").exists():
            making = tmp_path_factory.mktemp("making")
            tiny_project(making)
            experiments = [f"configs/{name}.yaml" for name in TINY_EXPERIMENTS]
            run_stages(making, STAGES[:1], *experiments)
            # two at a time: the other worker, if any, waits for it
            halves = [start_stages(making, STAGES[1:], *experiments[i::2]) for i in (0, 1)]
            for process in halves:
                output, _ = process.communicate(timeout=900)
                assert process.returncode == 0, output
            making.rename(shared / "tiny")
    folder = tmp_path_factory.mktemp("tiny")
    copied(shared / "tiny", folder)
    return folder


def copied(source: Path, target: Path) -> None:
    """Copy a project as it is, hard links and times included."""
    subprocess.run(["cp", "-a", "-T", source, target], check=True)


def brute_ngrams(pieces: list[bytes], buckets: int, longest: int) -> list[tuple[int, int]]:
    """(bucket, token that completes it) of every character n-gram of a text cut into pieces."""
    text, ends = b"".join(pieces).decode(), []
    bounds = list(itertools.accumulate(map(len, pieces)))
    for i in range(len(text)):  # the token in which character i ends
        last = len(text[: i + 1].encode())
        ends.append(next(t for t, bound in enumerate(bounds) if bound >= last))
    found = []
    for i in range(len(text)):
        code = 0
        for length in range(1, longest + 1):
            if i - length + 1 < 0:
                break
            code = (code * 1_000_003 + ord(text[i - length + 1]) + 7 * length) % 2_147_483_629
            found.append((code % buckets, ends[i]))
    return found
