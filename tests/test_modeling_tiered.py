"""Level 1: causal, batch- and padding-invariant routing; one model of many, exactly removable."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from modeling_monet import MonetConfig, MonetForCausalLM
from tests.conftest import brute_ngrams
from tiered import modeling_tiered
from tiered.modeling_tiered import (
    HashedNgrams,
    Level1Config,
    Level1Embedder,
    Level1Router,
    TfidfEmbedder,
    TieredConfig,
    TieredForCausalLM,
    assign,
    needed_positions,
    prefix_groups,
)

V, T = 60, 16


def level1(embedder: str) -> Level1Config:
    return Level1Config(
        embedder=embedder,
        vocab_size=V,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=T,
        ngram_buckets=31,
        tfidf_buckets=97,
        tfidf_dimensions=12,
        tfidf_token_bytes=3,
    )


def fill_tfidf(embedder: TfidfEmbedder) -> None:
    """Tokens of one to three bytes, some of them parts of characters, and a random projection."""
    pieces = [bytes(p) for p in ([97 + i] for i in range(20))]
    pieces += [piece for letter in "हिあзé" for piece in (letter.encode(), letter.encode()[:1])]
    pieces += [letter.encode()[1:] for letter in "हिあзé"] + [b"ab", b"cde", b" a", b""]
    for i in range(V):
        piece = pieces[i % len(pieces)]
        embedder.token_bytes[i, : len(piece)] = torch.tensor(list(piece), dtype=torch.int16)
    embedder.projection.normal_()


@pytest.fixture(params=["transformer", "hashed_ngrams", "tfidf", "euclidean"])
def router(request) -> Level1Router:
    torch.manual_seed(0)
    kind = "transformer" if request.param == "euclidean" else request.param
    made = Level1Router(level1(kind), 3, 4).eval()
    if kind == "tfidf":
        fill_tfidf(made.embedder)
    if request.param == "euclidean":
        made.embedder.config.metric = "euclidean"
    made.centroids = torch.randn_like(made.centroids).abs()
    if request.param == "euclidean":  # all about as far from unit vectors
        made.centroids = torch.nn.functional.normalize(made.centroids, dim=-1)
    made.centroid_partition = torch.tensor([0, 1, 2, 1])
    return made


def ids(rows: int = 5, length: int = T) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def monet(seed: int) -> MonetForCausalLM:
    torch.manual_seed(seed)
    return MonetForCausalLM(
        MonetConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=T,
            moe_dim=4,
            moe_heads=2,
            moe_experts=4,
            moe_topk=2,
            moe_groups=1,
            initializer_range=0.3,
        )
    ).eval()


def tiered(router: Level1Router, scope: str = "token") -> TieredForCausalLM:
    config = TieredConfig(
        partitions=[["a"], ["b", "d"], ["c"]],
        level1=router.embedder.config.to_dict(),
        centroid_domains=["a", "b", "c", "d"],
        scope=scope,
        context_tokens=4,
        vocab_size=V,
    )
    return TieredForCausalLM.from_parts(config, router, {k: monet(k) for k in range(3)})


@torch.inference_mode()
def test_scores_never_see_a_later_token(router):
    x = ids()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    before, after = router.scores(x), router.scores(changed)
    # the same kernel on the same shapes: equal bits, and the change is visible afterwards
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@torch.inference_mode()
def test_scores_of_a_prefix_equal_those_of_the_whole_row(router):
    x = ids()
    for length in (1, 5, T):
        # other kernels at other lengths: float32 rounding only
        assert torch.allclose(router.scores(x[:, :length]), router.scores(x)[:, :length], atol=1e-5)


@torch.inference_mode()
def test_scores_do_not_depend_on_batch_order_or_size(router):
    x = ids()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(router.scores(x)[order], router.scores(x[order]))
    assert torch.allclose(router.scores(x)[2:3], router.scores(x[2:3]), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(router, side):
    x, pad = ids(length=10), torch.full((5, 6), 7)
    real = torch.ones_like(x)
    joined = [pad, x] if side == "left" else [x, pad]
    mask = [torch.zeros_like(pad), real] if side == "left" else [real, torch.zeros_like(pad)]
    padded = router.scores(torch.cat(joined, 1), torch.cat(mask, 1))
    padded = padded[:, 6:] if side == "left" else padded[:, :10]
    assert torch.allclose(padded, router.scores(x), atol=1e-5)


@torch.inference_mode()
def test_prefix_embedding_is_the_mean_of_hidden_states_so_far():
    torch.manual_seed(0)
    embedder = Level1Embedder(level1("transformer")).eval()
    states = embedder.hidden_states(ids())
    expected = torch.stack([states[:, : t + 1].mean(1) for t in range(T)], 1)
    assert torch.allclose(embedder.prefix_embeddings(ids()), expected, atol=1e-5)


@pytest.mark.parametrize("items", [None, 7])
def test_a_loss_made_by_parts_is_that_of_all_logits(items, monkeypatch):
    """Loss and every gradient, with targets that are left out; at most an eighth of the allowed
    logits at once, here 3 tokens'."""
    found, made = [], []
    ignored = torch.rand(ids().shape, generator=torch.Generator().manual_seed(2)) < 0.3
    labels = ids().masked_fill(ignored, -100)
    for most in (2**28, 3 * 8 * V):
        monkeypatch.setattr(modeling_tiered, "WHOLE_LOGITS", most)
        torch.manual_seed(0)
        embedder = Level1Embedder(level1("transformer")).train()
        entropy = torch.nn.functional.cross_entropy
        monkeypatch.setattr(
            torch.nn.functional,
            "cross_entropy",
            lambda x, *a, **k: made.append(len(x)) or entropy(x, *a, **k),  # noqa: B023
        )
        output = embedder(ids(), labels=labels, num_items_in_batch=items)
        output.loss.backward()
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", entropy)
        assert (output.logits is None) == (most < 2**28)
        found.append([output.loss.detach(), *(p.grad for p in embedder.parameters())])
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, atol=1e-6)
    assert made[0] > 3 and set(made[1:]) <= {1, 2, 3}
    assert embedder.eval()(ids(), labels=ids()).logits is not None


