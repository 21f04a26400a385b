"""What the files of a run must hold for a page to be drawn from them.

A schema of JSON is a `Rule`; a dictionary of schemas by the keys that must be there, or may be if
`Optional`; or `Each`.

Legend: L layers, M latents, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from ..errors import InputError


class Rule(NamedTuple):
    """What a single value must be, in words, and whether one is."""

    words: str
    holds: Callable[[Any], bool]


class Each(NamedTuple):
    """A list of values of one schema; of `length` values, if that is given."""

    schema: Any
    length: int | None = None


class Optional(NamedTuple):
    """The schema of a key that need not be there."""

    schema: Any


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e300 and math.isfinite(value)


NUMBER = Rule("a number", _is_number)
NUMBER_OR_NULL = Rule("a number or null", lambda value: value is None or _is_number(value))
COUNT = Rule("an integer, 0 or more", lambda value: _is_integer(value) and 0 <= value < 2**63)
POSITIVE = Rule("an integer, 1 or more", lambda value: _is_integer(value) and 0 < value < 2**63)
TEXT = Rule("text", lambda value: isinstance(value, str))
TEXT_OR_NULL = Rule("text or null", lambda value: value is None or isinstance(value, str))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))

CONFIG = {
    "d_in": POSITIVE, "n_latents": POSITIVE, "k": POSITIVE, "layers": Each(COUNT),
    "model": Optional(TEXT_OR_NULL), "training": Optional(OBJECT), "k_max": Optional(POSITIVE),
    "lens": Optional(OBJECT),
}  # fmt: skip
_INTERVAL = {"value": NUMBER_OR_NULL, "low": NUMBER_OR_NULL, "high": NUMBER_OR_NULL}
_RATIOS = {
    "A": _INTERVAL,
    "B": _INTERVAL,
    "var_layer": NUMBER_OR_NULL,
    "var_given_latent": NUMBER_OR_NULL,
    "var_given_latent_token": NUMBER_OR_NULL,
}
_PAIR = {
    "ended": COUNT, "began": COUNT, "tokens": COUNT,
    "share": NUMBER, "chance": NUMBER, "strength": NUMBER,
}  # fmt: skip
EVALUATED = (
    "fvu", "fvu_paper", "l0", "l1", "dead", "explained", "pca", "delta_ce", "kl", "top1",
    "recovered_mean", "recovered_zero",
)  # fmt: skip
JOINT = ("delta_ce_from", "recovered_from", "kl_from", "top1_from")
"""Figures of evaluation.json that are there if several layers were replaced at once."""
LATENT_NUMBERS = (
    "tokens_active", "frequency", "mean_layer", "std_layer", "var_layer", "var_within_token",
    "entropy", "n_layers", "mean_layer_totals", "entropy_totals", "max_activation", "nearest",
    "nearest_cosine", "encoder_cosine",
)  # fmt: skip
"""Columns of analysis_latents.parquet."""
MATCH_NUMBERS = ("match_decoder", "match_encoder", "match_mutual")
"""Columns that are there if the analysis had other SAEs to compare with."""
FLOW_NUMBERS = ("continues", "follower", "follower_share", "follower_chance")
"""Columns that are there if the analysis was of several layers."""


def training_step(n_layers: int) -> dict[str, Any]:
    """A line of metrics.jsonl with the metrics of training steps."""
    fvu = {"fvu": NUMBER_OR_NULL, "fvu_layers": Each(NUMBER_OR_NULL, n_layers)}
    return {"tokens": COUNT, "dead": NUMBER, **fvu}


def validation(n_layers: int) -> dict[str, Any]:
    """A line of metrics.jsonl with validation metrics."""
    means = dict.fromkeys(("fvu", "fvu_paper"), NUMBER_OR_NULL)
    layers = {f"{name}_layers": Each(NUMBER_OR_NULL, n_layers) for name in means}
    newer = {
        "fvu_all": Optional(NUMBER_OR_NULL),
        "fvu_lens": Optional(NUMBER_OR_NULL),
        "top_share_layers": Optional(Each(NUMBER_OR_NULL, n_layers)),
    }
    return {"tokens": COUNT, "heldout": {**means, **layers, **newer}}


def evaluation(n_layers: int) -> dict[str, Any]:
    """The content of evaluation.json, measured at L layers."""
    metric = {
        "mean": NUMBER_OR_NULL,
        "mean_interval": Each(NUMBER_OR_NULL, 2),
        "layers": Each(NUMBER_OR_NULL, n_layers),
        "intervals": Each(Each(NUMBER_OR_NULL, 2), n_layers),
    }
    figures = dict.fromkeys(EVALUATED, metric) | {
        **dict.fromkeys(JOINT, Optional(metric)),
        "fvu_all": Optional(metric),
        "fvu_lens": Optional(metric),
        "top_share": Optional({"layers": Each(NUMBER_OR_NULL, n_layers)}),
    }
    return {"tokens": COUNT, "ce_true": NUMBER_OR_NULL, "figures": figures}


def analysis(n_layers: int, n_bins: int, n_match_bins: int) -> dict[str, Any]:
    """The content of analysis.json, measured at L layers; its histograms of the decoder's cosines
    have `n_bins` bins, and those of matches `n_match_bins`."""
    shares, counts = Each(NUMBER, n_bins), Each(NUMBER, n_match_bins)
    return {
        "tokens": COUNT,
        "ratios": {"equations": _RATIOS, "released": _RATIOS},
        "entropy": {"profile": _INTERVAL, "totals": _INTERVAL},
        "mmcs": {"value": NUMBER_OR_NULL, "random": NUMBER_OR_NULL},
        "cosine_histogram": {"edges": Each(NUMBER), "decoder": shares, "random": shares},
        "adjacent": {
            "cosine": Each(NUMBER_OR_NULL, max(n_layers - 1, 0)),
            "norm": Each(NUMBER_OR_NULL, n_layers),
        },
        "flow": Optional(
            {
                **dict.fromkeys(("active", "began", "ended"), Each(NUMBER, n_layers)),
                "pair_tokens": COUNT,
                "pairs": Each(_PAIR),
            }
        ),
        "stability": Optional(
            {
                "others": Each(TEXT),
                "pairs": COUNT,
                "median": NUMBER_OR_NULL,
                "mutual_above": {"0.7": NUMBER_OR_NULL, "0.9": NUMBER_OR_NULL},
                "chance": {"median": NUMBER_OR_NULL, "upper": NUMBER_OR_NULL},
                "histogram": {"edges": Each(NUMBER), "match": counts, "chance": counts},
            }
        ),
    }


def prompt(n_layers: int, n_tokens: int, n_entries: int) -> dict[str, Any]:
    """The content of analysis_prompt.json."""
    token = Rule(f"in [0, {n_tokens})", lambda value: _is_integer(value) and 0 <= value < n_tokens)
    layer = Rule(f"in [0, {n_layers})", lambda value: _is_integer(value) and 0 <= value < n_layers)
    columns = {"token": token, "layer": layer, "latent": COUNT, "value": NUMBER}
    return {
        "prompt": TEXT,
        "tokens": Each(TEXT),
        "entries": {name: Each(rule, n_entries) for name, rule in columns.items()},
    }


def check(value: Any, schema: Any, where: str) -> None:
    """Raise InputError if `value`, which stands at `where`, does not have the schema."""
    if isinstance(schema, Rule):
        if not schema.holds(value):
            shown = repr(value)
            shown = shown if len(shown) < 60 else shown[:60] + "…"
            raise InputError(f"{where} must be {schema.words}, got {shown}")
    elif isinstance(schema, Each):
        words = "a list" if schema.length is None else f"a list of {schema.length}"
        ok = isinstance(value, list) and schema.length in (None, len(value))
        check(value, Rule(words, lambda _: ok), where)
        for i, item in enumerate(value):
            check(item, schema.schema, f"{where}[{i}]")
    else:
        check(value, OBJECT, where)
        for key, inner in schema.items():
            if isinstance(inner, Optional):
                if key not in value:
                    continue
                inner = inner.schema
            if key not in value:
                raise InputError(f"{where} must have {key!r}, and has none")
            check(value[key], inner, f"{where}.{key}")


def length(value: Any, *keys: str) -> int:
    """The length of the list under `keys` in JSON; 0 if there is none, which `check` then tells."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return len(value) if isinstance(value, list) else 0


