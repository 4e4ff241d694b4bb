"""Monet against golden files, brute force over all E^2 experts, and exact no-ops."""

import copy
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_monet
from modeling_monet import (
    LinearCrossEntropy,
    MonetConfig,
    MonetForCausalLM,
    MonetMoHDE,
    MonetMoVDE,
    MonetRouter,
    ambiguity_loss,
    document_bounds,
    renormalized,
    squared_relu,
    uniformity_loss,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
V = 61


def config(**changes) -> MonetConfig:
    values = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "moe_dim": 4,
        "moe_heads": 2,
        "moe_experts": 6,
        "moe_topk": 2,
        "moe_groups": 2,
        "initializer_range": 0.3,
    }
    return MonetConfig(**{**values, **changes})


def monet(seed: int = 0, attention: str = "eager", **changes) -> MonetForCausalLM:
    torch.manual_seed(seed)
    made = config(**changes)
    made._attn_implementation = attention
    return MonetForCausalLM(made).eval()


def ids(rows: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_gates(heads: int, experts: int, dtype=torch.float64) -> torch.Tensor:
    g = torch.rand(2, 2, 3, heads, experts, dtype=dtype)
    g = torch.where(g < 0.3, 0.0, g)
    return g / g.sum(-1, keepdim=True)


# ---------------------------------------------------------------- golden parity


@pytest.fixture(scope="module", params=["monet-vd", "monet-hd"])
def golden(request):
    folder = GOLDEN / request.param
    made = MonetConfig.from_pretrained(folder)
    made.uniformity_loss_coef = made.ambiguity_loss_coef = 0.0
    model, info = MonetForCausalLM.from_pretrained(
        folder, config=made, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model, load_file(folder / "expected.safetensors")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 2e-5 of the tensor's largest magnitude: float32 summation order."""
    return (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_golden_evaluation(golden):
    model, expected = golden
    x = expected["input_ids"]
    with torch.no_grad():
        out = model.eval()(x, labels=x, output_hidden_states=True, output_router_probs=True)
    assert close(out.logits, expected["eval.logits"])
    assert close(out.loss[None], expected["eval.loss"])
    assert len(out.hidden_states) == 5
    for i, state in enumerate(out.hidden_states):
        assert close(state, expected[f"eval.hidden_states.{i}"]), i
    for group, pair in zip((0, 2), out.router_probs, strict=True):
        for axis, gate in enumerate(pair, 1):
            assert close(gate, expected[f"eval.router_probs.{group}.g{axis}"])


def test_golden_training(golden):
    model, expected = copy.deepcopy(golden[0]).train(), golden[1]
    x = expected["input_ids"]
    out = model(x, labels=x, output_logits=True)
    out.loss.backward()
    assert close(out.logits, expected["train.logits"])
    assert close(out.loss[None], expected["train.loss"])
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert len(gradients) == sum(n.startswith("train.grad.") for n in expected)
    for name, gradient in gradients.items():
        assert close(gradient, expected[f"train.grad.{name}"]), name
    buffers = {n: b for n, b in model.named_buffers() if "running" in n}
    assert len(buffers) == 8 == sum(n.startswith("train.buffer.") for n in expected)
    for name, buffer in buffers.items():
        assert close(buffer, expected[f"train.buffer.{name}"]), name


# ---------------------------------------------------------------- sizes


TABLE = [  # hidden, experts, published trainable (row 4's is a quarter of row 1's: computed here)
    (2048, 512, 766_556_160, 800_110_592),
    (1224, 256, 382_931_320, 392_958_328),
    (712, 128, 198_689_656, 201_606_008),
    (384, 64, 99_883_648, 100_670_080),
    (196, 32, 48_925_020, 49_125_724),
]


@pytest.mark.parametrize("hidden, experts, without, with_routers", TABLE)
def test_parameter_table_of_the_paper_sizes(hidden, experts, without, with_routers):
    made = MonetConfig(
        vocab_size=119547,
        hidden_size=hidden,
        num_hidden_layers=8,
        num_attention_heads=32,
        moe_dim=8,
        moe_heads=8,
        moe_topk=8,
        moe_groups=4,
        moe_experts=experts,
    )
    with torch.device("meta"):
        model = MonetForCausalLM(made)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes.values()) == with_routers
    assert sum(s for n, s in sizes.items() if ".router." not in n) == without
    counts = made.parameter_counts()
    assert counts["total"] == with_routers and counts["trainable_without_routers"] == without
    assert counts["experts"] == sum(s for n, s in sizes.items() if ".moe." in n)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_decompose": "horizontal"},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"num_hidden_layers": 3},
    ],
)
def test_parameter_counts_equal_the_model(changes):
    model = monet(**changes)
    assert model.config.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"moe_decompose": "horizontal"}])
