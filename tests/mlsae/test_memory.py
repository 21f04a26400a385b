"""A run that would not fit is refused, with what it needs and what is free."""

import pytest
import torch

from bench.memory import peak_bytes
from mlsae import memory
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data.stream import Residuals
from mlsae.distributed import ALONE
from mlsae.errors import InputError
from mlsae.model import MLSAEConfig
from mlsae.training.init import init_stats
from mlsae.training.loop import train_step
from mlsae.training.start import begin, new_state
from mlsae.training.validation import validate

CONFIG = MLSAEConfig(d_in=512, n_latents=32768, k=32, layers=(0, 1, 2, 3, 4, 5))


def test_the_estimate_counts_weights_gradients_and_moments():
    """With one token per part: four float32 numbers for each of the 2 · M · D weights."""
    needed = memory.estimate([CONFIG], 1, torch.float32)
    weights = 2 * 512 * 32768
    assert needed == pytest.approx(16 * weights, rel=0.01)
    half = memory.estimate([CONFIG], 1, torch.bfloat16)
    assert half == pytest.approx(18 * weights, rel=0.01)


def test_an_optimizer_with_one_moment_needs_less():
    """12 bytes for each of the 2 · M · D weights, and one matrix's direction and update."""
    weights = 2 * 512 * 32768
    one = memory.estimate([CONFIG], 1, torch.float32, optimizers=("normuon", "adam"))
    assert one == pytest.approx(14 * weights + 8 * weights / 2, rel=0.01)
    both = memory.estimate([CONFIG], 1, torch.bfloat16, optimizers=("normuon", "normuon"))
    assert both == pytest.approx(14 * weights + 4 * weights / 2, rel=0.01)
    many = (16384, torch.float32, 1)  # a direction takes less than their activations
    adam, normuon = (memory.estimate([CONFIG], *many, (name, name)) for name in ("adam", "normuon"))
    assert adam - normuon == 4 * weights


def test_each_sae_adds_its_weights_and_the_largest_its_activations():
    smaller = MLSAEConfig(d_in=512, n_latents=8192, k=32, layers=CONFIG.layers)
    both = memory.estimate([CONFIG, smaller], 16384, torch.float32)
    alone = memory.estimate([CONFIG], 16384, torch.float32)
    assert both - alone == 16 * 2 * 512 * 8192


def test_each_shard_holds_its_part_of_the_weights():
    whole = memory.estimate([CONFIG], 1, torch.float32)
    assert memory.estimate([CONFIG], 1, torch.float32, shards=4) == pytest.approx(
        whole / 4, rel=0.01
    )
    # At the start, one of the two weight matrices is held whole for a moment.
    assert memory.estimate([CONFIG], 1, torch.float32, shards=64) > 4 * 512 * 32768


def test_the_flags_that_the_error_names_shrink_the_estimate():
    needed = memory.estimate([CONFIG], 16384, torch.float32)
    assert memory.estimate([CONFIG], 4096, torch.float32) < needed
    smaller = MLSAEConfig(d_in=512, n_latents=8192, k=32, layers=CONFIG.layers)
    assert memory.estimate([smaller], 16384, torch.float32) < needed
    fewer = MLSAEConfig(d_in=512, n_latents=32768, k=32, layers=(0,))
    assert memory.estimate([fewer], 16384, torch.float32) < needed


def test_the_estimate_is_the_sum_of_its_parts():
    parts = memory.parts([CONFIG], 16384, torch.float32)
    assert memory.estimate([CONFIG], 16384, torch.float32) == parts.total == sum(parts)
    assert parts.expected == parts.total - parts.dead
    vectors = 6 * 16384
    copies = 4 * vectors * 512  # by hand: 12 of them, 60 B per selection, keys, AuxK
    assert parts.residuals + parts.activations + parts.validation == (
        12 * copies + 60 * vectors * 32 + memory._KEY_BYTES
    )
    assert parts.dead == memory._AUX_BYTES


@pytest.mark.parametrize(
    ("n_latents", "k", "k_max", "tokens", "n_layers"),
    [(1024, 32, None, 1024, 2), (8192, 16, None, 512, 3), (2048, 16, 64, 1024, 2)],
)
def test_what_is_told_of_a_cpu_is_what_torch_allocates(n_latents, k, k_max, tokens, n_layers):
    """Start, a step and validation, each by torch's profiler: within 15 % of the formula."""
    cpu, d_in = torch.device("cpu"), 96
    activation = "topk" if k_max is None else "batchtopk"
    config = TrainConfig(
        sae=SAEConfig(n_latents=n_latents, k=k, k_max=k_max, activation=activation),
        optimizer="adam",
    )
    sae = MLSAEConfig(d_in, n_latents, k, tuple(range(n_layers)), k_max=k_max)
    state = new_state(config, sae, cpu, ALONE, config.tokens)
    x, mask = torch.randn(n_layers, tokens, d_in), torch.ones(tokens, dtype=torch.bool)

    def start():
        begin(config, state, init_stats(state.mlsae, iter([x[:, mask].float()])))

    def validation():
        validate([state.mlsae], ((x[:, mask].float(), x[:, :0]) for _ in range(2)))

    def step():
        train_step([state], [Residuals(x, mask)], tokens)

    measured = [peak_bytes(start, cpu)]
    step()  # makes the moments
    measured += [peak_bytes(step, cpu), peak_bytes(validation, cpu) + x.nbytes]
    vectors = n_layers * tokens
    sizes = memory._Sizes(d_in, n_latents, k_max or k, k, tokens, vectors, vectors, 4, 4)
    assert memory._live(sizes) == pytest.approx(measured, rel=0.15)


def test_on_a_cpu_a_smaller_part_needs_less():
    def needed(micro_tokens):
        return memory.parts(
            [CONFIG], micro_tokens, torch.float32, device_type="cpu", batch_tokens=2048
        )

    assert needed(1024).total < needed(2048).total
    assert needed(1024).state == needed(2048).state == 16 * 2 * 512 * 32768


def test_too_little_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**9)
    memory.check_memory(10**9, torch.device("cpu"))
    with pytest.raises(InputError, match=r"needs about 2\.0 GB of cpu memory, and 1\.0 GB is free"):
        memory.check_memory(2 * 10**9, torch.device("cpu"))


def test_the_workspaces_are_those_of_the_kernels():
    """The estimate has copies of the numbers, because importing the kernels imports Triton."""
    pytest.importorskip("triton")
    from sparse_topk import auxk
    from sparse_topk.triton_ops.topk import encode

    assert memory._KEY_BYTES == encode._KEY_BYTES
    assert auxk._PIECE_BYTES == memory._AUX_BYTES


def test_free_and_peak_memory_of_this_machine_are_plausible():
    free = memory.available(torch.device("cpu"))
    assert free is None or 10**8 < free < 10**14
    assert 10**7 < memory.peak(torch.device("cpu")) < 10**12
