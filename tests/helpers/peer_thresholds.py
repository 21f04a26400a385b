"""Let other libraries write SAEs with thresholds, or without a subtraction of b_dec, and run them.

    PYTHON tests/helpers/peer_thresholds.py LIBRARY FOLDER

It runs in the library's own environment, without our code, as `peer.py` does. FOLDER holds
`x.safetensors` {x (N, D)}; for each kind of SAE of LIBRARY the program adds a folder, and beside it
`KIND.safetensors` {f (N, M) dense activations, x_hat (N, D)}. SAEs of other projects that sae-lens
reads from the hub are read by its reader from files here.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

M, K = 48, 5


def randn(*shape):
    return torch.randn(*shape)


def files(D):
    """Weights in sae-lens' layout, all of them random."""
    rows = torch.nn.functional.normalize(randn(M, D), dim=1)
    return {
        "W_enc": randn(D, M), "W_dec": rows, "b_enc": randn(M), "b_dec": randn(D),
        "threshold": torch.rand(M) * 3,
    }  # fmt: skip


def fill(sae, w):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(w[name])


def outputs(sae, x):
    f = sae.encode(x)
    return f, sae.decode(f)


def saelens(folder, D, x):
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    plain = {"d_in": D, "d_sae": M}
    for kind, sae in (
        ("jumprelu", JumpReLUSAE(JumpReLUSAEConfig(**plain))),
        ("raw", JumpReLUSAE(JumpReLUSAEConfig(**plain, apply_b_dec_to_input=False))),
        ("layer_norm", JumpReLUSAE(JumpReLUSAEConfig(**plain, normalize_activations="layer_norm"))),
        ("standard", StandardSAE(StandardSAEConfig(**plain))),
        ("topk_raw", TopKSAE(TopKSAEConfig(**plain, k=K, apply_b_dec_to_input=False))),
    ):
        fill(sae, files(D))
        sae.save_model(folder / kind)
        yield kind, *outputs(SAE.load_from_disk(folder / kind), x)
    sizes = {"matryoshka_widths": [M // 2, M]}
    for kind, sae in (
        ("batchtopk", BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**plain, k=K))),
        (
            "matryoshka",
            MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(**plain, k=K, **sizes)
            ),
        ),
    ):
        fill(sae, files(D))
        sae.topk_threshold = torch.tensor(1.25, dtype=torch.double)
        sae.save_inference_model(folder / kind)
        yield kind, *outputs(SAE.load_from_disk(folder / kind), x)
    yield from by_saelens(folder, D, x)


def by_saelens(folder, D, x):
    """Gemma Scope, Qwen-Scope and Llama Scope, by sae-lens' readers."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loaders.hf_hub_download = lambda repo_id, filename, subfolder="", **_: str(
        folder / repo_id.split("/")[1] / subfolder / filename
    )
    loaders.QWEN_SCOPE_MODEL_INFO["Qwen3-8B-Base"] = ("Qwen/Qwen3-8B-Base", D)
    loaders.get_safetensors_tensor_shapes = lambda repo_id, name: {
        key: list(t.shape) for key, t in load_file(folder / repo_id.split("/")[1] / name).items()
    }
    norm = 2.5
    w = files(D)
    gemma = ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    place(folder, *gemma)
    np.savez(path(folder, *gemma) / "params.npz", **{n: t.numpy() for n, t in w.items()})
    gemma_2 = ("google/gemma-scope-2-1b-pt", "resid_post/layer_12_width_16k_l0_medium")
    config = {
        "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.12.output",
    }  # fmt: skip
    place(folder, *gemma_2, {"config.json": config})
    tensors = {name.lower(): t for name, t in w.items()}
    save_file(tensors, path(folder, *gemma_2) / "params.safetensors")
    qwen = ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_5", "")
    place(folder, *qwen)
    turned = {n: w[n].T.contiguous() if n.startswith("W") else w[n] for n in w if n != "threshold"}
    torch.save(turned, path(folder, *qwen) / "layer12.sae.pt")
    llama = ("fnlp/Llama3_1-8B-Base-LXR-32x", "Llama3_1-8B-Base-L15R-32x")
    config = {
        "act_fn": "jumprelu", "jump_relu_threshold": 0.7, "d_model": D, "d_sae": M, "top_k": 50,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False,
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    }  # fmt: skip
    place(folder, *llama, {"hyperparams.json": config})
    (path(folder, *llama) / "checkpoints").mkdir()
    save_file(
        {
            "encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"],
        },
        path(folder, *llama) / "checkpoints" / "final.safetensors",
    )  # fmt: skip
    for kind, reader, (repository, inside), name in (
        ("gemma", loaders.gemma_2_sae_huggingface_loader, gemma, None),
        ("gemma_2", loaders.gemma_3_sae_huggingface_loader, gemma_2, None),
        ("qwen", loaders.qwen_scope_sae_huggingface_loader, qwen, "layer12.sae.pt"),
        ("llama", loaders.llama_scope_sae_huggingface_loader, llama, None),
    ):
        sizes = {"d_in": D, "d_sae": M, "dtype": "float32"}
        cfg, state, _ = reader(repository, name or inside, cfg_overrides=sizes)
        sae = SAE.from_dict(loaders.handle_pre_6_0_config(cfg))
        sae.load_state_dict(state)
        if kind == "llama":
            sae.fold_activation_norm_scaling_factor(math.sqrt(D) / norm)
        yield kind, *outputs(sae, x)
        (folder / f"{kind}.path").write_text(f"{repository.split('/')[1]}/{name or inside}")


def path(folder, repository, inside):
    return folder / repository.split("/")[1] / inside


def place(folder, repository, inside, contents=None):
    path(folder, repository, inside).mkdir(parents=True)
    for name, content in (contents or {}).items():
        (path(folder, repository, inside) / name).write_text(json.dumps(content))


def dictionary_learning(folder, D, x):
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.utils import load_dictionary

    for kind, sae in (
        ("batchtopk", BatchTopKSAE(D, M, K)),
        ("untrained", BatchTopKSAE(D, M, K)),
        ("matryoshka", MatryoshkaBatchTopKSAE(D, M, K, [M // 2, M // 2])),
        ("jumprelu", JumpReluAutoEncoder(D, M)),
    ):
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(
                    torch.rand(M) * 3 if name == "threshold" else randn(*parameter.shape)
                )
            if kind in ("batchtopk", "matryoshka"):
                sae.threshold.fill_(1.25)
        (folder / kind).mkdir()
        torch.save(sae.state_dict(), folder / kind / "ae.pt")
        trainer = {
            "dict_class": type(sae).__name__, "activation_dim": D, "dict_size": M, "layer": 2,
            "lm_name": "some/model", "submodule_name": "resid_post_layer_2",
        }  # fmt: skip
        if kind != "jumprelu":
            trainer["k"] = K
        (folder / kind / "config.json").write_text(json.dumps({"trainer": trainer}))
        loaded, _ = load_dictionary(str(folder / kind), "cpu")
        yield kind, loaded.encode(x), loaded(x)


@torch.no_grad()
def main(library, folder):
    torch.manual_seed(1)
    x = load_file(folder / "x.safetensors")["x"]
    for kind, f, x_hat in globals()[library](folder, x.shape[1], x):
        save_file(
            {"f": f.contiguous(), "x_hat": x_hat.contiguous()}, folder / f"{kind}.safetensors"
        )
        if not (folder / f"{kind}.path").exists():
            (folder / f"{kind}.path").write_text(kind)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
