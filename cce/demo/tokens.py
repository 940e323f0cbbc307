"""Token ids of a corpus, from a byte-level BPE tokenizer trained on it; cached in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import platformdirs
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cce.demo.text import Corpus
from cce.files import Cache

_CACHE = Cache("file of the demo's tokens")


def cache_folder() -> Path:
    """Folder for tokenizers and token ids, with one subfolder per corpus."""
    return platformdirs.user_cache_path("cce", appauthor=False) / "tokens"


def load_tokens(corpus: Corpus, vocab: int) -> Tensor:
    """Load or make the token ids (L,) int64 of ``corpus``, in [0, vocab).

    The ids are cached under a hash of everything they depend on, along with ``tokenizer.json``, for people to read. If
    a text is too short for ``vocab`` merges, the last entries are unused; the model keeps its size.
    """
    folder = cache_folder() / _key(corpus, vocab)
    kept = _CACHE.get(folder / "ids.npy")
    if kept is not None:
        return torch.from_numpy(np.load(io.BytesIO(kept)).astype(np.int64))
    tokenizer = train_tokenizer(corpus, vocab)
    encoded = tokenizer.encode_batch_fast(corpus.pieces, add_special_tokens=False)
    ids = np.fromiter((token for piece in encoded for token in piece.ids), dtype=np.int32)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    _CACHE.put_plain(folder / "tokenizer.json", tokenizer.to_str().encode())
    _CACHE.put(folder / "ids.npy", buffer.getvalue())
    return torch.from_numpy(ids.astype(np.int64))


def train_tokenizer(corpus: Corpus, vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with at most ``vocab`` entries, including the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus.pieces, trainer)
    return tokenizer


def _key(corpus: Corpus, vocab: int) -> str:
    digest = hashlib.sha256(f"sealed {tokenizers.__version__} {vocab}".encode())
    for piece in corpus.pieces:
        digest.update(f"\0{len(piece)}\0".encode() + piece.encode())
    return digest.hexdigest()[:24]
