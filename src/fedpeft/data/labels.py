"""Labels as files have them, names or indices, to class indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import DataError
from fedpeft.data.load import Source


def label_keys(source: Source, column: str) -> list[str]:
    """The labels as text: integers, also those that a file format made floats, in decimal digits."""
    keys = []
    for i, row in enumerate(source.rows):
        value = row.get(column)
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        if not isinstance(value, int | str) or not str(value).strip():
            raise DataError(f"{source.row(i)} has the label {value!r}, neither a name nor an index; mend or drop it")
        keys.append(str(value).strip())
    return keys


def sorted_values(values: Sequence[str]) -> tuple[str, ...]:
    """The different labels, sorted: as numbers where all are."""
    distinct = sorted(set(values))
    return tuple(sorted(distinct, key=int)) if all(_is_index(v) for v in distinct) else tuple(distinct)


def _is_index(key: str) -> bool:
    return key.removeprefix("-").isdecimal()


def label_indices(keys: Sequence[str], names: Sequence[str], by_name: bool, source: Source) -> NDArray[np.int64]:
    """Class index per row; labels are read as names if all of the training rows' are names, else as indices."""
    known = {name if by_name else str(i): i for i, name in enumerate(names)}
    indices = np.fromiter((known.get(key, -1) for key in keys), dtype=np.int64, count=len(keys))
    if bad := np.flatnonzero(indices < 0).tolist():
        bad = [i for i in bad if keys[i] not in names] or bad  # where names and indices are mixed
        key = keys[bad[0]]
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        if not by_name and _is_index(key):
            problem = f"label {key} is out of range: 0 to {len(names) - 1} stand for {shown}"
        else:
            problem = f"label {key!r} is not one of the {len(names)} labels that the task has: {shown}"
        raise DataError(f"{source.row(bad[0])}: {problem}. Correct task.labels or the {len(bad)} such rows")
    return indices
