"""The OLMoE family: transformers' OLMoE, brute force, hand-made tables."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    StaticCache,
)

from tiered.baselines.modeling_moe import (
    Experts,
    MoeConfig,
    MoeForCausalLM,
    Routing,
    SpreadExperts,
    TreeExperts,
    TreeRouter,
    balancing_loss,
    document_bounds,
    expert_ranges,
    tree_paths,
)

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 2, "num_experts": 6, "num_experts_per_tok": 2}
SHAPE |= {"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1}
IDS = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0
VARIANTS = {
    "base": {},
    "shared": {"num_shared_experts": 2},
    "dense": {"num_dense_layers": 1},
    "loss_free": {"balance_update_rate": 1e-3, "router_aux_loss_coef": 0.0},
    "cross_layer": {"routing_stream_size": 4},
    "bank": {"expert_bank_layers": 2},
    "tree": {"tree_depth": 2, "tree_branching": 2, "intermediate_size": 32},
    "uneven_tree": {"tree_depth": 2, "tree_branching": 3, "intermediate_size": 9},
    "grouped": {"num_key_value_heads": 1, "norm_topk_prob": True, "tie_word_embeddings": True},
}


def make(variant: str = "base", seed: int = 0, **more) -> MoeForCausalLM:
    torch.manual_seed(seed)
    return MoeForCausalLM(MoeConfig(**{**SHAPE, **VARIANTS[variant], **more}))


UNUSUAL = {"num_key_value_heads": 1, "attention_bias": True, "clip_qkv": 0.3}
UNUSUAL |= {"tie_word_embeddings": True, "initializer_range": 0.2}


@pytest.mark.parametrize("padded", ["nowhere", "right", "left"])
@pytest.mark.parametrize("own", [{}, {"norm_topk_prob": True}, UNUSUAL])
def test_without_options_it_is_transformers_olmoe(padded, own):
    """Logits, auxiliary loss, loss and gradients from the same weights, to 1e-6."""
    torch.manual_seed(0)
    theirs = OlmoeForCausalLM(OlmoeConfig(**SHAPE, **own)).train()
    ours = make(router_z_loss_coef=0.0, **own).train()
    ours.load_state_dict(theirs.state_dict())  # the same names
    mask = {"nowhere": None, "right": MASK, "left": MASK.flip(1)}[padded]
    labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
    a = theirs(IDS, attention_mask=mask, labels=labels, output_router_logits=True)
    b = ours(IDS, attention_mask=mask, labels=labels, output_routing=True)
    real = slice(None) if mask is None else mask.bool()
    assert torch.allclose(a.logits[real], b.logits[real], atol=2e-6)
    assert torch.allclose(a.aux_loss, b.aux_loss, atol=1e-6)
    assert torch.allclose(a.loss, b.loss, atol=1e-6)
    for x, y in zip(a.router_logits, b.routing, strict=True):
        assert torch.allclose(x, y.logits, atol=1e-6)
    a.loss.backward()
    b.loss.backward()
    found = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, found[name].grad, atol=1e-6), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_experts_are_the_loop_and_counts_are_those_of_the_model(variant):
    model = make(variant)
    grouped = model(IDS).logits
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation = "eager"
    assert torch.allclose(grouped, model(IDS).logits, atol=1e-6)
    counts, sizes = (
        model.config.parameter_counts(),
        {n: p.numel() for n, p in model.named_parameters()},
    )
    assert counts["total"] == sum(sizes.values())
    assert counts["experts"] == sum(n for name, n in sizes.items() if ".experts." in name)
    routers = ("mlp.gate", "mlp.stream", "routing_gate")
    own = (
        n
        for name, n in sizes.items()
        if any(r in name for r in routers) and "gate_proj" not in name
    )
    assert counts["routers"] == sum(own)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_loads_and_a_cache_changes_nothing(variant, tmp_path):
    model = make(variant).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    first = model(IDS[:, :5], use_cache=True)
    rest = model(IDS[:, 5:], past_key_values=first.past_key_values)
    both = torch.cat([first.logits, rest.logits], 1)
    assert torch.allclose(both, model(IDS).logits, atol=1e-5)  # kernels for other lengths
    written = [
        model.generate(
            IDS[:1, :4], max_new_tokens=6, use_cache=c, do_sample=False, eos_token_id=None
        )
        for c in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_counts_nowhere(variant):
    """Losses of a padded batch are those of its rows without padding, and so is the load."""
    model, other = make(variant).train(), make(variant).train()
    labels = IDS.masked_fill(MASK == 0, -100)
    padded = model(IDS, attention_mask=MASK, labels=labels, output_routing=True)
    parts = [other(ids, labels=ids, output_routing=True) for ids in (IDS[:1, :6], IDS[1:])]
    tokens = torch.tensor([6.0, 18.0])
    z = (torch.stack([p.z_loss for p in parts]) * tokens).sum() / 24
    assert torch.allclose(padded.z_loss, z, atol=1e-5)
    united = tuple(
        Routing(*(torch.cat(fields) for fields in zip(*layers, strict=True)))
        for layers in zip(*(p.routing for p in parts), strict=True)
    )
    assert torch.allclose(padded.aux_loss, balancing_loss(united, None), atol=1e-5)
    if model.config.balance_update_rate:
        for one, two in zip(model.model.routers(), other.model.routers(), strict=True):
            assert torch.equal(one.load, two.load) and one.load.sum() == 24 * 2


def test_losses_by_hand():
    """Two layers, two experts, one chosen; U sum f P over pooled layers; a mean of squares."""

    def routing(logits, chosen):
        logits = torch.tensor(logits)
        return Routing(logits, logits.softmax(-1), torch.tensor(chosen), None, None)

    quarter = torch.log(torch.tensor([0.25, 0.75])).tolist()
    both = (
        routing([quarter, quarter], [[1], [1]]),
        routing([[0.0, 0.0], [0.0, 0.0]], [[0], [1]]),
    )
    f, p = [1 / 4, 3 / 4], [(0.5 + 1) / 4, (1.5 + 1) / 4]
    expected = 2 * (f[0] * p[0] + f[1] * p[1])
    assert balancing_loss(both, None).item() == pytest.approx(expected, abs=1e-6)
    # without the second token
    valid = torch.tensor([True, False])
    f, p = [1 / 2, 1 / 2], [(0.25 + 0.5) / 2, (0.75 + 0.5) / 2]
    expected = 2 * (f[0] * p[0] + f[1] * p[1])
    assert balancing_loss(both, valid).item() == pytest.approx(expected, abs=1e-6)
    router = make(num_hidden_layers=1).model.routers()[0]
    squares = router.squared_log_sums(torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    by_hand = [torch.tensor(2.0).log() ** 2, torch.tensor([1.0, 3.0]).exp().sum().log() ** 2]
    assert torch.allclose(squares, torch.stack(by_hand))


def test_layers_that_take_turns_are_balanced_in_sum_alone():
    """Two layers of two experts, each using one: the pooled loss is least, each one's largest."""

    def layer(expert: int) -> Routing:
        probs = torch.zeros(4, 2)
        probs[:, expert] = 1.0
        chosen = torch.full((4, 1), expert)
        return Routing(probs, probs, chosen, chosen, torch.ones(4, 1))

    routings = (layer(0), layer(1))
    pooled = make(num_hidden_layers=2, num_experts=2, num_experts_per_tok=1)
    apart = make(
        num_hidden_layers=2, num_experts=2, num_experts_per_tok=1, router_aux_loss_per_layer=True
    )
    assert pooled.router_losses(routings, None)["aux_loss"] == 1.0
    assert apart.router_losses(routings, None)["aux_loss"] == 2.0


