"""Run sae-probes on the dense view of a run, with activations of its own transformer; no network.

    PYTHON tests/helpers/peer_probes.py RUN LAYER [DATASET]

It runs in an environment that has sae-probes and this project, and prints how well probes of 1 and
16 latents tell the two classes of a dataset that sae-probes ships: its own result.

Legend: D width of the residual stream.
"""

import json
import sys
import tempfile
from pathlib import Path

import pandas
import sae_probes
import torch
from sae_probes.constants import DATA_PATH

from mlsae import MLSAE, DenseSAE
from mlsae.data.config import DataConfig
from mlsae.data.residuals import ResidualReader
from mlsae.data.transformer import load_tokenizer, load_transformer


def last_residuals(config, texts, layer):
    """The residual at the last token of each text, (texts, D)."""
    reader = ResidualReader(load_transformer(config, torch.device("cpu")), [layer])
    tokenizer, rows = load_tokenizer(config), []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        rows.append(reader(ids)[0, 0, -1].float())
    return torch.stack(rows)


def main(run, layer, dataset="105_click_bait"):
    mlsae = MLSAE.from_pretrained(run)
    hook = f"blocks.{layer}.hook_resid_post"
    texts = pandas.read_csv(DATA_PATH / "cleaned_data" / f"{dataset}.csv.zst", compression="zstd")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / f"model_activations_{mlsae.config.model}"
        cache.mkdir()
        config = DataConfig(mlsae.config.model, "builtin")
        x = last_residuals(config, texts["prompt"].tolist(), layer)
        torch.save(x, cache / f"{dataset}_{hook}.pt")
        sae_probes.run_sae_evals(
            DenseSAE(mlsae, layer=layer), mlsae.config.model, hook, "l1", "normal", ks=[1, 16],
            results_path=Path(folder) / "results", model_cache_path=folder, datasets=[dataset],
            device="cpu",
        )  # fmt: skip
        (result,) = (Path(folder) / "results").rglob("*.json")
        for metrics in json.loads(result.read_text()):
            print(f"k = {metrics['k']}: AUC {metrics['test_auc']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
