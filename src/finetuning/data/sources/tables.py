"""Parquet, Arrow and CSV files, read in batches; each row keeps its number, those of CSV their line."""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from finetuning.data.samples import JsonObject, Row
from finetuning.errors import DataError, Location, Problem, reading

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024
_LARGEST_FIELD = 1 << 28


def read_parquet(path: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file; `line` is the number of the row, from 1."""
    import pyarrow.parquet as pq

    problem = "not a Parquet file, or damaged"
    with reading(problem, DataError, location=Location(file=path)), pq.ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(batch_size=_BATCH))


def read_arrow(path: str) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file, of the stream or file format; `line` is the number of the row, from 1."""
    import pyarrow as pa

    problem = "not an Arrow file, or damaged"
    with reading(problem, DataError, location=Location(file=path)), pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from _rows(path, (reader.get_batch(index) for index in range(reader.num_record_batches)))
        else:
            yield from _rows(path, pa.ipc.open_stream(source))


def _rows(path: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    decode: _Decode | None = None
    for batch in batches:
        # Offsets of a damaged file that point elsewhere would end the process.
        batch.validate(full=True)
        if number == 0:
            _check_names(path, batch.schema.names)
            decode = _json_decoder(dict(zip(batch.schema.names, batch.schema.types, strict=True)))
        for start in range(0, batch.num_rows, _BATCH):
            for values in batch.slice(start, _BATCH).to_pylist(maps_as_pydicts="strict"):
                number += 1
                row = without_nulls(values)
                yield Row(cast("JsonObject", decode(row)) if decode else row, Location(file=path, line=number))


def _check_names(path: str, names: Sequence[str]) -> None:
    """Raise DataError if two columns have one name: the values of the first would vanish."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"columns with the same name: {', '.join(repeated)}", location=Location(file=path))


_Decode = Callable[[object], object]


def _json_decoder(kind: Any) -> _Decode | None:
    """Return a function that parses the JSON texts in values of an Arrow type, at any depth; None if there are none.

    `datasets` writes values whose type differs from row to row, such as the arguments of tool calls, as JSON.

    Args:
        kind: an Arrow type, or a mapping of names to types.
    """
    import pyarrow as pa

    if isinstance(kind, pa.StructType):
        kind = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    if isinstance(kind, dict):
        fields = {name: decode for name, inner in kind.items() if (decode := _json_decoder(inner))}
        return partial(_decode_fields, fields) if fields else None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _parsed
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        decode = _json_decoder(kind.value_type)
        return partial(_decode_items, decode) if decode else None
    return None


def _decode_fields(fields: Mapping[str, _Decode], values: object) -> object:
    if not isinstance(values, dict):
        return values
    return {name: fields[name](value) if name in fields else value for name, value in values.items()}


def _decode_items(decode: _Decode, values: object) -> object:
    return [decode(value) for value in values] if isinstance(values, list) else values


def _parsed(text: object) -> object:
    return json.loads(text) if isinstance(text, str) else text


def without_nulls(values: Any) -> Any:
    """Return a value without the keys whose value is null, at any depth.

    The Arrow type of a column has the keys of all its rows, and a row has nulls for the keys that it does not have.
    """
    if isinstance(values, dict):
        return {key: without_nulls(item) for key, item in values.items() if item is not None}
    if isinstance(values, list):
        return [without_nulls(item) for item in values]
    return values


def read_csv(path: str, stream: BinaryIO, separator: str = ",") -> Iterator[Row | Problem]:
    """Yield the rows of a CSV file with a header, each with its first line; an empty field is an empty text."""
    # The csv module rejects fields of more than 128 KiB by default; the limit is global to the process.
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    reader = csv.reader(_decoded(path, stream), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(
                f"duplicate columns in the header: {', '.join(repeated)}", location=Location(file=path, line=1)
            )
        if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
            raise DataError(
                f"the columns seem to be separated by {mark!r}, expected {separator!r}",
                location=Location(file=path, line=1),
                hint="Save it with commas, or with tabs and the name .tsv.",
            )
        line = reader.line_num + 1
        for fields in reader:
            location = Location(file=path, line=line)
            line = reader.line_num + 1
            if not fields:
                continue
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), location)
            else:
                yield Problem(f"{len(fields)} fields, but the header has {len(header)}", location)
    except csv.Error as error:
        raise DataError(f"invalid CSV: {error}", location=Location(file=path, line=reader.line_num)) from None


def _decoded(path: str, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})"
            raise DataError(message, location=Location(file=path, line=number)) from None