def test_losses_are_weighed_in_training_alone_and_once_per_step():
    model = make("cross_layer", router_z_loss_coef=0.5, routing_offset_coef=0.25)
    for router in model.model.routers():
        torch.nn.init.normal_(router.weight)
    out = model.eval()(IDS, labels=IDS)
    assert out.loss == out.lm_loss
    assert torch.allclose(
        out.lm_loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    )
    out = model.train()(IDS, labels=IDS)
    total = out.lm_loss + 0.01 * out.aux_loss + 0.5 * out.z_loss + 0.25 * out.offset_loss
    assert torch.allclose(out.loss, total)
    offsets = torch.stack([r.weight for r in model.model.routers()])
    assert torch.allclose(out.offset_loss, offsets.square().mean())
    # a micro-batch of 24 of 96 targets
    part = model(IDS, labels=IDS, num_items_in_batch=96)
    assert torch.allclose(part.loss, (24 / 96) * total, atol=1e-6)


@pytest.mark.parametrize("variant", ["base", "tree", "cross_layer"])
def test_router_scores_stay_float32_under_autocast(variant):
    router = make(variant, initializer_range=0.3).model.routers()[0]
    x = torch.randn(30, router.weight.shape[1])
    exact = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, exact.logits) and torch.equal(found.index, exact.index)


