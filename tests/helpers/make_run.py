"""The folder of a run with the files that train, evaluate and analyze write, filled with made-up
numbers.

Legend: L layers, M latents.
"""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.numpy

NASTY = [
    "</script>",
    "<b>bold</b>",
    '"quoted"',
    "it's",
    "naïve ✓ 漢字",
    "\n",
    "\t",
    " &amp;",
    "\\",
    "",
]
WORDS = [" return", " self", "(", ")", ":", " def", " if", " not", " None", " x", "=", "1"]
WORDS += [f" name{i}" for i in range(40)]


def make_run(
    folder,
    n_latents=256,
    n_layers=6,
    *,
    examples=3,
    evaluated=True,
    analyzed=True,
    trained=True,
    model="builtin",
    expansion=None,
    k=32,
    seed=0,
    alive=True,
    prompt="def f(x): <b>",
    others=(),
):
    """Write the run, with `examples` per latent, layer and kind, and matches in the SAEs named
    `others`; returns the data written."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    layers = list(range(n_layers))
    d_in = n_latents // (expansion or 16) or 1
    config = {
        "d_in": d_in, "n_latents": n_latents, "k": k, "layers": layers, "standardize": True,
        "model": model, "training": {"dataset": "builtin", "seed": seed},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    # Each latent is active around a center of its own, with a width of its own.
    center, width = random.uniform(0, n_layers - 1, n_latents), random.uniform(0.2, 2, n_latents)
    weight = np.exp(-(((np.arange(n_layers) - center[:, None]) / width[:, None]) ** 2))
    dead = np.arange(n_latents) % 16 == 5
    dead |= not alive
    weight[dead] = 0
    totals = weight * random.uniform(1, 100, (n_latents, 1))
    if trained:
        _train(folder, layers, totals, random)
    if evaluated:
        _evaluate(folder, config, random)
    if analyzed:
        table = _analyze(folder, config, totals, weight, random, prompt)
        rows = _examples(folder, weight, dead, random, examples)
        if others:
            table |= _matches(folder, table, others)
        return {"latents": table, "examples": rows, "totals": totals}
    return {"totals": totals}


def _train(folder, layers, totals, random):
    lines = []
    for i in range(1, 31):
        fvu = [(1.1 + 0.1 * layer) / i**0.6 for layer in layers]
        line = {"tokens": 1000 * i, "loss": 1 / i, "fvu": float(np.mean(fvu)), "fvu_layers": fvu}
        lines.append(line | {"dead": 0.05 * i / 30})
    fvu = lines[-1]["fvu_layers"]
    heldout = {"fvu": float(np.mean(fvu)), "fvu_layers": fvu, "n_tokens": 5000}
    heldout |= {"fvu_paper": heldout["fvu"] / 2, "fvu_paper_layers": [x / 2 for x in fvu]}
    lines.append({"tokens": 30_000, "heldout": heldout})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arrays = {"totals": totals.astype(np.float32), "counts": (totals > 0).astype(np.int64)}
    safetensors.numpy.save_file(arrays, folder / "latents.safetensors")


def _evaluate(folder, config, random):
    metrics = {}
    scales = {
        "fvu": 0.1, "fvu_paper": 0.08, "mse": 1, "l0": config["k"], "l1": 70, "dead": 0.02,
        "explained": 0.9, "pca": 0.5, "delta_ce": 0.4, "kl": 0.3, "top1": 0.8,
        "recovered_zero": 0.98, "recovered_mean": 0.95,
    }  # fmt: skip
    for name, scale in scales.items():
        values = (scale * random.uniform(0.7, 1.1, len(config["layers"]))).tolist()
        mean = float(np.mean(values))
        known = name not in ("dead", "pca")
        metrics[name] = {
            "mean": mean,
            "mean_interval": [0.95 * mean, 1.05 * mean] if known else [None, None],
            "layers": values,
            "intervals": [[0.9 * x, 1.1 * x] if known else [None, None] for x in values],
        }
    about = {"model": config["model"], "dataset": "builtin", "tokens": 65_000, "ce_true": 2.1}
    about |= {"layers": config["layers"], "figures": metrics, "k": config["k"], "rows": 128}
    (folder / "evaluation.json").write_text(json.dumps(about))


def _analyze(folder, config, totals, weight, random, prompt):
    n_latents, n_layers = totals.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        profile = weight / weight.sum(1, keepdims=True)
    tokens_active = np.where(weight.any(1), random.integers(1, 60_000, n_latents), 0)
    counts = (tokens_active[:, None] * (weight > 0.01)).astype(np.int64)
    arrays = {"counts": counts, "totals": totals, "profile": profile}
    arrays["tokens_active"] = tokens_active
    arrays["continued"] = np.minimum(counts[:, :-1], counts[:, 1:]) // 2
    safetensors.numpy.save_file(arrays, folder / "analysis.safetensors")
    index = np.arange(n_layers)
    mean = profile @ index
    var = profile @ index**2 - mean**2
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = -np.nansum(profile * np.log(profile), 1) / np.log(max(2, n_layers))
    entropy[tokens_active == 0] = np.nan
    pick = lambda: [list(random.choice(WORDS, 3)) for _ in range(n_latents)]  # noqa: E731
    latents = {
        "latent": np.arange(n_latents), "tokens_active": tokens_active,
        "frequency": tokens_active / 65_536, "mean_layer": mean, "var_layer": var,
        "std_layer": np.sqrt(np.maximum(var, 0)), "var_within_token": 0.02 * var,
        "entropy": entropy, "n_layers": (counts >= 100).sum(1), "mean_layer_totals": mean,
        "entropy_totals": entropy, "max_activation": random.uniform(1, 30, n_latents),
        "nearest": (np.arange(n_latents) + 1) % n_latents,
        "nearest_cosine": random.uniform(0.1, 0.9, n_latents),
        "encoder_cosine": random.uniform(0.3, 1, n_latents), "tokens_in": pick(),
        "tokens_out": pick(),
        **_flow_columns(counts, arrays["continued"]),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(latents), folder / "analysis_latents.parquet")
    ends = lambda value: {"value": value, "low": 0.96 * value, "high": 1.04 * value}  # noqa: E731
    edges = np.linspace(-1, 1, 41)
    bell = lambda s: np.rint(1e5 * np.exp(-((edges[:-1] / s) ** 2))).astype(int).tolist()  # noqa: E731
    about = {
        "layers": config["layers"], "tokens": 65_536, "n_latents": n_latents, "k": config["k"],
        "model": config["model"], "dataset": "builtin", "count_threshold": 100,
        "ratios": {
            "equations": {"A": ends(0.62), "B": ends(0.031), "var_layer": 2.9,
                          "var_given_latent": 1.8, "var_given_latent_token": 0.05},
            "released": {"A": ends(0.71), "B": ends(0.012), "var_layer": 2.9,
                         "var_given_latent": 2.1, "var_given_latent_token": 0.02},
        },
        "entropy": {"profile": ends(0.55), "totals": ends(0.51)},
        "mmcs": {"value": 0.31, "random": 0.25},
        "cosine_histogram": {"edges": edges.tolist(), "decoder": bell(0.3), "random": bell(0.15)},
        "adjacent": {"cosine": random.uniform(0.4, 0.8, n_layers - 1).tolist(),
                     "norm": np.linspace(5, 40, n_layers).tolist()},
        "seconds": 10.0, "peak_bytes": 10**9, "versions": {},
    }  # fmt: skip
    if n_layers > 1:
        about["flow"] = _flow(counts / 65_536, arrays["continued"] / 65_536)
    (folder / "analysis.json").write_text(json.dumps(about))
    _write_prompt(folder, config["layers"], weight, random, prompt)
    return latents


def _flow_columns(counts, continued):
    """None of a single layer."""
    n = len(counts)
    if not continued.shape[1]:
        return {}
    with np.errstate(invalid="ignore", divide="ignore"):
        continues = continued.sum(1) / counts[:, :-1].sum(1)
    follower = np.where(np.arange(n) % 2, (np.arange(n) + 4) % n, -1)
    return {
        "continues": continues, "follower": follower,
        "follower_share": np.where(follower >= 0, 0.25, np.nan),
        "follower_chance": np.where(follower >= 0, 0.0625, np.nan),
    }  # fmt: skip


def _flow(active, continued):
    active, continued = active.sum(0), continued.sum(0)
    began, ended = active.copy(), active.copy()
    began[1:] -= continued
    ended[:-1] -= continued
    pair = {"tokens": 4321, "share": 0.4567, "chance": 0.0123, "strength": 0.5}
    return {
        "active": active.tolist(), "began": began.tolist(), "ended": ended.tolist(),
        "pair_tokens": 16_384, "missed": 0, "pairs": [{"ended": 1, "began": 3, **pair}],
    }  # fmt: skip


def _matches(folder, table, others):
    """Add matches to the files of the analysis: the new columns."""
    random = np.random.default_rng(1)
    active = table["tokens_active"] > 0
    n = len(active)
    columns = {
        "match_decoder": np.where(active, random.uniform(0.2, 1, n), np.nan),
        "match_encoder": np.where(active, random.uniform(0.1, 0.9, n), np.nan),
        "match_mutual": np.where(active, random.integers(0, len(others) + 1, n), np.nan)
        / len(others),
        "match_latents": [[0] * len(others)] * n,
    }
    path = folder / "analysis_latents.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table | columns), path)
    cosines = columns["match_decoder"][active]
    counts, edges = np.histogram(cosines, 100, (-1, 1))
    about = json.loads((folder / "analysis.json").read_text())
    about["stability"] = {
        "others": list(others), "pairs": len(cosines), "median": float(np.median(cosines)),
        "mutual": 0.8, "mutual_above": {"0.7": 0.4321, "0.9": 0.1234},
        "chance": {"median": 0.2346, "upper": 0.3457},
        "histogram": {
            "edges": edges.tolist(), "match": counts.tolist(),
            "chance": np.eye(100)[62].tolist(),
        },
    }  # fmt: skip
    (folder / "analysis.json").write_text(json.dumps(about))
    return columns


def _write_prompt(folder, layers, weight, random, prompt):
    alive = np.flatnonzero(weight.any(1))
    tokens = [prompt, *NASTY, " last"]
    entries = {"token": [], "layer": [], "latent": [], "value": []}
    for token in range(len(tokens)):
        for latent in random.choice(alive, min(20, len(alive)), replace=False):
            layer = int(np.argmax(weight[latent]))
            for at in {layer, min(layer + token % 2, len(layers) - 1)}:
                for name, value in zip(entries, (token, at, int(latent), 3.5), strict=True):
                    entries[name].append(value)
    text = {"prompt": "".join(tokens), "tokens": tokens, "layers": layers}
    (folder / "analysis_prompt.json").write_text(json.dumps(text | {"entries": entries}))


def _examples(folder, weight, dead, random, examples):
    """Windows of 25 tokens drawn from `WORDS` and `NASTY`."""
    kinds = ["top", "q1", "q2", "q3", "q4"]
    n_layers = weight.shape[1]
    where = np.argwhere((weight > 0.05) & ~dead[:, None])
    latent, layer = np.repeat(where, len(kinds) * examples, axis=0).T
    kind = np.tile(np.repeat(kinds, examples), len(where))
    total = len(latent)
    words = np.array(WORDS + NASTY, dtype=object)
    chosen = words[random.integers(0, len(words), (total, 25))]
    activation = random.uniform(0.5, 20, total) + 30 * (kind == "top")
    position = random.integers(0, 25, total)
    acts = np.where(random.random((total, 25)) < 0.1, random.uniform(0.1, 0.5, (total, 25)), 0)
    acts[np.arange(total), position] = activation
    rows = {
        "latent": latent, "layer": layer, "kind": kind, "activation": activation,
        "tokens": list(chosen), "activations": list(acts), "position": position,
        "document": random.integers(0, 500, total),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "analysis_examples.parquet")
    assert n_layers > layer.max(initial=0)
    return rows