def check_tensor(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, int],
    where: str,
    kind: str = "floating-point",
) -> None:
    """Raise InputError unless the file `where` holds a tensor of this name, shape and kind, which
    else is "integer"."""
    tensor, floats = tensors.get(name), kind == "floating-point"
    if tensor is None or tuple(tensor.shape) != shape or tensor.is_floating_point() != floats:
        got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise InputError(f"{name} in {where} must be {kind} of shape {shape}, got {got}")


def check_columns(
    schema: pa.Schema, names: Iterable[str], is_type: Callable[[Any], bool], kind: str, where: str
) -> None:
    """Raise InputError unless the table `where` has columns of these names and this kind."""
    for name in names:
        i = schema.get_field_index(name)
        if i < 0 or not is_type(schema.field(i).type):
            got = "none" if i < 0 else schema.field(i).type
            raise InputError(f"{where} must have one column {name!r} of {kind}, got {got}")


def is_number_type(kind: pa.DataType) -> bool:
    """Whether a column has numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_number_list(kind: pa.DataType) -> bool:
    """Whether a column has lists of numbers, or nothing at all."""
    return bool(
        pa.types.is_null(kind) or (pa.types.is_list(kind) and is_number_type(kind.value_type))
    )


def is_text_list(kind: pa.DataType) -> bool:
    """Whether a column has lists of strings, or nothing at all."""
    inside = pa.types.is_list(kind) and kind.value_type
    return bool(pa.types.is_null(kind) or (inside and pa.types.is_string(inside)))


def check_range(column: pa.ChunkedArray, end: int, name: str, where: str) -> None:
    """Raise InputError unless all of a column's values are in [0, end)."""
    bounds = pc.min_max(column).as_py()
    if column.null_count or (len(column) and not 0 <= bounds["min"] <= bounds["max"] < end):
        raise InputError(f"{name} in {where} must be in [0, {end}), got {bounds}")