# --- balancing without a loss -----------------------------------------------------------------


def test_a_bias_of_zero_changes_nothing_and_any_bias_selects_without_weighing():
    plain, balanced = make().train(), make("loss_free").train()
    balanced.load_state_dict(plain.state_dict(), strict=False)
    a, b = (m(IDS, labels=IDS, output_routing=True) for m in (plain, balanced))
    assert torch.equal(a.logits, b.logits)
    router = balanced.model.routers()[0]
    router.balance[4] = 10.0
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    routing = router(x)
    assert (routing.chosen == 4).any(-1).all()
    probs = F.linear(x, router.weight).softmax(-1)
    assert torch.equal(routing.weights, probs.gather(-1, routing.chosen))
    assert torch.equal(routing.chosen[:, 0], torch.full((20,), 4))


def test_the_bias_moves_by_hand():
    model = make("loss_free", num_experts=4).train()
    router = model.model.routers()[0]
    router.load = torch.tensor([5.0, 1.0, 3.0, 3.0])  # mean 3
    router.balance.copy_(torch.tensor([0.0, 0.002, 0.0, -0.001]))
    model.after_optimizer_step()
    expected = torch.tensor([-0.001, 0.003, 0.0, -0.001])
    assert torch.equal(router.balance, expected)
    assert router.load is None
    # two micro-batches of a step are counted together, checkpointed layers once
    model.gradient_checkpointing_enable()
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
    assert [r.load.sum().item() for r in model.model.routers()] == [2 * 27 * 2] * 3
    with torch.no_grad():
        model.eval()(IDS)
    assert [r.load.sum().item() for r in model.model.routers()] == [2 * 27 * 2] * 3
    assert "load" not in " ".join(model.state_dict())


@pytest.mark.parametrize("variant", ["base", "cross_layer", "tree"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_frozen_router_learns_nothing_and_the_rest_does(variant, loaded, tmp_path):
    model = make(variant, freeze_router=True)
    if loaded:
        model.save_pretrained(tmp_path)
        model = MoeForCausalLM.from_pretrained(tmp_path)
    model.train()(IDS, labels=IDS).loss.backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    gates = {n for n, _ in model.named_parameters() if n.endswith("mlp.gate.weight")}
    assert len(gates) == 3
    assert frozen == gates | {n for n, _ in model.named_parameters() if "routing_gate" in n}
    plain = make(variant).train()
    assert all(torch.equal(w, plain.state_dict()[n]) for n, w in model.state_dict().items())


# --- trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("branching", [2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6])
def test_tree_indices_are_those_of_an_enumeration(branching, depth):
    """Edges numbered by a breadth-first walk; leaves in the order of their branches."""
    edges, frontier = {}, [()]
    for _ in range(depth):
        frontier = [(*node, child) for node in frontier for child in range(branching)]
        for edge in frontier:
            edges[edge] = len(edges)
    expected = [
        [edges[leaf[: level + 1]] for level in range(depth)]
        for leaf in itertools.product(range(branching), repeat=depth)
    ]
    assert tree_paths(branching, depth).tolist() == expected


def tree(branching: int = 3, depth: int = 2, k: int = 2, width: int = 36) -> MoeConfig:
    sizes = {"tree_branching": branching, "tree_depth": depth, "intermediate_size": width}
    return MoeConfig(**{**SHAPE, **sizes, "num_experts_per_tok": k})


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_a_trees_weights_are_those_of_a_walk_over_its_nodes(k):
    config = tree(k=k)
    torch.manual_seed(0)
    router = TreeRouter(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(7, 16)
    routing = router(x)
    paths = tree_paths(3, 2).tolist()
    logits = F.linear(x, router.weight).double()
    for token in range(7):
        # branch probabilities, node by node: the root's edges 0-2, then 3-5, 6-8, 9-11
        branch = {}
        for first in (0, 3, 6, 9):
            for i, p in enumerate(logits[token, first : first + 3].softmax(-1).tolist()):
                branch[first + i] = p
        leaves = [branch[a] * branch[b] for a, b in paths]
        assert sum(leaves) == pytest.approx(1)
        assert routing.probs[token].tolist() == pytest.approx(leaves, abs=1e-6)
        best = sorted(range(9), key=lambda leaf: -leaves[leaf])[:k]
        total, expected = sum(leaves[leaf] for leaf in best), dict.fromkeys(range(12), 0.0)
        for leaf in best:
            for edge in paths[leaf]:
                expected[edge] += leaves[leaf] / total
        found = dict.fromkeys(range(12), 0.0)
        assert len(set(routing.index[token].tolist())) == routing.index.shape[1]
        for edge, weight in zip(routing.index[token].tolist(), routing.weights[token], strict=True):
            found[edge] += weight.item()
        assert found == pytest.approx(expected, abs=1e-6)
        if k == 9:  # all leaves: the product down to the edge
            down = {e: branch[e] if e < 3 else branch[e] * branch[(e - 3) // 3] for e in range(12)}
            assert found == pytest.approx(down, abs=1e-6)


def test_a_trees_output_is_the_weighted_sum_of_its_edges_experts():
    config = tree()
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    experts, router = TreeExperts(config), TreeRouter(config)
    for parameter in (*experts.parameters(), *router.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 16)
    routing = router(x)
    widths = [m.down_proj.shape[-1] for m in experts.levels]
    assert widths == [12, 4]
    for token in range(5):
        expected = torch.zeros(16)
        for edge, weight in zip(routing.index[token].tolist(), routing.weights[token], strict=True):
            level, place = (0, edge) if edge < 3 else (1, edge - 3)
            own = experts.levels[level]
            gate, up = (own.gate_up_proj[place] @ x[token]).chunk(2)
            expected = expected + weight * (own.down_proj[place] @ (F.silu(gate) * up))
        found = experts(x, routing.index, routing.weights)[token]
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_trees_z_loss_is_the_mean_over_its_nodes():
    router = TreeRouter(tree(branching=2, depth=2, width=4))
    logits = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 2.0]])
    by_hand = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]]).exp().sum(-1).log().square().mean()
    assert router.squared_log_sums(logits).item() == pytest.approx(by_hand.item())


