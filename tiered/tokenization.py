"""The tokenizer all partitions share: making, loading, identity; ids with the bytes under each."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tiered.hub import snapshot
from tiered.store import TOKENIZER_RECORD, UserError, canonical_json, digest, read_json

END, PAD = "<|endoftext|>", "<|pad|>"
TOKEN_FILTERS = ("unknown_tokens", "untokenizable")
MAX_TOKEN_SPAN = np.iinfo(np.uint16).max
# Words of every script: marks (\p{M}: Indic vowel signs) and the two joiners stay with their
# letters. GPT-2's pattern breaks Devanagari at each vowel sign.
WORDS = (
    r" ?[\p{L}\p{M}\x{200C}\x{200D}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}\x{200C}\x{200D}]+"
    r"|\s+(?!\S)|\s+"
)


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level pieces, by byte value (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, a function of what words texts have how often."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = _words(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_tokenizer() -> Tokenizer:
    """Tokenizer whose id is the byte; 256 ends a document, 257 pads."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = _words(), decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    return tokenizer


def fast_tokenizer(backend: Tokenizer) -> Any:
    """A tokenizer of ours as transformers' PreTrainedTokenizerFast."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str, revision: str) -> Any:
    """The fast tokenizer of a folder or of the hub; raises UserError."""
    from transformers import AutoTokenizer

    folder = name
    try:
        if not Path(name).is_dir():
            # whole files first: a fault while AutoTokenizer reads them one by one can come out as
            # another tokenizer without an error.
            folder = snapshot(name, revision, ["*.json", "*.txt", "*.model", "*.jinja"])
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except UserError as error:
        raise UserError(f"tokenizer.name: {error}") from None
    except (OSError, ValueError, KeyError, httpx2.HTTPError) as error:
        raise UserError(
            f"tokenizer.name: cannot load {name!r} ({' '.join(str(error).split())[:300]})"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer.name: {name!r} has no fast tokenizer (tokenizer.json)")
    tokenizer.split_special_tokens = True
    return tokenizer


def tokenizer_record(tokenizer: Any, name: str) -> dict[str, Any]:
    """What other stages know of a tokenizer: hash, size, and the ids they need."""
    separator = tokenizer.eos_token_id
    separator = tokenizer.sep_token_id if separator is None else separator
    if separator is None:
        raise UserError(f"tokenizer.name: {name!r} has neither an eos nor a sep token")
    pad = tokenizer.pad_token_id
    identity = {
        "separator_id": separator,
        "pad_id": separator if pad is None else pad,
        "unk_id": None if tokenizer.unk_token_id == separator else tokenizer.unk_token_id,
        "vocab_size": len(tokenizer),
    }
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # settings of a call (how to pad and cut), not of the tokenizer; this project never uses them.
    backend = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
    return {"name": name, "hash": digest([canonical_json(backend), identity]), **identity}


class Encoder:
    """Token ids of a text with the UTF-8 bytes and characters under each token."""

    def __init__(self, folder: Path):
        self.record = read_json(folder / TOKENIZER_RECORD)
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_padding()
        self.backend.no_truncation()
        # a special token's name in a text is text.
        self.backend.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder()
        self.special = np.array([i for i, token in added.items() if token.special], dtype=np.int32)
        decoder = json.loads(self.backend.to_str())["decoder"]
        self.byte_level = "ByteLevel" in json.dumps(decoder)
        if self.byte_level:
            self.bytes_of, self.chars_of = self._piece_tables(added)

    def _piece_tables(self, added: dict[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and characters (bytes that start one) of every token, (V,) int64 each."""
        counts = [(len(raw), sum(byte & 0xC0 != 0x80 for byte in raw)) for raw in self.pieces()]
        for i, token in added.items():  # the special ones too, which have no text of their own
            counts[i] = (len(token.content.encode()), len(token.content))
        tables = np.array(counts, dtype=np.int64)
        return tables[:, 0], tables[:, 1]

    def pieces(self) -> list[bytes]:
        """The text of every token id as UTF-8 bytes (those of one character may stand in several
        tokens); empty for special tokens and ids without a token.

        Of tokenizers that are not byte-level: `##` continues a word, any other piece or the sign
        U+2581 begins one after a space.
        """
        value = {character: byte for byte, character in enumerate(byte_alphabet())}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocabulary.values()) + 1)
        added = self.backend.get_added_tokens_decoder()
        wordpiece = any(piece.startswith("##") for piece in vocabulary)
        for piece, i in vocabulary.items():
            if i in added:  # stored as text, the others as one character per byte
                pieces[i] = b"" if added[i].special else piece.encode()
            elif self.byte_level:
                pieces[i] = bytes(value.get(c, 0x80) for c in piece)
            elif wordpiece:
                pieces[i] = (piece[2:] if piece.startswith("##") else f" {piece}").encode()
            else:
                pieces[i] = piece.replace("\u2581", " ").encode()
        return pieces

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, bytes, characters) per text, each (tokens,); the sums are the text's, exactly."""
        if not self.byte_level:
            return [self._by_offsets(text) for text in texts]
        results = []
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            token_bytes, token_chars = self.bytes_of[ids], self.chars_of[ids]
            exact = token_bytes.sum() == len(text.encode()) and token_chars.sum() == len(text)
            # a normaliser or an added first space: the pieces are not the text's own bytes.
            results.append((ids, token_bytes, token_chars) if exact else self._by_offsets(text))
        return results

    def _by_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As encode, from offsets: what no token covers goes to the following (or last) token."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if not len(ids):
            return ids, np.zeros(0, np.int64), np.zeros(0, np.int64)
        ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
        ends[-1] = len(text)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        return ids, np.diff(bytes_before[ends], prepend=0), np.diff(ends, prepend=0)

    def verdict(self, ids: np.ndarray, token_bytes: np.ndarray, max_unk_share: float) -> str:
        """The filter that drops a tokenised document, or "" if it is kept."""
        unk = self.record["unk_id"]
        if unk is not None and len(ids) and (ids == unk).mean() > max_unk_share:
            return "unknown_tokens"
        special = self.special[self.special != (-1 if unk is None else unk)]
        if not len(ids) or token_bytes.max() > MAX_TOKEN_SPAN or np.isin(ids, special).any():
            return "untokenizable"
        return ""
