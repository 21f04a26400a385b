"""SAEs in other libraries' formats, written by hand in those libraries' layouts.

Legend: D inputs, M latents, K active latents per token.
"""

import json

import safetensors.torch
import torch

D, M, K = 6, 24, 3


def sae(seed=0, D=D, M=M, dtype=torch.float32):
    """Weights by this project's names; the norms of W_dec's rows are near, but not equal to, 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(M, D, generator=generator), dim=1)
    return {
        "W_enc": torch.randn(M, D, generator=generator).to(dtype),
        "W_dec": (rows * (1 + 1e-3 * torch.randn(M, 1, generator=generator))).to(dtype),
        "b_enc": torch.randn(M, generator=generator).to(dtype),
        "b_dec": torch.randn(D, generator=generator).to(dtype),
    }


def build(name, folder, weights):
    """Write the files of format `name`, with its own config and counters."""
    w = {key: value.clone() for key, value in weights.items()}
    return write(folder, FILES[name](w))


def write(folder, files):
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save(folder / file, content)
    return folder


def sparsify(w):
    cfg = {
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": M,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "activation": "topk",
        "d_in": D,
    }
    tensors = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    return {"cfg.json": cfg, "sae.safetensors": tensors}


def saelens(w):
    cfg = {
        "architecture": "topk",
        "d_in": D,
        "d_sae": M,
        "k": K,
        "dtype": str(w["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": "6.5.0",
            "model_name": "gpt2",
            "tag": 7,
            "hook_name": "blocks.4.hook_resid_post",
        },
    }
    tensors = {**w, "W_enc": w["W_enc"].T.contiguous()}
    return {"cfg.json": cfg, "sae_weights.safetensors": tensors}


def dictionary_learning(w):
    config = {
        "trainer": {
            "dict_class": "AutoEncoderTopK",
            "trainer_class": "TopKTrainer",
            "activation_dim": D,
            "dict_size": M,
            "k": K,
            "lr": 1e-4,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            "submodule_name": "resid_post_layer_3",
        },
        "buffer": {"d_submodule": D},
    }
    tensors = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "b_dec": w["b_dec"],
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(0.25),
    }
    return {"config.json": config, "ae.pt": tensors}


def openai(w):
    counter = torch.arange(M)
    tensors = {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["W_enc"],
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": counter,
        "latents_activation_frequency": counter / M,
        "latents_mean_square": counter / 2,
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }
    return {"autoencoder.pt": tensors}


def released(w):
    config = {
        "auxk": 256,
        "dead_steps_threshold": 19,
        "dead_threshold": 0.001,
        "k": K,
        "n_inputs": D,
        "n_latents": M,
        "standardize": True,
    }
    tensors = {
        "encoder.weight": w["W_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "pre_encoder_bias": w["b_dec"],
        "last_nonzero": torch.arange(M),
    }
    return {"config.json": config, "model.safetensors": tensors}


FILES = {
    "sparsify": sparsify,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
    "released": released,
}


def save(path, content):
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        safetensors.torch.save_file(content, path)


def load(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return safetensors.torch.load_file(path)


def same(a, b):
    """Whether the contents of two files are equal; tensors in every bit and in their dtype."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
