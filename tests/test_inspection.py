"""Expert pages from a run: what is stored is what a loop finds, and the page shows it."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_stages, tiny_project
from tiered.baselines.modeling_moe import MoeForCausalLM
from tiered.config import load
from tiered.data import ProcessedData, Rows
from tiered.experts import expert_masks, expert_scores, experts_of, mean_expert_weights
from tiered.inspection import ablations, chosen_texts, costliest, pieces_of, row_nats, spelled
from tiered.methods import moe_config
from tiered.partition import make_partition_map
from tiered.recorder import RoutingRecorder
from tiered.report import build
from tiered.report_experts import ablation_table, plot_flow, saturation
from tiered.router import load_models, run_models
from tiered.store import EXPERTS_FORMAT, UserError, read_json, tree_hashes, write_json
from tiered.training import expert_devices, train_partition

TEXT = "नमस्ते, 你好 world"  # of a reader's own
WATCHED = (
    "eval: {expert_rows: 6, expert_ablations: 2, flow_tokens: 10,"
    f" flow_texts: {{greeting: '{TEXT}'}}}}\n"
)
CONFIGS = {
    "moe": "base: base.yaml\nname: moe\npartition: {n: 1}\n"
    "model: {type: moe, num_attention_heads: 2, num_experts: 6, intermediate_size: 8,"
    " balance_update_rate: 1e-3, router_aux_loss_coef: 0.0}\n"
    "training: {routing_steps: 7, learning_rate: 5e-3}\n"
    "unlearn: {operations: [original, gold, mask-skew, mask-random], mask_ratio: 1.2,"
    " random_masks: 2}\n" + WATCHED,
    "pairs": "base: base.yaml\nname: pairs\npartition: {method: family, n: 2}\n"
    "training: {routing_steps: 9}\n" + WATCHED,
}
STAGES = ("process_dset", "train_det_router", "run_clm", "eval_det_router")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspection")
    tiny_project(folder)
    for name, text in CONFIGS.items():
        (folder / f"configs/{name}.yaml").write_text(text)
    run_stages(folder, STAGES, *(f"configs/{name}.yaml" for name in CONFIGS))
    run_stages(folder, ("unlearn_benchmarks",), "configs/moe.yaml")
    return folder


def loaded(project: Path, name: str):
    config = load(f"configs/{name}.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    return config, data, partitions, load_models(run_models(config, partitions, data))


def test_every_model_is_read_on_its_own_domains(project, monkeypatch):
    monkeypatch.chdir(project)
    for name in CONFIGS:
        _, data, partitions, models = loaded(project, name)
        stored = read_json(project / f"runs/{name}/eval/experts.json")["partitions"]
        assert stored.keys() == {str(k) for k in models}
        for k, model in models.items():
            found = stored[str(k)]
            assert found["domains"] == [d for d in data.domains if d in partitions.members[k]]
            for i, domain in enumerate(found["domains"]):
                ids = data.rows(domain, "test", 6).input_ids.astype(np.int64)
                assert found["tokens"][domain] == ids.size
                weights = mean_expert_weights(model, [torch.from_numpy(ids)]).flatten(1)
                share = weights / weights.sum(1, keepdim=True)
                for g, group in enumerate(found["groups"]):
                    drawn = share[g][group["drawn"]]
                    assert np.allclose(group["share_of_domain"][i], drawn, atol=2e-6)


def test_words_contexts_and_flow_are_of_the_text(project, monkeypatch):
    monkeypatch.chdir(project)
    _, data, _, _ = loaded(project, "moe")
    found = read_json(project / "runs/moe/eval/experts.json")["partitions"]["0"]
    texts = {
        d: [data.tokenizer.decode(row) for row in data.rows(d, "test", 6).input_ids.tolist()]
        for d in data.domains
    }
    seen = 0
    for experts in found["shown"]:
        loads = [e["load"] for e in experts]
        assert loads == sorted(loads, reverse=True) and sum(loads) == pytest.approx(1, abs=1e-4)
        for expert in experts:
            assert sum(expert["domains"].values()) == pytest.approx(1, abs=1e-3)
            for context in expert["contexts"]:
                whole = "".join(texts[context["domain"]])
                before, token, after = context["text"]
                assert before in whole and after in whole
                if "\\x" not in token:  # bytes of a character that goes on
                    assert before + token + after in whole
                    seen += 1
    assert seen > 20
    flows, pieces = found["flow"], pieces_of(data)
    assert list(flows) == ["greeting", *data.domains]
    ids = data.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    given = {d: data.rows(d, "test", 1).input_ids[0, :10].tolist() for d in data.domains}
    for name, row in {"greeting": ids, **given}.items():
        flow = flows[name]
        assert flow["tokens"] == ["".join(parts) for parts in spelled(pieces, row)]
        assert [len(group) for group in flow["groups"]] == [len(row), len(row)]
        for group in flow["groups"]:
            for tops in group:
                weights = [w for _, w in tops]
                assert len(tops) == 2 and weights == sorted(weights, reverse=True)
    assert "".join(text for text, _ in spelled(pieces, ids)) == TEXT


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    pieces = ["你".encode()[:2], "你".encode()[2:] + b" a", b"\xe5", b"\xa5", b"\xbd", b"", b"\xbd"]
    assert spelled(pieces, range(7)) == [
        ("", r"\xe4\xbd"),
        ("你 a", ""),
        ("", r"\xe5"),
        ("", r"\xa5"),
        ("好", ""),
        ("", ""),
        (r"\xbd", ""),  # goes on with nothing: a row may begin inside of a character
    ]


def test_a_special_token_has_its_name(project, monkeypatch):
    monkeypatch.chdir(project)
    _, data, _, _ = loaded(project, "moe")
    pieces, separator = pieces_of(data), data.separator_id
    assert pieces[separator].decode() == data.tokenizer.convert_ids_to_tokens(separator) != ""
    assert all(pieces)


def test_a_text_of_no_token_is_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    config = load("configs/moe.yaml", ["eval.flow_texts={nothing: ''}"])
    with pytest.raises(UserError, match=r"eval\.flow_texts\.nothing: no token in ''"):
        chosen_texts(config, ProcessedData(config))
    with pytest.raises(UserError, match=r"eval\.flow_texts: 'hi' is a domain"):
        load("configs/moe.yaml", ["eval.flow_texts={hi: some text}"])


def domain_bpb(model, rows, batch_rows: int) -> dict[str, float]:
    """Bits per byte of a model on every domain's rows."""
    nats = row_nats(model, rows, batch_rows)
    return {d: nats[d].sum() / np.log(2) / own.token_bytes[:, 1:].sum() for d, own in rows.items()}


