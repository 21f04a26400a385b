"""SAEs with thresholds, or without a subtraction of b_dec, in other libraries' layouts.

Legend: D inputs, M latents, K active latents per token.
"""

import math

import numpy as np
import torch

from tests.helpers import peer_files
from tests.helpers.peer_files import D, K, M

SCALE = math.sqrt(D) / 2.5  # of a Llama Scope whose inputs have the mean norm 2.5
GEMMA = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_5"
GEMMA_2 = "gemma-scope-2-1b-pt/resid_post/layer_12_width_16k_l0_medium"
QWEN = "SAE-Res-Qwen3-8B-Base-W64K-L0_3"
LLAMA = "Llama3_1-8B-Base-L15R-8x"


def thresholds():
    return torch.rand(M, generator=torch.Generator().manual_seed(4)) * 3


def norm_1(w):
    return w | {"W_dec": torch.nn.functional.normalize(w["W_dec"], dim=1)}


def saelens(folder, w, **changes):
    files = peer_files.saelens(w)
    del files["cfg.json"]["k"]
    files["cfg.json"] |= {"architecture": "jumprelu", "normalize_activations": "none"} | changes
    if files["cfg.json"]["architecture"] == "jumprelu":
        files["sae_weights.safetensors"]["threshold"] = thresholds()
    return peer_files.write(folder, files)


def dictionary_learning(folder, w, kind, threshold):
    files = peer_files.dictionary_learning(w)
    files["config.json"]["trainer"] |= {"dict_class": kind}
    if kind != "BatchTopKSAE":
        files["ae.pt"] = {**w, "W_enc": w["W_enc"].T.contiguous()}
    if kind == "MatryoshkaBatchTopKSAE":
        files["ae.pt"] |= {"k": torch.tensor(K), "group_sizes": torch.tensor([M - 4, 4])}
    if kind == "JumpReluAutoEncoder":
        del files["config.json"]["trainer"]["k"]
    files["ae.pt"]["threshold"] = threshold
    return peer_files.write(folder, files)


def gemma(folder, w):
    folder.mkdir(parents=True)
    arrays = {**w, "W_enc": w["W_enc"].T, "threshold": thresholds()}
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in arrays.items()})
    return folder


def gemma_2(folder, w, **changes):
    config = {
        "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": False,
        "hf_hook_point_in": "model.layers.12.output", "hf_hook_point_out": None,
    }  # fmt: skip
    tensors = {name.lower(): t.contiguous() for name, t in w.items()}
    tensors |= {"w_enc": w["W_enc"].T.contiguous(), "threshold": thresholds()}
    return peer_files.write(
        folder, {"config.json": config | changes, "params.safetensors": tensors}
    )


def qwen(folder, w):
    tensors = {**w, "W_dec": w["W_dec"].T.contiguous()}
    return peer_files.write(folder, {"layer12.sae.pt": tensors}) / "layer12.sae.pt"


def llama(folder, w, **changes):
    config = {
        "act_fn": "jumprelu", "jump_relu_threshold": 0.7, "top_k": K, "d_model": D, "d_sae": M,
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
        "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    }  # fmt: skip
    tensors = {
        "encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"],
        "decoder.weight": norm_1(w)["W_dec"].T.contiguous(),
    }  # fmt: skip
    return peer_files.write(
        folder, {"hyperparams.json": config | changes, "checkpoints/final.safetensors": tensors}
    )
