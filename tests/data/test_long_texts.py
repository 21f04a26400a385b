"""Texts too long to be held: what their parts join to is what the whole would be."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlsae.data import columnar, records
from mlsae.data.local_files import LocalFiles
from mlsae.data.long_lines import NotTextError, last_text, parts_of_text
from mlsae.data.records import Bad

UTF_8 = st.text(st.characters(exclude_categories=["Cs"]))
TEXTS = UTF_8 | st.lists(st.sampled_from(["\\", '"', "\n", "é", "日", "🎉", "u0041", "a"])).map(
    "".join
)
SCALARS = TEXTS | st.none() | st.booleans() | st.integers() | st.floats()
VALUES = st.recursive(
    SCALARS, lambda each: st.lists(each) | st.dictionaries(TEXTS, each), max_leaves=6
)
SPACES = st.sampled_from(["", " ", "\t \r"])


@st.composite
def lines(draw):
    """A line of an object, in which keys may repeat, and any character may be escaped."""

    def written(value):
        return json.dumps(value, ensure_ascii=draw(st.booleans()))

    keys = TEXTS | st.sampled_from(["text", "te\\u0078t", "id"])
    members = draw(st.lists(st.tuples(keys, VALUES), max_size=3))
    members.insert(draw(st.integers(0, len(members))), ("text", draw(TEXTS)))
    space = draw(SPACES)
    shown = [f"{space}{written(key)}{space}:{space}{written(value)}" for key, value in members]
    return f"{space}{{{','.join(shown)}{space}}}{space}".encode()


def long_text(line, size):
    """What the parts of a line of bytes make, that comes in chunks of `size`."""

    def chunks():
        return (line[i : i + size] for i in range(0, len(line), size))

    which = last_text(chunks(), "text")
    if which is None:
        raise NotTextError
    return "".join(parts_of_text(chunks(), "text", which))


@settings(max_examples=100)
@given(lines(), st.integers(1, 20))
@example(b'{"text": "a", "id": "b", "te\\u0078t": "c"}', 5)
@example(b'{"text": "a", "text": null}', 5)
def test_a_long_line_has_the_text_that_json_finds(line, size):
    members = json.loads(line, object_pairs_hook=list)
    texts = [value for key, value in members if key == "text"]
    if all(isinstance(text, str) for text in texts):
        assert long_text(line, size) == json.loads(line)["text"]
    else:
        with pytest.raises(NotTextError):
            long_text(line, size)


@pytest.mark.parametrize(
    "escaped",
    [
        r"\ud83c\udf89", r"a\ud83c", r"\udf89\ud83c", r"\ud83c\ud83c\udf89", r"\ud83cA\udf89",
        r"\\ud83c\udf89", r"\ud83c\n", r"\ud83cA", r"\uD83C\uDF89\u00e9", r"\/\b\f\r\t\"\\",
    ],
)  # fmt: skip
def test_escaped_surrogates_make_a_character_only_as_a_pair(escaped):
    line = f'{{"text": "{escaped}", "b": "{escaped}"}}'.encode()
    for size in range(1, len(line) + 1):
        assert long_text(line, size) == json.loads(line)["text"], size


BROKEN = [
    b'{"text": "a"', b'{"text": "a"}}', b'{"text": "a",}', b'{"text": "a" "b": 1}',
    b'{"text": "a\x01"}', b'{"text": "\\x"}', b'{"text": "\\ud83"}', b'{"text": "a", "b": 01}',
    b'{"text": "a", "b": tru}', b'{"text": "a", "b": [1 2]}', b'{"text": "a", b: 1}', b"", b"   ",
    b'{"text": "\xff"}', b'{"text": "a"}\xc3', b'{"text": "a", "b": -}', b'{"text": "a", "b": "}',
    b'{"text": "a", "b": ' + 10**5 * b"[" + 10**5 * b"]" + b"}", b'{"text": "a", "b": [,]}',
    b'{"text": "a", "b": ' + 5000 * b"1" + b"}", b'{"text" "a"}', b'{"text": "\\ud83c\\u12"}',
]  # fmt: skip


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_line_that_json_refuses_is_refused(line):
    with pytest.raises((ValueError, RecursionError)):
        json.loads(line)
    for size in (1, 7, 2**20):
        with pytest.raises(NotTextError):
            long_text(line, size)


@settings(max_examples=100)
@given(lines(), st.integers(0, 100), st.binary(max_size=2))
@example(b'{"text": "a", "text": 1e5}', 24, b"}")
def test_what_is_read_of_a_damaged_line_is_what_json_reads(line, at, damage):
    line = line[:at] + damage + line[at + 1 :]
    try:
        text = long_text(line, 5)
    except NotTextError:
        return
    assert json.loads(line)["text"] == text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_records_are_the_same_whether_lines_are_long_or_not(tmp_path, suffix, monkeypatch):
    """Texts, lists, bad lines and empty ones, from any record on; the last has no line's end."""
    texts = [{"text": 30 * "é\n"}, {"text": list(range(40))}, {"other": 60 * "b"}, {"text": "c"}]
    bad = [b'{"text": "' + 60 * b"d" + b'"', b'{"text": "' + 50 * b"\xff" + b'"}', 70 * b" ", b""]
    content = b"\n".join([*(json.dumps(each).encode() for each in texts), *bad, b'{"text": "e"}'])
    path = tmp_path / f"a{suffix}"
    with pa.output_stream(str(path), compression="detect") as file:
        file.write(content)

    def read(position=None):
        found = []
        for place, record in LocalFiles(path, "text").read(position):
            value = record.value
            if not isinstance(value, str | np.ndarray | Bad):
                value = "".join(value)
            found.append((place, record.place, str(value)))
        return found

    held = read()
    assert len(held) == 7
    monkeypatch.setattr(records, "_LONG_LINE", 32)
    monkeypatch.setattr(records, "_BUFFER_BYTES", 7)
    assert read() == held
    for i, (position, _, _) in enumerate(held):
        assert read(position) == held[i:]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_long_cell_is_its_parts(tmp_path, kind, dictionary, monkeypatch):
    monkeypatch.setattr(columnar, "_PART_BYTES", 7)
    texts = ["short", None, "é日🎉" * 20, "", "a" * 30]
    pq.write_table(
        pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet",
        use_dictionary=dictionary, row_group_size=4,
    )  # fmt: skip
    found = [record.value for _, record in LocalFiles(tmp_path / "a.parquet", "text").read()]
    joined = [each if isinstance(each, str | Bad) else "".join(each) for each in found]
    assert isinstance(joined.pop(1), Bad)
    assert joined == [text for text in texts if text is not None]
    last = [
        record.value for _, record in LocalFiles(tmp_path / "a.parquet", "text").read([0, 4, 0])
    ]
    assert "".join(last[0]) == texts[4]


