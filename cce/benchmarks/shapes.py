"""The heads of published models, on which all benchmarks and tuners run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Problem of a loss over N tokens with the head of a model.

    Attributes:
        name: name of the model.
        n, d, v: number of tokens, width, and size of the vocabulary.
    """

    name: str
    n: int
    d: int
    v: int

    @property
    def label(self) -> str:
        """Name and sizes, for tables.

        >>> Shape("gpt2", 256, 768, 50257).label
        'gpt2 256x768x50257'
        """
        return f"{self.name} {self.n}x{self.d}x{self.v}"


#: Sizes (D, V) of a model's head, from its published configuration ("hidden_size", "vocab_size").
HEADS = {
    "gpt2": (768, 50_257),
    "phi3.5-mini": (3072, 32_064),
    "phi4": (5120, 100_352),
    "mistral-7b": (4096, 32_768),
    "mistral-nemo": (5120, 131_072),
    "qwen2.5-0.5b": (896, 151_936),
    "qwen2.5-7b": (3584, 152_064),
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-8b": (4096, 151_936),
    "llama3-8b": (4096, 128_256),
    "deepseek-v3": (7168, 129_280),
    "gpt-oss-20b": (2880, 201_088),
    "gemma2-2b": (2304, 256_000),
    "gemma3-1b": (1152, 262_144),
    "gemma3-4b": (2560, 262_208),
}

#: Tokens of a step, from a few sequences to a long context.
TOKENS = (256, 1024, 4096, 8192, 16_384, 32_768)

GPU_SHAPES = ("gemma2-2b:8192", "llama3-8b:8192", "qwen3-0.6b:16384")
CPU_SHAPES = ("gpt2:256", "qwen2.5-0.5b:128")
QUICK = {"cuda": ("gemma2-2b:4096",), "cpu": ("gpt2:128",)}


def parse(text: str) -> Shape:
    """Parse a shape: a model and N as "gpt2:256", a model alone (N = 8192), or sizes as "256x768x50257".

    Raises:
        ValueError: ``text`` is none of these.

    >>> parse("gpt2:256"), parse("4x5x6")
    (Shape(name='gpt2', n=256, d=768, v=50257), Shape(name='given', n=4, d=5, v=6))
    """
    name, _, tokens = text.partition(":")
    if name in HEADS:
        sizes = [tokens or "8192", *map(str, HEADS[name])]
    else:
        name, sizes = "given", text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"got {text!r}, expected MODEL:N or NxDxV; models: {', '.join(HEADS)}")
    n, d, v = map(int, sizes)
    return Shape(name, n, d, v)


def all_shapes() -> list[Shape]:
    """All heads with all numbers of tokens."""
    return [parse(f"{name}:{n}") for name in HEADS for n in TOKENS]
