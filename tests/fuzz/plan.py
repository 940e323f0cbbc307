"""One random call as data: what is called, sizes, dtypes, layouts, options. ``draw(seed, index)`` makes it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import sequences  # noqa: F401  adds to RECIPES
from recipes import RECIPES

FLOATS = ("float32", "float32", "bfloat16", "float16", "float64")
TARGETS = ("int64", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
LAYOUTS = ("plain", "plain", "strided", "offset", "transposed", "expanded", "flipped", "column", "windows")
UPSTREAMS = (*["random"] * 8, "ones", "expanded", "expanded", "strided", "strided", "zero", "nan")
#: What the numbers of e and c are: normal, whole multiples of a power of two (logits are exact), rows of c that equal
#: rows of e (a confident token), ties, near float16's largest number, near float32's least.
DATA = ("normal", "normal", "whole", "whole", "confident", "zero", "equal", "large", "tiny")


@dataclass(frozen=True)
class Plan:
    """One call; everything random is in ``values``, the seed of the tensors' numbers.

    Attributes:
        call: "loss", "terms", "module" or a recipe's name.
        lead: shape of the tokens; d, v: sizes; k: entries a token, 0 for ordinary targets.
        dtypes, layouts: by tensor.
        kinds: tensors beside e, c and targets, and what their numbers are.
        data, offset: of e and c; the offset is common to the logits of a row.
        ignored: share of the tokens that are.
        broken: ("e", "nan"), ...: tensors with an entry that is no number.
        options: numbers and names passed on. spec: fields of ``cce.Spec``, or None.
        wants: tensors whose gradients are asked for. upstream: what arrives there.
    """

    values: int
    call: str = "loss"
    lead: tuple[int, ...] = (3,)
    d: int = 4
    v: int = 7
    k: int = 0
    heads: int = 0
    dtypes: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    data: str = "normal"
    offset: float = 0.0
    ignored: float = 0.0
    broken: tuple[tuple[str, str], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] | None = None
    wants: tuple[str, ...] = ("e", "c")
    upstream: str = "ones"

    def to_json(self) -> str:
        return json.dumps({name: x for name, x in asdict(self).items() if x != getattr(Plan(0), name)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        found = json.loads(text)
        for name in ("lead", "wants"):
            if name in found:
                found[name] = tuple(found[name])
        found["broken"] = tuple(tuple(x) for x in found.get("broken", ()))
        return cls(**{"values": 0, **found})


@dataclass(frozen=True)
class Limits:
    """How large calls may be, and how many variants of kernels they take.

    Attributes:
        n, d, v: largest sizes.
        kernels: only what the backends with kernels take.
        blocks: sizes of a filter's tiles; given in every spec that has a filter if they are fewer than usual.
        variants: dtypes, options, layouts and kinds of sizes are those of ``index % variants`` then, and only the rest
            is drawn for every call.
    """

    n: int = 24
    d: int = 40
    v: int = 260
    kernels: bool = False
    blocks: tuple[int, ...] = ()
    variants: int = 0


def draw(seed: int, index: int, limits: Limits) -> Plan:
    """The call number ``index`` of ``seed``."""
    own = random.Random(f"{seed} {index}")
    variant = random.Random(f"{seed} variant {index % limits.variants}") if limits.variants else own
    call = variant.choice(["loss"] * 8 + ["terms"] * 6 + ["module"] * 2 + list(RECIPES))
    recipe = RECIPES.get(call)
    pairs = call in ("clip_contrastive", "nt_xent")
    dtypes = _dtypes(variant, limits)
    options, kinds, k = _options(variant, call)
    data, spec = own.choice(DATA), _spec(variant, own, limits)
    plan = Plan(
        values=own.randrange(2**31),
        call=call,
        lead=_lead(own, limits, call, variant),
        d=_size(own, limits.d, variant),
        v=_size(own, limits.v, variant),
        k=k,
        heads=variant.choice([1, 2, 3]) if call in ("multi_token", "multi_codebook") else 0,
        dtypes=dtypes,
        kinds=kinds,
        data=data,
        offset=_offset(own, dtypes, data),
        ignored=own.choice([0.0] * 6 + [0.3] * 4 + [0.9] * 2 + [1.0]),
        broken=_broken(own, call, kinds, options, spec),
        options=options,
        spec=spec,
    )
    names = ["e", "c", *([] if pairs else ["targets"]), *kinds]
    layouts = {name: variant.choice(LAYOUTS) for name in names if variant.random() < 0.5}
    if call == "top_k_distillation" or "nan_ignored" in kinds.values():
        # With other values their sum may be above 1, and what is NaN not what is ignored.
        layouts = {name: x for name, x in layouts.items() if name in "ec" or x not in ("expanded", "windows")}
    differentiable = ["e", "c", *(x for x in kinds if x in ("bias", "token_weight", "target_weight", "logit_scale"))]
    if call == "top_k_distillation":
        differentiable.remove("target_weight")
    wants = tuple(x for x in differentiable if variant.random() < 0.8)
    if own.random() < 0.1:
        wants = ()
    own_options = _values_of_call(own, plan)
    left_out = ["nan"] * (recipe is not None) + ["zero"] * bool(plan.broken)  # a filter skips rows of upstream 0
    arriving = own.choice([x for x in UPSTREAMS if x not in left_out])
    if call == "evaluate":
        wants = ()
    return _with(plan, layouts=layouts, wants=wants, upstream=arriving, options={**options, **own_options})


def _with(plan: Plan, **fields: Any) -> Plan:
    return Plan(**{**{name: getattr(plan, name) for name in plan.__dataclass_fields__}, **fields})


def _size(rng: random.Random, most: int, variant: random.Random) -> int:
    if variant is not rng:  # compiled kernels know whether a size is 1 or a multiple of 16
        kind, size = variant.choice([1, *[16] * 4, *[0] * 5]), rng.randint(2, most)
        return 1 if kind == 1 else max(size // 16, 1) * 16 if kind else size - (size % 16 == 0)
    if rng.random() < 0.08:
        return 1
    return rng.choice([2, 3, rng.randint(2, 8), rng.randint(2, most), rng.randint(2, most), most])


def _lead(rng: random.Random, limits: Limits, call: str, variant: random.Random) -> tuple[int, ...]:
    n = _size(rng, limits.n, variant)
    if call in ("clip_contrastive", "nt_xent"):
        return (n,)
    if call in ("dpo", "grpo"):
        return (2 * rng.randint(1, 3), max(n // 4, 1))
    if call == "multi_token":
        return rng.choice([(n + 4,), (2, 4 + n // 4), (0, 5)])
    if rng.random() < 0.08:
        single = RECIPES.get(call) is None or not RECIPES[call].least
        return rng.choice([(0,), (2, 0), (0, 3), (1,), (2, 1, 1), *([(), ()] if single else [])])
    return rng.choice([(n,), (n,), (2, 1 + n // 2), (1 + n // 3, 3), (2, 1, 1 + n // 4)])


def _dtypes(rng: random.Random, limits: Limits) -> dict[str, str]:
    floats = [x for x in FLOATS if not (limits.kernels and x == "float64")]
    e = rng.choice(floats)
    found = {"e": e, "c": e if rng.random() < 0.7 else rng.choice(floats), "targets": rng.choice(TARGETS)}
    for name in ("bias", "weight", "token_weight", "target_weight", "logit_scale", "head_weight"):
        found[name] = found["c"] if rng.random() < 0.6 else rng.choice(FLOATS)
    if rng.random() < 0.1:
        found["token_weight"] = rng.choice(["bool", "int32", "uint8"])
    return found


def _options(rng: random.Random, call: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """Options whose values a kernel is compiled for, tensors beside e, c and targets, and K."""
    recipe, options, kinds = RECIPES.get(call), dict[str, Any](), dict[str, str]()
    if call in ("clip_contrastive", "nt_xent"):
        assert recipe is not None
        options = {"reduction": rng.choice(recipe.reductions), **recipe.draw(rng)}
        if call == "clip_contrastive" and rng.random() < 0.4:
            kinds["logit_scale"] = "learned"
            del options["logit_scale"]
        return options, kinds, 0
    if call != "multi_codebook" and rng.random() < 0.5:
        kinds["bias"] = rng.choice(["normal"] * 3 + ["masked", "common"] * 2 + ["large", "all_masked"])
    if rng.random() < 0.35:
        options["softcap"] = rng.choice([0.5, 5.0, 30.0, 1e4])
    if rng.random() < 0.35:
        options["logit_scale"] = rng.choice([0.25, 2, 0.7, 1.3])
    k = rng.choice([1, 2, 5]) if rng.random() < 0.25 else 0
    if recipe is None:
        if call == "terms":
            options["outputs"] = rng.sample(["nll", "lse", "entropy", "prediction"], rng.randint(1, 4))
        else:
            options["reduction"] = rng.choice(["mean", "sum", "none"])
            for name, values in {"label_smoothing": [0.1, 1.0], "z_loss": [1e-4, 0.5]}.items():
                if rng.random() < 0.2:
                    options[name] = rng.choice(values)
            if rng.random() < 0.2:
                kinds["weight"] = rng.choice(["positive", "zeros"])
            if rng.random() < 0.3:
                kinds["token_weight"] = rng.choice(["positive", "normal", "zeros", "nan_ignored"])
        if k:
            kinds["target_weight"] = rng.choice(["probabilities", "normal", "zeros", "nan_ignored"])
        return options, kinds, k
    options.update(recipe.draw(rng))
    if recipe.reductions:
        options["reduction"] = rng.choice(recipe.reductions)
    if recipe.token_weight and rng.random() < 0.3:
        # 0 times the NaN of a masked row, or the slope at an infinite loss, is not defined.
        masked = "masked" in kinds.get("bias", "")
        kinds["token_weight"] = "positive" if masked else rng.choice(["positive", "zeros", "nan_ignored"])
    if options.get("top_entropy", 1) < 1 and "bias" in kinds:
        kinds["bias"] = "normal"  # the order of entropies that are NaN is not defined
    k = rng.choice([1, 2, 5]) if {"negatives", "target_weight"} & set(recipe.needs) else 0
    for name in recipe.needs:
        if name in ("negatives", "target_weight", "ref_log_prob", "advantages", "rewards") or rng.random() < 0.6:
            kinds[name] = {"target_weight": "probabilities"}.get(name, "normal")
    if call in ("ppo", "grpo") and "ref_log_prob" in kinds:
        if rng.random() < 0.5:
            options["kl_coefficient"] = 0.3
        else:
            del kinds["ref_log_prob"]
    return options, kinds, k


def _values_of_call(rng: random.Random, plan: Plan) -> dict[str, Any]:
    """Options that no kernel hears of."""
    found: dict[str, Any] = {}
    if plan.call in ("clip_contrastive", "nt_xent"):
        return found
    if rng.random() < 0.3:
        found["ignore_index"] = rng.choice([-1, rng.randrange(plan.v), 2**40, 255])
    if plan.call == "multi_token":
        if rng.random() < 0.5:
            found["shift"] = rng.randint(0, plan.lead[-1] - plan.heads)
    elif plan.lead and rng.random() < 0.3:
        found["shift"] = rng.choice([1] * 5 + [2] * 3 + [plan.lead[-1], plan.lead[-1] + 3])
    return found


def _offset(rng: random.Random, dtypes: dict[str, str], data: str) -> float:
    """Mostly where the logits are exact, so that it costs nothing."""
    found = rng.choice([0.0] * 6 + [2.0**10, 2.0**14, 2.0**17, 2.0**20, -(2.0**20)])
    if data not in ("normal", "whole", "zero") and rng.random() < 0.7:
        return 0.0
    return max(min(found, 2.0**14), -(2.0**14)) if "float16" in (dtypes["e"], dtypes["c"]) else found


def _broken(
    rng: random.Random, call: str, kinds: dict[str, str], options: dict[str, Any], spec: dict[str, Any] | None
) -> tuple[tuple[str, str], ...]:
    """Mostly nothing; and only what has a defined outcome."""
    if rng.random() > 0.12 or options.get("top_entropy", 1) < 1:
        return ()
    name = rng.choice(["e", "e", "e", "c", *(x for x in ("bias",) if x in kinds)])
    value = rng.choice(["nan", "inf", "-inf"])
    if "zeros" in kinds.values() or call in ("grpo", "unlikelihood"):
        return ()  # a filter skips rows of upstream 0, whatever they hold
    masked, filtered = "masked" in kinds.get("bias", ""), spec is not None and spec["filter"] != "none"
    if masked and (name == "c" or value != "nan"):
        return ()  # whether it wins over the bias of -inf
    if value != "nan" and (call in ("clip_contrastive", "nt_xent") or (name != "bias" and filtered)):
        return ()  # inf - inf in a sum of several losses, 0 * inf of an entry without probability
    return () if value != "nan" and name == "c" and "label_smoothing" in options else ((name, value),)


def _spec(variant: random.Random, own: random.Random, limits: Limits) -> dict[str, Any] | None:
    if variant.random() < 0.25:
        return None
    blocks = limits.blocks or ((16, 32, 64, 128) if limits.kernels else (1, 7, 16, 50, 128, 1000))
    found: dict[str, Any] = {"filter": variant.choice(["none", "none", "element", "tile"])}
    if found["filter"] != "none":
        # So small that what is left out is nothing beside a rounding error.
        found["threshold"] = 1e-30  # of a filter
        found["compensate"] = variant.random() < 0.6
        found["row_order"] = variant.choice(["live", "natural"])
    if variant.random() < 0.6 or (limits.blocks and found["filter"] != "none"):
        found |= {"block_n": variant.choice(blocks), "block_v": variant.choice(blocks)}
    if variant.random() < 0.3:
        found["lse_accumulation"] = "online"
    if variant.random() < 0.2 and not limits.kernels:
        found["accumulate"] = variant.choice(["float32", "float64"])
    if variant.random() < 0.3:
        found["scratch_bytes"] = 2 ** own.randint(14, 18)
    if variant.random() < 0.4:
        found["vocab_order"] = variant.choice(["mean_logit", "natural", "given", "given"])
    return found