def test_an_ablation_is_the_change_that_leaving_out_makes(project, monkeypatch):
    monkeypatch.chdir(project)
    config, data, _, models = loaded(project, "moe")
    found = read_json(project / "runs/moe/eval/experts.json")["partitions"]["0"]
    ablation, model = found["ablation"], models[0]
    rows = {d: data.rows(d, "test", 6) for d in data.domains}
    before = domain_bpb(model, rows, 8)
    assert before == pytest.approx(ablation["bpb"], abs=1e-5)
    # by hand: nats of every row, bytes of what is scored
    ids = torch.from_numpy(rows["hi"].input_ids.astype(np.int64))
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1]).logits.double().log_softmax(-1)
    nats = -logits.gather(-1, ids[:, 1:, None]).sum().item()
    size = rows["hi"].token_bytes[:, 1:].sum()
    assert before["hi"] == pytest.approx(nats / np.log(2) / size, abs=1e-5)
    assert len(ablation["experts"]) == 2 * 2 and set(ablation["paths"]) == set(data.domains)
    entries = [([(e["group"], e["expert"])], e) for e in ablation["experts"]]
    entries += [(list(enumerate(e["path"])), e) for e in ablation["paths"].values()]
    for places, entry in entries:
        keep = torch.ones(2, 6).bool()
        for g, e in places:
            keep[g, e] = False
        model.purge_experts(keep)
        after = domain_bpb(model, rows, config.eval.batch_rows)
        for domain, change in entry["change_bpb"].items():
            assert after[domain] - before[domain] == pytest.approx(change, abs=2e-5)
    # the one that costs most, from models that see the one half of the rows only
    halves = [{d: own.only(np.arange(6) % 2 == i) for d, own in rows.items()} for i in (0, 1)]
    model.purge_experts(torch.ones(2, 6).bool())
    without = [domain_bpb(model, half, 8) for half in halves]
    costs = {}
    for entry in ablation["experts"]:
        keep = torch.ones(2, 6).bool()
        keep[entry["group"], entry["expert"]] = False
        model.purge_experts(keep)
        after = [domain_bpb(model, half, 8) for half in halves]
        for domain in rows:
            change = [a[domain] - b[domain] for a, b in zip(after, without, strict=True)]
            costs[entry["group"], entry["expert"], domain] = change
    most = ablation["most"]
    place = (most["group"], most["expert"])
    assert (*place, most["domain"]) == max(costs, key=lambda key: costs[key][0])
    assert most["found_bpb"] == pytest.approx(costs[(*place, most["domain"])][0], abs=2e-5)
    for domain, interval in most["change_bpb"].items():
        assert interval["value"] == pytest.approx(costs[(*place, domain)][1], abs=2e-5)