def test_flops_per_token_equal_the_counted_matrix_products(changes):
    model, x = monet(num_key_value_heads=2, **changes), ids(2, 12)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x, use_cache=False)
    # Not matrix products: biases of u, weights of the norms. Not causal: eager attention computes
    # all 12 keys where the config counts (12 + 1) / 2.
    added = sum(p.numel() for n, p in model.named_parameters() if "bias" in n or "norm" in n)
    unseen = 4 * (4 * 16 * 12 - 2 * 16 * 13)
    counted = counter.get_total_flops() / x.numel()
    # rotary angles and the like are elementwise: the two numbers are equal, not close
    assert counted == model.config.flops_per_token(12) - 2 * added + unseen


# ---------------------------------------------------------------- experts and router


def test_vertical_layer_is_the_sum_over_all_experts():
    torch.manual_seed(0)
    layer = MonetMoVDE(config()).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    g1, g2 = gates = random_gates(2, 6)
    k = 2
    expected = torch.zeros_like(x)
    for i in range(6):
        rows_i = slice(i * k, (i + 1) * k)
        a = squared_relu(x @ layer.u1.weight[rows_i].T + layer.u1.bias[rows_i])
        for j in range(6):
            rows_j = slice(j * k, (j + 1) * k)
            c = squared_relu(x @ layer.u2.weight[rows_j].T + layer.u2.bias[rows_j])
            left = (
                a @ layer.v11.weight[:, rows_i].T + c @ layer.v12.weight[:, rows_i].T + layer.b1[i]
            )
            right = (
                a @ layer.v21.weight[:, rows_j].T + c @ layer.v22.weight[:, rows_j].T + layer.b2[j]
            )
            gate = (g1[..., i] * g2[..., j]).sum(-1, keepdim=True)
            expected += gate * torch.cat([left, right], -1)
    assert torch.allclose(layer(x, gates), expected, atol=1e-10, rtol=1e-10)


def test_horizontal_layer_is_the_sum_over_all_experts():
    torch.manual_seed(0)
    layer = MonetMoHDE(config(moe_decompose="horizontal")).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    g1, g2 = gates = random_gates(2, 6)
    m = 4
    expected = torch.zeros_like(x)
    for i in range(6):
        rows_i = slice(i * m, (i + 1) * m)
        a = squared_relu(x @ layer.u.weight[rows_i].T + layer.u.bias[rows_i])
        for j in range(6):
            value = a @ layer.v.weight[:, j * m : (j + 1) * m].T + layer.b[j]
            expected += (g1[..., i] * g2[..., j]).sum(-1, keepdim=True) * value
    assert torch.allclose(layer(x, gates), expected, atol=1e-10, rtol=1e-10)


def masked_reference(layer: nn.Module, x, gates, keep: torch.Tensor) -> torch.Tensor:
    """sum_ij keep_ij sum_h g1_hi g2_hj expert_ij(x), with each expert cut out of the layer."""
    expected, width = torch.zeros_like(x), layer.config.moe_dim
    g1, g2 = gates
    for i, j in keep.nonzero().tolist():
        if isinstance(layer, MonetMoHDE):
            first, second = (slice(n * width, (n + 1) * width) for n in (i, j))
            a = squared_relu(x @ layer.u.weight[first].T + layer.u.bias[first])
            value = a @ layer.v.weight[:, second].T + layer.b[j]
        else:
            first, second = (slice(n * width // 2, (n + 1) * width // 2) for n in (i, j))
            a = squared_relu(x @ layer.u1.weight[first].T + layer.u1.bias[first])
            c = squared_relu(x @ layer.u2.weight[second].T + layer.u2.bias[second])
            left = a @ layer.v11.weight[:, first].T + c @ layer.v12.weight[:, first].T + layer.b1[i]
            right = a @ layer.v21.weight[:, second].T + c @ layer.v22.weight[:, second].T
            value = torch.cat([left, right + layer.b2[j]], -1)
        expected += (g1[..., i] * g2[..., j]).sum(-1, keepdim=True) * value
    return expected


@pytest.mark.parametrize("kind", [MonetMoVDE, MonetMoHDE])
@pytest.mark.parametrize("elements", [2**22, 5 * 36])  # one chunk; six tokens in chunks of 5
def test_masked_layer_is_the_sum_over_kept_experts(kind, elements, monkeypatch):
    monkeypatch.setattr(modeling_monet, "MASKED_ELEMENTS", elements)
    torch.manual_seed(0)
    layer = kind(config()).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, gates = torch.randn(2, 3, 16, dtype=torch.float64), random_gates(2, 6)
    keep = torch.rand(6, 6) < 0.6
    assert 0 < keep.sum() < 36
    found = layer(x, gates, keep)
    assert torch.allclose(found, masked_reference(layer, x, gates, keep), atol=1e-10, rtol=1e-10)
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.allclose(layer(x, gates, everything), layer(x, gates), atol=1e-10, rtol=1e-10)
    assert layer(x, gates, ~everything).abs().max() == 0
    # renormalised: per head, the kept experts' weights sum to 1 again
    layer.config.renormalize_masked = True
    share = torch.einsum("bthi,ij,bthj->bth", gates[0], keep.double(), gates[1])[..., None]
    scaled = torch.stack([torch.where(share > 0, gates[0] / share, 0.0), gates[1]])
    expected = masked_reference(layer, x, scaled, keep)
    assert torch.allclose(layer(x, gates, keep), expected, atol=1e-10, rtol=1e-10)


def test_renormalised_masks_train_and_tiny_shares_do_not_blow_up():
    """A head without kept experts has a gradient, 0; one with nearly none counts as without."""
    g1 = torch.tensor([[[[0.0, 1.0]], [[1e-5, 1.0]], [[0.5, 0.5]]]], requires_grad=True)
    g2 = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]]])
    keep = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = renormalized(g1.to(dtype), g2.to(dtype), keep.to(dtype))
        assert found[0, :, 0].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
        (gradient,) = torch.autograd.grad(found.float().sum(), g1)
        assert gradient.isfinite().all() and gradient[0, :2].abs().max() == 0


