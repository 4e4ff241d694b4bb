"""Speed and memory of process_dset.py over sizes of input, against transformers' run_clm recipe.

    python scripts/bench.py data --megabytes 100 2000 --only ours
    python scripts/bench.py data --megabytes 100

The input is made of the sample corpus: documents of four stretches each, drawn from all documents
of a language, so that it can be of any size and has few near duplicates. Both contenders get the
same tokenizer and the same number of processes. The recipe loads JSON lines, tokenises them by
`map` and cuts them into blocks by a second `map` (group_texts): no filters, no duplicates looked
for, no splits, no counts of bytes. It is written here from its description. `tokenizer alone` is
what neither can go below: the same lines through the same tokenizer, nothing kept.
"""

import argparse
import gzip
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHARD_BYTES = 64e6
VOCABULARY, BLOCK = 32768, 1024
BATCH_LINES = 1000
POLL_SECONDS = 0.05


def sample_documents(domain: str) -> list[str]:
    """Texts of a language of the sample corpus."""
    (path,) = (ROOT / "data/sample/multilingual").glob(f"c4-{domain}.*.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_input(folder: Path, megabytes: float, domains: list[str]) -> None:
    """JSON lines of `megabytes` in all, in files of 64 MB, a sub-folder per domain."""
    for domain in domains:
        words = [text.split(" ") for text in sample_documents(domain)]
        rng, left, number = random.Random(domain), megabytes * 1e6 / len(domains), 0
        (folder / domain).mkdir(parents=True)
        while left > 0:
            with open(folder / domain / f"part-{number:04d}.jsonl", "wb") as file:
                while left > 0 and file.tell() < SHARD_BYTES:
                    line = json.dumps({"text": drawn_text(words, rng)}, ensure_ascii=False) + "\n"
                    left -= file.write(line.encode())
            number += 1


def drawn_text(words: list[list[str]], rng: random.Random) -> str:
    """Four stretches of 30 to 120 words, of four documents."""
    stretches = []
    for _ in range(4):
        document = rng.choice(words)
        start = rng.randrange(max(1, len(document) - 60))
        stretches.append(" ".join(document[start : start + rng.randint(30, 120)]))
    return "\n".join(stretches)


def train_tokenizer(folder: Path, domains: list[str]) -> None:
    """The tokenizer of both contenders, trained on the sample."""
    from tiered.tokenization import fast_tokenizer, train_bpe

    texts = itertools.chain.from_iterable(sample_documents(d) for d in domains)
    fast_tokenizer(train_bpe(texts, VOCABULARY)).save_pretrained(folder)


def recipe(files: list[str], tokenizer_folder: str, output: str, processes: int) -> None:
    """transformers' run_clm: load, tokenise by map, cut into blocks by map, save."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    raw = datasets.load_dataset("json", data_files=files, split="train", cache_dir=f"{output}.raw")

    def tokenise(examples: dict[str, list]) -> dict[str, list]:
        return tokenizer(examples["text"])

    def group(examples: dict[str, list]) -> dict[str, list]:
        joined = {k: list(itertools.chain.from_iterable(v)) for k, v in examples.items()}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        blocks = {k: [v[i : i + BLOCK] for i in range(0, total, BLOCK)] for k, v in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()}

    tokens = raw.map(tokenise, batched=True, num_proc=processes, remove_columns=raw.column_names)
    tokens.map(group, batched=True, num_proc=processes).save_to_disk(output)


def encode_lines(files: list[str], tokenizer_folder: str, share: int, processes: int) -> None:
    """Tokenise every `processes`-th line, from `share` on, and keep nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{tokenizer_folder}/tokenizer.json")
    for file in files:
        with open(file, "rb") as lines:
            own = (
                json.loads(line)["text"] for line in itertools.islice(lines, share, None, processes)
            )
            while batch := list(itertools.islice(own, BATCH_LINES)):
                tokenizer.encode_batch_fast(batch, add_special_tokens=False)


def alone(files: list[str], tokenizer_folder: str, output: str, processes: int) -> None:
    """The tokenizer and nothing else, in as many processes."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        shares = [
            pool.submit(encode_lines, files, tokenizer_folder, i, processes)
            for i in range(processes)
        ]
        for share in shares:
            share.result()


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Wall seconds of a command, and the most memory at a time: of all its processes, and of its
    largest one (resident bytes; pages that processes share count in each)."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peaks, ended = {"all": 0.0, "one": 0.0}, threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            sizes = resident(process.pid)
            peaks["all"] = max(peaks["all"], sum(sizes))
            peaks["one"] = max([peaks["one"], *sizes])

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"bench_data.py: {' '.join(command)} failed:\n{output[-3000:]}")
    return {"seconds": time.perf_counter() - begin, **peaks}


def resident(pid: int) -> list[float]:
    """Resident bytes of a process and of all below it."""
    try:
        process = psutil.Process(pid)
        return [p.memory_info().rss for p in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def contender(kind: str, folder: Path, raw: Path, domains: list[str], processes: int) -> list[str]:
    """The command line of a contender."""
    if kind != "ours":
        files = sorted(str(path) for path in raw.rglob("*.jsonl"))
        own = [files, str(folder / "tokenizer"), str(folder / raw.name) + ".blocks", processes]
        return [sys.executable, __file__, f"--{kind.replace(' ', '-')}", json.dumps(own)]
    section = {"source": str(raw), "domains": domains, "num_proc": processes}
    section |= {"block_size": BLOCK, "processed_dir": str(folder / f"{raw.name}.processed")}
    config = {"name": raw.name, "threads": 1, "device": "cpu", "data": section}
    config |= {"tokenizer": {"name": str(folder / "tokenizer")}, "partition": {"n": 1}}
    path = folder / f"{raw.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, str(ROOT / "process_dset.py"), str(path)]


def race_data(given: argparse.Namespace, kinds: list[str], folder: Path) -> list[dict[str, Any]]:
    """Seconds and peak memory of every contender on every size of input; prints them as a table."""
    domains, rows = given.languages.split(","), []
    train_tokenizer(folder / "tokenizer", domains)
    print(f"\ndata: {', '.join(domains)}, {given.processes} processes\n")
    print("| contender | MB | s | MB/s | time / ours | peak MB, all | peak MB, largest |")
    print("|---|---|---|---|---|---|---|")
    for megabytes in given.megabytes:
        raw = folder / f"raw{megabytes:g}"
        write_input(raw, megabytes, domains)
        for kind in kinds:
            command = contender(kind, folder, raw, domains, given.processes)
            row = {"contender": kind, "megabytes": megabytes, **measured(command, folder)}
            rows.append(row)
            ours = next(r for r in rows if r["megabytes"] == megabytes)
            print(
                f"| {kind} | {megabytes:g} | {row['seconds']:.1f} |"
                f" {megabytes / row['seconds']:.2f} | {row['seconds'] / ours['seconds']:.2f} |"
                f" {row['all'] / 1e6:.0f} | {row['one'] / 1e6:.0f} |",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run_clm"]:
        recipe(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--tokenizer-alone"]:
        alone(*json.loads(sys.argv[2]))
