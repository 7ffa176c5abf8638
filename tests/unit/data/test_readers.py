"""Files in every format and every state of repair, read through the public door."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.data import rows as limits
from baton.data.readers import describe, read_rows
from baton.data.rows import Columns, Reject, Row
from baton.errors import DataError

QA: Columns = {"question": "question", "answer": "answer"}
REAL = Path(__file__).parents[3].parent / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL.name} is not beside the checkout")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(
    name: str,
    data: str | bytes,
    columns: Columns = QA,
    encoding: str | None = None,
    format: str | None = None,
) -> list[Row | Reject]:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_rows(Path(name), encoding=encoding, columns=columns, format=format))


def texts(rows: Sequence[Row | Reject]) -> list[tuple[str, ...]]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [tuple(row.values.values()) for row in rows if isinstance(row, Row)]


def message(
    name: str,
    data: str | bytes,
    columns: Columns = QA,
    encoding: str | None = None,
    format: str | None = None,
) -> str:
    with pytest.raises(DataError) as caught:
        read(name, data, columns, encoding, format)
    return str(caught.value)


# --- CSV --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_is_read_whatever_its_delimiter_newline_and_byte_order_mark(
    delimiter: str, newline: str, mark: str
) -> None:
    lines = ['"question"{d}answer', 'a, b; c\td"{d}2', '"multi{n}line ""quoted"""{d}4', ""]
    lines[1] = '"a, b; c\td"{d}2'
    data = mark + newline.join(lines).format(d=delimiter, n=newline)
    rows = read("x.csv", data)
    assert texts(rows) == [("a, b; c\td", "2"), (f'multi{newline}line "quoted"', "4")]
    assert [(row.number, row.line) for row in rows] == [(1, 2), (2, 3)]


def test_the_delimiter_that_finds_the_wanted_columns_wins() -> None:
    source = "question;answer;a,b,c,d\n1;2;x,y,z,w\n"
    assert texts(read("x.csv", source)) == [("1", "2")]
    assert describe(Path("x.csv"), encoding=None, columns=QA).delimiter == ";"


def test_tsv_takes_only_tabs() -> None:
    assert texts(read("x.tsv", "question\tanswer\n1,5\t2;5\n")) == [("1,5", "2;5")]


def test_blank_lines_are_no_rows_and_spaces_around_column_names_do_not_count() -> None:
    rows = read("x.csv", "\n question , answer \n\n1,2\n\n\n3,4\n\n")
    assert texts(rows) == [("1", "2"), ("3", "4")]
    assert [(row.number, row.line) for row in rows] == [(1, 4), (2, 7)]


def test_several_columns_are_joined_and_empty_parts_left_out() -> None:
    columns = {"question": ["instruction", "input"], "answer": "output"}
    rows = read("x.csv", "instruction,input,output\na,b,c\na,,c\n,b,c\n, ,c\n", columns)
    assert texts(rows) == [("a\nb", "c"), ("a", "c"), ("b", "c"), ("", "c")]


def test_a_broken_csv_row_is_rejected_in_its_place_and_reading_goes_on() -> None:
    data = 'question,answer\n1,2\nonly one\n3,4,5\n"x" y,6\n"a\nb"c,7\nnul\0,8\n9,10\n'
    assert read("x.csv", data) == [
        Row(1, 2, {"question": "1", "answer": "2"}),
        Reject(2, 3, "broken_row", "1 fields, the header has 2", "only one"),
        Reject(3, 4, "broken_row", "3 fields, the header has 2", "3,4,5"),
        Reject(4, 5, "broken_row", "',' expected after '\"' (line 5)", '"x" y,6\n'),
        Reject(
            5, 6, "broken_row", "',' expected after '\"' (lines 6 to 7, lost together)", 'b"c,7\n'
        ),
        Reject(6, 8, "nul_character", "field question contains a NUL character", "nul\0,8"),
        Row(7, 9, {"question": "9", "answer": "10"}),
    ]


