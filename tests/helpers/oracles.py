"""Oracles: slow and simple computations that results are compared with."""

import torch
import torch.nn.functional as F


def stable_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest of each row by sorting all of it: ties to the smaller index, then indices
    ascending. scores (N, M) → values and indices (N, K)."""
    indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    return scores.gather(1, indices), indices


def check_topk(
    values: torch.Tensor,
    indices: torch.Tensor,
    scores: torch.Tensor,
    relu: bool,
    rtol: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assert that values and indices (N, K) are `stable_topk`'s of scores (N, M); with `relu` of
    ReLU(scores), where any latents may have the values 0. Returns what was expected."""
    scores = scores.to(values.device)
    m = scores.shape[1]
    expected, expected_indices = stable_topk(scores, indices.shape[1])
    assert indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < m)).all()
    assert (indices.diff(dim=1) > 0).all()
    if relu:  # each latent's value, 0 where it is not chosen
        dense = torch.zeros_like(scores)
        actual = dense.to(values.dtype).scatter(1, indices, values)
        expected = dense.scatter(1, expected_indices, expected.relu())
    else:
        assert torch.equal(indices, expected_indices)
        actual = values
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=0, equal_nan=True
    )
    return expected, expected_indices


def keys_of(scores: torch.Tensor, group: int, n_keys: int, relu: bool) -> torch.Tensor:
    """Each group's largest keys, the largest first, as `triton_ops.topk.product` defines them.
    scores (N, M) float32 → (N, T, J) int32."""
    if relu:
        bits = scores.relu().view(torch.int32).long() & 0x7FFFFFFF
    else:
        bits = (scores + 0.0).view(torch.int32).long()
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) - 0x400000
        bits = torch.where(bits < -(2**31), bits + 2**32, bits)
    member = torch.arange(scores.shape[1], device=scores.device) % group
    keys = (bits & -group) | (group - 1 - member)
    keys = F.pad(keys, (0, -len(member) % group), value=-(2**31)).unflatten(1, (-1, group))
    return keys.sort(dim=2, descending=True).values[..., :n_keys].transpose(1, 2).int().contiguous()
