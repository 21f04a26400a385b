"""Kernels run on the GPU where there is one, else under Triton's interpreter. A failure is printed
at once, since a run that is cut off has no summary."""

import os
import shutil
import tempfile

# Read when CUDA starts: deterministic algorithms, which some tests ask for, need it in cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tests need no network, and must not wait for one. Read when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Processes that share the cores take their share of threads: more of them wait for one another.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import pytest
import torch

# Triton reads it at its first import, so it is set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Programs keep tokens between runs: those of the tests, for the session, in a folder of their own,
# which is not the user's. So the text of most of them is tokenized once.
_OWN_CACHE = None
if "MLSAE_TOKEN_CACHE" not in os.environ:  # the processes that xdist starts share the first one's
    os.environ["MLSAE_TOKEN_CACHE"] = _OWN_CACHE = tempfile.mkdtemp(prefix="mlsae-tokens-")

try:
    import hypothesis
except ImportError:  # then the files that use it say so
    pass
else:
    # A kernel's first call compiles it, which takes longer than an example may by default.
    hypothesis.settings.register_profile("kernels", deadline=None)
    hypothesis.settings.load_profile("kernels")


@pytest.fixture(scope="session", autouse=True)
def no_matrix_units():
    """Transformers compute in float32 in this process, whichever CPU it runs on: tests compare what
    training, evaluation and analysis read, to a few roundings."""
    from mlsae.data import dtypes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def team():
    """Four processes in a gloo group, for all tests that want them."""
    from tests.helpers.team import Team

    with Team(4) as processes:
        yield processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Leave a GPU's memory to the tests of other processes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Announcer:
    """Prints each failure when it is reported. Under xdist the reports come to the main process,
    and a worker prints nothing."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED at {report.when}: {report.nodeid}", red=True)
            self.terminal.write_line(report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"NOT COLLECTED: {report.nodeid}", red=True)
            self.terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Announcer(terminal), "announcer")


def pytest_unconfigure() -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
