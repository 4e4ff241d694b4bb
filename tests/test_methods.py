"""From the model section of a config to a model."""

import types

import pytest
import torch

from tiered.config import Config, ModelConfig
from tiered.methods import MODELS, monet_config
from tiered.store import UserError

DATA = types.SimpleNamespace(vocab_size=40, pad_id=0, separator_id=1)


def section(**values) -> Config:
    return Config(name="x", model=ModelConfig(hidden_size=24, **values))


def test_heads_are_as_wide_as_asked_and_attention_as_named():
    default = monet_config(section(), DATA)
    assert (default.head_dim, default._attn_implementation) == (12, "sdpa")
    made = monet_config(section(head_dim=32, attn_implementation="eager"), DATA)
    model = MODELS["monet"].build(made)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 24)
    assert model.config._attn_implementation == "eager"
    assert sum(p.numel() for p in model.parameters()) == made.parameter_counts()["total"]
    # a saved config keeps the width
    assert type(made)(**made.to_dict()).head_dim == 32


def test_ablations_reach_the_model():
    frozen = MODELS["monet"].build(monet_config(section(freeze_router=True), DATA))
    router = frozen.model.layers[0].router
    assert not any(p.requires_grad for p in router.parameters())
    horizontal = MODELS["monet"].build(monet_config(section(moe_decompose="horizontal"), DATA))
    assert horizontal.model.layers[0].moe.v.weight.shape == (24, 16 * 8)


@pytest.mark.parametrize("kind", ["monet", "llama", "moe", "mixtral"])
def test_head_counts_that_do_not_divide_are_one_line(kind):
    make = MODELS[kind].config_from
    with pytest.raises(UserError, match=r"24 is not a multiple of model.num_attention_heads .5"):
        make(section(type=kind, num_attention_heads=5), DATA)
    with pytest.raises(UserError, match="num_key_value_heads: 3 does not divide"):
        make(section(type=kind, num_attention_heads=4, num_key_value_heads=3), DATA)


def test_a_smaller_vocabulary_than_the_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_size: 39 is smaller than the tokenizer"):
        monet_config(section(vocab_size=39), DATA)
    assert monet_config(section(vocab_size=64), DATA).vocab_size == 64


def test_router_scores_stay_float32_under_autocast():
    """bfloat16 moves a score by up to 1 in 256: experts near the threshold would come and go."""
    torch.manual_seed(0)
    model = MODELS["monet"].build(monet_config(section(initializer_range=0.3), DATA)).eval()
    router, x = model.model.layers[0].router, torch.randn(2, 5, 24)
    (exact, _), _ = router(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        (found, _), _ = router(x, None)
    assert found.dtype == torch.float32 and torch.equal(found, exact)