@torch.inference_mode()
def test_hashed_ngram_cosine_equals_explicit_counts():
    embedder = HashedNgrams(level1("hashed_ngrams"))
    centroids = torch.rand(4, 31, generator=torch.Generator().manual_seed(2))
    found = embedder.similarities(ids(), None, centroids)
    for t in range(T):
        counts = embedder.row_embeddings(ids()[:, : t + 1])
        expected = torch.nn.functional.cosine_similarity(counts[:, None], centroids[None], dim=-1)
        assert torch.allclose(found[:, t], expected, atol=1e-5)


@torch.inference_mode()
def test_both_metrics_by_formula():
    torch.manual_seed(0)
    embedder = Level1Embedder(level1("transformer")).eval()
    centroids = torch.randn(4, 16)
    prefixes = embedder.prefix_embeddings(ids())[:, :, None]
    cosine = torch.nn.functional.cosine_similarity(prefixes, centroids, dim=-1)
    assert torch.allclose(embedder.similarities(ids(), None, centroids), cosine, atol=1e-5)
    embedder.config.metric = "euclidean"
    units = prefixes / prefixes.norm(dim=-1, keepdim=True)
    distance = (units - centroids).norm(dim=-1)
    found = embedder.similarities(ids(), None, centroids)
    assert torch.allclose(found, -(distance**2), atol=1e-5)


def test_character_ngrams_equal_those_of_the_decoded_text():
    """Characters cut by tokens count where they end; texts beside one another share no n-gram."""
    config = Level1Config("tfidf", vocab_size=256, tfidf_token_bytes=4, tfidf_buckets=1009)
    embedder = TfidfEmbedder(config)
    generator = torch.Generator().manual_seed(0)
    tokens, rows, expected = [], [], []
    pieces_of: list[bytes] = []
    for row, text in enumerate(["hi, हिन्दी é", "日本 a😀z", "x"]):
        raw, pieces = text.encode(), []
        while raw:  # cut anywhere, also inside characters
            size = int(torch.randint(1, 5, (1,), generator=generator))
            pieces.append(raw[:size])
            raw = raw[size:]
        first = len(pieces_of)
        expected += [(b, first + t) for b, t in brute_ngrams(pieces, 1009, 3)]
        tokens += range(first, first + len(pieces))
        rows += [row] * len(pieces)
        pieces_of += pieces
    for i, piece in enumerate(pieces_of):
        embedder.token_bytes[i, : len(piece)] = torch.tensor(list(piece), dtype=torch.int16)
    bucket, end = embedder.terms(torch.tensor(tokens), torch.tensor(rows))
    found = zip(bucket.tolist(), end.tolist(), strict=True)
    assert sorted(found) == sorted(expected)