def test_purging_a_model_touches_no_other_of_the_same_config():
    made = config()
    first, second = MonetForCausalLM(made).eval(), MonetForCausalLM(made).eval()
    keep = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    first.purge_experts(keep, renormalize=True)
    before = first(ids()).logits
    second.purge_experts(None)
    assert torch.equal(first(ids()).logits, before)
    assert first.config.expert_masks and not second.config.expert_masks
    assert not made.expert_masks


def test_a_frozen_router_stays_frozen_when_loaded(tmp_path):
    monet(freeze_router=True).save_pretrained(tmp_path)
    loaded = MonetForCausalLM.from_pretrained(tmp_path).train()
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".router." in n)
    assert all(p.requires_grad for n, p in loaded.named_parameters() if ".router." not in n)


@pytest.mark.parametrize("decompose", ["vertical", "horizontal"])
def test_purged_experts_stay_purged_in_a_checkpoint(tmp_path, decompose):
    model, x = monet(moe_decompose=decompose), ids()
    before = model(x).logits
    model.save_pretrained(tmp_path / "whole")
    assert not [n for n in load_file(tmp_path / "whole/model.safetensors") if "keep" in n]
    keep = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    model.purge_experts(keep)
    purged = model(x).logits
    assert not torch.allclose(purged, before, atol=1e-3)
    model.save_pretrained(tmp_path / "purged")
    loaded = MonetForCausalLM.from_pretrained(tmp_path / "purged", attn_implementation="eager")
    assert torch.equal(torch.stack([loaded.model.layers[i].router.keep for i in (0, 2)]), keep)
    assert torch.equal(loaded.eval()(x).logits, purged)
    # gradient checkpointing runs masked layers twice; the gradients are the same
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(loaded).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trained(x, labels=x).loss.backward()
        gradients.append([p.grad for p in trained.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    model.purge_experts(None)
    assert torch.equal(model(x).logits, before)
    with pytest.raises(ValueError, match=r"keep: expected shape \(2, 6, 6\), found \(6, 6\)"):
        model.purge_experts(keep[0])


def reference_gates(z: torch.Tensor, mean, variance, topk: int) -> torch.Tensor:
    """The keep rule spelt out: normalise, compare with the quantile, at least the largest."""
    b, t, h, e = z.shape
    out = torch.zeros_like(z)
    quantile = NormalDist().inv_cdf(1 - topk / e) if topk < e else -math.inf
    for i in range(b):
        for j in range(t):
            for head in range(h):
                row = z[i, j, head]
                normal = (row - mean[head]) / torch.sqrt(variance[head] + 1e-5)
                keep = normal >= min(quantile, normal.max())
                out[i, j, head, keep] = row[keep].softmax(0)
    return out


def test_router_keeps_by_quantile_and_falls_back_to_the_largest():
    torch.manual_seed(0)
    router = MonetRouter(config(moe_topk=1)).eval()
    for name, norm in (("w1", router.norm1), ("w2", router.norm2)):
        nn.init.normal_(getattr(router, name).weight)
        norm.running_mean.copy_(torch.tensor([0.5, -1.0]))
        norm.running_var.copy_(torch.tensor([60.0, 9.0]))
    x = torch.randn(3, 8, 16)
    gates, _ = router(x, None)
    for w, norm, gate in ((router.w1, router.norm1, gates[0]), (router.w2, router.norm2, gates[1])):
        z = w(x).view(3, 8, 2, 6)
        expected = reference_gates(z, norm.running_mean, norm.running_var, 1)
        assert torch.allclose(gate, expected, atol=1e-6)
        normal = (z - norm.running_mean[:, None]) / torch.sqrt(norm.running_var + 1e-5)[:, None]
        # the fallback really happens here, and so does keeping more than one
        fallback = normal.amax(-1) < NormalDist().inv_cdf(1 - 1 / 6)
        assert fallback.any() and ((gate > 0).sum(-1) > 1).any()
        assert ((gate > 0).sum(-1)[fallback] == 1).all()


def test_topk_of_all_experts_keeps_all():
    torch.manual_seed(0)
    router = MonetRouter(config(moe_topk=6)).eval()
    nn.init.normal_(router.w1.weight)
    x = torch.randn(1, 4, 16)
    (g1, _), _ = router(x, None)
    assert torch.allclose(g1, router.w1(x).view(1, 4, 2, 6).softmax(-1), atol=1e-7)
    assert (g1 > 0).all()


def test_batch_statistics_leave_padding_out():
    torch.manual_seed(0)
    router = MonetRouter(config()).train()
    nn.init.normal_(router.w1.weight)
    nn.init.normal_(router.w2.weight)
    x = torch.randn(2, 5, 16)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    (g1, _), statistics = router(x, valid)
    reference = nn.BatchNorm1d(2, affine=False).train()
    z = router.w1(x).view(2, 5, 2, 6)[valid]  # (7, H, E)
    normal = reference(z)
    router.update_running_statistics(statistics)
    assert torch.allclose(router.norm1.running_mean, reference.running_mean, atol=1e-6)
    assert torch.allclose(router.norm1.running_var, reference.running_var, atol=1e-6)
    threshold = torch.minimum(normal.amax(-1), torch.tensor(NormalDist().inv_cdf(1 - 2 / 6)))
    assert torch.equal(g1[valid] > 0, normal >= threshold[..., None])


def test_training_on_padding_alone_is_an_error():
    model, x = monet().train(), ids()
    with pytest.raises(ValueError, match="attention_mask: all tokens are padding"):
        model(x, attention_mask=torch.zeros_like(x), labels=x)
    means = [b for n, b in model.named_buffers() if n.endswith("running_mean")]
    assert len(means) == 4 and all((b == 0).all() for b in means)


def test_running_statistics_stay_float32_in_a_bfloat16_model(tmp_path):
    monet().save_pretrained(tmp_path)
    model = MonetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {n: b.dtype for n, b in model.named_buffers() if "running" in n}
    assert len(kinds) == 8 and set(kinds.values()) == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    gates = model(ids(), output_router_probs=True).router_probs
    for gate in (g for pair in gates for g in pair):
        assert gate.dtype == torch.float32 and torch.allclose(gate.sum(-1), torch.ones(3, 12, 2))


def test_padding_changes_neither_loss_gradient_nor_buffers():
    x = ids(2, 12)
    short = x[:, :9]
    mask = torch.ones_like(x)
    mask[:, 9:] = 0
    models = [monet().train() for _ in range(2)]
    losses = [models[0](x, attention_mask=mask, labels=x).loss, models[1](short, labels=short).loss]
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-6), name
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-6)


