"""One text, token by token: which latents are active at which layers, and where the same latents
are active over many tokens.

Legend: L layers, T tokens of the text, M latents, K active latents per token, n latents of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..cli import empty_table
from ..data.stream import DataStream
from ..data.tokens import not_special
from ..errors import InputError
from ..metrics import mean_layer
from ..model import MLSAE

_SHADES = " ▁▂▃▄▅▆▇█"
_LISTED = 3  # latents per token in the table


def tokenize(stream: DataStream, prompt: str) -> Tensor:
    """The token ids (T,) of a text, with the special tokens that the model expects at its start.

    Raises InputError if all of them are special, or there are more than `seq_len`.
    """
    ids = torch.tensor(stream.tokenizer(prompt)["input_ids"], dtype=torch.int64)
    if len(ids) > stream.seq_len:
        raise InputError(
            f"--prompt must have at most {stream.seq_len} tokens (a row; see --seq_len), got "
            f"{len(ids)}"
        )
    if not len(ids) or not not_special(ids, stream.tokenizer).any():
        raise InputError(
            f"--prompt must have a token that is not special, got {prompt!r}; give some text"
        )
    return ids


@torch.inference_mode()
def read_prompt(
    mlsae: MLSAE, stream: DataStream, ids: Tensor, strings: list[str]
) -> dict[str, Any]:
    """The content of analysis_prompt.json for token ids (T,): every active (token, layer, latent)
    with its h.

    A layer is its position in `layers`. Special and dropped tokens have no entries.
    """
    x = stream.reader(ids[None].to(stream.device))[:, 0]
    codes = mlsae.encode(x, stream.reader.layers)
    values, indices = (part.cpu() for part in codes)  # (L, T, K)
    active = (values > 0) & stream.token_mask(ids[None]).T
    layer, token, rank = active.nonzero(as_tuple=True)
    order = torch.argsort(token, stable=True)
    layer, token, rank = layer[order], token[order], rank[order]
    return {
        "prompt": "".join(strings[i] for i in ids.tolist()),
        "tokens": [strings[i] for i in ids.tolist()],
        "layers": list(stream.reader.layers),
        "entries": {
            "token": token.tolist(),
            "layer": layer.tolist(),
            "latent": indices[layer, token, rank].tolist(),
            "value": values[layer, token, rank].float().tolist(),
        },
    }


def latents_by_token(reading: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """For each token of `read_prompt`, its latents (n,), the most active first, and their h at each
    layer, (n, L)."""
    token, layer, latent = (
        torch.tensor(reading["entries"][name], dtype=torch.int64)
        for name in ("token", "layer", "latent")
    )
    value = torch.tensor(reading["entries"]["value"], dtype=torch.float64)
    by_token = []
    for t in range(len(reading["tokens"])):
        here = token == t
        latents, row = latent[here].unique(return_inverse=True)
        h = torch.zeros(len(latents), len(reading["layers"]), dtype=torch.float64)
        h[row, layer[here]] = value[here]
        order = h.sum(1).argsort(descending=True)
        by_token.append((latents[order], h[order]))
    return by_token


def prompt_table(reading: dict[str, Any], profile: Tensor | None) -> Table:
    """A table to print: the most active latents of each token, with one bar per layer.

    profile (M, L) is where latents are active over many tokens.
    """
    layers = reading["layers"]
    headings = ["token", "active", "latent", "Σ h", "at this token", "mean layer"]
    if profile is not None:
        headings += ["over many", "mean layer"]
    left = set(headings) - {"active", "Σ h"}
    table = empty_table(f"Token by token, layers {layers[0]} … {layers[-1]}", headings, left)
    for string, (latents, h) in zip(reading["tokens"], latents_by_token(reading), strict=True):
        table.add_section()
        means = mean_layer(h)
        for i in range(min(_LISTED, len(latents))):
            first = (repr(string)[1:-1], f"{len(latents)}") if i == 0 else ("", "")
            j = int(latents[i])
            cells = [str(j), f"{h[i].sum():.1f}", bars(h[i]), f"{means[i]:.2f}"]
            if profile is not None:
                mean = mean_layer(profile[j])
                cells += [bars(profile[j]), f"{mean:.2f}"] if mean.isfinite() else ["never", ""]
            table.add_row(*first, *cells, style=None if i == 0 else "dim")
        if not len(latents):
            table.add_row(repr(string)[1:-1], "left out")
    return table


def bars(values: Tensor) -> str:
    """One character per value (L,), from empty to a full block for the largest."""
    steps = (values / values.max() * (len(_SHADES) - 1)).ceil().long().tolist()
    return "".join(_SHADES[step] for step in steps)