def test_a_quote_that_is_never_closed_does_not_swallow_the_file_quietly() -> None:
    data = 'question,answer\n1,2\n"open,3\n' + "5,6\n" * 10
    assert message("x.csv", data) == (
        'x.csv: a quote (") opened in the row at line 3 is still open at line 13; close it, '
        "double the quotes inside fields, or fetch the file again if it is cut off"
    )


def test_a_field_may_be_longer_than_the_limit_of_the_csv_module() -> None:
    long = "长" * 200_000
    assert texts(read("x.csv", f'question,answer\n{long},"{long}"\n')) == [(long, long)]


def test_a_field_without_end_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = csv.field_size_limit()
    monkeypatch.setattr(limits, "MAX_FIELD_CHARS", 1000)
    csv.field_size_limit(1000)
    try:
        problem = message("x.csv", 'question,answer\n1,"2\n' + "3,4\n" * 1000)
    finally:
        csv.field_size_limit(limit)
    assert problem == (
        'x.csv: a quote (") opened in the row at line 2 is still open at line 252; close it, '
        "double the quotes inside fields, or fetch the file again if it is cut off"
    )


def test_a_column_that_is_not_there_is_answered_with_those_that_are() -> None:
    assert message("x.csv", "questoin,answr,department\n1,2,3\n") == (
        "x.csv: there is no column 'question' (did you mean 'questoin'?), 'answer' (did you mean "
        "'answr'?); the columns are: questoin, answr, department"
    )
    assert message("x.csv", "a,b\n1,2\n", {"text": "content"}) == (
        "x.csv: there is no column 'content'; the columns are: a, b"
    )


def test_a_wanted_column_that_is_there_twice_is_refused() -> None:
    assert message("x.csv", "question,answer,question\n1,2,3\n") == (
        "x.csv: 2 columns are named 'question'; rename all but the one to read"
    )
    assert texts(read("x.csv", "question,answer,x,x\n1,2,3,4\n")) == [("1", "2")]


def test_a_file_without_rows_is_refused() -> None:
    no_rows = "x.csv: has a header but no rows; fetch or write it again"
    assert message("x.csv", "question,answer\n") == no_rows
    assert message("x.csv", "question,answer") == no_rows
    assert message("x.csv", "\n\n") == "x.csv: has no header line that can be read, it starts ''"
    assert message("x.csv", '"question" x,answer\n1,2\n') == (
        "x.csv: has no header line that can be read, it starts '\"question\" x,answer\\n1,2'"
    )


def test_a_wrong_encoding_is_answered_with_the_right_one() -> None:
    data = "question,answer\n头疼怎么办,多喝水，早点睡\n".encode("gbk")
    assert message("x.csv", data, encoding="utf-8") == (
        "x.csv: byte 18 (line 2) is 0xcc, which is not valid utf-8; declare encoding: gb18030; "
        "it decodes the whole file"
    )


