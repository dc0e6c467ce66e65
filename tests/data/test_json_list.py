"""JSON lists read entry by entry: what `json.loads` makes of the whole, in small pieces."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointalign.data import json_list
from pointalign.data.json_list import json_entries
from pointalign.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.builds(
    lambda values, indent, ascii_only, blanks: (
        blanks + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + blanks
    ),
    st.lists(VALUES, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from(["", " ", "\r\n\t"]),
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """From a file's bytes and the size of a piece to its entries; each place must hold its entry."""

    def read_pieces(content, piece):
        monkeypatch.setattr(json_list, "MEBIBYTE", piece)
        path = tmp_path / "list.json"
        path.write_bytes(content)
        values = []
        for value, place, entry in json_entries(path):
            assert content[place : place + len(entry)] == entry
            assert json.loads(entry) == value
            values.append(value)
        return values

    return read_pieces


def outcome(call):
    """What a call gives, or the words of its refusal."""
    try:
        return call()
    except DataError as error:
        return str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(1, 9))
def test_entries_are_those_of_the_whole(read, text, piece):
    assert read(text.encode(), piece) == json.loads(text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(TEXTS, st.integers(1, 40), st.data())
def test_what_is_refused_is_what_json_refuses_in_its_words(read, tmp_path, text, piece, data):
    at = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.sampled_from(["", ",", "]", "[", "{", '"', "x", "\\", "\n", "é", "1"]))
    broken = text[:at] + inserted + text[at + data.draw(st.integers(0, 3)) :]
    got = outcome(lambda: read(broken.encode(), piece))
    try:
        wanted = json.loads(broken)
    except ValueError:
        # The file is read in text mode for the message, where a line's end is one character.
        try:
            json.loads(broken.replace("\r\n", "\n").replace("\r", "\n"))
        except ValueError as plain:
            error = plain
        wanted = f"{tmp_path / 'list.json'} is not JSON ({error}); copy it again"
    else:
        if not isinstance(wanted, list):
            wanted = f"{tmp_path / 'list.json'} holds a {type(wanted).__name__}, not a list of conversations; give another file"
    assert got == wanted


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", [b'["\xe9"]', b'[1, "\xc3', b"[1]\xff", b'["a", \xf0\x9f\x98"]'])
def test_bytes_that_are_no_text_are_never_passed_over(read, content, piece):
    assert "is not JSON ('utf-8' codec can't decode" in outcome(lambda: read(content, piece))


def test_numbers_at_the_edge_of_a_piece_are_whole(read):
    for piece in range(1, 12):
        assert read(b"[123456, 7.5e10, -12]", piece) == [123456, 7.5e10, -12]


def test_a_nesting_that_is_too_deep_is_refused(read):
    assert "is not JSON" in outcome(lambda: read(b"[" * 200_000, 1 << 20))


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "MEBIBYTE", 8)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(list(range(10_000))))
    entries = json_entries(path)
    next(entries)
    path.write_text("[1]" + " " * 50_000)
    with pytest.raises(DataError, match="changed while it was read"):
        list(entries)


def test_what_is_read_is_told_in_mebibytes(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["x" * 100] * 50_000))
    told = []
    assert sum(1 for _ in json_entries(path, told.append)) == 50_000
    assert sum(told) == path.stat().st_size >> 20
