"""A run that would not fit is refused, with what it needs and what is free."""

import pytest
import torch

from mlsae import memory
from mlsae.errors import InputError
from mlsae.model import MLSAEConfig

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