@torch.inference_mode()
def test_score_of_a_partition_is_its_best_centroid(router):
    cosines = router.embedder.similarities(ids(), None, router.centroids)
    expected = torch.stack([cosines[..., 0], cosines[..., [1, 3]].amax(-1), cosines[..., 2]], -1)
    assert torch.equal(router.scores(ids()), expected)


def test_sample_scope_decides_from_the_context_and_ties_go_to_the_lowest():
    scores = torch.zeros(2, 6, 3)
    scores[0, :2, 2], scores[0, 2:, 1] = 1, 1  # token: 2 2 1 1 1 1
    scores[0, 5, 0] = 2
    assert assign(scores, "token", 3).tolist() == [[2, 2, 1, 1, 1, 0], [0] * 6]
    assert assign(scores, "sample", 3).tolist() == [[2, 2, 1, 1, 1, 1], [0] * 6]
    left = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)  # two padded positions: decided two later
    assert assign(scores, "sample", 3, left)[0].tolist() == [2, 2, 1, 1, 1, 1]
    assert assign(scores, "sample", 9).tolist() == assign(scores, "token", 9).tolist()


def test_prefix_groups_cover_every_needed_position_once():
    chosen = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    needed = needed_positions(chosen, 0)
    assert needed.tolist() == [6, 0, 3]
    groups = [(g.rows.tolist(), g.length) for g in prefix_groups(needed, 6)]
    assert groups == [([2], 4), ([0], 6)]


@torch.inference_mode()
def test_forward_takes_each_position_from_the_partition_that_was_chosen(router):
    model = tiered(router)
    for scope in ("token", "sample"):
        out = model(ids(), scope=scope)
        assert len(out.partition.unique()) > 1
        full = torch.stack([model.partitions[str(k)](ids()).logits for k in range(3)], 2)
        index = out.partition[..., None, None].expand(-1, -1, 1, V)
        # prefixes run at their own length: other kernels, rounding only
        assert torch.allclose(out.logits, full.gather(2, index)[:, :, 0], atol=2e-5)


@torch.inference_mode()
def test_oracle_and_a_single_partition_equal_the_bare_model_exactly(router):
    model = tiered(router)
    bare = model.partitions["2"](ids()).logits
    assert torch.equal(model(ids(), scope="oracle", partition=2).logits, bare)
    assert torch.equal(model(ids(), allowed_partitions=[2]).logits, bare)
    model.remove_partition(0)
    model.remove_partition(1)
    assert torch.equal(model(ids()).logits, bare)


@torch.inference_mode()
def test_loss_is_the_mean_next_token_loss_of_the_routed_logits(router):
    model, x = tiered(router), ids()
    labels = x.clone()
    labels[0, 3] = -100
    out = model(x, labels=labels)
    logp = out.logits.log_softmax(-1)
    picked = [-logp[b, t, x[b, t + 1]] for b in range(5) for t in range(T - 1) if (b, t) != (0, 2)]
    assert out.loss.item() == pytest.approx(torch.stack(picked).mean().item(), abs=1e-5)


@torch.inference_mode()
def test_removed_partition_cannot_affect_outputs(router):
    intact, poisoned = tiered(router), tiered(copy.deepcopy(router))
    scores = intact.partition_scores(ids())
    poisoned.router.centroids[router.centroid_partition == 1] = float("nan")
    for tensor in poisoned.partitions["1"].state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    kept = poisoned(ids(), allowed_partitions=[0, 2])
    assert torch.isfinite(kept.logits).all() and 1 not in kept.partition
    assert torch.equal(kept.logits, intact(ids(), allowed_partitions=[0, 2]).logits)
    # the planted violation: while the partition may be routed to, its poison is reached
    assert not torch.isfinite(poisoned(ids()).logits).all()
    intact.remove_partition(1)
    assert torch.equal(kept.logits, intact(ids()).logits)
    assert torch.equal(scores[..., [0, 2]], intact.partition_scores(ids())[..., [0, 2]])


