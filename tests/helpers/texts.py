"""Datasets on disk, for the tests that read text."""

import json


def write(path, texts):
    """Write the texts in the format of the path's suffix; a path without one becomes a folder with
    a .txt file per text."""
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "\n".join(json.dumps(record) for record in records)
    if path.suffix == "":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text)
    elif path.suffix == ".txt":
        path.write_text(texts[0])
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)
