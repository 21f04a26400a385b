"""Train a TopK SAE as another library does: its own classes, and the lines of its own trainer.

Each function imports only its own library, since each runs in an environment of its own.

The libraries' dense products would take most of the time of a comparison, so `sparse_topk`'s stand
in for them: the same values and the same gradients. `checked` compares the losses of the first
steps with those of the library's own products. AuxK needs the dense scores; it acts in none of
these libraries before 1,000 steps or 10 million vectors, and a longer run has the library's own
products from the start.

What is not a library's default: the peak rate, given by the caller; and warm-up. sparsify's Muon
and dictionary_learning warm up over 1,000 steps, which a short run does not have (the second
refuses it), so they have 5 % of the steps if that is less.

Legend: N vectors, D inputs, M latents, K active latents per vector.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_topk import TopK, sparse_decode, topk_encode, topk_sae

from .vectors import Vectors, standardized

_NO_AUXK_STEPS, _NO_AUXK_VECTORS = 1000, 10_000_000
_CHECKED_STEPS = 3
# Relative, of their losses. sparsify's Muon orthogonalizes in bfloat16, of 8 bits, so that a sum in
# another order can show in the second loss.
_TOLERANCES = (1e-5, 1e-3, 1e-3)


class Peer(NamedTuple):
    """A training under way."""

    step: Callable[[Tensor], float]
    """One optimizer step on standardized vectors (N, D): its loss."""
    weights: Callable[[], dict[str, Tensor]]
    """W_enc (M, D), b_enc (M,), W_dec (M, D), b_dec (D,), as `mlsae.formats.SavedSAE` names
    them."""


class Size(NamedTuple):
    """What a training is of."""

    d: int
    m: int
    k: int
    steps: int
    vectors: int
    """Per step, as it is asked for: a batch has fewer where tokens are dropped."""

    @property
    def warmup(self) -> int:
        """Steps of warm-up: the libraries' 1,000, or 5 % of the run if that is less."""
        return min(1000, max(1, round(0.05 * self.steps)))


def sparsify(size: Size, cell: dict[str, Any], native: bool) -> Peer:
    """sparsify: `SparseCoder` and the lines of `Trainer.__init__` and `Trainer.fit`."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it calls Triton kernels on a CPU too
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.fused_encoder import EncoderOutput

    class Sparse(SparseCoder):
        def encode(self, x: Tensor) -> EncoderOutput:
            top = topk_encode(x - self.b_dec, self.encoder.weight, self.encoder.bias, self.cfg.k)
            return EncoderOutput(*top, None)

        def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
            return sparse_decode(TopK(top_acts, top_indices), self.W_dec, self.b_dec)

    torch.manual_seed(cell["seed"])
    config = SparseCoderConfig(num_latents=size.m, k=size.k)
    sae = (SparseCoder if native else Sparse)(size.d, config, dtype=torch.float32)
    optimizers, schedulers = _sparsify_optimizers(sae, size, cell)
    first = True

    def step(x: Tensor) -> float:
        nonlocal first
        if first:
            sae.b_dec.data = x.mean(0)
            first = False
        sae.set_decoder_norm_to_unit_norm()
        loss = sae(x).fvu  # auxk_alpha is 0 by default
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        return loss.item()

    def weights() -> dict[str, Tensor]:
        if cell["trainer"] == "sparsify-signum":
            optimizers[0].eval()  # the averaged weights, which are the trained ones
        encoder = sae.encoder
        return _named(encoder.weight, encoder.bias, sae.W_dec, sae.b_dec)

    return Peer(step, weights)


def _sparsify_optimizers(sae: Any, size: Size, cell: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The optimizers of `Trainer.__init__`, and their schedulers."""
    lr = cell["lr"]
    if cell["trainer"] == "sparsify-signum":
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
        optimizer.train()
        return [optimizer], []
    from sparsify.muon import Muon
    from transformers import get_linear_schedule_with_warmup

    matrices = [p for p in sae.parameters() if p.ndim >= 2]
    rest = [p for p in sae.parameters() if p.ndim < 2]
    muon, adam = Muon(matrices, lr=lr, ddp=True), torch.optim.Adam(rest, lr=lr)
    return [muon, adam], [
        get_linear_schedule_with_warmup(muon, 0, size.steps),
        get_linear_schedule_with_warmup(adam, size.warmup, size.steps),
    ]


