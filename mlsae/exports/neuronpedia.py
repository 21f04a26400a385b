"""Neuronpedia: the files that its bulk import reads, one source per layer.

MODEL/LAYER-SET/    a source: the latents of the SAE at one layer, whose ids all sources share
    release.jsonl model.jsonl sourceset.jsonl source.jsonl    one row each
    features/batch-N.jsonl.gz       one row per latent that is active at the layer
    activations/batch-N.jsonl.gz    one row per example: tokens, values
    explanations/batch-N.jsonl.gz   one row per label of the run

Rows are those of the tables SourceRelease, Model, SourceSet, Source, Neuron, Activation and
Explanation of its database (apps/webapp/prisma/schema.prisma in hijohnnylin/neuronpedia), as its
utils/neuronpedia-utils/neuronpedia_utils/export-data.py writes them.

Legend: L layers, M latents, V vocabulary.
"""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from ..analysis.geometry import token_strings
from ..data.stream import DataStream
from ..errors import InputError, first_line
from ..formats.saved import read_json, read_tensors
from ..model import MLSAE
from ..report.labels import read_labels
from .neuronpedia_rows import Names, activation, explanations, feature, logits_of

_BATCH = 1024  # latents per file
_FILES = ("analysis.json", "analysis.safetensors", "analysis_examples.parquet")


def check_analysis(run: Path) -> None:
    """Raise InputError unless `run` has an analysis with examples."""
    missing = [name for name in _FILES if not (run / name).is_file()]
    if missing:
        raise InputError(
            f"--to neuronpedia needs the analysis of {run}, and there is no {missing[0]}; run "
            f"python -m mlsae.analyze {run} first"
        )
    if not read_json(run / "analysis.json").get("examples"):
        raise InputError(
            f"--to neuronpedia needs examples, and the analysis of {run} has none; run "
            f"python -m mlsae.analyze {run} again, without --examples 0"
        )


def write_sources(run: Path, mlsae: MLSAE, stream: DataStream, out: Path, names: Names) -> str:
    """Write the sources of all layers of the analysis of `run` to `out`: what to print of it.

    Memory holds the examples of a few thousand latents. Raises InputError if the analysis is
    damaged, or of another SAE.
    """
    about, counts = _read_counts(run, mlsae)
    layers, n_tokens = about["layers"], about["tokens"]
    labels = read_labels(run)
    folders = {layer: out / names.model / names.source(layer) for layer in layers}
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    for layer, folder in folders.items():
        _write_about(folder, layer, names, now, mlsae, stream, about)
    strings = token_strings(stream.tokenizer)
    model: Any = stream.reader.model
    head = model.get_output_embeddings()
    n_features = n_activations = 0
    bar = tqdm(total=len(counts), unit=" latents", unit_scale=True, desc="exporting")
    with bar:
        for first in range(0, len(counts), _BATCH):
            last = min(first + _BATCH, len(counts))
            examples = _examples(run / "analysis_examples.parquet", first, last)
            W_dec = mlsae.sae.W_dec[first:last]
            logits = logits_of(W_dec, None if head is None else head.weight, strings)
            for i, (layer, folder) in enumerate(folders.items()):
                found = examples.get(i, {})
                source = {"modelId": names.model, "layer": names.source(layer)}
                features, activations = [], []
                for latent in range(first, last):
                    if not counts[latent, i]:
                        continue
                    frequency = counts[latent, i].item() / n_tokens
                    own = found.get(latent, [])
                    row = {**source, "index": str(latent), "creatorId": names.creator}
                    features.append(feature(row, names, frequency, own, logits, latent - first))
                    activations += [activation(row, n, now, e) for n, e in enumerate(own)]
                number = first // _BATCH
                _write_rows(folder / "features" / f"batch-{number}.jsonl.gz", features)
                _write_rows(folder / "activations" / f"batch-{number}.jsonl.gz", activations)
                rows = explanations(labels, features, names)
                if rows:
                    _write_rows(folder / "explanations" / f"batch-{number}.jsonl.gz", rows)
                n_features += len(features)
                n_activations += len(activations)
            bar.update(last - first)
    return (
        f"{len(folders)} sources of the model {names.model}, {names.source(layers[0])} to "
        f"{names.source(layers[-1])}: {n_features:,} features, {n_activations:,} activations"
    )