def test_what_costs_most_is_found_on_even_rows_and_measured_on_odd_ones():
    """Two changes, two domains, four rows of ten bytes; 1 nat is 1 / ln 2 bits."""

    rows = Rows("a", "test", ("",) * 4, *[np.array([[90, 4, 6]] * 4)] * 3, *[np.zeros(4)] * 2)
    changes = [
        {"a": np.array([1.0, -1, 1, -3]), "b": np.array([0.0, 9, 0, 9])},
        {"a": np.array([0.5, 5, 0.5, 7]), "b": np.array([1.5, 1, 1.5, 2])},
    ]
    found = costliest(changes, {"a": rows, "b": rows})
    assert (found["index"], found["domain"]) == (1, "b")
    assert found["found_bpb"] == pytest.approx(0.15 / np.log(2), abs=1e-6)
    # a: 5 and 7 nats in 20 bytes, 0.6 a byte; t with one degree of freedom 12.7062, SE 0.1
    low, high = (0.6 + sign * 12.7062 * 0.1 for sign in (-1, 1))
    expected = {"value": 0.6, "low": low, "high": high, "standard_error": 0.1}
    for name, value in expected.items():
        assert found["change_bpb"]["a"][name] == pytest.approx(value / np.log(2), abs=1e-4)
    assert found["change_bpb"]["b"]["value"] == pytest.approx(0.15 / np.log(2), abs=1e-6)
    assert costliest(changes, {"a": rows, "b": rows.only(np.arange(4) < 3)}) is None
    assert costliest([], {"a": rows, "b": rows}) is None


@pytest.mark.parametrize("renormalize", [False, True])
def test_ablations_of_a_purged_model_are_on_top_of_the_purge(project, monkeypatch, renormalize):
    """And the model is as it was, whatever happens meanwhile."""
    monkeypatch.chdir(project)
    config, data, _, models = loaded(project, "moe")
    model, rows = models[0], {d: data.rows(d, "test", 6) for d in data.domains}
    keep = torch.ones(2, 6).bool()
    keep[0, :2] = False
    model.purge_experts(keep, renormalize)
    recorder = RoutingRecorder(rows, data.vocab_size)
    for domain, own in rows.items():
        recorder.read(model, domain, own.input_ids)
    before = domain_bpb(model, rows, 8)
    found = ablations(config, recorder, model, rows, lambda items, *_: items)
    assert found["bpb"] == pytest.approx(before, abs=1e-6)
    assert torch.equal(expert_masks(model)[0], keep)
    assert expert_masks(model)[1] is model.config.renormalize_masked is renormalize
    entry = found["experts"][-1]
    more = keep.clone()
    more[entry["group"], entry["expert"]] = False
    model.purge_experts(more, renormalize)
    after = domain_bpb(model, rows, 8)
    model.purge_experts(keep, renormalize)
    for domain, change in entry["change_bpb"].items():
        assert after[domain] - before[domain] == pytest.approx(change, abs=2e-5)

    def stop(items, *_):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablations(config, recorder, model, rows, stop)
    assert torch.equal(expert_masks(model)[0], keep)


