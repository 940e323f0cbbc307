"""Text and code found on this machine, split by kind and into training and held-out documents, for ``train_lm.py``."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = (
    ".py .pyi .pyx .pxd .md .rst .txt .tex .html .c .cc .cpp .cxx .cu .cuh .h .hh .hpp .inc .inl .ipp .tcc .td .mlir "
    ".js .ts .css .json .toml .yaml .yml .cfg .ini .cmake .sh .pl .pm .pod .f .f90 .java .go .rs .lua .r .jl"
)
SUFFIXES = set(_SUFFIXES.split())
#: Kinds of text that a fine-tuning can be on: files of these are then kept from the pre-training.
DOMAINS = {
    "c": {".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hh", ".hpp", ".inc", ".inl", ".ipp", ".tcc"},
    "documentation": {".md", ".rst", ".txt", ".tex", ".html", ".pod"},
}
NOT_TEXT = {"__pycache__", "site-packages", "dist-packages", "node_modules"}  # the packages are roots of their own

MAX_BYTES, MAX_JSON_BYTES = 2**20, 2**16  # longer files are mostly data or generated
MAX_LINE = 2000  # characters; nobody writes longer lines, programs do
HELD_OUT, DOMAIN_HELD_OUT = 0.01, 0.03  # of the characters; a domain has fewer


@dataclass(frozen=True)
class Document:
    """One file: the package it belongs to, its text, and how its name ends."""

    package: str
    text: str
    suffix: str


@dataclass(frozen=True)
class Texts:
    """Shuffled documents; ``held_out`` shares no package with ``training`` where there are several."""

    training: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Corpus:
    """All text.

    Attributes:
        general: everything, or everything but a domain.
        domain: that domain, for fine-tuning; None without one.
        facts: what was found, for people and for the record.
    """

    general: Texts
    domain: Texts | None
    facts: dict[str, str | int]


def default_roots() -> list[Path]:
    """Folders with text and code that exist: Python's packages and library, system headers and documentation."""
    paths = sysconfig.get_paths()
    found = [Path(paths[name]) for name in ("purelib", "platlib", "stdlib")]
    for base in (Path("/usr/local/lib"), Path("/usr/lib")):
        found += [*sorted(base.glob("python3*/dist-packages")), *sorted(base.glob("python3*"))]
    places = "local/include include local/cuda/include share/doc share/perl share/perl5 src share/cmake"
    found += [Path("/usr") / place for place in places.split()]
    return [path for path in dict.fromkeys(path.resolve() for path in found) if path.is_dir()]


def read_corpus(roots: Iterable[Path], seed: int = 0, domain: str | None = None) -> Corpus:
    """Reads all text below ``roots``, each distinct file once, always in the same order.

    Raises:
        ValueError: there are fewer than two documents, of the ``domain`` or of the others.
    """
    documents, facts = read_documents(roots)
    shuffled = random.Random(seed).sample(documents, len(documents))
    if domain is None:
        general, found = split(shuffled, HELD_OUT, "")
        return Corpus(general, None, facts | found)
    others = [x for x in shuffled if x.suffix not in DOMAINS[domain]]
    general, of_general = split(others, HELD_OUT, "")
    special, of_domain = split([x for x in shuffled if x.suffix in DOMAINS[domain]], DOMAIN_HELD_OUT, f"{domain}_")
    return Corpus(general, special, facts | of_general | of_domain)


def split(documents: list[Document], share: float, prefix: str) -> tuple[Texts, dict[str, str | int]]:
    """Training and held-out text, and facts whose names begin with ``prefix``."""
    if len(documents) < 2:
        raise ValueError(f"got {len(documents)} {prefix[:-1]} documents, expected at least two: one is held out")
    packages = held_out_packages(documents, share)
    held_out = [x.text for x in documents if x.package in packages]
    training = [x.text for x in documents if x.package not in packages]
    if not packages:  # one large package only: single documents
        count = max(1, round(share * len(documents)))
        held_out, training = training[:count], training[count:]
    facts: dict[str, str | int] = {
        "training_characters": sum(map(len, training)),
        "held_out_documents": len(held_out),
        "held_out_characters": sum(map(len, held_out)),
        "held_out_packages": ", ".join(sorted(packages)) or "none: single documents",
    }
    return Texts(training, held_out), {prefix + name: fact for name, fact in facts.items()}


def read_documents(roots: Iterable[Path]) -> tuple[list[Document], dict[str, str | int]]:
    """The distinct documents below ``roots``, and counts of what was found and left out."""
    documents: list[Document] = []
    seen: set[bytes] = set()
    found = duplicates = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading and hashing let go of the interpreter's lock
        for document, digest in pool.map(_read, _files(roots), chunksize=64):
            found += 1
            if digest in seen:
                duplicates += 1
            elif document is not None:
                documents.append(document)
            seen.add(digest)
    skipped = found - duplicates - len(documents)
    facts: dict[str, str | int] = {"files": found, "documents": len(documents), "duplicates": duplicates}
    return documents, {**facts, "skipped": skipped}


def held_out_packages(documents: Iterable[Document], share: float) -> set[str]:
    """Packages with about this share of all text. Whole ones, because files of one package repeat each other.

    None has more than a quarter of that, so that the held-out text is no single program's. Where packages are too
    few or too large for that, none is taken.
    """
    sizes: defaultdict[str, int] = defaultdict(int)
    for document in documents:
        sizes[document.package] += len(document.text)
    wanted, taken = share * sum(sizes.values()), 0
    chosen: set[str] = set()
    for package in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if taken < wanted and sizes[package] <= wanted / 4:
            chosen.add(package)
            taken += sizes[package]
    return chosen if taken >= wanted / 2 else set()


def _files(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Package and path of every file that may be text, in a fixed order."""
    for root in dict.fromkeys(path.resolve() for path in roots):
        for folder, folders, names in os.walk(root):
            kept = (x for x in folders if x not in NOT_TEXT and not x.endswith(".dist-info") and x[0] != ".")
            folders[:] = sorted(kept)
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    # Not the root: one package may be installed below two of them.
                    yield path.relative_to(root).parts[0].removesuffix(path.suffix), path


def _read(file: tuple[str, Path]) -> tuple[Document | None, bytes]:
    """The document, None if it is not text that people wrote, and its hash."""
    package, path = file
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError:
        return None, b""
    digest = hashlib.sha256(data).digest()
    if len(data) > (MAX_JSON_BYTES if path.suffix.lower() == ".json" else MAX_BYTES) or b"\0" in data:
        return None, digest
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None, digest
    written = text.strip() and all(len(line) <= MAX_LINE for line in text.splitlines())
    return (Document(package, text, path.suffix.lower()) if written else None), digest
