"""Token ids of a corpus under a library's byte-level BPE, for ``train_lm.py``; cached beside its result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
from corpus import Corpus, read_corpus
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SAMPLE_CHARACTERS = 60_000_000  # for the tokenizer's merges
BATCH_CHARACTERS = 8_000_000  # an encoding takes some 20 times its text: not all at once
HELD_OUT_TOKENS = 2**20

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Recipe:
    """What the token ids depend on, apart from the files themselves: the key of the cache."""

    roots: tuple[str, ...]
    tokens: int
    vocab: int
    domain: str | None = None
    domain_tokens: int = 0
    seed: int = 0
    version: str = tokenizers.__version__


@dataclass(frozen=True)
class TokenIds:
    """Ids in [0, vocab) of the training and the held-out text, of a domain, too, and what was found on the way."""

    training: Ids
    held_out: Ids
    domain: Ids
    domain_held_out: Ids
    facts: dict[str, str | int]


NAMES = ("training", "held_out", "domain", "domain_held_out")  # of the ids, and of their files


def load_or_prepare(recipe: Recipe, folder: Path) -> TokenIds:
    """The ids kept in ``folder`` for this recipe, or else new ones, which are then kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    key, kept = asdict(recipe) | {"roots": list(recipe.roots)}, folder / "tokens.json"
    if kept.is_file() and (found := json.loads(kept.read_text()))["recipe"] == key:
        print(f"token ids of an earlier run: {folder}")
        return TokenIds(*(np.load(folder / f"{name}.npy") for name in NAMES), facts=found["facts"])
    kept.unlink(missing_ok=True)  # written last: what is there is complete
    tokenizer, ids = prepare(recipe)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in NAMES:
        np.save(folder / f"{name}.npy", getattr(ids, name))
    kept.write_text(json.dumps({"recipe": key, "facts": ids.facts}, indent=1))
    return ids


def prepare(recipe: Recipe) -> tuple[Tokenizer, TokenIds]:
    """Reads the text, trains the tokenizer and encodes as much as the recipe wants."""
    start = time.perf_counter()
    corpus = read_corpus([Path(root) for root in recipe.roots], recipe.seed, recipe.domain)
    _report(start, ", ".join(f"{name} {_show(fact)}" for name, fact in corpus.facts.items()))
    tokenizer = train_tokenizer(sample(corpus, SAMPLE_CHARACTERS), recipe.vocab)
    _report(start, f"tokenizer with {tokenizer.get_vocab_size():,} entries")
    ids = encode_corpus(tokenizer, corpus, recipe)
    enough = "" if len(ids.training) >= recipe.tokens else f", fewer than the {recipe.tokens:,} asked for"
    _report(start, f"{len(ids.training):,} training tokens{enough}; {len(ids.held_out):,} held out")
    if recipe.domain:
        _report(start, f"{recipe.domain}: {len(ids.domain):,} tokens; {len(ids.domain_held_out):,} held out")
    return tokenizer, ids


def sample(corpus: Corpus, characters: int) -> Iterator[str]:
    """Documents with about so many ``characters``, of the domain its share: a tokenizer is made for all uses."""
    parts = [corpus.general.training, *([corpus.domain.training] if corpus.domain else [])]
    sizes = [sum(map(len, part)) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        yield from _up_to(part, round(characters * size / max(1, sum(sizes))))


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer; id 0 ends a document, the others come in the order of their merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_corpus(tokenizer: Tokenizer, corpus: Corpus, recipe: Recipe) -> TokenIds:
    """At most as many training ids as the recipe wants, and the held-out ones."""
    training = encode(tokenizer, corpus.general.training, recipe.tokens)
    held_out = encode(tokenizer, corpus.general.held_out, HELD_OUT_TOKENS)
    domain, domain_held_out = (
        encode(tokenizer, texts, tokens)
        for texts, tokens in (
            (corpus.domain.training if corpus.domain else [], recipe.domain_tokens),
            (corpus.domain.held_out if corpus.domain else [], HELD_OUT_TOKENS),
        )
    )
    facts = corpus.facts | {"training_tokens": len(training), "held_out_tokens": len(held_out)}
    if recipe.domain:
        facts |= {"domain": recipe.domain, "domain_tokens": len(domain), "domain_held_out_tokens": len(domain_held_out)}
    return TokenIds(training, held_out, domain, domain_held_out, facts)


def encode(tokenizer: Tokenizer, texts: Iterable[str], tokens: int) -> Ids:
    """The first ``tokens`` ids of the documents, each with an end-of-text id; all if there are fewer."""
    end, dtype = tokenizer.token_to_id(END_OF_TEXT), np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    parts: list[Ids] = [np.empty(0, dtype)]
    count = 0
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        parts.append(np.concatenate([np.array([*document.ids, end], dtype) for document in encoded]))
        count += len(parts[-1])
        if count >= tokens:
            break
    return np.concatenate(parts)[:tokens]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def _show(fact: str | int) -> str:
    return f"{fact:,}" if isinstance(fact, int) else fact


def _report(start: float, line: str) -> None:
    print(f"[{time.perf_counter() - start:5.1f} s] {line}", flush=True)