# --- a routing stream, a bank, shared experts -------------------------------------------------


def test_one_gate_matrix_for_all_layers_and_a_router_that_reads_the_stream_alone():
    model = make("cross_layer").eval()
    state = model.state_dict()
    assert [n for n in state if "routing_gate" in n] == ["model.routing_gate.weight"]
    assert state["model.routing_gate.weight"].shape == (6, 4)
    offsets = [v for n, v in state.items() if n.endswith("mlp.gate.weight")]
    assert len(offsets) == 3 and all(v.shape == (6, 4) and not v.any() for v in offsets)
    streams, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.mlp.stream.register_forward_hook(lambda m, i, out: streams.append((*i, out)))
        )
    routing = model(IDS, output_routing=True).routing
    shared = state["model.routing_gate.weight"]
    previous = model.model.embed_routing(IDS)
    for layer, (r, u, out), found in zip(model.model.layers, streams, routing, strict=True):
        assert torch.equal(r, previous)
        step = r + (u @ layer.mlp.stream.linear.weight.T) * F.silu(
            u @ layer.mlp.stream.gate.weight.T
        )
        expected = step / (step.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.allclose(found.logits, (out @ shared.T).flatten(0, 1), atol=1e-5)
        previous = out


def test_layers_of_a_bank_use_the_same_experts():
    model = make("bank").eval()
    names = {n.split(".")[2] for n in model.state_dict() if ".experts." in n}
    assert names == {"0", "2"}  # layers 0 and 1 share, 2 begins another bank
    used = []
    for layer in (0, 2):
        experts = model.model.layers[layer].mlp.experts
        experts.register_forward_hook(lambda *_, layer=layer: used.append(layer))
    model(IDS)
    assert used == [0, 0, 2]


def test_shared_experts_are_added_and_dense_layers_route_nothing():
    model = make("shared").eval()
    block = model.model.layers[0].mlp
    u = torch.randn(2, 5, 16)
    with torch.no_grad():
        out, _, routing = block(u, block.experts)
        routed = block.experts(u.flatten(0, 1), routing.index, routing.weights).view_as(u)
        # two experts of width 8 side by side
        gate, up, down = (
            getattr(block.shared_experts, f"{n}_proj").weight for n in ("gate", "up", "down")
        )
        both = sum(
            (F.silu(u @ gate[s].T) * (u @ up[s].T)) @ down[:, s].T
            for s in (slice(0, 8), slice(8, 16))
        )
    assert torch.allclose(out, routed + both, atol=1e-6)
    dense = make("dense")
    assert len(dense(IDS, output_routing=True).routing) == 2
    assert dense.model.layers[0].mlp.gate_proj.weight.shape == (2 * 8, 16)  # as wide as 2 experts


# --- leaving experts out ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaving_out_nothing_is_the_original_and_everything_no_experts(variant, tmp_path):
    model = make(variant).eval()
    before, state = model(IDS).logits, {n: v.clone() for n, v in model.state_dict().items()}
    shape = (model.config.num_moe_layers, model.config.num_experts)
    for renormalize in (False, True):
        model.purge_experts(torch.ones(shape), renormalize)
        assert torch.allclose(model(IDS).logits, before, atol=1e-6)
        model.purge_experts(torch.zeros(shape), renormalize)
        blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "stream")]
        hooks = [block.register_forward_hook(check_nothing_routed) for block in blocks]
        model(IDS)
        for hook in hooks:
            hook.remove()
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    model.purge_experts(keep, True)
    purged = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, purged)
    model.purge_experts(None)
    assert torch.equal(model(IDS).logits, before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(ValueError, match="keep: expected shape"):
        model.purge_experts(torch.ones(1, 1))


def check_nothing_routed(block, inputs, out):
    expected = 0 if block.shared_experts is None else block.shared_experts(inputs[0])
    assert torch.allclose(out[0], torch.as_tensor(expected, dtype=out[0].dtype), atol=1e-7)


def test_purged_experts_are_gone_without_others_or_with_others_in_their_place():
    model = make().eval()
    router = model.model.routers()[0]
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)) * 10
    before = router(x)
    keep = torch.ones(3, 6).bool()
    keep[0, 2] = False
    model.purge_experts(keep)
    after = router(x)
    assert torch.equal(after.index, before.index)
    assert torch.equal(after.weights, before.weights * (before.index != 2))
    model.purge_experts(keep, renormalize=True)
    others = router(x)
    assert not (others.index == 2).any()
    rest = [0, 1, 3, 4, 5]
    probs = before.logits[:, rest].softmax(-1)
    best = probs.topk(2, -1)
    assert torch.allclose(others.weights, best.values, atol=1e-6)
    assert torch.equal(torch.tensor(rest)[best.indices], others.index)