def test_rows_before_a_bad_byte_arrive_and_then_the_error() -> None:
    data = "question,answer\n" + "头疼,多喝水\n" * 5000
    Path("x.csv").write_bytes(data.encode() + "牙疼,x\n".encode("gbk") + b"1,2\n")
    rows = read_rows(Path("x.csv"), encoding="utf-8", columns=QA)
    assert next(rows) == Row(1, 2, {"question": "头疼", "answer": "多喝水"})
    with pytest.raises(DataError) as caught:
        list(rows)
    assert str(caught.value) == (
        "x.csv: byte 85,016 (line 5,002) is 0xd1, which is not valid utf-8; no one encoding "
        "decodes the whole file, so it is damaged or mixes two; repair or remove line 5,002"
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "gb18030", "utf-32"])
def test_rows_are_the_same_in_every_encoding_declared_or_found(encoding: str) -> None:
    data = "question,answer\n" + "高血压怎么办？,请放心，多休息。\n" * 3
    expected = [("高血压怎么办？", "请放心，多休息。")] * 3
    assert texts(read("x.csv", data.encode(encoding), encoding=encoding)) == expected
    assert texts(read("x.csv", data.encode(encoding))) == expected


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.tuples(text, text), min_size=1),
    st.sampled_from([",", "\t", ";"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]),
)
def test_what_csv_writes_is_what_is_read(
    rows: list[tuple[str, str]], delimiter: str, encoding: str
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(["question", "answer"])
    writer.writerows(rows)
    data = buffer.getvalue().encode(encoding)
    assert texts(read("x.csv", data, encoding=encoding)) == rows


# --- JSON and JSONL ---------------------------------------------------------------------------


def test_broken_json_lines_are_rejected_in_their_place() -> None:
    lines = [
        '{"question": "1", "answer": "2", "more": [1]}',
        "",
        '{"question": "1", "ans',
        '["1", "2"]',
        '{"question": null, "answer": "2"}',
        '{"question": ["1"], "answer": "2"}',
        '{"question": true, "answer": "2"}',
        '{"question": NaN, "answer": "2"}',
        '{"question": "1"}',
        '{"question": "a\\u0000b", "answer": "2"}',
        '{"question": "1", "answer": "\\ud83d"}',
        "[" * 100_000,
        '{"question": ' + "1" * 5000 + ', "answer": "2"}',
        '{"question": 7, "answer": 2.5}',
        '{"question": "half a ro',
    ]
    rows = read("x.jsonl", "\n".join(lines))
    assert rows[0] == Row(1, 1, {"question": "1", "answer": "2"})
    assert rows[12] == Row(13, 14, {"question": "7", "answer": "2.5"})
    rejects = [row for row in rows if isinstance(row, Reject)]
    assert [(row.number, row.line, row.reason, row.detail) for row in rejects] == [
        (
            2,
            3,
            "broken_row",
            "not JSON: Unterminated string starting at, character 19",
        ),
        (3, 4, "broken_row", "a JSON list, not an object"),
        (4, 5, "null_value", "column question is null"),
        (5, 6, "not_text", "column question holds a list, not text"),
        (6, 7, "not_text", "column question holds a bool, not text"),
        (7, 8, "not_text", "column question is nan"),
        (8, 9, "missing_column", "no answer; there is question"),
        (9, 10, "nul_character", "field question contains a NUL character"),
        (10, 11, "bad_unicode", "field answer holds half a surrogate pair"),
        (
            11,
            12,
            "broken_row",
            "not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode "
            "string",
        ),
        (
            12,
            13,
            "broken_row",
            "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has "
            "5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        ),
        (
            14,
            15,
            "broken_row",
            "not JSON: Unterminated string starting at, character 14",
        ),
    ]
    assert all(len(row.excerpt) <= 200 for row in rejects)


def test_a_joined_column_may_be_null_or_left_out_of_a_json_row() -> None:
    columns = {"question": ["instruction", "input"], "answer": "output"}
    rows = read(
        "x.jsonl",
        '{"instruction": "a", "input": "b", "output": "c"}\n'
        '{"instruction": "a", "input": null, "output": "c"}\n'
        '{"instruction": "a", "output": "c"}\n'
        '{"instruction": null, "output": "c"}\n'
        '{"output": "c"}\n',
        columns,
    )
    assert texts(rows[:3]) == [("a\nb", "c"), ("a", "c"), ("a", "c")]
    assert [row.reason for row in rows[3:] if isinstance(row, Reject)] == [
        "null_value",
        "missing_column",
    ]


def test_line_separators_of_other_kinds_stay_inside_a_json_string() -> None:
    odd = "a\u2028b\x85c\u2029d"
    line = json.dumps({"question": odd, "answer": "2"}, ensure_ascii=False)
    assert texts(read("x.jsonl", f"\ufeff{line}\r\n{line}")) == [(odd, "2"), (odd, "2")]


def test_json_lines_under_the_name_json_are_read_as_lines() -> None:
    data = '{"question": "1", "answer": "2"}\n' * 2
    assert texts(read("x.json", data)) == [("1", "2")] * 2
    assert describe(Path("x.json"), encoding=None, columns=QA).format == "jsonl"


def test_elements_of_a_json_array_know_their_lines() -> None:
    data = '[\n {"question": "1",\n  "answer": "2"},\n\n {"question": 3, "answer": "4"},\n 5\n]\n'
    assert read("x.json", "\ufeff" + data) == [
        Row(1, 2, {"question": "1", "answer": "2"}),
        Row(2, 5, {"question": "3", "answer": "4"}),
        Reject(3, 6, "broken_row", "a JSON int, not an object", "5"),
    ]


def test_a_json_array_is_read_through_a_window_smaller_than_its_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "_WINDOW_CHARS", 7)
    rows = [{"question": "长" * n + '"\\\n', "answer": f"{n}"} for n in range(60)]
    for indent in (None, 2):
        data = json.dumps([*rows, 123456789012, True], indent=indent)
        found = read("x.json", data)
        assert texts(found[:-2]) == [(row["question"], row["answer"]) for row in rows]
        assert [row.excerpt for row in found[-2:] if isinstance(row, Reject)] == [
            "123456789012",
            "true",
        ]


def test_a_json_array_cut_off_anywhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_WINDOW_CHARS", 11)
    data = json.dumps([{"question": "1", "answer": "2"}, {"question": "33", "answer": "4é"}])
    for cut in range(len(data)):
        with pytest.raises(DataError):
            read("x.json", data[:cut])
    assert len(read("x.json", data)) == 2


def test_the_place_where_a_json_array_breaks_is_named() -> None:
    row = '{"question": "1", "answer": "2"}'
    tail = "; repair it there, or fetch it again if it is cut off"
    breaks = "x.json: the JSON array breaks after "
    assert message("x.json", f"[{row},\n{row}") == (
        f"{breaks}2 rows, at line 2, character 67: cut off{tail}"
    )
    assert message("x.json", f"[{row},\n{row[:-3]}") == (
        f"{breaks}1 rows, at line 2, character 63: Unterminated string starting at{tail}"
    )
    assert message("x.json", f"[{row},\n{row}\n{row}]") == (
        f"{breaks}2 rows, at line 3, character 68: ',' or ']' expected, found '{{'{tail}"
    )
    assert message("x.json", f"[{row},]") == (
        f"{breaks}1 rows, at line 1, character 34: Expecting value{tail}"
    )
    assert message("x.json", f"[{row}]\n{row}") == (
        f"{breaks}1 rows, at line 2, character 35: text follows the end of the array{tail}"
    )
    assert message("x.json", f"[{row}, " + "[" * 100_000) == (
        f"{breaks}1 rows, at line 1, character 35: maximum recursion depth exceeded while "
        f"decoding a JSON array from a unicode string{tail}"
    )


def test_a_json_file_that_is_no_list_of_objects_is_refused() -> None:
    assert message("x.json", "[]") == "x.json: holds no rows; fetch or write it again"
    assert message("x.jsonl", "\n\n") == "x.jsonl: holds no rows; fetch or write it again"
    assert message("x.json", '"text"') == (
        "x.json: starts with '\"text\"'; a JSON file must be an array of objects"
    )
    assert message("x.jsonl", '[\n{"question": "1", "answer": "2"}]') == (
        "x.jsonl: is a JSON array, not JSONL; declare format: json"
    )
    assert message("x.json", '{\n"data": [\n{"question": "1"}\n]}') == (
        "x.json: is one JSON object over several lines; write its rows as an array of objects or "
        "one object a line"
    )
    assert message("x.jsonl", "question,answer\n1,2\n") == (
        "x.jsonl: none of its first 2 rows is a JSON object; the file starts with "
        "'question,answer\\n1,2\\n'"
    )
    assert message("x.jsonl", '{"questions": "1"}\n', {"question": "question"}) == (
        "x.jsonl: there is no column 'question' (did you mean 'questions'?); "
        "the columns are: questions"
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.tuples(text, text), min_size=1), st.booleans())
def test_what_json_writes_is_what_is_read(rows: list[tuple[str, str]], ascii_only: bool) -> None:
    records = [{"question": question, "answer": answer} for question, answer in rows]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    assert texts(read("x.jsonl", "\n".join(lines))) == rows
    assert texts(read("x.json", json.dumps(records, ensure_ascii=ascii_only, indent=1))) == rows


