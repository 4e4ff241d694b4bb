"""Runs of several seeds as one row, by hand."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.test_report import rows
from tiered.config import EvalConfig
from tiered.evaluation import EXPERT_SETTINGS
from tiered.report import build
from tiered.report_seeds import EXPERT_PAGES, group_name, plot_seeds, seed_groups, seed_tables
from tiered.runs import Run, load_run
from tiered.store import EXPERTS_FORMAT, read_sealed, write_sealed

UTILITY = "Over seeds (bits per byte, test, macro over domains)"
EXPERTS = "Experts over seeds (T9, mean over layers, ± SD)"


def run_of(name: str, seed: int, bpb: float | str, folder: Path = Path("none"), **model) -> Run:
    """A run as far as the tables over seeds look at it."""
    figures = bpb if isinstance(bpb, str) else {"bpb": bpb}
    config = {
        "name": name,
        "seed": seed,
        "threads": seed,
        "model": model,
        "router": {"scope": "token"},
        "eval": {"split": "test", "expert_rows": seed, "flow_tokens": seed},
        "unlearn": {"forget": [name]},
    }
    return Run(folder, config, {"macro": {"token": figures}, "partitions": [[]]}, {})


def test_means_and_differences_seed_by_seed():
    """a: 2.0, 2.2, 2.4 with seeds 0, 1, 2; b: 2.1, 2.5 with seeds 1, 2: less a -0.1 and 0.3, so
    0.1 with an interval of 12.706 (t with one degree of freedom) times 0.2 on both sides."""
    runs = [run_of(f"x-a-s{s}", s, 2.0 + 0.2 * s, width=1) for s in (2, 0, 1)]
    runs += [run_of("x-b-s1", 1, 2.1, width=2), run_of("x-b-s2", 2, 2.7, width=2)]
    runs.append(run_of("alone", 0, 9.0, width=3))
    (title, found), *others = seed_tables(runs, runs[1]).items()
    assert title == UTILITY and not others
    assert [list(row.values()) for row in found] == [
        ["x-a", "1", "token", "0 1 2", "2.200", "0.2000", "2.000 2.200 2.400", "", ""],
        [
            *("x-b", "1", "token", "1 2", "2.400", "0.4243", "2.100 2.700"),
            "0.100 [-2.441, 2.641]",
            "1 of 2 seeds",
        ],
    ]
    assert "less x-a" in found[0]
    # a run of b is named first: differences are against b
    (found,) = seed_tables(runs, runs[3]).values()
    assert [row["less x-b"] for row in found] == ["-0.100 [-2.641, 2.441]", ""]
    # one that stands alone is no reference
    assert "less x-a" in seed_tables(runs, runs[-1])[UTILITY][0]


def test_splits_are_not_compared():
    runs = [run_of(f"a-{s}", s, 2.0, width=1) for s in (0, 1)]
    runs += [run_of(f"b-{s}", s, 2.5, width=2) for s in (0, 1)]
    runs += [run_of(f"c-{s}", s, 1.5, width=3) for s in (0, 1)]
    for run in runs[2:]:
        run.config["eval"]["split"] = "validation"
    found = seed_tables(runs, runs[0])
    (test,), (second, third) = found.values()
    assert list(found) == [UTILITY, UTILITY.replace("test", "validation")]
    assert test["less a"] == second["less b"] == "" and "less a" not in second
    assert third["less b"] == "-1.000 [-1.000, -1.000]"


def test_a_seed_that_is_not_shared_or_undefined_is_no_pair():
    runs = [run_of(f"a-{s}", s, 2.0, width=1) for s in (0, 1)]
    runs += [run_of("b-1", 1, 1.0, width=2), run_of("b-2", 2, 3.0, width=2)]
    runs += [run_of(f"c-{s}", s, "undefined", width=3) for s in (0, 1)]
    found = seed_tables(runs, runs[0])[UTILITY]
    assert [row["less a"] for row in found] == ["", "undefined", "undefined"]
    assert [row["lower with"] for row in found] == ["", "1 of 1 seeds", "0 of 0 seeds"]
    assert [row["seeds"] for row in found] == ["0 1", "1 2", "none"]
    assert found[2]["mean"] == found[2]["SD"] == "undefined"


def test_the_plot_orders_experiments_by_their_mean():
    runs = [
        run_of(f"{name}-{s}", s, bpb + s, width=bpb)
        for name, bpb in (("b", 2), ("a", 1))
        for s in (0, 1)
    ]
    runs += [run_of(f"c-{s}", s, "undefined", width=3) for s in (0, 1)]
    (axes,) = plot_seeds(runs).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    drawn = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert drawn["seed 0"] == [1, 2] and drawn["seed 1"] == [2, 3] and drawn["mean"] == [1.5, 2.5]
    assert plot_seeds(runs[:1]) is None and plot_seeds(runs[4:]) is None


def test_two_runs_of_a_seed_are_one_value():
    runs = [run_of("a-0", 0, 2.0), run_of("a-0-again", 0, 2.2), run_of("a-1", 1, 2.1)]
    (row,) = seed_tables(runs, runs[0])[UTILITY]
    assert (row["seeds"], row["mean"], row["SD"]) == ("0 1", "2.100", "0.0000")
    assert seed_groups(runs[:2]) == [] and seed_tables(runs[:2], runs[0]) == {}


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("moe-olmoe2-s0", "moe-olmoe2-s1"), "moe-olmoe2"),
        (("x-s10", "x-s11"), "x"),
        (("x_seed3", "x_seed4"), "x"),
        (("bass0", "bass1"), "bass"),
        (("one", "two"), "one"),
    ],
)
def test_name_of_a_group(names, shared):
    assert group_name([run_of(name, s, 1.0) for s, name in enumerate(names)]) == shared


def test_fields_of_the_expert_pages_are_known_by_their_beginning():
    fields = [f.name for f in dataclasses.fields(EvalConfig)]
    assert {f for f in fields if f.startswith(EXPERT_PAGES)} == set(EXPERT_SETTINGS)


def test_experts_over_seeds_are_means_of_runs(tmp_path):
    """NMI 0.1 and 0.3 in the layers of the first run's one model; 0.2, 0.2 and 0.6, 0.6 in those
    of the second's two: 0.2 and 0.4, so 0.3 +- 0.141. EC is lacking in one model."""
    names = ("max_violation", "load_entropy", "nmi_shuffled", "effective_domains_per_expert")
    names += ("effective_experts_per_domain", "tis", "tis_by_chance", "tis_attainable")
    names += ("tis_words", "ics", "ics_by_chance", "ics_attainable", "ics_words")

    def model(nmi: tuple[float, float], steps: dict) -> dict:
        groups = [dict.fromkeys(names, 1.0) | {"nmi": value} for value in nmi]
        paths = {"en": {"top_1": 0.25, "top_4": 0.5}}
        figures = {"groups": groups, "continuity": steps, "paths": paths}
        return figures | {"max_violation_pooled": 1.0}

    steps = {"1": {"observed": 0.5, "by_chance": 0.25}}
    found = [
        {"0": model((0.1, 0.3), steps)},
        {"0": model((0.2, 0.2), steps), "1": model((0.6, 0.6), {})},
    ]
    runs = []
    for seed, partitions in enumerate(found):
        folder = tmp_path / str(seed)
        (folder / "eval").mkdir(parents=True)
        text = json.dumps({"format": EXPERTS_FORMAT, "partitions": partitions})
        (folder / "eval/experts.json").write_text(text)
        runs.append(run_of(f"a-s{seed}", seed, 2.0, folder))
    (row,) = seed_tables(runs, runs[0])[EXPERTS]
    assert row["NMI"] == "0.300 ± 0.141" and row["runs"] == "2"
    assert row["EC(1)"] == "none"
    assert row["top-4 paths"] == "0.500 ± 0.000" and row["ICS, words"] == "1 ± 0"
    # a third seed without pages is not of the row; one run with pages makes none
    runs.append(run_of("a-s2", 2, 2.0))
    assert seed_tables(runs, runs[0])[EXPERTS] == [row]
    assert list(seed_tables(runs[1:], runs[1])) == [UTILITY]


