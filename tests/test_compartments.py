"""Compartments of the tiny runs: what is measured against what the parts say one by one."""

import dataclasses

import numpy as np
import pytest

from tests.test_gradient import context_of
from tiered.unlearning import compartments
from tiered.unlearning.checks import checks
from tiered.unlearning.compartments import selectivity


def test_selectivity_by_hand():
    changes = {"a": {"a": 3.0, "b": -0.5, "c": 0.5}, "b": {"a": 1.0, "b": 1.0, "c": 0.0}, "c": "x"}
    assert selectivity(changes, ["a", "b", "c"]) == pytest.approx(2 / 0.5)
    assert selectivity({"a": "words"}, ["a", "b"]) == "none"
    assert selectivity({"a": {"a": 1.0, "b": 0.0}}, ["a", "b"]) == "undefined"


def measures(auc: float | str, p: float = 1.0, exact: bool = False, **more):
    cell = auc if isinstance(auc, str) else {"value": auc, "p": p}
    facts = {"exact": exact, "complete": True, "system": f"{auc} {p}"}
    return {**facts, "AUC": {"LOSS": {"all": cell, "1": cell, "16": cell}}, **more}


def test_claims_by_hand():
    """Three systems at chance: p 0.03, 0.5, 0.02 become 0.06, 0.5, 0.06."""
    purge = {"bpb_change": {"test": {"value": 0.3}}}
    curve = {"robustness": {"relearn": {"bpb": [4.0, 3.0], "advantage_bpb": {"value": 0.0}}}}
    operations = {
        "original": measures(0.9, 1e-9),
        "gold": measures(0.52, 0.5, exact=True) | curve,
        "gold-seed-1": measures(0.44, 0.02),
        "delete-S1": measures(0.56, 0.03, exact=True, cost={"tokens": 0}),
        "sisa": measures("no power", exact=True) | curve,
        # the very system of gold is no fourth cell; what lacks a model need not relearn as gold
        "gold-recluster": measures(0.52, 0.5, exact=True),
        "delete-S2": measures("no power", exact=True, complete=False)
        | {"robustness": {"relearn": {"bpb": [9.0, 9.0], "advantage_bpb": {"value": -5.0}}}},
        "GA": measures(0.1, 1e-9),
        "mask-skew": measures(0.8, 1e-5) | purge,
        "mask-random": measures(0.8, 1e-5, draws={"test": [0.1, 0.2]}),
        "delete-S0": {"result": "not applicable"},
    }
    found = {c["claim"].split(" ")[0]: c for c in checks({"hi": operations})}
    assert found["attacks"]["measured"].startswith("3 cells, least p 0.0600 (")
    assert {name: c["holds"] for name, c in found.items()} == {
        **{"attacks": True, "LOSS": True, "mask-skew": True, "delete-S1": True, "exact": True},
    }
    operations["mask-random"]["draws"]["test"].append(0.31)
    operations["gold"] = measures(0.7, 0.01, exact=True)
    operations["original"] = measures("no power")
    operations["delete-S1"]["cost"]["tokens"] = 5
    found = {c["claim"].split(" ")[0]: c["holds"] for c in checks({"hi": operations})}
    assert found == {"attacks": False, "LOSS": False, "mask-skew": False, "delete-S1": False}


@pytest.fixture(scope="module")
def found(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny)
        made = {}
        for name in ("n1", "n2", "n4"):
            settings = {"mask_ratio": 1.2, "random_masks": 2, "retain_rows": 6}
            context = context_of(name, sequence=("hi", "de", "si", "en"), **settings)
            made[name] = context, compartments.compartments(context)
        yield made