# ---------------------------------------------------------------- losses


def test_auxiliary_losses_by_formula():
    torch.manual_seed(0)
    gates = random_gates(2, 6, torch.float32)
    valid = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    uniform = ambiguity = 0.0
    for gate in gates:
        kept = gate[valid]
        for h in range(2):
            uniform -= kept[:, h].mean(0).clamp(min=1e-9).log().sum().item() / (2 * 2 * 6)
            ambiguity += sum(1 - kept[t, h].max().item() for t in range(3)) / 3 / (2 * 2)
    assert uniformity_loss(gates, valid).item() == pytest.approx(uniform, rel=1e-5)
    assert ambiguity_loss(gates, valid).item() == pytest.approx(ambiguity, rel=1e-5)
    even = torch.full((1, 4, 2, 6), 1 / 6)
    assert uniformity_loss((even, even), None).item() == pytest.approx(math.log(6), rel=1e-6)


def test_auxiliary_losses_count_in_training_only():
    model, x = monet(uniformity_loss_coef=0.5, ambiguity_loss_coef=0.25), ids()
    out = model(x, labels=x)
    assert torch.equal(out.loss, out.lm_loss)
    model.train()
    out = model(x, labels=x)
    expected = out.lm_loss + 0.5 * out.uniformity_loss + 0.25 * out.ambiguity_loss
    assert torch.allclose(out.loss, expected)
    model.config.uniformity_loss_coef = model.config.ambiguity_loss_coef = 0.0
    assert torch.equal(model(x, labels=x).loss, model(x, labels=x).lm_loss)


