"""What Linux has and Windows has not: no module asks for it before it is used."""

import os
import subprocess
import sys
import types

import pytest
import torch

from mlsae import memory
from mlsae.files import sync_folder

# Hidden from this project only: other packages ask for the platform, which is still Linux here.
IMPORT_ALL = """
import builtins, importlib, pkgutil
import mlsae, sparse_topk

for package in (mlsae, sparse_topk):  # as if neither had been imported
    for name in [n for n in __import__("sys").modules if n.split(".")[0] == package.__name__]:
        del __import__("sys").modules[name]

HIDDEN = {"resource", "fcntl", "pwd", "grp", "termios", "posix"}
whole_import = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ("mlsae", "sparse_topk") and level == 0 and name in HIDDEN:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return whole_import(name, globals, locals, fromlist, level)

builtins.__import__ = without
for root in ("mlsae", "sparse_topk"):
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
        if not module.name.startswith("sparse_topk.triton_ops"):  # Triton is for Linux only
            importlib.import_module(module.name)
            print(module.name)
"""


def test_every_module_is_imported_without_what_only_unix_has():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    names = set(result.stdout.split())
    assert {"mlsae.train", "mlsae.analyze", "mlsae.training.run", "sparse_topk.allocator"} <= names


def test_peak_memory_is_what_windows_tells(monkeypatch):
    told = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=123_456_789))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: told))
    assert memory.peak(torch.device("cpu")) == 123_456_789


def test_folders_are_not_synced_where_they_cannot_be_opened(tmp_path, monkeypatch):
    def refused(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        sync_folder(tmp_path)
    monkeypatch.setattr("mlsae.files.os", types.SimpleNamespace(name="nt", open=refused))
    sync_folder(tmp_path)