def test_training_is_watched_and_not_changed(project, tmp_path):
    lines = (project / "runs/moe/models/0/observed.jsonl").read_text().splitlines()
    moments = [json.loads(line) for line in lines]
    steps = read_json(project / "runs/moe/models/0/record.json")["optimizer_steps"]
    expected = [0, *range(7, steps + 1, 7)]
    assert [m["step"] for m in moments] == expected + [steps] * (steps % 7 > 0)
    loads = np.array([m["load"] for m in moments])
    assert loads.shape[1:] == (2, 6) and np.allclose(loads.sum(-1), 1, atol=1e-4)
    assert not np.array_equal(loads[0], loads[-1])
    assert all(len(m["chosen"]) == 2 and len(m["chosen"][0]) == 4 * 4 * 32 for m in moments)
    uses = [{len(t) for t in group} for m in moments for group in m["chosen"]]
    assert all(u == {2} for u in uses)
    assert (saturation(moments)[-1] == 1).all() and (saturation(moments)[0] < 1).all()
    for moment in moments:
        worst = np.max(moment["load"], 1) * 6 - 1
        assert np.allclose(moment["max_violation"], worst, atol=1e-3)
    # the same model without anybody watching
    for name in ("configs", "processed"):
        shutil.copytree(project / name, tmp_path / name)
    spread = "base: moe.yaml\nname: spread\ntraining: {expert_devices: 2}\n"
    (tmp_path / "configs/spread.yaml").write_text(spread)
    files = ("configs/moe.yaml", "configs/spread.yaml")
    run_stages(tmp_path, ("run_clm",), *files, "training.routing_steps=0")
    alone, watched = tmp_path / "runs/moe/models/0", project / "runs/moe/models/0"
    assert not (alone / "observed.jsonl").exists()
    file = "model.safetensors"
    assert tree_hashes(alone)[file] == tree_hashes(watched)[file]
    # nor with its experts spread over devices
    store = {(tmp_path / f"runs/{name}/models/0").resolve() for name in ("moe", "spread")}
    one, two = (load_file(folder / file) for folder in sorted(store))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    # the biases of loss-free balancing have moved, by whole steps of the rate
    balance = load_file(alone / file)["model.layers.0.mlp.gate.balance"]
    assert balance.any() and torch.allclose(balance / 1e-3, (balance / 1e-3).round(), atol=1e-2)