def test_the_report_has_the_table(tiny, tmp_path):
    """Copies of runs that say that they are of another seed: no spread, and the difference of the
    two experiments with no width."""
    folders = []
    for name in ("n1", "n2"):
        folders.append(tmp_path / "runs" / f"{name}-s0")
        shutil.copytree(tiny / "runs" / name, folders[-1])
        again = tmp_path / "runs" / f"{name}-s1"
        shutil.copytree(tiny / "runs" / name, again)
        config = yaml.safe_load(read_sealed(again / "config.yaml"))
        changed = config | {"seed": config["seed"] + 1, "name": f"{name}-s1"}
        write_sealed(again / "config.yaml", yaml.safe_dump(changed))
        folders.append(again)
    build([folders[2], *folders, folders[2]], tmp_path / "report")  # n2 first, and named twice
    one, two = rows(
        tmp_path / "report/tables/over_seeds__bits_per_byte__test__macro_over_domains.csv"
    )
    values = [load_run(f).utility["macro"]["token"]["bpb"] for f in folders[::2]]
    less = values[0] - values[1]
    assert one["less n2"] == f"{less:.3f} [{less:.3f}, {less:.3f}]"
    assert (one["SD"], two["SD"], two["less n2"]) == ("0.0000", "0.0000", "")
    assert len(rows(tmp_path / "report/tables/sizes.csv")) == 4
    assert (tmp_path / "report/plots/seeds.png").stat().st_size > 10_000