def test_a_long_cell_of_a_slice_is_its_own(monkeypatch):
    monkeypatch.setattr(columnar, "_PART_BYTES", 7)
    for kind in (pa.string(), pa.large_string()):
        cells = pa.array(["a" * 30, "é" * 20, "b" * 10], kind)[1:]
        assert "".join(columnar._long_text(cells, 0)) == "é" * 20


def test_a_long_cell_that_is_not_utf_8_to_its_end_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_PART_BYTES", 7)
    cells = pa.array([b"a" * 30, b"a" * 30 + b"\xff", "é".encode()[:1] * 20]).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    good, *bad = [record.value for _, record in LocalFiles(tmp_path / "a.parquet", "text").read()]
    assert "".join(good) == 30 * "a"
    assert [each.reason for each in bad] == 2 * ["it holds bytes that are not UTF-8"]


def test_cells_of_a_gigabyte_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_BATCH_BYTES", 1000)
    texts = [f"{i} " * 200 for i in range(20)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    sizes = []
    read_rows = columnar._read_arrow

    def noting(values, *others):
        sizes.append(len(values))
        return read_rows(values, *others)

    monkeypatch.setattr(columnar, "_read_arrow", noting)
    assert [record.value for _, record in LocalFiles(path, "text").read()] == texts
    assert max(sizes) <= 2 < len(sizes)