@torch.inference_mode()
def test_removal_is_idempotent_and_order_free(router):
    a, b = tiered(copy.deepcopy(router)), tiered(copy.deepcopy(router))
    for k in (0, 1, 1):
        a.remove_partition(k)
    for k in (1, 0):
        b.remove_partition(k)
    assert a.present == b.present == [2]
    assert a.config.centroid_domains == b.config.centroid_domains == ["c"]
    assert torch.equal(a.router.centroids, b.router.centroids)
    with pytest.raises(ValueError, match="no model"):
        a.remove_partition(2)


def test_routing_to_nothing_is_refused(router):
    model = tiered(router)
    with pytest.raises(ValueError, match="no partition is left"):
        model(ids(), allowed_partitions=[])
    with pytest.raises(ValueError, match="needs `partition`"):
        model(ids(), scope="oracle")
    with pytest.raises(ValueError, match="partition 2 is not in allowed_partitions"):
        model(ids(), scope="oracle", partition=2, allowed_partitions=[0, 1])
    with pytest.raises(ValueError, match="has no model"):
        model.remove_partition(1)
        model(ids(), scope="oracle", partition=1)


@pytest.mark.parametrize("analyzer", ["char", "word"])
def test_any_bytes_give_the_terms_of_what_python_decodes(analyzer):
    """Overlong forms, surrogates, stray bytes; and no bytes at all."""
    config = Level1Config(
        "tfidf", vocab_size=256, tfidf_token_bytes=1, tfidf_analyzer=analyzer, tfidf_stop_words=0
    )
    embedder = TfidfEmbedder(config)
    embedder.token_bytes[:, 0] = torch.arange(256)
    if analyzer == "word":
        for letter in map(chr, range(0x800)):
            if letter.isalnum():
                embedder.word_characters[ord(letter)] = ord(letter)
    generator = torch.Generator().manual_seed(0)
    parts = [b"ab", b"z ", b"\xc3\xa9", b"\xc0\x83", b"\xf0\x80\xac\xac", b"\xed\xa0\x80"]
    parts += [b"\xf5\x80\x80\x80", b"\xf8", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98\x80", b"x"]
    for _ in range(300):
        order = torch.randint(0, len(parts), (6,), generator=generator).tolist()
        raw = b"".join(parts[i] for i in order)
        ids = torch.tensor(list(raw))
        text = raw.decode("utf-8", "ignore")
        again = torch.tensor(list(text.encode()), dtype=torch.long)
        found, expected = (embedder.terms(t, torch.zeros_like(t))[0] for t in (ids, again))
        assert sorted(found.tolist()) == sorted(expected.tolist())
    for shape in ((1, 0), (0, 5)):
        empty = torch.zeros(shape, dtype=torch.long)
        assert embedder.prefix_embeddings(empty).shape == (*shape, 100)


def test_wrong_centroids_and_unknown_partitions_change_nothing(router):
    model = tiered(router)
    with pytest.raises(ValueError, match="centroids: expected width"):
        model.add_partition(monet(9), ["e"], torch.zeros(1, 3))
    assert model.config.partitions == [["a"], ["b", "d"], ["c"]]
    assert model.router.num_partitions == 3
    for index in (-1, 9):
        with pytest.raises(ValueError, match=f"there is no partition {index}"):
            model(ids(), allowed_partitions=[0, index])


@torch.inference_mode()
def test_save_and_load_keep_every_bit(router, tmp_path):
    model = tiered(router)
    model.remove_partition(0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.present == [1, 2] and again.config.partitions[1] == ["b", "d"]
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in expected.items())
    # a copy: weights mapped from a file lie at other alignments, by which some products round
    again = copy.deepcopy(again)
    assert torch.equal(model(ids()).logits, again(ids()).logits)


@torch.inference_mode()
def test_a_purge_reaches_one_partition_and_is_saved(router, tmp_path):
    model = tiered(router)
    before = {k: model(ids(), scope="oracle", partition=k).logits for k in range(3)}
    keep = torch.ones(2, 4, 4, dtype=torch.bool)
    keep[0, 1] = False
    alone = copy.deepcopy(model.partitions["1"])
    alone.purge_experts(keep)
    model.purge_experts(1, keep)
    found = {k: model(ids(), scope="oracle", partition=k).logits for k in range(3)}
    assert torch.equal(found[1], alone(ids()).logits)
    assert not torch.equal(found[1], before[1])
    assert all(torch.equal(found[k], before[k]) for k in (0, 2))
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert torch.equal(again(ids(), scope="oracle", partition=1).logits, found[1])
    again.purge_experts(1, None)  # and back
    assert torch.equal(again(ids(), scope="oracle", partition=1).logits, before[1])
    with pytest.raises(ValueError, match="partition 3 has no model"):
        model.purge_experts(3, keep)


def test_a_checkpoint_runs_no_code_of_its_own_without_trust_remote_code(tmp_path):
    """A partition family that nothing here defines: its file is beside the weights, and is left
    alone by the class that was imported from this project."""
    (tmp_path / "modeling_unheard_of.py").write_text("raise SystemExit('ran')\n")
    family = {
        "model_type": "unheard_of",
        "auto_map": {"AutoModelForCausalLM": "modeling_unheard_of.M"},
    }
    config = TieredConfig(partitions=[["a"]], partition_configs={"0": family})
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="'unheard_of' is not known: import the module"):
        TieredForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- generation


