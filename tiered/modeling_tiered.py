"""Level 1 and Level 2 as one causal language model: a deterministic router over partition models.

Router: a small causal LM's hidden states (or hashed n-grams); the embedding of a prefix is the
running mean over its tokens, compared by cosine with centroids. No trained gate. The position that
predicts token t+1 is routed by tokens 0..t and never by a later one.

Shapes: B batch, T tokens, D hidden of the Level-1 embedder, N partitions (configured), C centroids,
V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import ModelOutput

SCOPES = ("oracle", "token", "sample")


class Level1Config(PreTrainedConfig):
    """Configuration of the Level-1 embedder: `transformer`, `hashed_ngrams` or `tfidf`.

    tfidf_stop_words: number of English stop words that the `word` analyser leaves out.
    metric: how prefixes are compared with centroids, `cosine` or (of the prefix's unit vector)
    `euclidean`.
    """

    model_type = "level1_embedder"

    def __init__(
        self,
        embedder: str = "transformer",
        vocab_size: int = 4096,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 128,
        ngram_buckets: int = 4096,
        ngram_max: int = 2,
        tfidf_buckets: int = 32768,
        tfidf_ngram_max: int = 3,
        tfidf_dimensions: int = 100,
        tfidf_token_bytes: int = 32,
        tfidf_analyzer: str = "char",
        tfidf_stop_words: int = 0,
        metric: str = "cosine",
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads"
                f" {num_attention_heads}"
            )
        self.embedder = embedder
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.ngram_buckets = ngram_buckets
        self.ngram_max = ngram_max
        self.tfidf_buckets = tfidf_buckets
        self.tfidf_ngram_max = tfidf_ngram_max
        self.tfidf_dimensions = tfidf_dimensions
        self.tfidf_token_bytes = tfidf_token_bytes
        self.tfidf_analyzer = tfidf_analyzer
        self.tfidf_stop_words = tfidf_stop_words
        self.metric = metric
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class Level1Layer(nn.Module):
    """Pre-norm transformer layer with an explicit causal mask."""

    def __init__(self, config: Level1Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), mask (B, 1, T, T) True where a key may be seen."""
        b, t, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PrefixEmbedder:
    """What embedders share that have a vector for every prefix."""

    def row_embeddings(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embedding of whole rows (B, D): that of the prefix that ends with the last token."""
        return self.prefix_embeddings(input_ids, attention_mask)[:, -1]

    def similarities(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, centroids: torch.Tensor
    ) -> torch.Tensor:
        """Similarity (B, T, C) of every prefix with every centroid."""
        prefixes = self.prefix_embeddings(input_ids, attention_mask)
        return similarities(prefixes, centroids, self.config.metric)


WHOLE_LOGITS = 2**28  # that training makes at once (1 GiB of float32, and as much for gradients)


class Level1Embedder(PrefixEmbedder, PreTrainedModel):
    """The embedder LM: trained as a language model, used through its hidden states only."""

    config: Level1Config
    config_class = Level1Config
    base_model_prefix = "level1"

    def __init__(self, config: Level1Config) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Level1Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # At D^-1/2 (not the usual 0.02) every map of a normed state, the tied head among them,
        # starts at unit variance: so narrow a model otherwise learns languages far more slowly.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)
            if isinstance(module, nn.Linear):
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final hidden states (B, T, D); padding on either side changes no valid position."""
        mask = _valid(input_ids, attention_mask)
        # generation may run past the table: later tokens share its last entry
        last = self.config.max_position_embeddings - 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0, max=last)
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()
        # A padded query would see nothing at all (softmax over the empty set): let it see itself.
        itself = torch.eye(t, dtype=torch.bool, device=input_ids.device)
        visible = (causal & mask[:, None, None, :]) | itself  # (B, 1, T, T)
        x = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Next-token logits (B, T, V) through the tied embedding; loss in nats if labelled.

        In training on more than WHOLE_LOGITS of them they are left out (None): the loss is made
        part by part.
        """
        states = self.hidden_states(input_ids, attention_mask)
        learns = labels is not None and self.training
        if learns and labels.numel() * self.config.vocab_size > WHOLE_LOGITS:
            return CausalLMOutput(loss=self._loss_by_parts(states, labels, **kwargs))
        logits = states @ self.tokens.weight.T
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    def _loss_by_parts(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The loss of `forward`; a part's logits are computed again for its gradient, not kept."""
        states, targets = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        rows = max(1, WHOLE_LOGITS // 8 // self.config.vocab_size)

        def nats(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits = (part @ self.tokens.weight.T).float()
            return F.cross_entropy(logits, target, reduction="sum")

        parts = zip(states.split(rows), targets.split(rows), strict=True)
        total = sum(checkpoint(nats, *part, use_reentrant=False) for part in parts)
        items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / items

    def prefix_embeddings(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Running mean of the hidden states of tokens 0..t, (B, T, D) float32."""
        mask = _valid(input_ids, attention_mask)[..., None].float()
        states = self.hidden_states(input_ids, attention_mask).float()
        return (states * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)


def similarities(prefixes: torch.Tensor, centroids: torch.Tensor, metric: str) -> torch.Tensor:
    """Similarity (..., C) of prefixes (..., D) with centroids (C, D): their cosine, or minus the
    squared distance between the prefix's unit vector and the centroid."""
    units = F.normalize(prefixes, dim=-1)
    # One centroid at a time: a matrix product's rounding depends on its shape, and removing a
    # centroid may not change one bit of another's similarity.
    if metric == "euclidean":
        return torch.stack([-(units - c).square().sum(-1) for c in centroids], -1)
    return torch.stack([(units * c).sum(-1) for c in F.normalize(centroids, dim=-1)], -1)


HASH_BASE, HASH_PRIME = 1_000_003, 2_147_483_629  # a prime below 2^31: int64 products stay exact
WORD_TABLE, IDEOGRAPHS_END, WORD_LENGTH, DIGIT = 0x20000, 0x40000, 64, 1 << 24


class TfidfEmbedder(PrefixEmbedder, nn.Module):
    """Embedder without a language model: tf-idf of hashed terms, projected by a truncated SVD
    (after c-BTM, arXiv:2303.14177).

    Terms are character n-grams (`char`), or c-BTM's words (`word`): two word characters or more,
    in lower case, without English stop words and numbers. What a term adds to a text's vector does
    not depend on the rest of the text, so the vector of every prefix is a running sum; a word
    counts from the character that ends it. Characters come from the bytes of the tokens: the bytes
    of one may stand in several tokens. projection (buckets, D): idf times the SVD's components,
    zero where a bucket is too rare; token_bytes (V, L): each token's bytes, -1 where there are
    none; of `word`, word_characters (WORD_TABLE,): the lower case of a word character (with DIGIT
    for digits), 0 for others, and stop_words: their hash codes.
    """

    def __init__(self, config: Level1Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer(
            "token_bytes",
            torch.full((config.vocab_size, config.tfidf_token_bytes), -1, dtype=torch.int16),
        )
        self.register_buffer(
            "projection", torch.zeros(config.tfidf_buckets, config.tfidf_dimensions)
        )
        if config.tfidf_analyzer == "word":
            self.register_buffer("word_characters", torch.zeros(WORD_TABLE, dtype=torch.int32))
            self.register_buffer(
                "stop_words", torch.zeros(config.tfidf_stop_words, dtype=torch.long)
            )

    def terms(self, tokens: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Buckets (M,) of all terms in texts laid one after another, and the index (M,) of the
        token that completes each. tokens (N,); row (N,), the text of each: terms cross none."""
        character, row, end = self._characters(tokens, row)
        if self.config.tfidf_analyzer == "word":
            code, end = self._words(character, row, end)
        else:
            code, end = self._ngrams(character, row, end)
        return code % self.config.tfidf_buckets, end

    def _characters(
        self, tokens: torch.Tensor, row: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Code point, text and last token of every whole character, each (characters,)."""
        token, place = (self.token_bytes[tokens] >= 0).nonzero(as_tuple=True)
        byte, row = self.token_bytes[tokens[token], place].long(), row[token]
        # lead bytes say how many bytes their character has; 10xxxxxx continue one
        width = 1 + (byte >= 0xC0).long() + (byte >= 0xE0).long() + (byte >= 0xF0).long()
        start = ((byte & 0xC0) != 0x80).nonzero()[:, 0]
        last = start + width[start] - 1
        following = torch.cat([start[1:], start.new_tensor([len(byte)])])[: len(start)]
        whole = last < following  # broken characters are left out
        start, last = start[whole], last[whole]
        whole = row[start] == row[last]
        start, last = start[whole], last[whole]
        width = last - start + 1
        # of the lead byte 7, 5, 4 or 3 bits belong to the character, of every other byte 6
        character = byte[start] & (0xFF >> (width + (width > 1).long()))
        for offset in range(1, 4):
            more = byte[(start + offset).clamp(max=max(0, len(byte) - 1))] & 0x3F
            character = torch.where(offset < width, (character << 6) | more, character)
        # as Python decodes: no longer form than needed, no surrogates, nothing beyond U+10FFFF
        least = character.new_tensor([0, 0x80, 0x800, 0x10000])[width - 1]
        valid = (character >= least) & (character <= 0x10FFFF)
        valid &= (character < 0xD800) | (character > 0xDFFF)
        return character[valid], row[start][valid], token[last][valid]

    def _ngrams(
        self, character: torch.Tensor, row: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hash codes (M,) of all n-grams, and the token (M,) that completes each."""
        codes, ends, code = [], [], torch.zeros_like(character)
        for length in range(1, self.config.tfidf_ngram_max + 1):
            # the n-gram that ends here: its characters so far, and the one `length - 1` before
            earlier = F.pad(character, (length - 1, 0))[: len(character)]
            same = F.pad(row, (length - 1, 0), value=-1)[: len(row)] == row
            code = (code * HASH_BASE + earlier + 7 * length) % HASH_PRIME
            codes.append(code[same])
            ends.append(end[same])
        return torch.cat(codes), torch.cat(ends)

    def _words(
        self, character: torch.Tensor, row: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hash codes (M,) of all words, and the token (M,) whose character ends each."""
        known = self.word_characters[character.clamp(max=WORD_TABLE - 1)].long()
        ideograph = character * (character < IDEOGRAPHS_END)  # beyond the table: planes 2 and 3
        folded = torch.where(character < WORD_TABLE, known, ideograph)
        inside = folded > 0
        # one more place on either side: a word ends where the text does, too
        border = F.pad(inside, (1, 1))
        other = F.pad(row[1:] != row[:-1], (1, 1), value=True)[: len(row) + 1]
        first = (border[1:-1] & (~border[:-2] | other[:-1])).nonzero()[:, 0]
        final = (border[1:-1] & (~border[2:] | other[1:])).nonzero()[:, 0]
        word = torch.repeat_interleave(final - first + 1)
        places = inside.nonzero()[:, 0]
        offset = places - first[word]
        kept = offset < WORD_LENGTH
        powers = torch.tensor(
            [pow(HASH_BASE, i + 1, HASH_PRIME) for i in range(WORD_LENGTH)], device=row.device
        )
        part = (folded[places] & (DIGIT - 1))[kept] * powers[offset[kept]]
        code = torch.zeros_like(first).index_add_(0, word[kept], part) % HASH_PRIME
        after = (final + 1).clamp(max=max(0, len(row) - 1))
        ended = (final + 1 < len(row)) & (row[after] == row[final])
        wanted = ended & (final > first) & (folded[first] < DIGIT)
        wanted &= ~torch.isin(code, self.stop_words)
        return code[wanted], end[after][wanted]

    def prefix_embeddings(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Projected tf-idf of tokens 0..t, (B, T, D) float32, up to its length."""
        place = _valid(input_ids, attention_mask).flatten().nonzero()[:, 0]
        bucket, end = self.terms(input_ids.flatten()[place], place // input_ids.shape[1])
        added = self.projection.new_zeros(input_ids.numel(), self.projection.shape[1])
        added.index_add_(0, place[end], self.projection[bucket])
        return added.view(*input_ids.shape, self.projection.shape[1]).cumsum(1)


class HashedNgrams(nn.Module):
    """Untrained embedder: counts of hashed token n-grams.

    A centroid depends on its own domain alone, so dropping it (S1) leaves what a rebuild without
    the domain (S2) makes.
    """

    def __init__(self, config: Level1Config) -> None:
        super().__init__()
        self.config = config

    def buckets(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Bucket of the n-gram that ends at each token, per length: (B, T), -1 where none ends."""
        found, code = [], torch.zeros_like(input_ids)
        for length in range(1, self.config.ngram_max + 1):
            shifted = F.pad(input_ids, (length - 1, 0))[:, : input_ids.shape[1]]
            code = (code * HASH_BASE + shifted + 7 * length) % HASH_PRIME
            bucket = code % self.config.ngram_buckets
            bucket[:, : length - 1] = -1
            found.append(bucket)
        return found

    def row_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Bucket counts of whole rows, (B, buckets) float32."""
        counts = torch.zeros(len(input_ids), self.config.ngram_buckets, device=input_ids.device)
        for bucket in self.buckets(input_ids):
            counts.scatter_add_(1, bucket.clamp(min=0), (bucket >= 0).float())
        return counts

    def similarities(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, centroids: torch.Tensor
    ) -> torch.Tensor:
        """Cosine (B, T, C) of every prefix's counts with every centroid; no (B, T, buckets)."""
        if attention_mask is not None and not bool(attention_mask.all()):
            return self._similarities_padded(input_ids, attention_mask, centroids)
        unit = F.normalize(centroids, dim=-1)
        dot = torch.zeros(*input_ids.shape, len(unit), device=input_ids.device)
        ends, valid = [], []
        for bucket in self.buckets(input_ids):
            present = bucket >= 0
            dot += unit.T[bucket.clamp(min=0)] * present[..., None]
            ends.append(bucket)
            valid.append(present)
        # |counts|^2 of a prefix grows by 2c + 1 when a bucket seen c times comes once more.
        t = input_ids.shape[1]
        stacked = torch.stack(ends, -1).flatten(1)  # (B, T * lengths), in order of arrival
        live = torch.stack(valid, -1).flatten(1)
        same = (stacked[:, :, None] == stacked[:, None, :]) & live[:, None, :] & live[:, :, None]
        earlier = same.tril(-1).sum(-1)
        growth = ((2 * earlier + 1) * live).view(len(input_ids), t, -1).sum(-1)
        norm = growth.cumsum(1).clamp(min=1).sqrt()
        return dot.cumsum(1) / norm[..., None]

    def _similarities_padded(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, centroids: torch.Tensor
    ) -> torch.Tensor:
        """Row by row without its padding; padded positions are 0."""
        out = torch.zeros(*input_ids.shape, len(centroids), device=input_ids.device)
        for row, mask in enumerate(attention_mask.bool()):
            if mask.any():
                out[row, mask] = self.similarities(input_ids[row, mask][None], None, centroids)[0]
        return out


def make_embedder(config: Level1Config) -> nn.Module:
    """The embedder module of a Level-1 config."""
    kinds = {
        "transformer": Level1Embedder,
        "hashed_ngrams": HashedNgrams,
        "tfidf": TfidfEmbedder,
    }
    if config.embedder not in kinds:
        raise ValueError(f"embedder: {config.embedder!r} is not one of {', '.join(kinds)}")
    return kinds[config.embedder](config)


def _valid(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


class Level1Router(nn.Module):
    """Embedder and centroids: a partition for every prefix.

    `centroid_partition[c]` is the partition of centroid c; a partition without centroid can never
    be chosen. A partition's score is the largest similarity among its centroids.
    """

    def __init__(self, config: Level1Config, num_partitions: int, num_centroids: int) -> None:
        super().__init__()
        widths = {
            "transformer": config.hidden_size,
            "hashed_ngrams": config.ngram_buckets,
            "tfidf": config.tfidf_dimensions,
        }
        self.embedder = make_embedder(config)
        self.num_partitions = num_partitions
        self.register_buffer("centroids", torch.zeros(num_centroids, widths[config.embedder]))
        self.register_buffer("centroid_partition", torch.zeros(num_centroids, dtype=torch.long))

    def scores(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Score (B, T, N) of every partition for the prefix ending at t; -inf without centroid."""
        found = self.embedder.similarities(input_ids, attention_mask, self.centroids)
        scores = found.new_full((*input_ids.shape, self.num_partitions), -torch.inf)
        index = self.centroid_partition.expand(*input_ids.shape, -1)
        return scores.scatter_reduce(-1, index, found, "amax")

    def add_partition(self, k: int, centroids: torch.Tensor) -> None:
        """Add centroids (C, D) of partition k, one of those there are or the next."""
        new = centroids.to(self.centroids)
        self.num_partitions = max(self.num_partitions, k + 1)
        self.centroids = torch.cat([self.centroids, new])
        index = self.centroid_partition.new_full((len(new),), k)
        self.centroid_partition = torch.cat([self.centroid_partition, index])

    def remove_partition(self, k: int) -> None:
        """Delete every centroid of partition k."""
        keep = self.centroid_partition != k
        self.centroids, self.centroid_partition = (
            self.centroids[keep].clone(),
            self.centroid_partition[keep].clone(),
        )


def assign(
    scores: torch.Tensor,
    scope: str,
    context_tokens: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partition (B, T) that predicts the token after position t; ties go to the lowest index.

    `token`: every position by its own prefix. `sample`: positions from context_tokens - 1 on by
    the prefix of context_tokens tokens; earlier ones as under `token`, since a choice may not
    depend on text it has not seen.
    """
    chosen = scores.argmax(-1)  # torch returns the first of equal maxima
    if scope == "token":
        return chosen
    if scope != "sample":
        raise ValueError(f"scope: {scope!r} is not one of token, sample")
    b, t = chosen.shape
    count = _valid(chosen, attention_mask).cumsum(1)  # tokens seen so far, padding apart
    decided = count >= context_tokens
    first = torch.where(decided.any(1), decided.int().argmax(1), t - 1)  # (B,)
    return torch.where(decided, chosen.gather(1, first[:, None]).expand(b, t), chosen)


@dataclass
class PrefixGroup:
    """Rows that need one partition's model up to one length (a power of two or T)."""

    rows: torch.Tensor
    length: int


def prefix_groups(needed: torch.Tensor, total: int) -> Iterator[PrefixGroup]:
    """Rows grouped by the prefix a model has to read: needed (B,) positions, 0 = row not needed.

    Lengths are rounded up to powers of two, so that short prefixes cost little and groups stay
    few; rows keep their order.
    """
    rounded = torch.where(needed > 0, 2 ** torch.ceil(torch.log2(needed.clamp(min=1).double())), 0)
    rounded = rounded.long().clamp(max=total)
    for length in sorted(set(rounded.tolist()) - {0}):
        yield PrefixGroup(torch.nonzero(rounded == length)[:, 0], length)


def needed_positions(assignment: torch.Tensor, k: int) -> torch.Tensor:
    """Positions (B,) that partition k's model has to read: up to the last one that chose it."""
    t = assignment.shape[1]
    places = torch.arange(1, t + 1, device=assignment.device)
    return ((assignment == k) * places).amax(1)


class TieredConfig(PreTrainedConfig):
    """Configuration of a tiered model.

    partitions: configured domains of each partition; partition_configs: model config per present
    partition (keys are indices as text); level1: the embedder's config; centroid_domains: the
    domain (or `None`) of each centroid; max_position_embeddings: tokens that every partition model
    was made for.
    """

    model_type = "tiered"

    def __init__(
        self,
        partitions: list[list[str]] | None = None,
        partition_configs: dict[str, dict] | None = None,
        level1: dict | None = None,
        centroid_domains: list | None = None,
        scope: str = "token",
        context_tokens: int = 32,
        early_positions: str = "token",
        vocab_size: int = 4096,
        max_position_embeddings: int | None = None,
        **kwargs: Any,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope: {scope!r} is not one of {', '.join(SCOPES)}")
        self.partitions = partitions or []
        self.partition_configs = partition_configs or {}
        self.level1 = level1 or {}
        self.centroid_domains = centroid_domains or []
        self.scope = scope
        self.context_tokens = context_tokens
        self.early_positions = early_positions
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)


class TieredCache:
    """Keys and values of every partition model that generation has used so far.

    A partition chosen for the first time, or again after a while, reads the tokens it has missed.
    """

    def __init__(self) -> None:
        self.caches: dict[int, DynamicCache] = {}
        # a model may cache more than the row's tokens (one that reads a token before them)
        self.read: dict[int, int] = {}

    def of(self, k: int, config: PreTrainedConfig) -> DynamicCache:
        """Partition k's cache, empty at first."""
        return self.caches.setdefault(k, DynamicCache(config=config))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the partition furthest ahead has read."""
        return max(self.read.values(), default=0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in a new order (beam search)."""
        for cache in self.caches.values():
            cache.reorder_cache(beam_idx)


@dataclass
class TieredOutput(ModelOutput):
    """Routed prediction: loss in nats per scored token, logits (B, T, V), partition (B, T).

    With a cache both are of the last position alone, T = 1.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    partition: torch.LongTensor | None = None
    past_key_values: TieredCache | None = None


class TieredForCausalLM(PreTrainedModel, GenerationMixin):
    """p(x_{t+1} | x_0..t) of the partition model that the router picks for the prefix 0..t.

    generate() takes `scope`, `partition` and `allowed_partitions` as forward() does.
    """

    config: TieredConfig
    config_class = TieredConfig
    base_model_prefix = "tiered"

    def __init__(self, config: TieredConfig) -> None:
        super().__init__(config)
        level1 = Level1Config(**config.level1)
        self.router = Level1Router(level1, len(config.partitions), len(config.centroid_domains))
        self.partitions = nn.ModuleDict(
            {
                k: AutoModelForCausalLM.from_config(_partition_config(c, config._name_or_path))
                for k, c in sorted(config.partition_configs.items(), key=lambda item: int(item[0]))
            }
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the parts, which initialise themselves."""

    @classmethod
    def from_parts(
        cls, config: TieredConfig, router: Level1Router, models: dict[int, PreTrainedModel]
    ) -> "TieredForCausalLM":
        """A tiered model around existing modules, without copying them."""
        config.partition_configs = {}
        model = cls(config)
        model.router = router
        model.partitions = nn.ModuleDict({str(k): models[k] for k in sorted(models)})
        for k in model.present:
            model._note_config(k)
        return model.eval()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As transformers; the files of the partition models' code are saved too."""
        super().save_pretrained(save_directory, **kwargs)
        for model in self.partitions.values():
            if _code_of(model):
                custom_object_save(model, save_directory)

    @property
    def present(self) -> list[int]:
        """Indices of the partitions that have a model."""
        return [int(k) for k in self.partitions]

    def partition_scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        allowed_partitions: list[int] | None = None,
    ) -> torch.Tensor:
        """Router scores (B, T, N); -inf for partitions that are absent or not allowed."""
        usable = torch.zeros(len(self.config.partitions), dtype=torch.bool, device=input_ids.device)
        usable[self.present] = True
        if allowed_partitions is not None:
            unknown = set(allowed_partitions) - set(range(len(usable)))
            if unknown:
                raise ValueError(f"allowed_partitions: there is no partition {min(unknown)}")
            keep = torch.zeros_like(usable)
            keep[list(allowed_partitions)] = True
            usable &= keep
        if not usable.any():
            raise ValueError(f"no partition is left to route to (present: {self.present})")
        if usable.sum() == 1:  # nothing to decide: the router is not run
            return torch.where(usable, 0.0, -torch.inf).expand(*input_ids.shape, -1)
        scores = self.router.scores(input_ids, attention_mask)
        return scores.masked_fill(~usable, -torch.inf)

    def assign(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scope: str | None = None,
        allowed_partitions: list[int] | None = None,
    ) -> torch.Tensor:
        """Partition (B, T) of every position under `token` or `sample` scope."""
        scores = self.partition_scores(input_ids, attention_mask, allowed_partitions)
        scope = scope or self.config.scope
        return assign(scores, scope, self.config.context_tokens, attention_mask)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        scope: str | None = None,
        partition: torch.Tensor | int | None = None,
        allowed_partitions: list[int] | None = None,
        past_key_values: TieredCache | None = None,
        **kwargs: Any,
    ) -> TieredOutput:
        """Routed logits (B, T, V); only partitions that are chosen somewhere are run.

        partition: (B,) or one index, required by (and only read under) scope `oracle`. A model
        reads a row up to the last position that chose it. past_key_values: input_ids are whole
        rows all the same; only the last position is predicted.
        """
        scope = scope or self.config.scope
        if scope == "oracle":
            if partition is None:
                raise ValueError("scope oracle needs `partition`, an index per row")
            partition = torch.as_tensor(partition, device=input_ids.device)
            chosen = partition.view(-1, 1).expand(*input_ids.shape)
            if allowed_partitions is not None:
                forbidden = set(partition.flatten().tolist()) - set(allowed_partitions)
                if forbidden:
                    raise ValueError(f"partition {min(forbidden)} is not in allowed_partitions")
        else:
            chosen = self.assign(input_ids, attention_mask, scope, allowed_partitions)
        if past_key_values is not None:
            return self._next(input_ids, attention_mask, chosen[:, -1], past_key_values)
        logits = None
        for k in self._chosen_partitions(chosen):
            for group in prefix_groups(needed_positions(chosen, k), input_ids.shape[1]):
                part = self._run(k, input_ids, attention_mask, group)
                if logits is None:
                    logits = part.new_zeros(*input_ids.shape, part.shape[-1])
                here = chosen[group.rows, : group.length] == k
                target = logits[group.rows]
                target[:, : group.length][here] = part[here]
                logits[group.rows] = target
        loss = self._loss(logits, labels) if labels is not None else None
        return TieredOutput(loss=loss, logits=logits, partition=chosen)

    def _next(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        chosen: torch.Tensor,
        cache: TieredCache,
    ) -> TieredOutput:
        """Logits (B, 1, V) after whole rows (B, T), by the partition (B,) chosen for each.

        A partition that any row chose reads what it has missed of all rows, so that its cache
        stays one block; rows of many partitions in one batch cost as many models.
        """
        logits = None
        for k in self._chosen_partitions(chosen):
            model = self.partitions[str(k)]
            part_cache = cache.of(k, model.config)
            missed = input_ids[:, cache.read.get(k, 0) :]
            cache.read[k] = input_ids.shape[1]
            part = model(
                input_ids=missed,
                attention_mask=attention_mask,
                past_key_values=part_cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            if logits is None:
                logits = torch.zeros_like(part)
            logits[chosen == k] = part[chosen == k]
        return TieredOutput(logits=logits, partition=chosen[:, None], past_key_values=cache)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves the cache to prepare_inputs_for_generation

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: TieredCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Whole rows at every step: the router reads them from the start."""
        cache = past_key_values
        if cache is None and use_cache:
            cache = TieredCache()
        routing = {
            n: kwargs[n] for n in ("scope", "partition", "allowed_partitions") if n in kwargs
        }
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **routing}
        return {**given, "past_key_values": cache}

    def _chosen_partitions(self, chosen: torch.Tensor) -> list[int]:
        wanted = sorted(set(chosen.flatten().tolist()))
        missing = [k for k in wanted if str(k) not in self.partitions]
        if missing:
            raise ValueError(f"partition {missing[0]} has no model (present: {self.present})")
        return wanted

    def _run(
        self,
        k: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        group: PrefixGroup,
    ) -> torch.Tensor:
        """Logits (rows, length, V) of partition k's model on one group of prefixes."""
        mask = None if attention_mask is None else attention_mask[group.rows, : group.length]
        return self.partitions[str(k)](
            input_ids=input_ids[group.rows, : group.length],
            attention_mask=mask,
            use_cache=False,
        ).logits

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    def purge_experts(self, k: int, keep: torch.Tensor | None, renormalize: bool = False) -> None:
        """Level 2: leave experts out of partition k's model, which must offer it (see
        `MonetPreTrainedModel.purge_experts`); saved with the checkpoint.

        Needed where an expert's domain shares a partition with others; no other output changes.
        """
        if str(k) not in self.partitions:
            raise ValueError(f"partition {k} has no model (present: {self.present})")
        model = self.partitions[str(k)]
        if not hasattr(model, "purge_experts"):
            raise ValueError(f"partition {k} is a {model.config.model_type}: it has no purge")
        model.purge_experts(keep, renormalize)
        self._note_config(k)

    def _note_config(self, k: int) -> None:
        """Keep the saved configuration of partition k's model in step with the model."""
        model = self.partitions[str(k)]
        self.config.partition_configs[str(k)] = {**model.config.to_dict(), **_code_of(model)}

    def add_partition(
        self,
        model: PreTrainedModel,
        domains: list[str],
        centroids: torch.Tensor,
        centroid_domains: list[str | None] | None = None,
        index: int | None = None,
    ) -> int:
        """Add a model for new domains, the inverse of `remove_partition`; the index it gets.

        index: one whose model was removed; None: the next, so that no request that is allowed an
        old index reaches new data. centroids (C, D): in the embedder's space
        (`router.embedder.row_embeddings`), one per entry of centroid_domains (None: domains).
        Weights and scores of the other partitions stay, bit for bit.
        """
        k = len(self.config.partitions) if index is None else index
        if k in self.present or not 0 <= k <= len(self.config.partitions):
            raise ValueError(f"index {k} is taken or beyond the next (present: {self.present})")
        if model.config.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"vocabularies differ: {model.config.vocab_size} and {self.config.vocab_size}"
            )
        if centroids.shape[1:] != self.router.centroids.shape[1:]:
            raise ValueError(
                f"centroids: expected width {self.router.centroids.shape[1]}, found"
                f" {tuple(centroids.shape)}"
            )
        names = list(domains if centroid_domains is None else centroid_domains)
        if len(names) != len(centroids):
            raise ValueError(f"{len(centroids)} centroids for {len(names)} domains")
        groups = list(self.config.partitions)
        groups[k : k + 1] = [list(domains)]
        self.config.partitions = groups
        self.router.add_partition(k, centroids)
        self.config.centroid_domains = [*self.config.centroid_domains, *names]
        device = self.router.centroids.device
        models = {**dict(self.partitions.items()), str(k): model.to(device).eval()}
        self.partitions = nn.ModuleDict({n: models[n] for n in sorted(models, key=int)})
        self._note_config(k)
        return k

    def remove_partition(self, k: int) -> None:
        """Delete partition k's model and centroids; indices of the others do not shift.

        Removing it again is a no-op. ValueError if no partition would be left.
        """
        if str(k) not in self.partitions:
            return
        if len(self.partitions) == 1:
            raise ValueError("removing the last partition would leave no model")
        keep = [c for c, p in enumerate(self.router.centroid_partition.tolist()) if p != k]
        self.config.centroid_domains = [self.config.centroid_domains[c] for c in keep]
        self.router.remove_partition(k)
        del self.partitions[str(k)]
        self.config.partition_configs.pop(str(k), None)


def _code_of(model: PreTrainedModel) -> dict[str, Any]:
    """The auto_map of a model whose code is saved with it; empty for transformers' own."""
    if model._auto_class is None:
        return {}
    module = type(model).__module__.split(".")[-1]
    return {
        "auto_map": {
            "AutoConfig": f"{module}.{type(model.config).__name__}",
            "AutoModelForCausalLM": f"{module}.{type(model).__name__}",
        }
    }


def _partition_config(config: dict[str, Any], source: str) -> PreTrainedConfig:
    """A partition model's configuration; a family that transformers does not know registers itself
    when its file, saved beside the weights in `source`, is imported.

    That file is run only where this one came from the same place under trust_remote_code.
    """
    if config["model_type"] not in CONFIG_MAPPING:
        if not __name__.startswith("transformers_modules"):
            raise ValueError(
                f"model_type {config['model_type']!r} is not known: import the module that defines"
                " it first, or load with trust_remote_code=True outside this project"
            )
        get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], source)
    values = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **values)


for _config, _model in ((Level1Config, Level1Embedder), (TieredConfig, TieredForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
TieredConfig.register_for_auto_class()
TieredForCausalLM.register_for_auto_class("AutoModelForCausalLM")