def dictionary_learning(size: Size, cell: dict[str, Any], native: bool) -> Peer:
    """dictionary_learning: the whole of `TopKTrainer`, at a constant rate after its warm-up."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    class Sparse(AutoEncoderTopK):
        def encode(self, x: Tensor, **_: bool) -> tuple[TopK, Tensor, Tensor, None]:
            top = topk_encode(x - self.b_dec, self.encoder.weight, self.encoder.bias, size.k)
            return top, top.values, top.indices, None

        def decode(self, top: TopK) -> Tensor:
            return sparse_decode(top, self.decoder.weight.T.contiguous(), self.b_dec)

    trainer = TopKTrainer(
        steps=size.steps, activation_dim=size.d, dict_size=size.m, k=size.k, layer=0,
        lm_name="builtin", dict_class=AutoEncoderTopK if native else Sparse, lr=cell["lr"],
        warmup_steps=size.warmup, seed=cell["seed"], device="cpu",
    )  # fmt: skip
    taken = 0

    def step(x: Tensor) -> float:
        nonlocal taken
        taken += 1
        return trainer.update(taken - 1, x)

    def weights() -> dict[str, Tensor]:
        ae = trainer.ae
        return _named(ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec)

    return Peer(step, weights)


def sae_lens(size: Size, cell: dict[str, Any], native: bool) -> Peer:
    """SAELens: `TopKTrainingSAE` and `SAETrainer.step`, at a constant rate."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Sparse(TopKTrainingSAE):
        def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
            x, norm = step_input.sae_in, self.W_dec.norm(dim=-1)
            W_enc, W_dec = self.W_enc.T * norm[:, None], self.W_dec * (1 / norm)[:, None]
            x_hat, *codes = topk_sae(x, W_enc, self.b_enc * norm, W_dec, self.b_dec, size.k)
            loss = self.mse_loss_fn(x_hat, x).sum(dim=-1).mean()
            # The trainer only asks which latents fired, so one row tells as much as N.
            fired = torch.bincount(codes[1][codes[0] > 0], minlength=size.m).float()[None]
            return TrainStepOutput(x, x_hat, fired, fired, loss, {"mse_loss": loss})

    torch.manual_seed(cell["seed"])
    sae_config = TopKTrainingSAEConfig(d_in=size.d, d_sae=size.m, k=size.k)
    sae = (TopKTrainingSAE if native else Sparse)(sae_config)
    config = SAETrainerConfig(
        total_training_samples=size.steps * size.vectors, train_batch_size_samples=size.vectors,
        lr=cell["lr"], lr_end=cell["lr"] / 10, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> float:
        loss = trainer.step(x).loss.item()
        trainer.n_training_steps += 1
        return loss

    def weights() -> dict[str, Tensor]:
        norm = sae.W_dec.detach().norm(dim=-1)
        W_enc, W_dec = sae.W_enc.detach().T * norm[:, None], sae.W_dec / norm[:, None]
        return _named(W_enc, sae.b_enc * norm, W_dec, sae.b_dec)

    return Peer(step, weights)


BUILD = {
    "sparsify-signum": sparsify,
    "sparsify-muon": sparsify,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
}


def train(
    cell: dict[str, Any], vectors: Vectors
) -> tuple[dict[str, Tensor], list[float], float | None]:
    """The trained weights, the seconds of each step, and the largest relative difference of the
    losses that were checked; None if the library's own products were used."""
    about = vectors.about
    per_step = about.batch_tokens * len(about.layers)
    size = Size(about.d_in, cell["n_latents"], cell["k"], len(about.batches), per_step)
    native = size.steps >= _NO_AUXK_STEPS or size.steps * per_step >= _NO_AUXK_VECTORS
    differs = None if native else checked(size, cell, vectors)
    peer = BUILD[cell["trainer"]](size, cell, native)
    seconds = []
    for x, _ in vectors.batches():
        started = time.perf_counter()
        peer.step(standardized(x))
        seconds.append(time.perf_counter() - started)
    return peer.weights(), seconds, differs


def checked(size: Size, cell: dict[str, Any], vectors: Vectors) -> float:
    """The largest relative difference between the losses of the first steps with the library's own
    products and those with ours. Raises RuntimeError if they are not equal but for rounding."""
    losses = []
    for native in (True, False):
        peer = BUILD[cell["trainer"]](size, cell, native)
        batches = zip(range(_CHECKED_STEPS), vectors.batches(), strict=False)
        losses.append([peer.step(standardized(x)) for _, (x, _) in batches])
    differs = [abs(own - ours) / abs(own) for own, ours in zip(*losses, strict=True)]
    if not all(d <= most for d, most in zip(differs, _TOLERANCES, strict=False)):
        raise RuntimeError(
            f"{cell['trainer']} has the losses {losses[0]} with its own products and {losses[1]} "
            "with those that stand in for them"
        )
    return max(differs)


def _named(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
