"""Inputs of `standardize` and `decode_error`, and what their results must be.

Legend: L layers, N tokens per layer, D inputs, M latents, K active latents per token.
"""

import torch

from sparse_topk import training_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, N, D, M, K = 2, 11, 12, 30, 5
EPS = 1e-5


def residuals(shape=(L, N, D), seed=0, offset=0.0, dtype=torch.float32):
    """x with a mean per layer and dimension, a center, and a mask that leaves out a third."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + torch.randn(shape[0], 1, shape[2])
    center = torch.randn(shape[2], generator=generator).to(DEVICE)
    mask = torch.rand(shape[1], generator=generator) > 1 / 3
    return (x + offset).to(DEVICE, dtype), center, mask.to(DEVICE)


def codes(rows, d=D, k=K, seed=0, dtype=torch.float32):
    """values, indices, W, b."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, k, generator=generator).to(DEVICE, dtype)
    indices = torch.randint(M, (rows, k), generator=generator).to(DEVICE)
    W, b = torch.randn(M, d, generator=generator), torch.randn(d, generator=generator)
    return values, indices, W.to(DEVICE, dtype), b.to(DEVICE)


def doubles(*tensors):
    return tuple(None if t is None else t.cpu().double() for t in tensors)


def assert_rounds_only(ours, truth, magnitude, rounds=8):
    """|ours − truth| is at most `rounds` roundings of `magnitude` in float32 (float64 if `ours` and
    the inputs are), and one of the result."""
    error = (ours.cpu().double() - truth).abs()
    bound = rounds * magnitude + torch.finfo(ours.dtype).eps * truth.abs()
    if ours.dtype == torch.float16:
        bound = bound + 2**-24  # its smallest step, where it is subnormal
    assert (error <= bound).all(), f"{error.max()} where {bound.flatten()[error.argmax()]} is due"


def assert_moments(found, truth, per_element, eps):
    """Of vectors `truth` (L, N', D), each of whose elements may be off by `per_element`."""
    n_layers, n, d = truth.shape
    assert found.n_tokens.dtype == found.mean.dtype == found.sq_dev.dtype == torch.float64
    assert found.n_tokens.item() == n
    assert found.mean.shape == found.sq_dev.shape == (n_layers, d)
    mean = truth.sum(1) / max(n, 1)
    deviations = truth - mean[:, None]
    spread = deviations.abs().sum(1)
    assert_rounds_only(found.mean, mean, eps * spread + per_element.sum(1) / max(n, 1))
    off = (deviations.abs() * (per_element + eps * deviations.abs())).sum(1)
    # Blocks' sums are about a token of their own, which may be far from the mean.
    assert_rounds_only(found.sq_dev, deviations.square().sum(1), off + eps * spread.square())


def assert_standardizes(x, center, mask, dtype=torch.float32, eps=EPS):
    """All results, against float64."""
    centered, mean, std, found = training_ops.standardize(x, center, mask, dtype, eps)
    (n_layers, n, d), acc_dtype = x.shape, torch.promote_types(x.dtype, torch.float32)
    assert centered.shape == (n_layers * n, d)
    assert centered.dtype == dtype
    assert mean.shape == std.shape == (n_layers * n,)
    assert mean.dtype == std.dtype == acc_dtype
    x, center = doubles(x, torch.zeros(d) if center is None else center)
    keep = torch.ones(n, dtype=torch.bool) if mask is None else mask.cpu()
    ulp = torch.finfo(acc_dtype).eps
    centered, mean, std = centered.cpu().view(n_layers, n, d), mean.cpu(), std.cpu()
    mean, std = mean.view(n_layers, n), std.view(n_layers, n)
    assert not centered[:, ~keep].any()
    assert not mean[:, ~keep].any()
    assert (std[:, ~keep] == (eps is None)).all()
    kept = x[:, keep]
    true_mean = kept.mean(2, keepdim=True)
    true_std = ((kept - true_mean).square().sum(2, keepdim=True) / (d - 1)).sqrt()
    size = kept.abs().amax(2, keepdim=True)
    off = ulp * true_std + (ulp * size).square() / true_std  # it is about the rounded mean
    if eps is None:
        true_std, true_mean, off, size, eps = torch.ones_like(true_std), 0 * true_mean, 0, 0, 0
    scale = 1 / (true_std + eps)
    assert_rounds_only(mean[:, keep, None], true_mean, ulp * size, 2)
    assert_rounds_only(std[:, keep, None], true_std, off)
    standardized = (kept - true_mean) * scale
    off = ulp * (standardized.abs() + size * scale + center.abs())
    assert_rounds_only(centered[:, keep], standardized - center, off, 4)
    assert_moments(found, kept, 0 * kept, ulp)


def assert_decodes(code, x, mean, std, mask, eps=EPS):
    """All results, against float64."""
    error, sq_error, found = training_ops.decode_error(*code, x, mean, std, mask, eps)
    (n_layers, n, d), dtype = x.shape, code[2].dtype
    assert error.shape == (n_layers * n, d)
    assert error.dtype == dtype
    assert sq_error.shape == (n_layers,)
    assert sq_error.dtype == torch.float64
    values, _, W, b, x, mean, std = doubles(*code, x, mean, std)
    indices = code[1].cpu()
    b = torch.zeros(d, dtype=torch.float64) if b is None else b
    keep = torch.ones(n, dtype=torch.bool) if mask is None else mask.cpu()
    by_layer = lambda t: t.unflatten(0, (n_layers, n))[:, keep]  # noqa: E731
    mean, std = by_layer(mean[:, None]), by_layer(std[:, None])
    x_hat = by_layer((values[..., None] * W[indices]).sum(1) + b)
    size = by_layer((values[..., None] * W[indices]).abs().sum(1) + b.abs())
    missed = x[:, keep] - x_hat * std - mean
    size = (x[:, keep] - mean).abs() + size * std
    ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * indices.shape[1]
    scale = 1 / (std + (eps or 0))
    error = error.cpu().view(n_layers, n, d)
    assert not error[:, ~keep].any()
    assert_rounds_only(error[:, keep], missed * scale, ulp * size * scale, 2)
    assert_rounds_only(
        sq_error, missed.square().sum((1, 2)), (ulp * size * missed.abs()).sum((1, 2))
    )
    assert_moments(found, missed * scale, ulp * size * scale, ulp)


def flat(results):
    return [u for t in results for u in ([t] if isinstance(t, torch.Tensor) else t)]


def run_all(x, center, mask, eps=EPS, code=None):
    """The results of both ops, one after the other."""
    code = codes(len(x) * x.shape[1], x.shape[2]) if code is None else code
    before = training_ops.standardize(x, center, mask, torch.float32, eps)
    after = training_ops.decode_error(*code, x, *before[1:3], mask, eps)
    return flat((*before, *after))
