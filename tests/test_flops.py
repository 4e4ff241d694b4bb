"""FLOPs on paper are those that torch counts on the models themselves, forward and backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from modeling_monet import MonetConfig, MonetForCausalLM
from tiered.baselines.modeling_demix import DemixConfig, DemixForCausalLM
from tiered.baselines.modeling_domain_token import DomainTokenConfig, DomainTokenForCausalLM
from tiered.baselines.modeling_lora_experts import linear_names
from tiered.baselines.modeling_moe import MoeConfig, MoeForCausalLM
from tiered.flops import (
    DEVICES,
    float32_flops,
    forward_flops,
    head_weight,
    hours,
    lora_flops,
    model_flops,
    training_flops,
)
from tiered.modeling_tiered import Level1Config, Level1Embedder

V, D, T, LAYERS = 53, 16, 12, 3
SHAPE = dict(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
IDS = torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(0))


def monet(**changes) -> MonetForCausalLM:
    own = dict(moe_dim=4, moe_heads=3, moe_experts=6, moe_topk=2, moe_groups=2, head_dim=16)
    return MonetForCausalLM(MonetConfig(**{**SHAPE, **own, **changes}))


def moe(**changes) -> MoeForCausalLM:
    own = dict(intermediate_size=16, num_experts=6, num_experts_per_tok=2)
    return MoeForCausalLM(MoeConfig(**{**SHAPE, **own, **changes}))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=40))


MODELS = {
    "monet": monet,
    "monet, horizontal": lambda: monet(moe_decompose="horizontal"),
    "monet, frozen routers": lambda: monet(freeze_router=True),
    "monet, tied": lambda: monet(tie_word_embeddings=True),
    "monet, grouped heads": lambda: monet(num_key_value_heads=1),
    "llama": llama,
    "moe": moe,
    "moe, frozen routers": lambda: moe(freeze_router=True),
    "moe, all options": lambda: moe(
        num_shared_experts=1, num_dense_layers=1, routing_stream_size=4, expert_bank_layers=2
    ),
    "moe, tree": lambda: moe(
        tree_depth=2, tree_branching=2, num_experts_per_tok=3, intermediate_size=32
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SHAPE, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2)
    ),
    "demix": lambda: DemixForCausalLM(
        DemixConfig(**SHAPE, intermediate_size=40, domain_experts=[0, 1])
    ),
    "domain token": lambda: DomainTokenForCausalLM(
        DomainTokenConfig(**SHAPE, intermediate_size=40, domains=[0])
    ),
}
SPARSE = ("moe", "moe, all options", "moe, tree", "mixtral")


def counted(model, attention: str = "eager", experts: str = "eager", **inputs) -> int:
    """FLOPs that torch sees in a forward and a backward pass on IDS."""
    model.train()
    model.set_attn_implementation(attention)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation(experts)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS, **inputs).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_what_torch_counts(name):
    """Equal. Eager attention computes all keys, those that the mask hides too: T of a query (with a
    domain token T + 1), where a causal kernel computes (T + 1) / 2."""
    model = MODELS[name]()
    inputs, part, keys = {}, model, T + (name == "domain token")
    if name == "demix":  # a row passes one expert: what is counted is the Llama that it makes
        inputs, part = {"domain_ids": torch.tensor([0, 1, 1])}, model.part(0)
    parts = model_flops(part, T, keys)
    assert counted(model, **inputs) == pytest.approx(training_flops(parts) * IDS.numel(), rel=1e-12)
    causal = model_flops(part, T)
    unseen = (keys - (keys + 1) / 2) / keys * parts["attention scores"].total
    assert training_flops(parts) - training_flops(causal) == pytest.approx(unseen, rel=1e-12)


def test_monet_makes_the_heads_gradients_in_the_forward_pass():
    """LinearCrossEntropy: a counter around the forward pass sees all three products of the head,
    one around the backward pass none. The last token of a row has no logits."""
    model = monet().train()
    model.set_attn_implementation("eager")
    parts = model_flops(model, T, T)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=IDS, labels=IDS).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    early = parts["LM head"].backward
    assert early == pytest.approx(2 * 2 * D * V * (T - 1) / T, rel=1e-12)
    assert forward.get_total_flops() == round((forward_flops(parts) + early) * IDS.numel())
    late = sum(part.backward for part in parts.values()) - early
    assert backward.get_total_flops() == round(late * IDS.numel())


@pytest.mark.parametrize("name", SPARSE)
def test_torch_does_not_see_grouped_products_and_they_are_all_that_differs(name):
    model = MODELS[name]()
    parts = model_flops(model, T, T)
    found = counted(model, experts="grouped_mm")
    assert round((training_flops(parts) - parts["experts"].total) * IDS.numel()) == found


def test_torch_does_not_see_the_fused_attention_of_a_cpu():
    config = Level1Config(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2)
    models = [Level1Embedder(config), llama()]
    for model in models:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=IDS, labels=IDS).loss.backward()
        parts = model_flops(model, T)
        unseen = parts["attention scores"].total
        assert counter.get_total_flops() == round((training_flops(parts) - unseen) * IDS.numel())


def test_low_rank_updates_of_a_frozen_model():
    """Equal but for the first layer, whose input takes no gradient: 3 D D products of its maps, and
    3 r D of their updates, are counted and not computed."""
    rank, base = 3, llama().requires_grad_(False)
    names = linear_names(base)
    parts = lora_flops(base, {name: base.get_submodule(name) for name in names}, rank, T)
    every_key = model_flops(base, T, T)["attention scores"].total - parts["attention scores"].total
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM"))
    base.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = training_flops(parts) + every_key - 2 * (3 * D * D + 3 * rank * D)
    assert counter.get_total_flops() == round(expected * IDS.numel())


def test_the_published_mixture_by_hand():
    """OLMoE-1B-7B on 4,096 tokens: four maps of D x D, eight experts of 3 D I, the router and the
    scores in every layer, the head; a backward pass has each twice."""
    config = MoeConfig(intermediate_size=1024)
    with torch.device("meta"):
        model = MoeForCausalLM(config)
    parts = model_flops(model, 4096)
    products = 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024 + 64 * 2048) + 50304 * 2048
    scores = 16 * 2 * 2048 * 4097
    assert forward_flops(parts) == 2 * products + scores == config.flops_per_token(4096)
    assert training_flops(parts) == 3 * forward_flops(parts)
    slow = 3 * 2 * 16 * (8 * 3 * 2048 * 1024 + 64 * 2048)
    assert float32_flops(parts) == slow  # routers, and experts by transformers' grouped product
    model.set_experts_implementation("eager")
    assert float32_flops(model_flops(model, 4096)) == 3 * 2 * 16 * 64 * 2048


def test_products_that_autocast_leaves_in_float32():
    """Monet's routers by their own word; experts by the grouped product, which takes weights as
    they are: what it gives is float32, where a linear map of the same layer gives bfloat16."""
    found = {}

    def note(name):
        return lambda module, inputs, output: found.update({name: output.dtype})

    model = moe().train()
    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_hook(note("attention maps"))
    layer.mlp.experts.register_forward_hook(note("experts"))
    layer.mlp.gate.register_forward_hook(
        lambda module, inputs, output: found.update(routers=output.logits.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS)
    marked = {name: part.float32 for name, part in model_flops(model, T).items()}
    assert {name: dtype == torch.float32 for name, dtype in found.items()} == {
        name: marked[name] for name in found
    }
    assert marked["experts"] and marked["routers"] and not marked["attention maps"]
    assert [n for n, p in model_flops(monet(), T).items() if p.float32] == ["routers"]


def test_hours_and_the_head():
    a100, h100 = DEVICES
    assert hours(312e12 * 0.5 * 3600, a100.bfloat16, 0.5) == 1
    assert hours(989e12 * 7200, h100.bfloat16, 1.0) == 2
    assert head_weight(monet()).shape == (V, D)
