"""EleutherAI's delphi (`eai-delphi`): the cache of activations that it explains and scores.

HOOKPOINT/START_END.safetensors    the latents START to END, one of several files:
    locations      (n, 3) uint16 or uint32: row, position, latent − START
    activations    (n,) float16, or float32 where that overflows
    tokens         (R, T) int32: the rows of text
HOOKPOINT/config.json              {model_name, dataset_repo, dataset_split, dataset_name,
                                   dataset_column, batch_size, cache_ctx_len, n_tokens, n_splits}

HOOKPOINT is the block's name in the transformer without its head, such as layers.5. Activations of
1e-5 or less are left out, as delphi does. Checked against eai-delphi 0.1.3's LatentDataset.

Legend: L layers, R rows, T positions, N tokens, M latents, S splits.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.stream import DataStream
from ..data.tokens import not_special
from ..errors import InputError
from ..evaluation.heldout import check_kept
from ..model import MLSAE

_LEAST = 1e-5  # delphi's own: what counts as active
_ACTIVE = np.dtype([("location", "<u4", 3), ("activation", "<f4")])  # a row of a spool
_FILE_BYTES = 256 * 2**20
_SPLITS = 5  # delphi's default


def write_cache(
    mlsae: MLSAE, stream: DataStream, out: Path, tokens: int, splits: int | None
) -> str:
    """Write the cache of `tokens` held-out tokens to the folder `out`: what to print of it.

    Memory holds the text, a few rows' residuals and one file. Raises InputError if no token is
    left, or there are more splits than latents.
    """
    n_latents, k = mlsae.config.n_latents, mlsae.config.k
    if splits is not None and splits > n_latents:
        raise InputError(f"--splits must be at most {n_latents:,} (the latents), got {splits}")
    input_ids = stream.heldout(tokens)
    token_mask = stream.token_mask(input_ids)
    check_kept(token_mask, not_special(input_ids, stream.tokenizer))
    if splits is None:
        needed = math.ceil(int(token_mask.sum()) * k * _ACTIVE.itemsize / _FILE_BYTES)
        splits = min(n_latents, max(_SPLITS, needed))
    bounds = [n_latents * i // splits for i in range(splits + 1)]
    hookpoints = names_of_blocks(stream.reader.model, stream.reader.blocks, stream.reader.layers)
    for hookpoint in hookpoints:
        (out / hookpoint).mkdir()
    _spool(mlsae, stream, input_ids, token_mask, bounds, [out / name for name in hookpoints])
    about = _config(stream, input_ids, splits)
    n_active = 0
    for hookpoint in hookpoints:
        for start, end in pairwise(bounds):
            n_active += _write_split(out / hookpoint, start, end, input_ids)
        (out / hookpoint / "config.json").write_text(json.dumps(about, indent=4))
    n_tokens = int(token_mask.sum())
    return (
        f"{n_active:,} activations of {n_latents:,} latents at {n_tokens:,} tokens and the "
        f"hookpoints {', '.join(hookpoints)}, in {splits} files each"
    )


def names_of_blocks(model: Any, blocks: nn.ModuleList, layers: tuple[int, ...]) -> list[str]:
    """The names of the blocks of `layers` in the transformer without its head, which is what
    AutoModel loads."""
    base = getattr(model, "base_model", model)
    names = {module: name for name, module in base.named_modules()}
    return [names[blocks[layer]] for layer in layers]


def _spool(
    mlsae: MLSAE,
    stream: DataStream,
    input_ids: Tensor,
    token_mask: Tensor,
    bounds: list[int],
    folders: list[Path],
) -> None:
    """Append the active latents of each layer and split to a file of `_ACTIVE`, in the order of
    the text."""
    device = stream.device
    ends = torch.tensor(bounds[1:-1], device=device)
    bar = tqdm(total=input_ids.numel(), unit=" tokens", unit_scale=True, desc="encoding")
    with bar:
        for first in range(0, len(input_ids), stream.micro_rows):
            rows = input_ids[first : first + stream.micro_rows]
            keep = token_mask[first : first + stream.micro_rows].to(device)
            place = keep.nonzero()  # (N, 2)
            place[:, 0] += first
            x = stream.reader(rows.to(device))[:, keep].float()
            values, indices = mlsae.encode(x, stream.reader.layers)
            for layer, folder in enumerate(folders):
                token, rank = (values[layer] > _LEAST).nonzero(as_tuple=True)
                latent = indices[layer][token, rank]
                split = torch.bucketize(latent, ends, right=True)
                order = split.sort(stable=True).indices
                active = np.empty(len(order), _ACTIVE)
                location = torch.cat([place[token], latent[:, None]], 1)[order]
                active["location"] = location.cpu().numpy()
                active["activation"] = values[layer][token, rank][order].float().cpu().numpy()
                lengths = split.bincount(minlength=len(bounds) - 1).tolist()
                for i, part in enumerate(np.split(active, np.cumsum(lengths)[:-1])):
                    with (folder / f"{bounds[i]}.spool").open("ab") as file:
                        part.tofile(file)
            bar.update(rows.numel())


def _write_split(folder: Path, start: int, end: int, input_ids: Tensor) -> int:
    """Make the file of the latents start … end − 1 from its spool: how many activations it has."""
    spool = folder / f"{start}.spool"
    active = np.fromfile(spool, _ACTIVE)
    spool.unlink()
    location = active["location"].copy()
    location[:, 2] -= start
    if location.max(initial=0) < 2**16:
        location = location.astype(np.uint16)
    activation = active["activation"]
    if activation.max(initial=0) <= np.finfo(np.float16).max:
        activation = activation.astype(np.float16)
    safetensors.numpy.save_file(
        {
            "locations": location,
            "activations": np.ascontiguousarray(activation),
            "tokens": input_ids.numpy().astype(np.int32),
        },
        folder / f"{start}_{end - 1}.safetensors",
    )
    return len(active)


def _config(stream: DataStream, input_ids: Tensor, splits: int) -> dict[str, Any]:
    """The content of config.json. delphi reads the text from the tokens beside it, and the
    tokenizer by the model's name."""
    data = stream.config
    return {
        "dataset_repo": data.dataset,
        "dataset_split": data.dataset_split,
        "dataset_name": data.dataset_config or "",
        "dataset_column": data.column,
        "batch_size": stream.micro_rows,
        "cache_ctx_len": input_ids.shape[1],
        "n_tokens": input_ids.numel(),
        "n_splits": splits,
        "model_name": data.model,
    }