def test_an_added_domains_model_is_spread_too(project, tmp_path, monkeypatch):
    for name in ("configs", "raw"):
        shutil.copytree(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    values = ("data.domains=[si,de,en]", "data.added_domains=[hi]")
    values += ("training.added_from=nearest", "training.expert_devices=2")
    run_stages(tmp_path, ("process_dset",), "configs/moe.yaml", *values)
    config = load("configs/moe.yaml", values)
    data, partitions, spread = ProcessedData(config), make_partition_map(config), []
    monkeypatch.setattr(MoeForCausalLM, "spread_experts", lambda _, devices: spread.append(devices))
    folder = train_partition(config, data, partitions, 1)  # trains the one it starts from first
    assert read_json(folder / "record.json")["started_from"]["partition"] == 0
    assert spread == [[torch.device("cpu")] * 2] * 2


def test_purging_a_domains_experts_reaches_the_benchmark(project, monkeypatch):
    monkeypatch.chdir(project)
    _, data, _, models = loaded(project, "moe")
    expected = experts_of(expert_scores(models[0], data, batch_rows=8), "hi", 1.2)
    assert expected.any()
    weights = models[0].state_dict()
    for operation in ("mask-skew", "mask-random"):
        folder = project / f"runs/moe/unlearn/hi/{operation}"
        metrics = read_json(folder / "metrics.json")
        assert metrics["exact"] is False and metrics["weights_removed"] is False
        (model,) = load_models({0: folder / "system/models/0"}).values()
        state = model.state_dict()
        purged = ~torch.stack([state.pop(f"model.layers.{g}.mlp.gate.keep") for g in (0, 1)])
        assert torch.equal(purged.sum(1), expected.sum(1))
        assert torch.equal(purged, expected) == (operation == "mask-skew")
        assert all(torch.equal(v, weights[n]) for n, v in state.items())


def test_pages_show_it(project, tmp_path):
    page = build([project / "runs/moe", project / "runs/pairs"], tmp_path)
    text = page.read_text()
    for name in ("experts_moe_0.html", "experts_pairs_0.html", "experts_pairs_1.html"):
        assert f'href="{name}"' in text
        own = (tmp_path / name).read_text()
        assert own.count("<img") >= 4 and "layer 1" in own
    table = (tmp_path / "tables/experts__t9__mean_over_layers.md").read_text()
    assert table.count("\n") == 2 + 3 and "EC(1)" in table
    found = read_json(project / "runs/moe/eval/experts.json")["partitions"]["0"]
    assert f"| {found['continuity']['1']['observed']:.3f} |" in table
    own = (tmp_path / "experts_moe_0.html").read_text()
    assert "Read: 6 rows of the test split per domain" in own and "<b>MaxVio</b>: largest" in own
    most = found["ablation"]["most"]
    (table,) = (tmp_path / "tables").glob("the_expert_that_costs_a_domain_most*.md")
    (row,) = [line for line in table.read_text().splitlines() if line.startswith("| moe |")]
    cells = [text.strip() for text in row.split("|")][1:-1]
    assert cells[3:5] == [most["domain"], f"{most['found_bpb']:.3f}"]
    others = {d: v["value"] for d, v in most["change_bpb"].items() if d != most["domain"]}
    assert cells[6] == f"{np.mean(list(others.values())):.3f}"
    assert cells[7].startswith(f"{max(others.values()):.3f} (")


def test_what_is_left_out_has_its_layer_and_the_domain_that_it_hits():
    found = {"layers": [[0, 1], [2, 3]], "ablation": {"experts": [], "paths": {}}}
    change = {"hi": -0.02, "de": 0.3, "si": 0.01}
    found["ablation"]["experts"].append({"group": 1, "expert": 7, "change_bpb": change})
    small = {"path": [4, 7], "change_bpb": {"hi": 0.0004, "de": -0.2, "si": 0.0}}
    found["ablation"]["paths"]["hi"] = small
    single, path = ablation_table(found)
    assert single["left out"] == "layers 2-3, expert 7" and path["left out"] == "path of hi: 4 7"
    assert single["hits most"] == "de" and path["hits most"] == "none"
    assert (single["hi"], single["de"], path["de"]) == ("-0.020", "+0.300", "-0.200")


def test_saturation_is_the_share_of_the_last_experts_by_hand():
    early = {"chosen": [[[0, 1], [2, 3]], [[], [1]]]}
    late = {"chosen": [[[0, 2], [2, 3]], [[], []]]}
    found = saturation([early, late])
    assert found[:, 0].tolist() == [3 / 4, 1.0] and np.isnan(found[:, 1]).all()


def test_a_flow_goes_through_the_heaviest_experts():
    """Two layers behind a dense one, four experts, three tokens; the last has none in the first."""
    groups = [[[[2, 0.9], [0, 0.1]], [[2, 0.6]], []], [[[1, 0.5]], [[3, 0.7]], [[3, 0.7]]]]
    found = {"flow": {"mine": {"tokens": ["a", "b", "c"], "groups": groups}}}
    found |= {"experts": 4, "groups": [{}, {}], "layers": [[1], [2]]}
    (axes,) = plot_flow(found).axes
    lines = {(*line.get_xdata(), *line.get_ydata()): line.get_linewidth() for line in axes.lines}
    assert set(lines) == {(0, 1, 2, 1), (0, 1, 2, 3), (0, 1, -1, 3)}
    assert len(set(lines.values())) == 1  # a token each
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]
    assert axes.get_title() == "mine: 3 tokens"
    plt.close(axes.figure)