def _read_counts(run: Path, mlsae: MLSAE) -> tuple[dict[str, Any], Tensor]:
    """What analysis.json says, and at how many tokens each latent is active, (M, L). Raises
    InputError if one is damaged, or of another SAE."""
    about = read_json(run / "analysis.json")
    layers, n_tokens = about.get("layers"), about.get("tokens")
    counts = read_tensors(run / "analysis.safetensors").get("counts", torch.empty(0))
    if not isinstance(layers, list) or not isinstance(n_tokens, int) or n_tokens < 1:
        raise InputError(f"{run / 'analysis.json'} must name its layers and tokens; analyze again")
    if counts.shape != (mlsae.config.n_latents, len(layers)):
        raise InputError(
            f"{run / 'analysis.safetensors'} must have the counts of {mlsae.config.n_latents} "
            f"latents at {len(layers)} layers, got {tuple(counts.shape)}; analyze again"
        )
    return about, counts


def _examples(path: Path, first: int, last: int) -> dict[int, dict[int, list[dict[str, Any]]]]:
    """The examples of the latents `first` to `last` − 1, by layer (its place in the analysis) and
    latent; of the file, only row groups with such latents are read. Raises InputError if it is
    damaged."""
    try:
        chosen = [("latent", ">=", first), ("latent", "<", last)]
        rows = pq.read_table(path, filters=chosen).to_pylist()
        found: dict[int, dict[int, list[dict[str, Any]]]] = {}
        seen = set()  # one may be of the highest, and drawn too
        for row in rows:
            place = row["layer"], row["latent"], row["document"], row["position"], *row["tokens"]
            if place not in seen:
                seen.add(place)
                found.setdefault(row["layer"], {}).setdefault(row["latent"], []).append(row)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} must be the examples of an analysis: {first_line(error)}; analyze again"
        ) from error
    return found


def _write_about(
    folder: Path,
    layer: int,
    names: Names,
    now: str,
    mlsae: MLSAE,
    stream: DataStream,
    about: dict[str, Any],
) -> None:
    """The four files about a source."""
    folder.mkdir(parents=True)
    model: Any = stream.reader.model
    sae = mlsae.config
    description = f"Multi-layer SAE, {sae.n_latents:,} latents, k = {sae.k}: layer {layer}"
    creator = {"creatorId": names.creator, "createdAt": now, "visibility": "PUBLIC"}
    creator_name = {"creatorName": "mlsae", "urls": []}
    for name, row in {
        "release": {
            "name": names.release, "description": description.split(":")[0], **creator_name,
            "creatorNameShort": "mlsae", "featured": False, "isNewUi": False,
            "defaultUmapSourceIds": [],
        },
        "model": {
            "id": names.model, "displayName": names.model, "displayNameShort": names.model,
            "instruct": False, "layers": len(stream.reader.blocks), "neuronsPerLayer": 0,
            "dimension": model.get_input_embeddings().weight.shape[1],
            "owner": sae.model.split("/")[0] or "unknown", "inferenceEnabled": False,
            "updatedAt": now,
        },
        "sourceset": {
            "modelId": names.model, "name": names.source_set, "type": "",
            "description": description.split(":")[0], "releaseName": names.release,
            **creator_name, "hasDashboards": True,
        },
        "source": {
            "id": names.source(layer), "modelId": names.model, "setName": names.source_set,
            "hasDashboards": True, "inferenceEnabled": False, "dataset": about.get("dataset"),
            "num_prompts": about.get("rows"), "num_tokens_in_prompt": about.get("seq_len"),
            "notes": f"{description}; {about['tokens']:,} tokens", "hasUmap": False,
            "hasUmapLogSparsity": False, "hasUmapClusters": False,
        },
    }.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text(_line(row | creator), "utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        for row in rows:
            file.write(_line(row).encode())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