def test_auxiliary_losses_count_once_under_accumulation():
    """Over uneven micro-batches the step's auxiliary term is the token-weighted mean."""
    model = monet(uniformity_loss_coef=0.5, ambiguity_loss_coef=0.25).train()
    parts = [ids(3, 12, 1), ids(1, 12, 2)]
    items = sum(p[:, 1:].numel() for p in parts)
    total, expected = 0.0, 0.0
    for part in parts:
        out = model(part, labels=part, num_items_in_batch=items)
        alone = model(part, labels=part)
        share = part[:, 1:].numel() / items
        total += out.loss.item()
        auxiliary = 0.5 * alone.uniformity_loss + 0.25 * alone.ambiguity_loss
        expected += share * (alone.lm_loss + auxiliary).item()
    assert total == pytest.approx(expected, rel=1e-6)


def test_trainer_accumulation_equals_one_large_batch(tmp_path):
    """Rows of equal tokens but unequal numbers of targets: BatchNorm statistics and auxiliary
    losses agree between micro-batches, so one step of the Trainer equals one step by hand on the
    plain mean loss, auxiliary losses included."""
    rows = [{"input_ids": ids(1)[0], "labels": ids(1)[0].clone()} for _ in range(4)]
    for i, row in enumerate(rows):
        row["labels"][: 3 * i] = -100
    by_hand = monet(uniformity_loss_coef=0.5, ambiguity_loss_coef=0.25).train()
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    by_hand(**batch).loss.backward()
    weights = [torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in by_hand.parameters()])]
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = monet(uniformity_loss_coef=0.5, ambiguity_loss_coef=0.25)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            learning_rate=0.1,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0,
            lr_scheduler_type="constant",
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in monet().parameters()])
    assert (weights[0] - before).abs().max() > 1e-2
    for found in weights[1:]:
        assert torch.allclose(weights[0], found, atol=5e-6)  # summation order, times the rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiled_loss_equals_cross_entropy_on_all_logits(dtype, monkeypatch):
    """Value and both gradients, tiles that divide the tokens and tiles that do not."""
    torch.manual_seed(0)
    states, weight = torch.randn(50, 16).to(dtype), torch.randn(V, 16).to(dtype)
    targets = torch.randint(V, (50,))
    targets[::7] = -100
    results = []
    for rows, columns in ((0, 0), (7, 13), (10, V), (25, V - 1), (512, 512)):
        x, w = (t.clone().requires_grad_() for t in (states, weight))
        if rows:
            monkeypatch.setattr(modeling_monet, "LOSS_ROWS", rows)
            monkeypatch.setattr(modeling_monet, "LOSS_COLUMNS", columns)
            loss = LinearCrossEntropy.apply(x, w, targets, torch.tensor(42.0))
        else:
            wide = torch.float64 if dtype == torch.bfloat16 else dtype
            loss = nn.functional.cross_entropy(
                x.to(wide) @ w.to(wide).T, targets, reduction="sum"
            ).div(42)
        (3 * loss).backward()
        assert loss.dtype == torch.promote_types(dtype, torch.float32) or not rows
        results.append((loss.detach(), x.grad, w.grad))
    # bfloat16: 8 bits of the probabilities; float64 and float32: order of summation
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            assert (a.double() - b.double()).abs().max() <= bound * a.double().abs().max()


def test_tiled_loss_under_autocast_keeps_sums_and_gradients_in_float32():
    torch.manual_seed(0)
    states, weight = torch.randn(50, 16), torch.randn(V, 16)
    targets, results = torch.randint(V, (50,)), []
    for narrow in (False, True):
        x, w = (t.clone().requires_grad_() for t in (states, weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = LinearCrossEntropy.apply(x, w, targets, torch.tensor(50.0))
        loss.backward()
        assert loss.dtype == x.grad.dtype == w.grad.dtype == torch.float32
        results.append((loss.detach(), x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        difference = (a - b).abs().max() / a.abs().max()
        assert 0 < difference < 2e-2  # bfloat16 products were used, with 8 bits each


def test_tiled_loss_gradcheck_and_repeated_backward(monkeypatch):
    """Against finite differences in float64, in uneven tiles, with ignored rows; gradients that
    are used twice, scaled, or of no rows at all."""
    monkeypatch.setattr(modeling_monet, "LOSS_ROWS", 4)
    monkeypatch.setattr(modeling_monet, "LOSS_COLUMNS", 5)
    torch.manual_seed(0)
    x, w = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 13))
    targets = torch.tensor([0, 12, -100, 5, 4, -100, 9])
    divisor = torch.tensor(3.0, dtype=torch.float64)
    call = lambda x, w: LinearCrossEntropy.apply(x, w, targets, divisor)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, w), atol=1e-8)
    loss = call(x, w)
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for scale in (1.0, 2.5, 1.0):
        again = torch.autograd.grad(loss * scale, (x, w), retain_graph=True)
        for a, b in zip(once, again, strict=True):
            assert torch.allclose(a * scale, b, rtol=1e-14)
    x.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.allclose(x.grad, 2 * once[0], rtol=1e-14)
    nothing = LinearCrossEntropy.apply(x[:0], w, targets[:0], divisor)
    assert nothing == 0
    assert torch.autograd.grad(nothing, w)[0].abs().max() == 0