def repeated_forwards(model: TieredForCausalLM, x: torch.Tensor, steps: int, **options):
    """Greedy continuation by whole forwards without a cache, one token at a time."""
    for _ in range(steps):
        x = torch.cat([x, model(x, **options).logits[:, -1:].argmax(-1)], 1)
    return x


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, {"scope": "sample"}, {"allowed_partitions": [0, 2]}])
def test_generation_equals_repeated_full_forwards(router, options):
    model, x = tiered(router), ids(4, 5)
    expected = repeated_forwards(model, x, 8, **options)
    steps = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False):
        found = model.generate(
            x, attention_mask=torch.ones_like(x), use_cache=use_cache, **steps, **options
        )
        assert torch.equal(found, expected)
    # the route is taken anew at every token, by several partitions within a row
    if not options:
        chosen = model.assign(expected)[:, 4:-1]
        assert max(len(row.unique()) for row in chosen) > 1
    if "allowed_partitions" in options:
        assert 1 not in model.assign(expected, allowed_partitions=[0, 2])


@torch.inference_mode()
def test_generation_runs_past_the_embedder_position_table(router):
    """The table has T entries and the partition models have more: T + 4 tokens are routed."""
    model, x = tiered(router), ids(2, 5)
    steps = {"max_new_tokens": T - 1, "min_new_tokens": T - 1, "do_sample": False}
    found = model.generate(x, attention_mask=torch.ones_like(x), pad_token_id=0, **steps)
    assert torch.equal(found, repeated_forwards(model, x, T - 1))


@torch.inference_mode()
def test_generation_by_label_is_the_partition_model_alone(router):
    model, x = tiered(router), ids(3, 5)
    steps = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    steps |= {"attention_mask": torch.ones_like(x)}
    found = model.generate(x, scope="oracle", partition=torch.tensor([2, 2, 2]), **steps)
    assert torch.equal(found, model.partitions["2"].generate(x, **steps))


@torch.inference_mode()
def test_left_padded_rows_generate_what_single_rows_do(router):
    model = tiered(router)
    rows = [ids(1, 6)[0], ids(2, 3)[1]]
    padded, mask = torch.full((2, 6), 7), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 6 - len(row) :], mask[i, 6 - len(row) :] = row, 1
    steps = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(padded, attention_mask=mask, **steps)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **steps)
        assert torch.equal(found[i, 6:], alone[0, len(row) :])


@torch.inference_mode()
def test_beam_search_reorders_every_partition_and_finds_the_best(router):
    """Against all V^2 continuations, scored by full forwards."""
    model, x = tiered(router), ids(1, 5)
    first = model(x).logits[0, -1].log_softmax(-1)
    rows = torch.cat([x.expand(V, -1), torch.arange(V)[:, None]], 1)
    second = model(rows).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    found = model.generate(
        x,
        attention_mask=torch.ones_like(x),
        num_beams=V,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
    )
    assert found[0, 5:].tolist() == [best // V, best % V]
