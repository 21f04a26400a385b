"""The script that tries every architecture of transformers, on some of them."""

import pytest
import torch

from scripts import architectures
from scripts.architectures import NOT_BUILT, OK, REFUSED, WRONG, Result, page, try_architecture

READ = (
    "gpt2", "gpt_neox", "llama", "gemma2", "qwen2", "phi", "opt",  # the families of the other tests
    "mamba", "jamba", "bloom", "falcon", "openai-gpt", "modernbert-decoder", "granite_swa",
    "deepseek_v3", "gpt_oss", "zamba2", "gemma3", "qwen2_vl", "emu3",
)  # fmt: skip
REFUSALS = {
    "gemma3n_text": "block 0 returns a tensor (4, 1, 4, 32)",
    "reformer": "block 0 returns a ReformerOutput",
    "hrm_text": "has 2 (L_module.layers, H_module.layers)",
    "xlnet": "block 0 returns a tensor (4, 1, 32)",
    "bart": "is an encoder-decoder (bart)",
    "blip-2": "must run on text alone",
    "mllama": "0 1 2",
}


pytestmark = pytest.mark.filterwarnings("ignore")  # those of many architectures


@pytest.mark.parametrize("name", READ)
def test_an_architecture_is_read(name):
    assert try_architecture(name).status == OK


@pytest.mark.parametrize("name", REFUSALS)
def test_an_architecture_is_refused_with_a_sentence(name):
    result = try_architecture(name)
    assert result.status == REFUSED
    assert REFUSALS[name] in result.reason


def test_what_differs_from_hooks_is_found(monkeypatch):
    read = architectures.ResidualReader.__call__
    monkeypatch.setattr(
        architectures.ResidualReader, "__call__", lambda self, ids: read(self, ids).roll(1, 0)
    )
    assert try_architecture("llama") == Result(
        "llama", WRONG, "residuals differ from those of hooks"
    )


def test_what_differs_from_hidden_states_is_found(monkeypatch):
    """As if another list of modules were taken for the blocks."""
    monkeypatch.setattr(
        "mlsae.data.residuals.find_blocks",
        lambda model: torch.nn.ModuleList(b.self_attn for b in model.model.layers),
    )
    result = try_architecture("llama")
    assert (result.status, result.reason) == (
        WRONG,
        "residuals differ from the hidden states of transformers",
    )


def test_a_fault_of_ours_is_a_line_of_the_table(monkeypatch):
    def fail(*_args):
        raise KeyError("layer")

    monkeypatch.setattr(architectures, "read", fail)
    assert try_architecture("llama") == Result("llama", WRONG, "KeyError: 'layer'")


def test_an_architecture_that_hangs_or_ends_the_process_does_not_end_the_script(monkeypatch):
    monkeypatch.setattr(architectures, "_SECONDS", 0.2)
    monkeypatch.setattr(
        architectures, "try_architecture", lambda _: torch.multiprocessing.Event().wait()
    )
    assert architectures.try_guarded("llama").status == NOT_BUILT
    monkeypatch.setattr(architectures, "_SECONDS", 20)
    monkeypatch.setattr(architectures, "try_architecture", lambda _: architectures.sys.exit(3))
    assert architectures.try_guarded("llama") == Result("llama", WRONG, "the process ended")
    monkeypatch.setattr(architectures, "try_architecture", lambda name: Result(name, OK))
    assert architectures.try_guarded("llama") == Result("llama", OK)


def test_the_page_has_a_row_for_each_architecture():
    results = [Result("a", OK), Result("b", REFUSED, "one | two <x>"), Result("c", OK, "all")]
    text = page(results)
    assert "3 in all: 2 ok, 1 refused." in text
    assert "| a | ok |\n| b | refused: one / two &lt;x> |\n| c | ok: all |" in text
