"""The value that a table's item has in a column, or in several that are one label together."""

from acoustic.console import UserError

# A column's name; or, of a label in several columns of zeros and ones, their names.
Column = str | tuple[str, ...] | None


def names_of(column: Column) -> tuple[str, ...]:
    """The table's columns that make up one of ours."""
    return () if column is None else (column,) if isinstance(column, str) else tuple(column)


def pick(item: dict, column: Column):
    """A column's value; of several the names of those that are true, None where nothing is said in any."""
    if column is None or isinstance(column, str):
        return None if column is None else item.get(column)
    said = [is_true(name, item.get(name)) for name in column]
    return None if None in said else [name for name, value in zip(column, said) if value]


def is_true(column: str, value) -> bool | None:
    """None where nothing is said."""
    if value is None or value == "":
        return None
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("0", "0.0", "false", "no"):
        return False
    raise UserError(f"label_column_name: column {column!r} has {value!r}; of several columns each must be 0 or 1")
