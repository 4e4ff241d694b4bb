"""LoRA experts: routing rules against hand-computed values, peft as the reference, a run."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.conftest import run_stages, tiny_project
from tiered.baselines.glider import (
    Inside,
    domain_embeddings,
    glider_inputs,
    router_cosines,
    sentence_cosines,
)
from tiered.baselines.lora_experts import (
    ADAPTER,
    MEAN_ROWS,
    VECTORS,
    adapter_tensors,
    gate_model,
    gates_and_averages,
    load_experts,
)
from tiered.baselines.modeling_lora_experts import (
    LoraExpertsForCausalLM,
    RoutedLinear,
    Routing,
    glider_scores,
    linear_names,
    right_singular_vector,
    top_weights,
)
from tiered.branching import seed_config
from tiered.config import load
from tiered.data import ProcessedData
from tiered.evaluation import score_inside
from tiered.fitting import OrderedBlocks, ResumableTrainer
from tiered.partition import make_partition_map
from tiered.record import set_up_process
from tiered.report import build
from tiered.router import load_models, load_router, run_models, tiered_model
from tiered.store import UserError, read_json, tree_hashes
from tiered.training import train_partition

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
RANK, SCALE = 4, 0.25


def base_model(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **more)).eval()


def tensors(base, seed: int, zero_b: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for name in linear_names(base):
        outputs, inputs = base.get_submodule(name).weight.shape
        made = {
            "a": torch.randn(RANK, inputs, generator=generator),
            "b": torch.randn(outputs, RANK, generator=generator) * 0.3,
            "gates": torch.randn(inputs, generator=generator),
            "averages": torch.randn(inputs, generator=generator),
        }
        found[name] = made | ({"b": torch.zeros(outputs, RANK)} if zero_b else {})
    return found


def with_experts(base, names=(0, 3, 5), zero_b: bool = False) -> LoraExpertsForCausalLM:
    model = LoraExpertsForCausalLM.from_base(base, rank=RANK, scale=SCALE, experts=[])
    for k in names:
        model.add_expert(k, tensors(base, k, zero_b))
    return model.eval()


ROUTED = ("phatgoose", "glider", "average_activation", "arrow", "merged", "oracle")


def given(routing: str) -> dict[str, torch.Tensor]:
    cosines = torch.rand(3, 7, 3, generator=torch.Generator().manual_seed(1))
    wanted = {"oracle": {"expert": torch.tensor([3, 0, 5])}, "glider": {"cosines": cosines}}
    return wanted.get(routing, {})


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_experts_of_zeros_are_the_base_exactly(routing, tied):
    base = base_model(tie_word_embeddings=tied)
    expected = base(IDS).logits
    model = with_experts(base, zero_b=True)
    assert torch.equal(model(IDS, routing=routing, **given(routing)).logits, expected)
    without = with_experts(base, names=())
    assert torch.equal(without(IDS).logits, expected)


@torch.inference_mode()
def test_one_expert_is_pefts_adapter():
    """The oracle's expert against peft's own forward pass of the same adapter."""
    base = base_model()
    own = tensors(base, 3)
    model = with_experts(base)
    found = model(IDS, routing="oracle", expert=torch.tensor([3, 3, 3])).logits
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=linear_names(base))
    reference = get_peft_model(base_model(), config).eval()
    for name, values in own.items():
        layer = reference.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(values["a"])
        layer.lora_B["default"].weight.copy_(values["b"])
    torch.testing.assert_close(found, reference(IDS).logits, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_merged_is_the_base_with_the_mean_of_the_products():
    base = base_model()
    found = with_experts(base)(IDS, routing="merged").logits
    merged = base_model()
    for name in linear_names(merged):
        products = [t["b"] @ t["a"] for t in (tensors(base, k)[name] for k in (0, 3, 5))]
        merged.get_submodule(name).weight += SCALE * torch.stack(products).mean(0)
    torch.testing.assert_close(found, merged(IDS).logits, rtol=1e-4, atol=1e-5)


def by_hand(base, vectors: str, rule, names=(0, 3, 5)):
    """A Llama whose linear maps add each token's two best experts, token by token in a loop."""
    model = base_model()
    own = {k: tensors(base, k) for k in names}
    for name in linear_names(model):
        linear = model.get_submodule(name)

        def hook(module, inputs, output, name=name):
            out = output.clone()
            for place in np.ndindex(*output.shape[:2]):
                u = inputs[0][place]
                scores = [rule(u, own[k][name], place, i) for i, k in enumerate(names)]
                best = sorted(range(len(names)), key=lambda i: -scores[i])[:2]
                top = [math.exp(scores[i] - max(scores)) for i in best]
                for i, weight in zip(best, top, strict=True):
                    t = own[names[i]][name]
                    out[place] += weight / sum(top) * SCALE * (t["b"] @ (t["a"] @ u))
            return out

        linear.register_forward_hook(hook)
    return model


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


