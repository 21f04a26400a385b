"""A transformer of three blocks with a circuit planted in it, and the MLSAE that reads it without
error.

Token A at position s writes latent a at layer 1; block 2 takes it away and writes latent b, at s
and at s + 1, whatever stands there; b raises the logit of one token. All other tokens write latents
that say nothing: at layer 1 by the token, at layer 2 by the token before.

Legend: B rows, T positions, V vocabulary, D width: V directions of tokens, a, b, and noise.
"""

from types import SimpleNamespace

import torch
from torch import nn

from mlsae import MLSAE, MLSAEConfig

V, NOISE = 12, 8
A, TARGET = 5, 9  # token ids
LATENT_A, LATENT_B = V, V + 1
D = V + 2 + 2 * NOISE
FIRST, SECOND = slice(V + 2, V + 2 + NOISE), slice(V + 2 + NOISE, D)  # noise of layers 1 and 2


class _Keep(nn.Module):
    def forward(self, x):
        return x + 0.0


class _Write(nn.Module):
    """Latent a for token A, noise for any other."""

    def forward(self, x):
        table = torch.zeros(V, D, dtype=x.dtype)
        table[A, LATENT_A] = 3.0
        for token in set(range(V)) - {A}:
            table[token, V + 2 + token % NOISE] = 2.0
        return x + x[..., :V].relu() @ table


class _Move(nn.Module):
    """a becomes b, here and at the next token; other noise, by the token before."""

    def forward(self, x):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        moved = x.clone()
        moved[..., LATENT_A], moved[..., FIRST] = 0.0, 0.0
        moved[..., LATENT_B] = (x[..., LATENT_A] + 1.5 * before[..., LATENT_A]).relu()
        moved[..., SECOND] = 2.0 * before[..., :NOISE]
        return moved


class Planted(nn.Module):
    """What transformers calls a causal language model, as far as it is read."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            is_encoder_decoder=False, num_hidden_layers=3, hidden_size=D, vocab_size=V
        )
        self.config.get_text_config = lambda: self.config
        self.embed = nn.Embedding.from_pretrained(torch.eye(D)[:V])
        self.blocks = nn.ModuleList([_Keep(), _Write(), _Move()])
        generator = torch.Generator().manual_seed(0)
        self.unembed = nn.Parameter(0.02 * torch.randn(D, V, generator=generator), False)
        self.unembed[LATENT_B, TARGET] = 2.0

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=x @ self.unembed)


def planted():
    """The model, and an MLSAE of one latent per direction."""
    mlsae = MLSAE(MLSAEConfig(D, D, 6, (0, 1, 2), standardize=False)).requires_grad_(False)
    with torch.no_grad():
        mlsae.sae.W_enc.copy_(torch.eye(D))
        mlsae.sae.W_dec.copy_(torch.eye(D))
    return Planted(), mlsae