def test_liger_loss_equals_ours():
    """Values and gradients of liger-kernel's fused loss, its kernels interpreted on the CPU."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed (an option, for CUDA)")
    code = """
import torch
from modeling_monet import LinearCrossEntropy, liger_cross_entropy
torch.manual_seed(0)
x, w = (torch.randn(n, 16, requires_grad=True) for n in (37, 101))
targets = torch.randint(0, 101, (37,))
targets[3] = -100
results = []
for loss_of in (LinearCrossEntropy.apply, liger_cross_entropy):
    loss = loss_of(x, w, targets, torch.tensor(40.0))
    results.append((loss, *torch.autograd.grad(loss * 2, (x, w))))
for a, b in zip(*results):
    assert torch.allclose(a, b, atol=1e-6, rtol=1e-6), (a - b).abs().max()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("decompose", ["vertical", "horizontal"])
def test_compiled_model_equals_eager(decompose):
    """Traced whole without a break in evaluation, with one at the loss in training; the backend
    that runs the traced graph by torch's own kernels keeps the test short."""
    torch.compiler.reset()
    x, results = ids(), []
    for compiled in (False, True):
        model = monet(attention="sdpa", moe_decompose=decompose)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        logits = run(x).logits.detach()
        model.train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        out = run(input_ids=x, labels=x)
        out.loss.backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([logits, out.loss.detach(), *gradients, *model.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_narrow_heads_are_padded_without_a_trace(monkeypatch):
    """Zeros change neither logits nor gradients; eager attention is never padded."""
    x, results = ids(), []
    for width in (0, 16):
        monkeypatch.setattr(modeling_monet, "CPU_HEAD_DIM", width)
        model = monet(attention="sdpa").train()
        out = model(x, labels=x, output_logits=True)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_sure_prediction_costs_no_less_than_nothing_in_bfloat16():
    """The target's logit is rounded as its competitors are: nats never fall below zero."""
    torch.manual_seed(0)
    states = torch.randn(200, 64) * 8
    weight, targets = torch.cat([states, torch.randn(700, 64)]), torch.arange(200)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.cross_entropy((states @ weight.T).float(), targets)
        for i in range(200):
            row, target = states[i : i + 1], targets[i : i + 1]
            nats = LinearCrossEntropy.apply(row, weight, target, torch.tensor(1.0))
            assert nats >= 0
        nats = LinearCrossEntropy.apply(states, weight, targets, torch.tensor(200.0))
    assert nats.item() == pytest.approx(plain.item(), abs=1e-6)


def test_training_without_logits_equals_training_with_them():
    """Loss and every gradient are the plain path's, num_items_in_batch included; in float64, since
    in float32 both paths are further from float64 (up to 3e-6) than from one another."""
    off = {"uniformity_loss_coef": 0.0, "ambiguity_loss_coef": 0.0}
    x = ids()
    labels = x.clone()
    labels[0, 5:] = -100
    for items in (None, 50):
        tiled, plain = (monet(**off).double().train() for _ in range(2))
        out = tiled(x, labels=labels, num_items_in_batch=items)
        assert out.logits is None
        out.loss.backward()
        logits = plain(x).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        loss = loss / (items or (labels[:, 1:] != -100).sum())
        assert out.lm_loss.item() == pytest.approx(loss.item(), rel=1e-13)
        loss.backward()
        for a, b in zip(tiled.parameters(), plain.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() <= 1e-12 * b.grad.abs().max()


def test_no_tensor_of_all_logits_exists_in_training():
    """Tensors of (tokens, V) or more are never made: watched at every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    model, x = monet(vocab_size=5000).train(), ids(32, 64)
    with Largest() as plain:
        nn.functional.cross_entropy(model(x).logits.flatten(0, 1), x.flatten()).backward()
    with Largest() as tiled:
        model(x, labels=x).loss.backward()
    assert plain.elements == 32 * 64 * 5000
    assert tiled.elements == modeling_monet.LOSS_ROWS * 5000


def test_ignored_labels_and_no_labels():
    model, x = monet(), ids()
    assert model(x).loss is None
    labels = x.clone()
    labels[:, :7] = -100
    logp = model(x).logits.log_softmax(-1)
    picked = -logp[:, 6:-1].gather(-1, x[:, 7:, None])
    loss = model(x, labels=labels).loss
    assert loss.item() == pytest.approx(picked.mean().item(), abs=1e-6)
    causal = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    model.config._attn_implementation = "sdpa"  # takes a boolean mask as it is
    assert torch.allclose(model(x, attention_mask=causal, labels=labels).loss, loss, atol=1e-5)


# ---------------------------------------------------------------- attention, cache, packing


def test_sdpa_equals_eager():
    for changes in ({}, {"num_key_value_heads": 2}):
        a, b = monet(attention="eager", **changes), monet(attention="sdpa", **changes)
        x, mask = ids(), torch.ones(3, 12, dtype=torch.long)
        mask[0, :4] = 0
        for arguments in ({}, {"attention_mask": mask}):
            found, expected = a(x, **arguments).logits, b(x, **arguments).logits
            valid = mask.bool() if arguments else torch.ones_like(x, dtype=torch.bool)
            assert torch.allclose(found[valid], expected[valid], atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    grouped, full = monet(num_key_value_heads=2), monet()
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    assert torch.allclose(grouped(ids()).logits, full(ids()).logits, atol=1e-5)


def test_logits_never_see_a_later_token():
    model, x = monet(), ids()
    changed = x.clone()
    changed[:, 8:] = 3
    a, b = model(x).logits, model(changed).logits
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


PACKED = torch.tensor([[*range(5), *range(4), *range(3)], [*range(7), *range(5)]])


def apart(model: MonetForCausalLM, x: torch.Tensor) -> torch.Tensor:
    """Logits of the documents of PACKED, each run alone, put back in their places."""
    rows = []
    for row, lengths in zip(x, ([5, 4, 3], [7, 5]), strict=True):
        rows.append(torch.cat([model(part[None]).logits[0] for part in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_one_another(attention):
    model, x = monet(attention=attention), ids(2, 12)
    expected = apart(model, x)
    # with the default cache, without one, and with an empty one that the caller brings
    for arguments in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}):
        packed = model(x, position_ids=PACKED, **arguments).logits
        assert torch.allclose(packed, expected, atol=1e-5), arguments
    one_row = model(x[:1], position_ids=PACKED[:1]).logits
    assert torch.allclose(one_row, expected[:1], atol=1e-5)
    assert not torch.allclose(expected, model(x).logits, atol=1e-3)


def test_packed_documents_reach_flash_attention_as_bounds(monkeypatch):
    """Flash attention takes no mask; a plain loop over its documents stands in for the kernel."""

    def kernel(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
        assert attention_mask is None
        b, heads, t, width = query.shape
        flat = [z.transpose(1, 2).reshape(b * t, heads, width) for z in (query, key, value)]
        bounds = range(0, b * t + 1, t) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        parts = []
        for begin, end in itertools.pairwise(bounds):
            q, k, v = (z[begin:end].transpose(0, 1) for z in flat)
            scores = (q @ k.transpose(1, 2) * scaling).masked_fill(
                torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1), -math.inf
            )
            parts.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(parts).view(b, t, heads, width), None

    model, x = monet(), ids(2, 12)
    expected, plain = apart(model, x), model(x).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.allclose(model(x, position_ids=PACKED).logits, expected, atol=1e-5)
    assert torch.allclose(model(x).logits, plain, atol=1e-5)
    assert document_bounds(PACKED)["cu_seq_lens_k"].tolist() == [0, 5, 9, 12, 19, 24]
    assert document_bounds(PACKED)["max_length_q"] == 7
    assert document_bounds(torch.arange(12).expand(2, 12)) == {}


def test_cached_generation_equals_full_forwards():
    model, x = monet(attention="sdpa"), ids(2, 6)
    out = model.generate(
        x,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    sequence = x
    for step in range(8):
        logits = model(sequence, use_cache=False).logits[:, -1]
        assert torch.allclose(out.logits[step], logits, atol=1e-5)
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, sequence)


def test_left_padded_batch_generates_what_single_rows_do():
    model, x = monet(attention="sdpa"), ids(2, 7)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    padded[1, :5] = 0
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    mask[1, :5] = 0
    together = model.generate(
        padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
    )[:, 10:]
    singles = [x[:1], padded[1:, 5:]]
    for row, single in enumerate(singles):
        alone = model.generate(single, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row], alone[0, single.shape[1] :])
    logits = model(padded, attention_mask=mask).logits
    for row, single in enumerate(singles):
        found = logits[row, -single.shape[1] :]
        assert torch.allclose(found, model(single).logits[0], atol=1e-5)


def test_sampling_draws_from_the_model():
    """The first new token's frequencies over many rows are its probabilities."""
    model, x = monet(attention="sdpa"), ids(1, 6)
    torch.manual_seed(0)
    rows = 20_000
    drawn = model.generate(
        x.expand(rows, -1), max_new_tokens=1, do_sample=True, top_k=0, pad_token_id=0
    )[:, -1]
    frequencies = torch.bincount(drawn, minlength=V) / rows
    expected = model(x).logits[0, -1].softmax(-1)
    # five standard errors of a frequency
    assert (frequencies - expected).abs().max() < 5 * math.sqrt(0.25 / rows)
    assert expected.max() > 3 / V  # so that a uniform draw would fail


def test_beam_search_finds_the_best_of_all_continuations():
    """With as many beams as words the search over two tokens is exhaustive."""
    model, x = monet(attention="sdpa", vocab_size=9), ids(1, 5) % 9
    out = model.generate(
        x,
        max_new_tokens=2,
        min_new_tokens=2,
        num_beams=9,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best, found = -math.inf, None
    for first, second in itertools.product(range(9), repeat=2):
        whole = torch.cat([x, torch.tensor([[first, second]])], 1)
        scores = model(whole).logits[0].log_softmax(-1)
        total = (scores[4, first] + scores[5, second]).item()
        if total > best:
            best, found = total, whole
    assert torch.equal(out.sequences, found)


def test_text_generation_pipeline(tmp_path):
    """transformers' pipeline on a saved checkpoint with its tokenizer: text in, text out."""
    words = {f"w{i}": i for i in range(V - 1)} | {"[UNK]": V - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="w0")
    fast.save_pretrained(tmp_path)
    model = monet(attention="sdpa")
    model.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (answer,) = generate("w5 w7 w9", max_new_tokens=4, do_sample=False)
    x = torch.tensor([[5, 7, 9]])
    expected = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    new = " ".join(f"w{i}" for i in expected[0, 3:].tolist())
    assert answer["generated_text"] == f"w5 w7 w9{new}"


def test_logits_to_keep_is_the_tail():
    model, x = monet(), ids()
    full = model(x).logits
    assert torch.allclose(model(x, logits_to_keep=2).logits, full[:, -2:], atol=1e-6)


# ---------------------------------------------------------------- training mechanics


def test_gradient_checkpointing_changes_neither_gradients_nor_buffers():
    x, results = ids(), []
    for reentrant in (None, False, True):
        model = monet().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.layers[0].gradient_checkpointing
        model(x, labels=x).loss.backward()
        results.append(([p.grad for p in model.parameters()], list(model.buffers())))
    for gradients, buffers in results[1:]:
        for a, b in zip(results[0][0], gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)  # reentrant: another order of sums
        for a, b in zip(results[0][1], buffers, strict=True):
            assert torch.equal(a, b)  # one update of the running statistics, not two
        assert {int(b) for b in buffers if b.dtype == torch.long} == {1}


def test_evaluation_moves_no_buffer_and_frozen_routers_get_no_gradient():
    model, x = monet(), ids()
    before = [b.clone() for b in model.buffers()]
    model(x, labels=x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    frozen = monet(freeze_router=True).train()
    frozen(x, labels=x).loss.backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == (".router." in name), name
    trained = monet().train()
    trained(x, labels=x).loss.backward()
    assert trained.model.layers[0].router.w1.weight.grad.abs().max() > 0


def test_initial_weights():
    model = monet(hidden_size=64, moe_experts=16, vocab_size=997, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name.endswith("norm.weight"):
            assert torch.all(parameter == 1), name
        elif name.endswith(("bias", ".b", ".b1", ".b2")):
            assert torch.all(parameter == 0), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 15}, "hidden_size: 15 must be even"),
        ({"hidden_size": 20}, r"num_attention_heads: 4 must be such that head_dim.*\(5\) is even"),
        ({"moe_topk": 7}, r"moe_topk: 7 must be between 1 and moe_experts \(6\)"),
        ({"moe_topk": 0}, "moe_topk: 0 must be"),
        ({"moe_decompose": "diagonal"}, "moe_decompose: 'diagonal' must be vertical or horizontal"),
        ({"moe_dim": 3}, "moe_dim: 3 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must be a divisor"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' must be relu2"),
        ({"moe_groups": 0}, "moe_groups: 0 must be positive"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0 must be a divisor"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be such that head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be positive"),
        ({"uniformity_loss_coef": -1.0}, "uniformity_loss_coef: -1.0 must be 0 or more"),
    ],
)
def test_bad_configs_name_key_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_saved_model_loads_from_a_fresh_process_outside_the_repository(tmp_path):
    model, x = monet(), ids()
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    expected = model(x).logits.sum().item()
    code = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True)\n"
        f"print(type(m).__name__, m(torch.tensor({x.tolist()})).logits.sum().item())\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    assert name == "MonetForCausalLM"
    assert float(value) == pytest.approx(expected, rel=1e-4)
