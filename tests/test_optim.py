"""`UnitNormAdam` against torch's own Adam with the projection and the norm written out."""

import pytest
import torch

from sparse_topk import UnitNormAdam, torch_ops


def gradients(shape, steps=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize("block_bytes", [1, 200, 2**20])
def test_on_the_sphere_it_is_project_adam_normalise(monkeypatch, block_bytes):
    monkeypatch.setattr(torch_ops, "_ADAM_BLOCK_BYTES", block_bytes)
    start = torch.nn.functional.normalize(torch.randn(11, 7, dtype=torch.float64), dim=1)
    ours, truth = (start.clone().requires_grad_() for _ in range(2))
    optimizer = UnitNormAdam([ours], lr=0.1, unit_norm=True)
    adam = torch.optim.Adam([truth], lr=0.1, eps=6.25e-10)
    for grad in gradients(start.shape):
        ours.grad = grad.clone()
        optimizer.step()
        truth.grad = grad - (grad * truth.detach()).sum(1, keepdim=True) * truth.detach()
        adam.step()
        with torch.no_grad():
            truth /= truth.norm(dim=1, keepdim=True)
        assert torch.equal(ours.grad, grad), "the gradient must be left as it was"
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_off_the_sphere_it_is_adam(shape):
    start = torch.randn(shape, dtype=torch.float64)
    ours, truth = (start.clone().requires_grad_() for _ in range(2))
    optimizer = UnitNormAdam([ours], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    adam = torch.optim.Adam([truth], lr=0.1, betas=(0.8, 0.95), eps=1e-3)
    for grad in gradients(shape):
        ours.grad, truth.grad = grad.clone(), grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, truth)


def test_it_resumes_from_its_state():
    start = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    grads = [g.float() for g in gradients((4, 3), 6)]

    def run(p, optimizer, some):
        for grad in some:
            p.grad = grad.clone()
            optimizer.step()

    straight = start.clone().requires_grad_()
    run(straight, UnitNormAdam([straight], lr=0.1, unit_norm=True), grads)
    first = start.clone().requires_grad_()
    optimizer = UnitNormAdam([first], lr=0.1, unit_norm=True)
    run(first, optimizer, grads[:3])
    second = first.detach().clone().requires_grad_()
    resumed = UnitNormAdam([second], lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, grads[3:])
    assert torch.equal(second, straight)


def test_bad_arguments_are_named():
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        UnitNormAdam([p], lr=-1)
    with pytest.raises(ValueError, match="betas"):
        UnitNormAdam([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="matrix"):
        UnitNormAdam([p], unit_norm=True)