def test_a_purged_unit_is_not_brought_back_by_its_bias():
    model = make("loss_free").eval()
    router = model.model.routers()[0]
    router.balance[2] = 5.0
    keep = torch.ones(3, 6).bool()
    keep[0, 2] = False
    model.purge_experts(keep, renormalize=True)
    assert not (router(torch.randn(30, 16)).index == 2).any()


# --- sizes and mistakes -----------------------------------------------------------------------


def test_biases_rest_where_every_expert_of_a_layer_is_purged():
    model = make("loss_free", balance_update_rate=0.5, num_hidden_layers=2)
    first, second = model.model.routers()
    keep = torch.ones(2, model.config.num_experts).bool()
    keep[0] = False
    model.purge_experts(keep, renormalize=True)
    before = first.balance.clone()
    for router in (first, second):
        router.load = torch.arange(float(model.config.num_experts))
        router.update_balance()
    assert torch.equal(first.balance, before) and second.balance.isfinite().all()
    assert second.balance.abs().max() == 0.5


def test_others_take_the_place_of_purged_experts_in_training_too():
    """Loss-free balancing evens out those that are left; the purged keep their bias."""
    model = make("loss_free", balance_update_rate=0.01, initializer_range=0.3).train()
    keep = torch.ones(3, 6).bool()
    keep[:, 3:] = False
    model.purge_experts(keep, renormalize=True)
    loads = []
    for _ in range(120):
        with torch.no_grad():
            model(IDS)
        loads.append([r.load for r in model.model.routers()])
        model.after_optimizer_step()
    assert all(not load[3:].any() for moment in loads for load in moment)
    last = torch.stack([torch.stack(moment) for moment in loads[-20:]])[..., :3].mean(0)
    assert last.amax() <= 24 and last.amin() >= 12  # 18 on average, of 27 tokens' 54 choices
    for router in model.model.routers():
        assert router.balance[:3].any() and not router.balance[3:].any()


