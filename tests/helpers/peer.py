"""Run another library's real class on a folder that we wrote, and let it write an SAE of its own.

    PYTHON tests/helpers/peer.py LIBRARY FOLDER

It runs in the library's own environment, without our code. FOLDER holds `x.safetensors` {x (N, D)}
and our `converted/`; the program adds the library's own SAE, `native/`, and the outputs of both,
`converted.safetensors` and `native.safetensors` {f (N, M) dense activations, x_hat (N, D)}.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

M, K = 48, 5


def sparsify(folder):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)

    def run(x):
        out = sae(x)
        zeros = torch.zeros(len(x), sae.num_latents)
        return zeros.scatter(1, out.latent_indices, out.latent_acts), out.sae_out

    return run


def make_sparsify(folder, D):
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K))
    randomize(sae.encoder.bias, sae.b_dec)
    sae.save_to_disk(folder)


def saelens(folder):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)

    def run(x):
        f = sae.encode(x)
        return f, sae.decode(f)

    return run


def make_saelens(folder, D):
    """As saved by its training, which rescales by the decoder's norms and folds them on saving."""
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    cfg = TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K, normalize_activations="layer_norm")
    sae = TopKTrainingSAE(cfg)
    randomize(sae.b_enc, sae.b_dec)
    sae.save_inference_model(folder)


def dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), "cpu")
    return lambda x: (sae.encode(x), sae(x))


def make_dictionary_learning(folder, D):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10,
        activation_dim=D,
        dict_size=M,
        k=K,
        layer=2,
        lm_name="some/model",
        warmup_steps=1,
        device="cpu",
    )
    randomize(trainer.ae.encoder.bias, trainer.ae.b_dec)
    folder.mkdir()
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}))


def randomize(*parameters):
    for parameter in parameters:
        torch.nn.init.normal_(parameter)


@torch.no_grad()
def main(library, folder):
    torch.manual_seed(1)
    x = load_file(folder / "x.safetensors")["x"]
    globals()["make_" + library](folder / "native", x.shape[1])
    for name in ("converted", "native"):
        f, x_hat = globals()[library](folder / name)(x)
        save_file(
            {"f": f.contiguous(), "x_hat": x_hat.contiguous()}, folder / f"{name}.safetensors"
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
