"""The one door to the ops: which backend computes, the ops under torch.compile, and the whole SAE
on the Triton backend.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import inspect
import subprocess
import sys

import pytest
import torch

from sparse_topk import (
    SparseTopKSAE,
    ops,
    reference,
    torch_ops,
    training_ops,
    triton_ops,
)

N, D, M, K = 7, 12, 40, 5
CPU = torch.zeros(1)


def test_torch_on_a_cpu_and_triton_on_a_gpu(monkeypatch):
    monkeypatch.delenv("SPARSE_TOPK_BACKEND", raising=False)
    assert ops.backend_for(CPU) is torch_ops
    assert ops.backend_name("cpu") == "torch"
    assert ops.backend_name("cuda:1") == ops.backend_name(torch.device("cuda")) == "triton"


@pytest.mark.gpu
def test_a_gpu_tensor_gets_triton():
    assert ops.backend_for(CPU.cuda()) is triton_ops


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "torch")
    assert ops.backend_name("cuda") == "torch"
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    assert ops.backend_name("cpu") == "triton"
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "Torch")
    for ask in (lambda: ops.backend_for(CPU), lambda: ops.backend_name("cpu")):
        with pytest.raises(ValueError, match=r"SPARSE_TOPK_BACKEND must be .* got 'Torch'"):
            ask()


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    code = (
        "import torch; from sparse_topk import ops\nprint(ops.backend_for(torch.zeros(1)).__name__)"
    )

    def run():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run().stdout == "sparse_topk.triton_ops\n"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused = run()
    assert refused.returncode
    assert (
        "RuntimeError: SPARSE_TOPK_BACKEND is 'triton', and the tensor is on cpu" in refused.stderr
    )


def test_both_backends_have_the_same_ops():
    """Equal names, arguments and defaults; a backend may have more keywords, with defaults. Their
    results are tested elsewhere."""
    names = set(triton_ops.__all__) - {"CSC"}
    assert triton_ops.CSC is torch_ops.CSC
    assert names == {
        name
        for name, value in vars(torch_ops).items()
        if inspect.isfunction(value)
        and value.__module__.startswith("sparse_topk.torch_")
        and name[0] != "_"
    }
    for name in names:
        in_triton, in_torch = (
            inspect.signature(getattr(module, name)).parameters
            for module in (triton_ops, torch_ops)
        )
        assert {key: in_triton.get(key) for key in in_torch} == dict(in_torch), name
        assert [key for key in in_triton if key in in_torch] == list(in_torch), name
        for key in in_triton.keys() - in_torch.keys():
            assert in_triton[key].kind is inspect.Parameter.KEYWORD_ONLY, (name, key)
            assert in_triton[key].default is not inspect.Parameter.empty, (name, key)


def test_every_op_goes_through_a_door():
    for name in set(triton_ops.__all__) - {"CSC"}:
        assert callable(getattr(ops, name, None) or getattr(training_ops, name)), name
    for name in ("standardize", "decode_error", "reconstruction_error"):
        door, behind = (
            inspect.signature(getattr(module, name)) for module in (training_ops, torch_ops)
        )
        assert door == behind, name


def test_the_optimizer_runs_on_the_backend_of_its_weight(monkeypatch):
    """With every argument passed on, and the names and defaults of `torch_ops`."""
    for name in ("adam_unit_norm_", "tangent_momentum_", "apply_rows_"):
        door, behind, triton = (
            inspect.signature(getattr(module, name)).parameters
            for module in (ops, torch_ops, triton_ops)
        )
        parameters = [(key, p.kind, p.default) for key, p in door.items()]
        for other in (behind, triton):
            assert parameters == [(key, p.kind, p.default) for key, p in other.items()]
    received = {}
    monkeypatch.setattr(torch_ops, "adam_unit_norm_", lambda *args, **more: received.update(more))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "unit_norm": True}
    settings |= {"grad_scale": CPU, "shadow": CPU}
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "torch")
    ops.adam_unit_norm_(CPU, CPU, CPU, CPU, 1, **settings)
    assert received == settings


def case(bias=True):
    torch.manual_seed(0)
    sae = SparseTopKSAE(D, M, K, bias=bias)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return sae, torch.randn(N, D, requires_grad=True)


def gradients(module, sae, x):
    """The output, and the gradients of a loss by all inputs, none of which is constant."""
    out = module(x)
    inputs = [x, *sae.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.filterwarnings("default")  # torch's compiler uses what torch deprecates
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("aot_eager", None), ("aot_eager", torch.bfloat16), ("inductor", None)],
)
def test_compiled_is_the_same_without_a_graph_break(backend, dtype):
    """Output and every gradient; also under autocast, where the output has autocast's dtype."""
    sae, x = case()

    def autocast(module):
        def forward(x):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return module(x)

        return forward

    expected = gradients(autocast(sae), sae, x)
    assert expected[0].dtype == (dtype or torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(sae, backend=backend, fullgraph=True)
    for compiled_grad, grad in zip(gradients(autocast(compiled), sae, x), expected, strict=True):
        torch.testing.assert_close(compiled_grad, grad)


def test_fake_results_have_the_real_shapes_and_dtypes():
    sae, x = case()
    x, W = x.detach(), sae.W_enc.detach()
    values, indices = ops.topk_encode(x, W, None, K)
    csc = ops.csc_by_latent(indices, M)
    operators = torch.ops.sparse_topk
    for dtype in (torch.float32, torch.bfloat16):
        x, W, values = x.to(dtype), W.to(dtype), values.to(dtype)
        for operator, arguments in (
            (operators.topk_encode, (x, W, W[:, 0], K)),
            (operators.topk_encode, (x, W, None, K, True)),
            (operators.gather_sum, (values, indices, W)),
            (operators.gather_dot, (x, indices, W)),
            (operators.csc_by_latent, (indices, M)),
            (operators.scatter_outer, (values, *csc, x)),
            (operators.sum_by_latent, (values, indices, *csc)),
        ):
            torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_triton_gives_the_gradients_of_dense_autograd(monkeypatch, bias):
    """The whole module on the kernels, in Triton's interpreter if there is no GPU."""
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae, x = case(bias)
    sae = sae.to(device)
    x = x.detach().to(device).requires_grad_()

    def dense(x):
        return reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, K)

    actual, expected = gradients(sae, sae, x), gradients(dense, sae, x)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
