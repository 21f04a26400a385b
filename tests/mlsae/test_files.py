"""A file is replaced as a whole or not at all."""

import os

import pytest

from mlsae.errors import InputError
from mlsae.files import check_folder, replacing, write_file


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, b"old")
    with replacing(path) as partial:
        assert partial == tmp_path / "a.json.partial"
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, b"old")

    def interrupted():
        with replacing(path) as partial:
            partial.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_does_not_sync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_file(path, b"old")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="must be a file to be replaced, and is a folder"):
        write_file(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_to_write_to_is_there_or_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("", "new", "new/er", "link", "link/new", "a b [c]*?"):
        check_folder(tmp_path / name)
    for name in ("file", "file/in", "file/in/side", "loop", "loop/x", "dangling", "x" * 300):
        with pytest.raises(InputError, match="DST must be a folder"):
            check_folder(tmp_path / name, "DST")
    (tmp_path / "new").mkdir()
    check_folder(tmp_path, files=["file", "other"])
    with pytest.raises(InputError, match="new is itself a folder; remove it"):
        check_folder(tmp_path, files=["file", "new"])


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    (tmp_path / "own").mkdir()
    check_folder(tmp_path / "own" / "new")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(InputError, match=f"{tmp_path} may not be written to"):
            check_folder(folder)
