"""Run SAEBench's own checks of an SAE on our dense view, in an environment with SAEBench.

Legend: D width of the residual stream, M latents.
"""

import tempfile

import torch
from sae_bench.custom_saes import base_sae
from sae_bench.evals.core.main import get_featurewise_weight_based_metrics
from sae_bench.sae_bench_utils import general_utils
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mlsae import MLSAE, DenseSAE, MLSAEConfig

torch.manual_seed(0)
D, M, K = 16, 64, 6
mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 1), model="tiny"))
view = DenseSAE(mlsae, layer=1)

assert base_sae.BaseSAE.check_decoder_norms(view)
assert view.check_decoder_norms()


class Model:
    """Stands in for their `HookedTransformer`, whose `from_pretrained` needs the network."""

    @staticmethod
    def from_pretrained(_name, device):
        config = HookedTransformerConfig(
            n_layers=3, d_model=D, n_ctx=64, d_head=8, n_heads=2, d_vocab=200, act_fn="gelu",
            device=str(device),
        )  # fmt: skip
        model = HookedTransformer(config)
        cache = model.run_with_cache

        def run_with_cache(text, prepend_bos, **options):
            assert prepend_bos
            return cache(torch.tensor([[1, *(ord(c) % 200 for c in text[:40])]]), **options)

        model.run_with_cache = run_with_cache
        return model


base_sae.HookedTransformer = Model
base_sae.BaseSAE.test_sae(view, "tiny")  # prints the average L0

general_utils._standardize_sae_cfg(view.cfg)
assert view.cfg.hook_name == "blocks.1.hook_resid_post"
with torch.no_grad():
    metrics = get_featurewise_weight_based_metrics(view)
assert all(len(values) == M for values in metrics.values())
with tempfile.TemporaryDirectory() as folder:
    mlsae.save_pretrained(folder)
print("ok")
