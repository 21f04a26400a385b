"""Which module computes, and that it says so when it cannot."""

import inspect
import subprocess
import sys

import pytest
import torch

from sparse_topk import backend, torch_ops, triton_ops

CPU = torch.zeros(1)


def test_torch_on_a_cpu_and_triton_on_a_gpu(monkeypatch):
    monkeypatch.delenv("SPARSE_TOPK_BACKEND", raising=False)
    assert backend.ops_for(CPU) is torch_ops
    assert backend.backend_name("cpu") == "torch"
    assert backend.backend_name("cuda:1") == backend.backend_name(torch.device("cuda")) == "triton"


@pytest.mark.gpu
def test_a_gpu_tensor_gets_triton():
    assert backend.ops_for(CPU.cuda()) is triton_ops


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "torch")
    assert backend.backend_name("cuda") == "torch"
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    assert backend.backend_name("cpu") == "triton"
    monkeypatch.setenv("SPARSE_TOPK_BACKEND", "Torch")
    for ask in (lambda: backend.ops_for(CPU), lambda: backend.backend_name("cpu")):
        with pytest.raises(ValueError, match=r"SPARSE_TOPK_BACKEND must be .* got 'Torch'"):
            ask()


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    code = (
        "import torch; from sparse_topk import backend\n"
        "print(backend.ops_for(torch.zeros(1)).__name__)"
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


def test_both_have_the_same_verbs():
    """Names, arguments and defaults; a backend may have more keywords, with defaults. What they
    compute is tested elsewhere."""
    verbs = set(triton_ops.__all__) - {"LatentOrder"}
    assert triton_ops.LatentOrder is torch_ops.LatentOrder
    assert verbs == {
        name
        for name, value in vars(torch_ops).items()
        if inspect.isfunction(value) and inspect.getmodule(value) is torch_ops and name[0] != "_"
    }
    for name in verbs:
        ours, theirs = (
            inspect.signature(getattr(m, name)).parameters for m in (triton_ops, torch_ops)
        )
        assert {key: ours.get(key) for key in theirs} == dict(theirs), name
        assert [key for key in ours if key in theirs] == list(theirs), name
        for key in ours.keys() - theirs.keys():
            assert ours[key].kind is inspect.Parameter.KEYWORD_ONLY, (name, key)
            assert ours[key].default is not inspect.Parameter.empty, (name, key)