def test_weights_of_improbable_units_sum_to_1():
    """Loss-free balancing may choose what float32 holds no probability of."""
    for variant in ("tree", "loss_free"):
        own = {"balance_update_rate": 1e-3, "norm_topk_prob": True}
        router = make(variant, **own).model.routers()[0]
        router.balance[2:4] = 5.0
        logits = torch.tensor([[0.0, 0.0, -400.0, -401.0, 0.0, 0.0]])
        if variant == "tree":  # leaves 2 and 3 lie beneath edge 1
            logits = torch.tensor([[0.0, -400.0, 0.0, 0.0, 0.0, -1.0]])
        with torch.no_grad():
            router.weight.zero_()[:, 0] = logits[0]
        routing = router(torch.eye(16)[:1])
        assert routing.chosen.tolist() == [[2, 3]]
        share = 1 / (1 + math.exp(-1))
        expected = [share, 1 - share] if variant == "loss_free" else [1.0, 0.0, share, 1 - share]
        assert routing.weights[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_an_empty_purge_changes_no_choice():
    """A kept unit whose probability float32 cannot hold is kept all the same."""
    model = make("loss_free")
    router = model.model.routers()[0]
    router.balance[3] = 5.0
    with torch.no_grad():
        router.weight.zero_()[3, 0] = -400.0
    before = router(torch.eye(16)[:1])
    model.purge_experts(torch.ones(3, 6).bool(), renormalize=True)
    after = router(torch.eye(16)[:1])
    assert before.chosen[0, 0] == 3
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


# --- experts spread over devices -----------------------------------------------------------------


def test_ranges_of_experts_by_hand():
    assert expert_ranges(6, 4) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert expert_ranges(64, 2) == [range(32), range(32, 64)]
    assert expert_ranges(3, 1) == [range(3)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_spread_experts_are_the_same_experts(variant, tmp_path):
    """Output, gradients, a state dict of the same tensors, and a checkpoint that anyone loads."""
    whole, spread = make(variant).train(), make(variant).train()
    spread.spread_experts(["cpu"] * 5)
    counts = [len(m.parts) for m in spread.modules() if isinstance(m, SpreadExperts)]
    trees = {"tree": [2, 4] * 3, "uneven_tree": [3, 5] * 3, "bank": [5, 5], "dense": [5, 5]}
    assert counts == trees.get(variant, [5] * 3)
    a, b = (m(IDS, labels=IDS, attention_mask=MASK) for m in (whole, spread))
    assert torch.allclose(a.logits, b.logits, atol=1e-6)
    for out in (a, b):
        out.loss.backward()
    for name, weight in whole.named_parameters():
        path, leaf = name.rsplit(".", 1)
        module = spread.get_submodule(path)
        if isinstance(module, SpreadExperts):
            own = torch.cat([getattr(part, leaf).grad for part in module.parts])
        else:
            own = getattr(module, leaf).grad
        assert torch.allclose(own, weight.grad, atol=1e-6), name
    other = make(variant, seed=1)
    spread.load_state_dict(other.state_dict())
    spread.save_pretrained(tmp_path)
    loaded = MoeForCausalLM.from_pretrained(tmp_path).state_dict()
    assert spread.state_dict().keys() == loaded.keys() == other.state_dict().keys()
    for name, weight in other.state_dict().items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize("variant", ["shared", "cross_layer", "tree"])
def test_experts_go_to_their_devices_and_the_rest_to_the_first(variant):
    model = make(variant)
    model.spread_experts(["cpu", "meta"])
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        assert weight.device.type == ("meta" if ".parts.1." in name else "cpu"), name
    placed = {".".join(n.split(".")[:-1]) for n, _ in model.named_parameters() if ".parts." in n}
    assert placed == set(model.hf_device_map)
    assert {d.type for d in model.hf_device_map.values()} == {"cpu", "meta"}


def test_experts_are_spread_once():
    model = make("tree")
    with pytest.raises(ValueError, match="spread_experts: once, over one device or more"):
        model.spread_experts([])
    model.spread_experts(["cpu"] * 2)
    with pytest.raises(ValueError, match="spread_experts: once, over one device or more"):
        model.spread_experts(["cpu"] * 3)
    assert model(IDS).logits.isfinite().all()


def test_a_text_is_given_as_ids():
    with pytest.raises(ValueError, match="input_ids: needed"):
        make()(inputs_embeds=torch.zeros(1, 3, 16))


@pytest.mark.parametrize("width", [6, 7])
def test_experts_of_any_width_are_computed(width):
    """Widths that torch's grouped product refuses."""
    model = make(intermediate_size=width, hidden_size=20, num_attention_heads=2)
    loop = make(intermediate_size=width, hidden_size=20, num_attention_heads=2)
    loop.set_experts_implementation("eager")
    a, b = (m(IDS, labels=IDS) for m in (model, loop))
    assert torch.equal(a.logits, b.logits)
    a.loss.backward()


def test_a_bfloat16_model_keeps_float32_biases(tmp_path):
    model = make("loss_free")
    model.model.routers()[1].balance.copy_(torch.tensor([0.1234, -0.3, 0.001, 0.0, 1.0, 0.0077]))
    before = model.model.routers()[1].balance.clone()
    model.save_pretrained(tmp_path)
    read = MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half in (model.to(torch.bfloat16), read):
        router = half.model.routers()[1]
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.balance, before)
        half.train()(IDS, labels=IDS)
        assert router.load.dtype == torch.float32 and router.load.sum() == 54
        half.after_optimizer_step()
        assert ((router.balance - before).abs() < 2e-3).all()
        assert not torch.equal(router.balance, before)


def test_the_published_size():
    """OLMoE-1B-7B: 6.9 billion parameters, 1.3 of them for a token (arXiv:2409.02060)."""
    config = MoeConfig(intermediate_size=1024)
    with torch.device("meta"):
        model = MoeForCausalLM(config)
    counts = config.parameter_counts()
    assert sum(p.numel() for p in model.parameters()) == counts["total"] == 6_919_161_856
    assert counts["active"] == 1_282_017_280
    # by hand: 16 layers of 4 D^2 + 8 experts of 3 D I + router, and the head; causal attention
    products = 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024 + 64 * 2048) + 50304 * 2048
    assert config.flops_per_token(4096) == 2 * products + 16 * 2 * 2048 * 4097