def test_level_one_by_the_confusion(found):
    for name, (context, result) in found.items():
        level1 = result["level1"]
        table = np.array(level1["confusion_tokens"])
        assert table.shape == (4, context.partitions.n)
        assert (table.sum(1) == 6 * 31).all() or name == "n2"  # as many tokens of each domain
        into = level1["retained_tokens_routed_into"]["hi"]
        share = table / table.sum(1, keepdims=True)
        expected = share[1:, list(context.partitions.touched("hi"))].sum(1).mean()
        assert into == pytest.approx(expected, abs=1e-6)
    assert found["n1"][1]["level1"]["nmi"] == 0 and found["n1"][1]["level1"]["nmi_maximal"] == 0
    level1 = found["n4"][1]["level1"]
    assert level1["nmi_shuffled"] < 0.2 < level1["nmi"] <= level1["nmi_maximal"] == 1


def test_level_two_tells_domains_apart_inside_a_partition_only(found):
    assert "no other domain" in found["n4"][1]["level2"]["0"]
    groups = found["n2"][1]["level2"]["0"]
    assert groups["domains"] == ["hi", "si"] and groups["experts_per_group"] == 16
    for group in groups["groups"]:
        assert group["nmi_above_chance"] == pytest.approx(
            group["nmi"] - group["nmi_shuffled"], abs=2e-6
        )
        assert 1 <= group["effective_domains_per_expert"] <= 2
        assert 1 <= group["effective_experts_per_domain"] <= 16
        matrix = np.array(group["js_bits"])
        assert np.allclose(matrix, matrix.T) and not matrix.diagonal().any()
        counts = [group["skewed_experts"][str(r)]["hi"] for r in compartments.SKEWS]
        assert counts == sorted(counts, reverse=True)


def test_the_causal_matrix_is_measured_row_by_row(found):
    result = found["n2"][1]
    causal = result["causal"]
    assert causal["delete"]["hi"]["hi"] > 0 and causal["delete"]["hi"]["si"] > 0  # one partition
    assert found["n1"][1]["causal"]["delete"]["hi"] == "none"
    assert "no other domain" in found["n4"][1]["causal"]["mask-skew"]["hi"]
    row = causal["mask-skew"]["hi"]
    assert row["hi"] > row["si"]  # an expert that is hi's is less si's
    assert 0 < causal["coverage"]["hi"]["0"] < 1
    assert causal["selectivity"]["mask-skew"] > causal["selectivity"]["mask-random"]


def test_removals_in_sequence_go_on_until_nothing_is_left(found):
    four = found["n4"][1]["sequence"]
    assert four["order"] == ["hi", "de", "si", "en"]
    assert [s["removed"] for s in four["delete"][:4]] == [0, 1, 2, 3] and len(four["delete"]) == 5
    assert four["delete"][4] == "not applicable: removes all 4 models"
    assert four["delete"][0]["bpb_gone"] == "none"
    # one removal is the causal matrix's row
    causal = found["n4"][1]["causal"]["delete"]["hi"]
    first, second = four["delete"][:2]
    change = sum(causal.values())
    both = 3 * second["bpb_staying"] + second["bpb_gone"] - 4 * first["bpb_staying"]
    assert both == pytest.approx(change, abs=1e-5)
    assert second["bpb_change_gone"] == pytest.approx(causal["hi"], abs=2e-6)
    others = [v for d, v in causal.items() if d != "hi"]
    assert second["bpb_change_staying"] == pytest.approx(sum(others) / 3, abs=2e-6)
    assert first["bpb_change_staying"] == 0 and first["bpb_change_gone"] == "none"
    two = found["n2"][1]["sequence"]
    assert len(two["delete"]) == 3  # hi takes si along, de the rest
    purged = two["mask-skew"]
    assert [s["removed"] for s in purged] == [0, 1, 2, 3, 4] and purged[4]["bpb_staying"] == "none"
    assert found["n1"][1]["sequence"]["delete"][1] == "not applicable: removes all 1 models"
    assert "no other domain" in four["mask-skew"][1]


def test_a_second_run_reads_what_is_there(found, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    context, result = found["n2"]
    monkeypatch.setattr(compartments, "level1", None)
    assert compartments.compartments(context) == result
    section = dataclasses.replace(context.config.unlearn, random_masks=1)
    config = dataclasses.replace(context.config, unlearn=section)
    with pytest.raises(TypeError):  # another setting: measured again
        compartments.compartments(dataclasses.replace(context, config=config))