def test_a_report_without_what_was_noted_says_so(project, tmp_path):
    shutil.copytree(project / "runs/moe", tmp_path / "moe")
    (tmp_path / "moe/models/0/observed.jsonl").unlink()
    with pytest.raises(UserError, match=r"models/0/observed\.jsonl"):
        build([tmp_path / "moe"], tmp_path / "report")
    path = tmp_path / "moe/eval/experts.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "format"})
    with pytest.raises(UserError, match=r"experts\.json: written by another .*eval_det_router"):
        build([tmp_path / "moe"], tmp_path / "report")
    path.unlink()
    text = build([tmp_path / "moe"], tmp_path / "report").read_text()
    assert f"{path} is missing" in text


def test_another_content_of_the_file_is_another_format(project):
    """EXPERTS_FORMAT goes with these names: pages find them in every file that has the number."""
    stored = read_json(project / "runs/moe/eval/experts.json")
    assert stored["format"] == EXPERTS_FORMAT == 1
    found = stored["partitions"]["0"]
    names = "ablation continuity domains experts first_leaf flow groups layers"
    names += " max_violation_pooled paths rows shown skewed split tokens"
    assert sorted(found) == names.split()
    names = "drawn effective_domains_per_expert effective_experts_per_domain ics ics_attainable"
    names += " ics_by_chance ics_pairs ics_words js_bits load load_entropy max_violation nmi"
    names += " nmi_shuffled nmi_shuffled_sd share_of_domain tis tis_attainable tis_by_chance"
    names += " tis_words together weight_named"
    assert sorted(found["groups"][0]) == names.split()
    assert sorted(found["ablation"]) == ["bpb", "experts", "most", "paths"]


def test_equal_inputs_are_not_read_again(project, tmp_path):
    path = project / "runs/moe/eval/experts.json"
    before = path.stat().st_mtime_ns
    run_stages(project, ("eval_det_router",), "configs/moe.yaml")
    assert path.stat().st_mtime_ns == before
    utility = (project / "runs/moe/eval/utility.json").stat().st_mtime_ns
    run_stages(project, ("eval_det_router",), "configs/moe.yaml", "eval.flow_tokens=5")
    assert path.stat().st_mtime_ns > before
    assert (project / "runs/moe/eval/utility.json").stat().st_mtime_ns == utility


def test_a_family_without_experts_is_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    for key in ("eval.expert_rows", "training.routing_steps"):
        others = ["eval.expert_rows=0", "training.routing_steps=0"]
        with pytest.raises(UserError, match=f"{key}: a llama has no experts to watch"):
            load("configs/moe.yaml", ("model.type=llama", *others, f"{key}=4"))
    others += ["model.type=llama", "training.expert_devices=2"]
    with pytest.raises(UserError, match=r"expert_devices: only the experts of model.type moe"):
        load("configs/moe.yaml", tuple(others))


def test_options_that_would_do_nothing_are_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    tree = ("model.tree_depth=2", "model.intermediate_size=16")
    for values, text in (
        ((*tree, "model.num_experts=16"), "model.num_experts: 16, but the tree has 6 edges"),
        ((*tree, "model.num_experts=8", "model.norm_topk_prob=true"), "model.norm_topk_prob"),
    ):
        config = load("configs/moe.yaml", values)
        with pytest.raises(UserError, match=text):
            moe_config(config, ProcessedData(config))
    config = load("configs/moe.yaml", (*tree, "model.num_experts=8"))
    assert moe_config(config, ProcessedData(config)).num_experts == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expert_devices: one process drives them"):
        expert_devices(load("configs/moe.yaml", ("training.expert_devices=2",)))
