"""A run to serve: an untrained MLSAE of a small random model, with a made-up analysis; and a server
of it, in a thread of this process."""

import threading
import time
from contextlib import contextmanager

import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.app.__main__ import AppConfig
from mlsae.app.guard import LOOPBACK, Guard
from mlsae.app.pages import content_policy
from mlsae.app.routes import make_app
from mlsae.app.runs import Runs
from mlsae.app.serve import _listen, _Server
from tests.helpers.make_run import make_run
from tests.helpers.models import save_gpt2

D, M, K, L = 32, 256, 4, 2


def app_run(folder, analyzed=True):
    """The folder of a run, in `folder`."""
    model = save_gpt2(folder / "model")
    run = folder / "run"
    if analyzed:
        make_run(run, M, L, expansion=M // D, examples=1, evaluated=False, trained=False)
    torch.manual_seed(0)
    MLSAE(MLSAEConfig(D, M, K, tuple(range(L)), model=model)).save_pretrained(run)
    return run


def guarded(runs, token=None):
    """The application that the program serves on this machine."""
    return Guard(make_app(runs), LOOPBACK, token, content_policy())


@contextmanager
def served(*folders):
    """Serve runs in this block: their `Runs`, and the port."""
    runs = Runs(AppConfig(folders, device="cpu"))
    listener = _listen("127.0.0.1", 0)
    server = _Server(guarded(runs), runs)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield runs, listener.getsockname()[1]
    finally:
        runs.closing.set()
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