COMBINED = [
    dict(
        zip(("routing_stream_size", "num_dense_layers", "expert_bank_layers"), values, strict=True)
    )
    | {"num_shared_experts": shared, "num_hidden_layers": 4, **tree, **attention}
    for values in itertools.product((0, 4), (0, 1), (1, 2, 3))
    for shared in (0, 2)
    for tree in ({}, {"tree_depth": 2, "tree_branching": 2, "num_experts_per_tok": 3})
    for attention in ({}, {k: v for k, v in UNUSUAL.items() if k != "clip_qkv"})
]


def test_counts_of_all_options_together():
    """96 combinations: the total is that of the model; a token never has more than there is."""
    for options in COMBINED:
        config = MoeConfig(**{**SHAPE, **options})
        with torch.device("meta"):
            model = MoeForCausalLM(config)
        counts = config.parameter_counts()
        assert counts["total"] == sum(p.numel() for p in model.parameters()), options
        assert counts["active"] <= counts["total"], options
        assert counts["active"] >= counts["total"] - counts["experts"], options
    three_of_bank = MoeConfig(**{**SHAPE, "expert_bank_layers": 3})
    counts = three_of_bank.parameter_counts()
    assert counts["active"] == counts["total"]  # three layers' two choices may be all six


@pytest.mark.parametrize(("banks", "edges"), [(1, [2, 2, 2]), (2, [2, 4, 4]), (3, [2, 4, 6])])
def test_a_token_uses_no_more_of_a_tree_than_its_levels_have(banks, edges):
    """Two leaves of eight per layer; of a bank's layers together two edges at the root, four of
    four below it, and twice as many leaves as layers."""
    more = {"tree_depth": 3, "intermediate_size": 32, "expert_bank_layers": banks}
    counts = MoeConfig(**{**SHAPE, **more}).parameter_counts()
    used = sum(n * width for n, width in zip(edges, (16, 8, 4), strict=True))
    if banks == 2:  # two layers of one bank, and the third of another
        used = (used + 2 * 16 + 2 * 8 + 2 * 4) / 2
    held = 3 * 16 * 32 * 3  # a bank's three levels, each 32 wide together
    layers = -(-3 // banks)
    unused = layers * (held - 3 * 16 * used)
    assert counts["total"] - counts["active"] == unused


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_are_those_that_torch_counts(variant):
    model = make(variant)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    config = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS[:1])
    tokens, d, layers = IDS.shape[1], config.hidden_size, config.num_hidden_layers
    # torch counts scores that the mask hides too
    hidden = layers * 2 * d * (tokens - 1)
    assert counter.get_total_flops() == tokens * (config.flops_per_token(tokens) + hidden)