def phatgoose(u, t, place, i) -> float:
    return float(standard(t["gates"]) @ standard(u)) / len(u) ** 0.5


def glider(u, t, place, i) -> float:
    cosines = given("glider")["cosines"][place]
    alpha = 100 if cosines.max() >= 0.8 else 3
    return phatgoose(u, t, place, i) + alpha * float(cosines[i])


def average(u, t, place, i) -> float:
    return float(standard(t["averages"]) @ standard(u)) / len(u) ** 0.5


def arrow(u, t, place, i) -> float:
    direction = torch.linalg.svd(t["b"] @ t["a"])[2][0]
    return abs(float(direction @ u))


@pytest.mark.parametrize(
    ("routing", "rule"),
    [
        ("phatgoose", phatgoose),
        ("glider", glider),
        ("average_activation", average),
        ("arrow", arrow),
    ],
)
@torch.inference_mode()
def test_routing_is_that_of_a_loop_over_tokens_and_experts(routing, rule):
    base = base_model()
    found = with_experts(base)(IDS, routing=routing, **given(routing)).logits
    expected = by_hand(base, routing, rule)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base(IDS).logits, atol=1e-3)


def test_affinity_alpha_and_weights_by_hand():
    linear = torch.nn.Linear(4, 2, bias=False)
    routed = RoutedLinear(linear, 2, 1, 1.0)
    routed.gates.data = torch.tensor([[3.0, 1, 1, 3], [1.0, 1, 3, 3]])
    u = torch.tensor([[[2.0, 0, 0, 2]]])
    # standardised: u and the first gate (1, -1, -1, 1), the second (-1, -1, 1, 1)
    found = routed.affinities(u, "phatgoose")
    assert found.flatten().tolist() == pytest.approx([4 / 2, 0 / 2], abs=1e-4)
    weights = routed.weights(u, Routing("phatgoose", 2))
    expected = math.exp(2) / (math.exp(2) + 1)
    assert weights.flatten().tolist() == pytest.approx([expected, 1 - expected], abs=1e-4)
    cosines = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.79]])
    assert glider_scores(cosines, 0.8, 100.0, 3.0).flatten().tolist() == pytest.approx(
        [90, 10, 80, 20, 2.1, 2.37], rel=1e-6
    )
    top = top_weights(torch.tensor([1.0, 1.0, 1.0, 0.0]), 2)
    assert top.tolist() == [0.5, 0.5, 0, 0]  # ties go to the lowest index
    assert top_weights(torch.tensor([1.0, 0.0]), 0)[0].item() == pytest.approx(0.731059)


def test_arrows_direction_is_that_of_the_whole_product():
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    expected = torch.linalg.svd(b @ a)[2][0]
    found = right_singular_vector(a, b)
    assert abs(float(found @ expected)) == pytest.approx(1, abs=1e-5)
    assert not right_singular_vector(a, torch.zeros(7, 4)).any()