# --- Parquet ----------------------------------------------------------------------------------


def write_parquet(columns: dict[str, object], **options: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def test_parquet_rows_are_read_with_numbers_as_text_and_nulls_rejected() -> None:
    data = write_parquet(
        {
            "id": pa.array([1, 2, None, 4]),
            "name": pa.array(["甲", None, "丙", "丁"]).dictionary_encode(),
            "price": pa.array([Decimal("1.50")] * 4),
            "score": pa.array([0.5, 1.5, 2.5, float("nan")]),
        }
    )
    columns = {"a": ["id", "name"], "b": "price", "c": "score"}
    assert read("x.parquet", data, columns) == [
        Row(1, None, {"a": "1\n甲", "b": "1.50", "c": "0.5"}),
        Row(2, None, {"a": "2", "b": "1.50", "c": "1.5"}),
        Row(3, None, {"a": "丙", "b": "1.50", "c": "2.5"}),
        Reject(4, None, "not_text", "column score is nan", "4 | 丁 | 1.50 | nan"),
    ]
    assert read("x.parquet", data, {"a": "name"})[1] == Reject(
        2, None, "null_value", "column name is null", "None"
    )


def test_parquet_of_several_batches_and_row_groups_keeps_its_order() -> None:
    numbers = [str(n) for n in range(5000)]
    data = write_parquet({"question": numbers, "answer": numbers}, row_group_size=700)
    assert texts(read("x.parquet", data)) == [(n, n) for n in numbers]


def test_a_parquet_string_that_is_no_utf8_is_one_reject_not_the_end() -> None:
    raw = pa.array([b"good", b"\xff\xfe", None], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    rows = read("x.parquet", write_parquet({"question": strings}), {"question": "question"})
    assert rows == [
        Row(1, None, {"question": "good"}),
        Reject(2, None, "not_text", "column question holds a bytes, not text", "b'\\xff\\xfe'"),
        Reject(3, None, "null_value", "column question is null", "None"),
    ]


def test_a_parquet_file_that_cannot_be_used_is_refused() -> None:
    data = write_parquet({"question": ["1"], "answer": [["2"]]})
    assert message("x.parquet", data, {"q": "question", "a": "answer"}) == (
        "x.parquet: column answer holds list<element: string>, not text; "
        "map another column or convert it"
    )
    assert message("x.parquet", data, {"q": "text"}) == (
        "x.parquet: there is no column 'text'; the columns are: question, answer"
    )
    none = write_parquet({"question": pa.array([], pa.string())})
    assert message("x.parquet", none, {"q": "question"}) == (
        "x.parquet: holds no rows; fetch or write it again"
    )
    with pytest.raises(DataError) as caught:
        read_rows(Path("none.parquet"), encoding=None, columns=QA)
    assert str(caught.value) == ("none.parquet: there is no such file; did you mean x.parquet?")


def test_a_damaged_parquet_file_is_refused() -> None:
    column = [f"{n}" * 20 for n in range(3000)]
    data = write_parquet({"question": column, "answer": column})
    assert message("x.parquet", data[:-10]) == (
        "x.parquet: damaged Parquet file (Parquet magic bytes not found in footer. Either the "
        "file is corrupted or this is not a parquet file); fetch it again"
    )
    assert message("x.parquet", b"") == (
        "x.parquet: damaged Parquet file (Parquet file size is 0 bytes); fetch it again"
    )
    for start in (10, 2000):
        hole = data[:start] + b"\xff" * 1500 + data[start + 1500 :]
        assert message("x.parquet", hole).startswith("x.parquet: damaged Parquet file (")


# --- all formats ------------------------------------------------------------------------------


def test_text_files_may_be_gzipped() -> None:
    data = gzip.compress("question,answer\n头疼,多喝水\n".encode("gbk"))
    assert texts(read("x.csv.gz", data)) == [("头疼", "多喝水")]
    lines = gzip.compress(b'{"question": "1", "answer": "2"}\n')
    assert texts(read("x.jsonl.gz", lines)) == [("1", "2")]


def test_a_declared_format_overrules_the_name() -> None:
    assert texts(read("x.txt", "question,answer\n1,2\n", format="csv")) == [("1", "2")]
    assert texts(read("x.csv", '[{"question": 1, "answer": 2}]', format="json")) == [("1", "2")]


def test_a_format_nobody_knows_is_refused() -> None:
    assert message("x.txt", "question,answer\n1,2\n") == (
        "x.txt: its name does not tell the format; declare format: "
        "csv | json | jsonl | parquet | tsv"
    )
    assert message("x.csv", "question,answer\n1,2\n", format="jsnl") == (
        "x.csv: there is no format 'jsnl'; did you mean jsonl?"
    )
    assert message("x.csv", "question,answer\n1,2\n", format="xml") == (
        "x.csv: there is no format 'xml'; use one of csv, json, jsonl, parquet, tsv"
    )


def test_a_mapping_without_columns_is_refused() -> None:
    nothing = "x.csv: no columns are mapped; name one for every field, e.g. question"
    assert message("x.csv", "a,b\n1,2\n", {}) == nothing
    assert message("x.csv", "a,b\n1,2\n", {"question": []}) == nothing


def test_problems_of_a_file_are_found_before_the_first_row_is_asked_for() -> None:
    Path("x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError):
        read_rows(Path("x.csv"), encoding=None, columns=QA)


def test_reading_text_loads_neither_pyarrow_nor_torch() -> None:
    Path("x.csv").write_text("question,answer\n1,2\n")
    code = (
        "import sys; from pathlib import Path; from baton.data.readers import read_rows\n"
        "list(read_rows(Path('x.csv'), encoding=None, columns={'q': 'question'}))\n"
        "print({'torch', 'pyarrow', 'pandas', 'charset_normalizer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.parquet"])
def test_a_file_is_never_held_in_memory(name: str) -> None:
    rows = [{"question": "头疼怎么办" * 50, "answer": f"{n}" * 300} for n in range(12_000)]
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), name)
    elif name == "x.csv":
        with Path(name).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        data = "\n".join(lines) if name == "x.jsonl" else f"[{','.join(lines)}]"
        Path(name).write_text(data, encoding="utf-8")
    code = (
        "import sys, tracemalloc, pyarrow.parquet; from pathlib import Path\n"
        "from baton.data.readers import read_rows\n"
        "tracemalloc.start()\n"
        "rows = read_rows(Path(sys.argv[1]), encoding=None, columns={'q': 'question'})\n"
        "count = sum(1 for _ in rows)\n"
        "print(count, tracemalloc.get_traced_memory()[1] < 8_000_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
    )
    assert done.stdout == "12000 True\n"


# --- real files -------------------------------------------------------------------------------


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("encoding", [None, "gb18030", "gbk"])
def test_the_medical_file_is_read_whole(encoding: str | None) -> None:
    columns = {"question": ["title", "ask"], "answer": "answer"}
    source = describe(REAL / "medical_qa_6000.gb18030.csv", encoding=encoding, columns=columns)
    assert (source.encoding, source.delimiter) == ("gb18030", ",")
    assert source.columns == ("department", "title", "ask", "answer")
    rows = texts(list(source.rows()))
    assert len(rows) == 6000
    assert rows[0][0].startswith("高血压患者能吃党参吗？\n我有高血压这两天女婿来的时候")


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        ("chat_train_3k.parquet", {"question": "prompt", "answer": "response"}, 3000),
        ("raft_torchhub_train.jsonl", {"code": "code", "call": "api_call"}, 837),
        ("math_gsm8k_train.jsonl", QA, 7473),
    ],
)
def test_real_files_are_read_without_a_reject(name: str, columns: Columns, count: int) -> None:
    rows = texts(list(read_rows(REAL / name, encoding=None, columns=columns)))
    assert len(rows) == count
    assert all(all(row) for row in rows)