def test_packed_documents_do_not_see_one_another():
    """As each document alone; flash attention, which takes no mask, is told their bounds."""
    model = make(initializer_range=0.3).eval()
    row = torch.cat([IDS[0], IDS[1, :5]])[None]
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    packed = model(row, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(IDS[:1]).logits, model(IDS[1:2, :5]).logits], 1)
    assert torch.allclose(packed, alone, atol=1e-5)
    assert not torch.allclose(packed, model(row).logits, atol=1e-2)
    bounds = document_bounds(torch.cat([positions, torch.arange(14)[None]]))
    assert bounds["cu_seq_lens_q"].tolist() == bounds["cu_seq_lens_k"].tolist() == [0, 9, 14, 28]
    assert bounds["max_length_q"] == bounds["max_length_k"] == 14
    assert document_bounds(torch.arange(14)[None]) == {}
    seen = []

    def kernel(module, query, key, value, mask, **kwargs):
        seen.append((mask, kwargs.get("cu_seq_lens_q")))
        return query.transpose(1, 2), None

    AttentionInterface.register("recorded_flash", kernel)
    AttentionMaskInterface.register("recorded_flash", lambda *_, **__: None)
    model.config._attn_implementation_internal = "recorded_flash"
    model(row, position_ids=positions, use_cache=False)
    assert [(m, b.tolist()) for m, b in seen] == [(None, [0, 9, 14])] * 3
    seen.clear()
    model(row, use_cache=False)
    assert seen == [(None, None)] * 3


@pytest.mark.parametrize("variant", ["base", "cross_layer", "tree", "loss_free"])
def test_checkpointing_changes_no_gradient_and_no_load(variant):
    """torch's reentrant kind, too, which follows flat tuples of tensors only."""
    found = []
    for reentrant in (None, False, True):
        model = make(variant, router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS, attention_mask=MASK).loss.backward()
        loads = [r.load for r in model.model.routers()]
        found.append(([p.grad for p in model.parameters()], loads))
    for gradients, loads in found[1:]:
        for a, b in zip(found[0][0], gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        for a, b in zip(found[0][1], loads, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_gives_the_same(attention, padded):
    model = make(initializer_range=0.3).eval()
    model.set_attn_implementation(attention)
    mask = MASK.flip(1) if padded else None
    cache = StaticCache(config=model.config, max_cache_len=20)
    a = model(IDS, attention_mask=mask, past_key_values=cache).logits
    b = model(IDS, attention_mask=mask, use_cache=False).logits
    real = slice(None) if mask is None else mask.bool()
    assert torch.allclose(a[real], b[real], atol=1e-5)


def test_a_batch_of_padding_alone_adds_nothing():
    model = make("loss_free", router_aux_loss_coef=0.1).train()
    nothing = torch.zeros_like(IDS)
    out = model(IDS, attention_mask=nothing, labels=nothing - 100, num_items_in_batch=50)
    assert out.loss == 0 and out.z_loss == 0 and out.aux_loss == 0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(not r.load.any() for r in model.model.routers())
    with pytest.raises(ValueError, match=r"attention_mask: expected \(B, T\)"):
        model(IDS, attention_mask=torch.ones(3, 1, 9, 9).bool())


def test_a_longer_vocabulary_reaches_the_routing_stream():
    model = make("cross_layer").eval()
    before = model(IDS).logits
    model.resize_token_embeddings(60)
    after = model(torch.cat([IDS, torch.full((3, 1), 55)], 1)).logits
    assert torch.allclose(after[:, :9, :50], before, atol=1e-6) and after.isfinite().all()
    counts = model.config.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tree_branching": 0, "tree_depth": 2}, "tree_branching: 0 must be 2 or more"),
        ({"tree_depth": -1}, "tree_depth: -1 must be 0 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be 1 or more"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must be a divisor"),
        ({"intermediate_size": -8}, "intermediate_size: -8 must be 1 or more"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok: 7 must be between 1 and 6, the experts"),
        ({"tree_depth": 2, "num_experts_per_tok": 5}, "between 1 and 4, the leaves"),
        ({"tree_depth": 4}, "intermediate_size: 8 must be a multiple of 16"),
        ({"num_dense_layers": 3}, "num_dense_layers: 3 must be between 0 and 2"),
        ({"hidden_size": 15}, "hidden_size: 15 must be 2 heads of even width"),
        ({"tree_branching": 1}, "tree_branching: 1 must be 2 or more"),
        ({"expert_bank_layers": 0}, "expert_bank_layers: 0 must be 1 or more"),
        ({"balance_update_rate": -1.0}, "balance_update_rate: -1.0 must be 0 or more"),
    ],
)
def test_mistakes_are_one_line(values, text):
    with pytest.raises(ValueError, match=text):
        MoeConfig(**{**SHAPE, **values})
