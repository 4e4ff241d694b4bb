"""The report: pages, tables and plots from stored numbers, words where there are none."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, TINY_EXPERIMENTS, run_stages
from tiered import report_unlearning
from tiered.config import Config
from tiered.report import build
from tiered.runs import load_run, point
from tiered.store import UserError, read_json, write_json

OPERATIONS = Config().unlearn.operations


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def images(page: Path) -> int:
    text = page.read_text(encoding="utf-8")
    assert "http" not in text, "the page must need no network"
    return text.count("<img ")


def test_report_of_plain_runs_has_every_table_and_plot(tiny):
    page = build([tiny / "runs" / n for n in TINY_EXPERIMENTS], tiny / "report")
    text = page.read_text(encoding="utf-8")
    assert images(page) == 6
    assert text.count("<table>") == 7 + len(TINY_EXPERIMENTS) + 1  # leaderboards, claims
    assert "Clusters of k4" in text and "top terms" in text
    assert "Ways to partition" in text and "Mixtures (bits per byte" in text
    assert 'href="forget_hi.html"' in text
    found = rows(tiny / "report/tables/unlearning_hi.csv")
    assert len(found) == len(TINY_EXPERIMENTS) * len(OPERATIONS)
    stored = json.loads((tiny / "runs/n1/metrics.json").read_text())["unlearning"]["hi"]
    (original,) = [r for r in found if (r["n"], r["operation"]) == ("1", "original")]
    assert original["UA"].startswith(f"{stored['original']['UA']['value']:.3f} [")
    # no curve, no compartments: the plots that need them are left out
    assert images(tiny / "report/forget_hi.html") == 3 + len(TINY_EXPERIMENTS)
    assert not list((tiny / "report/plots").glob("causal*"))


@pytest.fixture(scope="module")
def rich(tiny, tmp_path_factory) -> Path:
    """Runs with two golds, gradient ascent, relearning, rounding, compartments and a sequence."""
    folder = tmp_path_factory.mktemp("rich") / "tiny"
    shutil.copytree(tiny, folder)
    settings = {
        "operations": "[original,gold,delete-S1,sisa,mask-skew,mask-random,mask-massmatched,GA]",
        "robustness": "[relearn,int4]",
        "compartments": "true",
        "sequence": "[hi,de]",
        "gold_seeds": 2,
        "relearn_steps": 2,
        "random_masks": 2,
        "max_steps": 6,
        "single_run": "runs/n4",
    }
    overrides = [f"unlearn.{key}={value}" for key, value in settings.items()]
    run_stages(folder, ["unlearn_benchmarks"], "configs/n1.yaml", "configs/n2.yaml", *overrides)
    build([folder / "runs" / n for n in ("n1", "n2")], folder / "report")
    return folder


def test_report_of_the_benchmark_in_full(rich):
    # tradeoff, cost, two causal, coverage, sequence; utility, routing, mixtures, experts
    assert images(rich / "report/index.html") == 10
    # auc, gap, relearn, densities of two runs, rerouting
    assert images(rich / "report/forget_hi.html") == 6
    for name in ("robustness_hi", "memory_hi", "claims", "compartments", "leaderboard_n1"):
        assert rows(rich / f"report/tables/{name}.csv"), name
    robust = {(r["n"], r["operation"]): r for r in rows(rich / "report/tables/robustness_hi.csv")}
    assert robust["1", "gold"]["relearn advantage, bpb"] == "0.000 [0.000, 0.000]"
    assert "UA int4" in robust["1", "GA"]


def test_leaderboard_orders_by_the_gap_and_shows_its_parts(rich):
    run = load_run(rich / "runs/n2")
    board = report_unlearning.leaderboard(run)
    gaps = [float(r["gap to gold"]) for r in board]
    assert gaps == sorted(gaps) and board[0]["operation"] in ("gold", "sisa") and gaps[0] == 0
    names = [r["operation"] for r in board]
    assert "gold, other seeds" in names and len(names) == len(set(names))
    row = board[names.index("GA")]
    measured = run.measured("hi")
    parts = [
        abs(point(measured["GA"][k]) - point(measured["gold"][k])) for k in ("UA", "MIA_efficacy")
    ]
    parts += [
        abs(point(measured["GA"][k]["all"]) - point(measured["gold"][k]["all"]))
        for k in ("RA", "TA")
    ]
    assert float(row["gap to gold"]) == pytest.approx(np.mean(parts), abs=6e-4)
    shown = abs(float(row["UA - gold"]))
    assert shown == pytest.approx(parts[0], abs=6e-4)
    assert row["exact"] == "0 of 1" and row["forget sets"] == "1 of 1"
    assert row["verdicts"].endswith(" 1")


def test_means_leave_words_out():
    assert report_unlearning._mean([1.0, np.nan, 3.0]) == "2.000 (1.000 to 3.000)"
    assert report_unlearning._mean([2.0, np.nan, 2.0]) == "2.000"
    assert report_unlearning._mean([np.nan]) == "none"
    assert np.isnan(point("no power")) and point({"value": 2}) == 2.0


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("models/1", "runs/n2/models/1: not the model that eval/utility.json is of"),
        ("models/1/hashes.json", "runs/n2/models/1: not the model that eval/utility.json is of"),
        ("models/1/record.json", "models/1/record.json: file is missing"),
        ("eval/utility.json", "no utility yet"),
        ("unlearn/hi/gold/rows.parquet", "unlearn/hi/gold/rows.parquet: file is missing"),
        ("unlearn/hi/gold/timings.json", "unlearn/hi/gold/timings.json: file is missing"),
    ],
)
def test_a_report_of_a_part_of_a_run_says_what_is_missing(lost, message, tiny, tmp_path):
    shutil.copytree(tiny / "runs/n2", tmp_path / "runs/n2")
    path = tmp_path / "runs/n2" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=re.escape(message)):
        build([tmp_path / "runs/n2"], tmp_path / "report")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("n2", "metrics.json"),
        ("n2", "unlearn/compartments.json"),
        ("k4", "partition/clusters/clusters.json"),
    ],
)
def test_a_report_names_what_is_missing_and_shows_the_rest(name, lost, rich, tmp_path, capsys):
    """A stage may be at work, or a run was copied in part."""
    folder = tmp_path / name
    shutil.copytree(rich / "runs" / name, folder)
    whole = build([folder], tmp_path / "whole").read_text(encoding="utf-8")
    assert "is missing" not in whole + capsys.readouterr().err
    (folder / lost).unlink()
    page = build([folder], tmp_path / "part").read_text(encoding="utf-8")
    told = f"{folder / lost} is missing: what it holds is not in the report"
    assert told in page and told in capsys.readouterr().err
    assert "Utility (macro over domains)" in page and len(page) < len(whole)


def test_results_of_other_models_are_not_reported_together(tiny, tmp_path):
    shutil.copytree(tiny / "runs/n2", tmp_path / "n2")
    path = tmp_path / "n2/metrics.json"
    metrics = read_json(path)
    metrics["utility"]["models"]["1"] = "0" * 16
    write_json(path, metrics)
    with pytest.raises(UserError, match=r"metrics\.json: of other models than eval/utility\.json"):
        load_run(tmp_path / "n2")


def test_tables_of_the_results_page_are_the_stored_numbers(rich):
    command = [sys.executable, str(ROOT / "scripts/unlearning_tables.py")]
    done = subprocess.run(
        [*command, "runs/n1", "runs/n2"], cwd=rich, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| GA")]
    for line, n in zip(lines, ("n1", "n2"), strict=True):
        known = load_run(rich / "runs" / n).measured("hi")
        assert line[1] == f"{point(known['GA']['UA_norm']):.2f}" or np.isnan(
            point(known["GA"]["UA_norm"])
        )
        assert line[2] == f"{point(known['GA']['gap_to_gold']):.3f}"
        assert line[3] == f"{point(known['GA']['bpb']['test']):.2f}"
    assert "gold, 1 other seeds" in done.stdout and "selectivity" in done.stdout
    missing = subprocess.run([*command, "runs"], cwd=rich, capture_output=True, text=True)
    assert missing.returncode == 1 and "not a run folder" in missing.stderr