@torch.inference_mode()
def test_experts_come_and_go_and_nothing_else_changes(tmp_path):
    base = base_model()
    model = with_experts(base)
    alone = model(IDS, routing="oracle", expert=torch.tensor([5, 5, 5])).logits
    whole = model(IDS).logits
    model.remove_expert(3)
    model.remove_expert(3)  # again: nothing
    assert model.experts == [0, 5]
    # one matrix product of all experts: another shape may round another way
    again = model(IDS, routing="oracle", expert=torch.tensor([5, 5, 5])).logits
    torch.testing.assert_close(again, alone)
    with pytest.raises(ValueError, match="expert 3 is not there"):
        model(IDS, routing="oracle", expert=torch.tensor([3, 0, 0]))
    # what is left is what would have been made without it
    torch.testing.assert_close(model(IDS).logits, with_experts(base, (0, 5))(IDS).logits)
    model.add_expert(3, tensors(base, 3))
    assert torch.equal(model(IDS).logits, whole)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, whole) and again.experts == [0, 3, 5]
    for k in (0, 3, 5):
        model.remove_expert(k)
    assert torch.equal(model(IDS).logits, base(IDS).logits)


@torch.inference_mode()
def test_no_token_sees_a_later_one_and_generation_agrees():
    model = with_experts(base_model())
    changed = IDS.clone()
    changed[:, 4:] = 7
    assert torch.equal(model(IDS).logits[:, :4], model(changed).logits[:, :4])
    found = model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    expected = IDS[:1, :4]
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


# --- a run ----------------------------------------------------------------------------------------

LORA = """base: base.yaml
name: lora
data: {domains: [hi, si, de], novel_domains: [en]}
tokenizer: {train_domains: [hi, si, de, en]}
partition: {method: language, n: 3}
model: {type: lora, init_from: seed, num_attention_heads: 2, lora_rank: 4, lora_gate_steps: 6}
training: {learning_rate: 5e-3}
seed_lm: {learning_rate: 4e-3}
eval:
  mixtures: [base, phatgoose, glider, average_activation, arrow, parameter_average, average]
unlearn: {operations: [original, gold, delete-S1, sisa]}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_project(folder)
    (folder / "configs/lora.yaml").write_text(LORA)
    # its seed LM never saw Hindi
    (folder / "configs/clean.yaml").write_text(
        "base: lora.yaml\nname: clean\nseed_lm: {domains: [si, de]}\n"
    )
    stages = ("process_dset", "train_det_router", "run_clm", "eval_det_router")
    run_stages(folder, (*stages, "unlearn_benchmarks"), "configs/lora.yaml", "configs/clean.yaml")
    return folder


def folders(project: Path, name: str) -> dict[int, Path]:
    return {k: project / f"runs/{name}/models/{k}" for k in range(3)}


@torch.inference_mode()
def test_a_partitions_checkpoint_is_its_adapter_on_the_seed(project):
    model = load_experts(project / "runs/lora/seed_lm", folders(project, "lora"))
    ids = torch.randint(3, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(project / "runs/lora/seed_lm")(ids).logits
    for k, folder in folders(project, "lora").items():
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert type(merged) is LlamaForCausalLM
        expected = model(ids, routing="oracle", expert=torch.tensor([k, k])).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (merged(ids).logits - base).abs().max() > 1e-2
        record = read_json(folder / "record.json")
        gates = load_file(folder / ADAPTER / VECTORS)
        trained = [v for n, v in gates.items() if n.startswith("gates.")]
        assert len(trained) == 14 and all(v.any() for v in trained)
        # by hand: rank x (inputs + outputs) of q, k, v, o and of gate, up, down; a gate per input
        own = 2 * (4 * (4 * (16 + 16) + 16) + 2 * (4 * (16 + 48) + 16) + 4 * (48 + 16) + 48)
        assert record["parameters"]["own"] == own
        blocks = sum(record["blocks"].values())
        assert record["tokens"] == (blocks + 6 * record["batch_rows"]) * 32
        assert record["gate_steps"] == 6


@torch.inference_mode()
def test_mean_activations_are_of_rows_from_all_over_the_training_text(project):
    """Against a loop over rows and modules of the merged checkpoint's activations."""
    folder = folders(project, "lora")[1]
    model = gate_model(project / "runs/lora/seed_lm", folder / ADAPTER)
    blocks = np.random.default_rng(0).integers(3, 400, (100, 32))
    found = gates_and_averages(model, OrderedBlocks(blocks, 1.0, 0))
    ordered = OrderedBlocks(blocks, 1.0, 0)
    merged, seen = AutoModelForCausalLM.from_pretrained(folder), []
    name = "model.layers.1.mlp.gate_proj"
    merged.get_submodule(name).register_forward_pre_hook(lambda m, i: seen.append(i[0][0]))
    for i in np.linspace(0, 99, MEAN_ROWS).round().astype(int).tolist():
        merged(ordered[i]["input_ids"][None])
    states = torch.cat(seen)
    expected = (states / states.norm(dim=-1, keepdim=True)).mean(0)
    torch.testing.assert_close(found[f"averages.{name}"], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found[f"gates.{name}"], model.routed()[name].gates[0])