def check_examples(schema: pa.Schema, where: str) -> None:
    """Raise InputError unless the table of examples has its columns."""
    numbers = ("latent", "layer", "position", "document", "activation")
    check_columns(schema, numbers, is_number_type, "numbers", where)
    check_columns(schema, ("kind",), pa.types.is_string, "text", where)
    check_columns(schema, ("tokens",), is_text_list, "lists of text", where)
    check_columns(schema, ("activations",), is_number_list, "lists of numbers", where)


def check_example_values(examples: pa.Table, n_latents: int, where: str) -> None:
    """Raise InputError unless each of the E examples is of a latent in [0, M), and has as many
    activations as tokens, with its own position among them."""
    if not len(examples):
        return
    check_range(examples["latent"], n_latents, "latent", where)
    check_range(examples["layer"], 2**15, "layer", where)
    columns = [examples[name] for name in ("activation", "kind", "document", "position")]
    columns += [pc.list_flatten(examples[name]) for name in ("tokens", "activations")]
    tokens, activations = (pc.list_value_length(examples[n]) for n in ("tokens", "activations"))
    at = examples["position"]
    inside = pc.and_(pc.greater_equal(at, 0), pc.less(at, tokens))
    whole = pc.and_(inside, pc.equal(tokens, activations))
    if any(column.null_count for column in (*columns, whole)) or not pc.all(whole).as_py():
        raise InputError(
            f"each row of {where} must have no null, as many activations as tokens, and its "
            "position among them; measure it again with mlsae.analyze"
        )
