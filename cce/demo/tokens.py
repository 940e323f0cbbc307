"""Token ids of a corpus: a byte-level BPE tokenizer trained on it, cached in the user's cache folder."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import platformdirs
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cce.demo.text import Corpus


def cache_folder() -> Path:
    """Where tokenizers and token ids are kept, one folder a corpus."""
    return platformdirs.user_cache_path("cce", appauthor=False) / "tokens"


def load_tokens(corpus: Corpus, vocab: int) -> Tensor:
    """Token ids (L,) int64 of ``corpus``, in [0, vocab).

    Both the tokenizer (``tokenizer.json``) and the ids are cached under a hash of everything they depend on.
    A text too short for ``vocab`` merges leaves the last entries unused; the model keeps its size.
    """
    folder = cache_folder() / _key(corpus, vocab)
    cached = _read_ids(folder / "ids.npy", vocab)
    if cached is None:
        tokenizer = train_tokenizer(corpus, vocab)
        encoded = tokenizer.encode_batch_fast(corpus.pieces, add_special_tokens=False)
        cached = np.fromiter((token for piece in encoded for token in piece.ids), dtype=np.int32)
        _write(folder, cached, tokenizer)
    return torch.from_numpy(cached.astype(np.int64))


def train_tokenizer(corpus: Corpus, vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most ``vocab`` entries, the 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus.pieces, trainer)
    return tokenizer


def _key(corpus: Corpus, vocab: int) -> str:
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocab}".encode())
    for piece in corpus.pieces:
        digest.update(f"\0{len(piece)}\0".encode() + piece.encode())
    return digest.hexdigest()[:24]


def _read_ids(path: Path, vocab: int) -> np.ndarray | None:
    try:
        ids: np.ndarray = np.load(path)
    except (OSError, ValueError, EOFError):  # absent, or cut short: made anew
        return None
    return ids if ids.ndim == 1 and ids.size and ids.min() >= 0 and ids.max() < vocab else None


def _write(folder: Path, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    with suppress(OSError):  # a read-only or full cache only costs the time to do it again
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("tokenizer.json", tokenizer.to_str().encode()), ("ids.npy", buffer.getvalue())):
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_bytes(data)
            partial.replace(folder / name)  # at once, so that a second demo never reads half a file