def test_a_killed_adapter_and_killed_gates_resume_to_the_same_files(project, tmp_path, monkeypatch):
    """A tied embedding, too: peft names its tensors anew."""
    same = ("model.tie_word_embeddings=true", "training.save_steps=5", "partition.index=0")
    tied = (*same, "model.lora_gate_steps=12")
    run_stages(project, ("run_clm",), "configs/lora.yaml", *tied, f"output_dir={tmp_path / 'a'}")
    monkeypatch.chdir(project)
    config = load("configs/lora.yaml", (*tied, f"output_dir={tmp_path / 'b'}"))
    set_up_process(config)
    data, partitions = ProcessedData(config), make_partition_map(config)
    saved = ResumableTrainer._save_checkpoint

    def killed(self, *args):
        saved(self, *args)
        if kills and self.state.global_step == 5:
            kills.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumableTrainer, "_save_checkpoint", killed)
    kills = ["seed LM", "adapter", "gates"]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_partition(config, data, partitions, 0)
    folder = train_partition(config, data, partitions, 0)
    assert tree_hashes(folder) == tree_hashes(tmp_path / "a/lora/models/0")


def test_gate_training_leaves_all_else_without_gradient(project):
    folder = folders(project, "lora")[1]
    model = gate_model(project / "runs/lora/seed_lm", folder / ADAPTER)
    for module in model.routed().values():
        module.gates.data.zero_()
    ids = torch.randint(3, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    # at v = 0 the expert counts half
    half = model(ids).logits
    experts = load_experts(project / "runs/lora/seed_lm", {1: folder})
    for module in experts.routed().values():
        module.b.data *= 0.5
    expected = experts(ids, routing="merged").logits
    torch.testing.assert_close(half, expected, rtol=1e-4, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    gates = {id(m.gates) for m in model.routed().values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in gates:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_evaluation_of_experts_routed_inside(project, monkeypatch):
    utility = read_json(project / "runs/lora/eval/utility.json")
    mixtures = utility["mixtures"]
    for name in ("base", "phatgoose", "glider", "average_activation", "arrow", "parameter_average"):
        assert 0 < mixtures["macro"][name]["bpb"] < 20
        assert 0 < mixtures["novel_macro"][name]["bpb"] < 20
    monkeypatch.chdir(project)
    config = load("configs/lora.yaml")
    data, partitions = ProcessedData(config), make_partition_map(config)
    found = run_models(config, partitions, data)
    router = load_router(config.run_dir / "router", "")
    tiered = tiered_model(config, partitions, router, load_models(found))
    rows = data.rows("hi", "test", 8)
    experts = load_experts(project / "runs/lora/seed_lm", folders(project, "lora"))
    inside = Inside(experts, router_cosines(config, tiered.router, experts.experts))
    ids = rows.input_ids
    nats = score_inside(config, inside, ids, "glider")
    bpb = nats.sum() / math.log(2) / rows.token_bytes[:, 1:].sum()
    assert bpb == pytest.approx(mixtures["domains"]["hi"]["glider"]["bpb"], abs=1e-5)
    # no choice depends on a later token, and a query's not on any after the first eight
    changed = ids.copy()
    changed[:, 12:] = 7
    for routing in ("phatgoose", "glider", "average_activation", "arrow"):
        both = [score_inside(config, inside, i, routing) for i in (ids, changed)]
        assert np.array_equal(both[0][:, :11], both[1][:, :11]), routing
        assert not np.array_equal(both[0][:, 11:], both[1][:, 11:])
    tokens = torch.from_numpy(changed[:, :-1]).long()
    cosines = tiered.router.scores(tokens)
    cosines[:, 7:] = cosines[:, 7:8]
    logits = experts(tokens, routing="glider", cosines=cosines).logits.double().log_softmax(-1)
    expected = -logits.gather(-1, torch.from_numpy(changed[:, 1:, None]).long())[..., 0].detach()
    assert np.allclose(score_inside(config, inside, changed, "glider"), expected.numpy(), atol=1e-4)
    prefix = ids[:, :12]
    # Arrow, PHATGOOSE and Glider agree where there is but one expert
    one = load_experts(project / "runs/lora/seed_lm", {1: folders(project, "lora")[1]})
    one = Inside(one, router_cosines(config, tiered.router, one.experts))
    alone = [score_inside(config, one, prefix, r) for r in ("phatgoose", "glider", "arrow")]
    assert alone[0] == pytest.approx(alone[1]) and alone[0] == pytest.approx(alone[2])


@pytest.fixture(scope="module")
def encoder(project, tmp_path_factory) -> Path:
    """A BERT of random weights with a tokenizer of its own: a sentence-embedding model."""
    folder = tmp_path_factory.mktemp("encoder")
    (data,) = (project / "processed").glob("*/tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(data)
    tokenizer.add_special_tokens({"pad_token": "[PADDING]"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)
    BertModel(made).save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_gliders_query_by_a_sentence_embedding_model(project, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    texts = {"hi": "Text in Hindi.", "si": "Text in Sinhala, which is longer.", "de": "German"}
    written = tmp_path / "descriptions.yaml"
    written.write_text("".join(f"{d}: {t}\n" for d, t in texts.items()))
    named = (f"output_dir={tmp_path}", f"eval.glider_encoder={encoder}")
    config = load("configs/lora.yaml", (*named, f"eval.glider_descriptions={written}"))
    data, partitions = ProcessedData(config), make_partition_map(config)
    bert, tokenizer = BertModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)

    def alone(text: str) -> np.ndarray:
        """One text, no padding."""
        hidden = bert(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].numpy()
        return hidden.mean(0) / np.linalg.norm(hidden.mean(0))

    rows = data.rows("de", "test", 6).input_ids
    tokens = torch.from_numpy(rows[:, :-1]).long()
    queries = [alone(data.tokenizer.decode(row[:8])) for row in rows]
    for experts in ([0, 1, 2], [0, 2]):
        found = sentence_cosines(config, data, partitions, experts)(tokens)
        assert found.shape == (*tokens.shape, len(experts))
        assert not found[:, :7].any()  # the query is not whole yet
        names = [("hi", "si", "de")[k] for k in experts]
        expected = [[q @ alone(texts[d]) for d in names] for q in queries]
        assert np.allclose(found[:, 7], expected, atol=1e-5)
        assert torch.equal(found[:, 7:], found[:, 7:8].expand_as(found[:, 7:]))
    # until then PHATGOOSE decides, from then on both
    model = load_experts(project / "runs/lora/seed_lm", folders(project, "lora"))
    inside = Inside(model, sentence_cosines(config, data, partitions, [0, 1, 2]))
    both = [score_inside(config, inside, rows, routing) for routing in ("phatgoose", "glider")]
    assert np.allclose(both[0][:, :7], both[1][:, :7], atol=1e-6)
    assert not np.allclose(both[0][:, 7:], both[1][:, 7:], atol=1e-6)
    # nobody has described the domains: their documents' beginnings do
    config = load("configs/lora.yaml", named)
    vectors = domain_embeddings(config, data)
    begin = data.rows("si", "router", 64).input_ids[:, :8]
    mean = np.mean([alone(data.tokenizer.decode(row)) for row in begin], 0)
    assert np.allclose(vectors["si"], mean / np.linalg.norm(mean), atol=1e-5)
    monkeypatch.setattr(
        "tiered.baselines.glider._encoder", None
    )  # from here on they come from the store
    assert torch.equal(domain_embeddings(config, data)["si"], vectors["si"])


def test_an_evaluation_by_a_sentence_embedding_model(project, encoder, tmp_path):
    """Another encoder is another evaluation; an unchanged one is not scored again."""
    shutil.copytree(project / "runs", tmp_path / "runs")
    arguments = (f"output_dir={tmp_path}/runs", f"eval.glider_encoder={encoder}")
    path, mixtures = tmp_path / "runs/lora/eval/utility.json", []
    for extra in ((), arguments, arguments):
        override = extra or (arguments[0],)
        run_stages(project, ("eval_det_router",), "configs/lora.yaml", *override)
        mixtures.append((path.stat().st_mtime_ns, read_json(path)["mixtures"]["macro"]))
    first, second, third = mixtures
    assert first[1]["glider"] != second[1]["glider"]
    assert first[1]["phatgoose"] == second[1]["phatgoose"]
    assert second == third


def test_removing_an_expert_is_exact_where_the_seed_never_saw_its_domain(project):
    def results(run):
        return {
            p.parent.name: read_json(p)
            for p in (project / f"runs/{run}/unlearn/hi").glob("*/metrics.json")
        }

    saw, clean = results("lora"), results("clean")
    assert not saw["delete-S1"]["exact"] and saw["delete-S1"]["weights_removed"]
    assert saw["gold"]["rebuilt"][:2] == ["router", "seed_lm"]
    assert clean["delete-S1"]["exact"] and clean["delete-S1"]["weights_removed"]
    provenance = read_json(project / "runs/lora/provenance.json")
    assert provenance["model/1"] == ["de", "hi", "si"]
    provenance = read_json(project / "runs/clean/provenance.json")
    assert provenance["seed_lm"] == ["de", "si"] and provenance["model/0"] == ["de", "hi", "si"]
    assert provenance["model/1"] == ["de", "si"]
    assert clean["gold"]["bpb"]["test"]["value"] > clean["original"]["bpb"]["test"]["value"]


def test_a_rerun_from_nothing_makes_the_same_files(project, tmp_path):
    override = (f"output_dir={tmp_path}", "partition.index=1")
    run_stages(project, ("run_clm",), "configs/lora.yaml", *override)
    assert tree_hashes(tmp_path / "lora/models/1") == tree_hashes(folders(project, "lora")[1])


def test_mistakes_in_a_config_are_one_line(project, monkeypatch):
    monkeypatch.chdir(project)
    for override, text in (
        ("model.init_from=", "model.init_from: lora needs a seed LM"),
        ("model.type=llama", "eval.mixtures: base routes experts of model.type lora"),
        ("eval.glider_alphas=3", "eval.glider_alphas: two numbers"),
        ("eval.glider_descriptions=a.yaml", "eval.glider_descriptions: needs eval.glider_encoder"),
        ("training.added_from=nearest", "training.added_from: an added domain of model.type lora"),
        ("seed_lm.type=demix", "seed_lm.type: a lora cannot start from a demix"),
        ("seed_lm.type=lora", "seed_lm.type: a lora cannot start from a lora"),
        ("seed_lm.domains=en", "seed_lm.domains: 'en' is not in data.domains"),
        ("seed_lm.domains=fr", "seed_lm.domains: 'fr' is not in data.domains"),
    ):
        with pytest.raises(UserError, match=text):
            load("configs/lora.yaml", (override,))
    text = "eval.glider_encoder: eval.mixtures has no glider"
    with pytest.raises(UserError, match=text):
        load("configs/lora.yaml", ("eval.mixtures=base", "eval.glider_encoder=somewhere"))
    none = load("configs/lora.yaml", ("seed_lm.domains=hi", "data.exclude_domains=hi"))
    with pytest.raises(UserError, match=r"seed_lm\.domains: the seed LM has no data"):
        seed_config(none)


def test_mistakes_in_descriptions_are_one_line(project, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    path = tmp_path / "d.yaml"
    for content, text in (
        ("hi: a\nsi: b\n", "says nothing of de"),
        ("- a\n", "is no mapping of domain to text"),
        ("hi: a\nsi: b\nde: 3\n", "is no mapping of domain to text"),
        ("a: b: c\n", "cannot be read"),
    ):
        path.write_text(content)
        given = (f"eval.glider_encoder={encoder}", f"eval.glider_descriptions={path}")
        config = load("configs/lora.yaml", given)
        with pytest.raises(UserError, match=f"eval.glider_descriptions: .*{text}"):
            glider_inputs(config, ProcessedData(config))
    config = load("configs/lora.yaml", (f"eval.glider_encoder={tmp_path}",))
    with pytest.raises(UserError, match=r"eval\.glider_encoder: .* holds no model"):
        glider_inputs(config, ProcessedData(config))
    config = load("configs/lora.yaml", ("eval.glider_encoder=no/such",))
    with pytest.raises(UserError, match=r"eval\.glider_encoder: 'no/such' is neither a folder nor"):
        glider_inputs(config, ProcessedData(config))


def test_adapters_read_back_by_module(project):
    found = adapter_tensors(folders(project, "lora")[0] / ADAPTER)
    assert len(found) == 14 and set(found["model.layers.0.mlp.up_proj"]) == {
        *("a", "b", "gates", "averages")
    }
    assert found["model.layers.0.mlp.up_proj"]["b"].shape == (48, 4)


def test_report_has_held_in_and_held_out_by_every_way_to_choose(project, tmp_path):
    page = build([project / "runs/lora", project / "runs/clean"], tmp_path)
    assert "is missing" not in page.read_text(encoding="utf-8")
    text = (
        tmp_path / "tables/lora_experts__held_in_and_held_out__t8__bits_per_byte.csv"
    ).read_text()
    utility = read_json(project / "runs/lora/eval/utility.json")
    macro, novel = (utility["mixtures"][n]["glider"]["bpb"] for n in ("macro", "novel_macro"))
    line = f'lora,"Glider, per token and linear map, and per query",{macro:.3f},{novel:.3f}'
    assert line in text.splitlines()
    assert "retrieval, per row" in text and "none: the seed LM alone" in text
    # the seed counts once beside three experts
    records = [
        read_json(p / "record.json")["parameters"] for p in folders(project, "lora").values()
    ]
    seed = read_json(project / "runs/lora/seed_lm/record.json")["parameters"]["total"]
    sizes = (tmp_path / "tables/sizes.csv").read_text()
    assert f'"{seed + sum(r["own"] for r in records):,}"' in sizes
