"""One value of the configuration: whether it fits its key, which values would, and how TOML writes it.

The type of a key is an annotation built from bool, int, float, str, list, dict, Literal, tuple[T, ...] and None. TOML
has no null: None is written "none".

Every number has bounds, those in a list or a table too: what config/sections.py says, and otherwise those of LARGEST. Nothing
below overflows within them.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from minisft.strict_json import is_depth_at_most

LIMITS = ("above", "at_least", "below", "at_most")
LARGEST = {
    int: 2**31 - 1,
    float: 1e30,
}  # the largest number of a key without a bound above; negative for one without below
MAX_DEPTH = 32  # of lists and tables inside each other
MAX_BITS = 1000  # of a whole number, which TOML may write as 0xfff...
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def fit(value: Any, f: Field) -> Any:
    """The value in the type of the key, or MISSING where the type or the range is wrong."""
    fitted = fit_type(value, f.type)
    if isinstance(fitted, dict) and "of" in f.metadata:
        fitted = {name: fit_type(inner, f.metadata["of"]) for name, inner in fitted.items()}
    inner = fitted.values() if isinstance(fitted, dict) else fitted if isinstance(fitted, tuple) else [fitted]
    return MISSING if MISSING in inner or not all(_in_range(one, limits(f)) for one in inner) else fitted


def fit_type(value: Any, kind: Any) -> Any:
    """The value as `kind`, or MISSING. A bool is no number, an int is a float too, a lone item is a list of one."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else MISSING
    if get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        items = [fit_type(item, get_args(kind)[0]) for item in items]
        return MISSING if MISSING in items else tuple(items)
    if get_args(kind):  # a union; None first, because "none" is a string too
        if NoneType in get_args(kind) and value in (None, "none"):
            return None
        return next((v for one in get_args(kind) if (v := fit_type(value, one)) is not MISSING), MISSING)
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) <= sys.float_info.max else MISSING
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else MISSING
    return value if isinstance(value, kind) else MISSING


def limits(f: Field) -> dict[str, float]:
    """{"at_least": 0, "below": 1}: the bounds of the numbers that a key takes; {} if it takes none."""
    kinds = _kinds(f.metadata.get("of", f.type))
    if not kinds & {int, float}:
        return {}
    largest = LARGEST[float if float in kinds else int]
    found = {name: f.metadata[name] for name in LIMITS if name in f.metadata}
    below = {} if found.keys() & {"above", "at_least"} else {"at_least": -largest}
    above = {} if found.keys() & {"below", "at_most"} else {"at_most": largest}
    return below | found | above


def _kinds(kind: Any) -> set:
    """The types that an annotation is made of."""
    return {kind}.union(*map(_kinds, [] if get_origin(kind) is Literal else get_args(kind)))


def _in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return (
        ("above" not in limits or value > limits["above"])
        and ("at_least" not in limits or value >= limits["at_least"])
        and ("below" not in limits or value < limits["below"])
        and ("at_most" not in limits or value <= limits["at_most"])
    )


def expected(f: Field) -> str:
    """The values that a key takes, in words: 'a number above 0 or "none"'."""
    kinds = [kind for kind in get_args(f.type) or [f.type] if kind is not NoneType]
    if get_origin(f.type) in (Literal, tuple):
        kinds = [f.type]
    bounds = [f"{name.replace('_', ' ')} {bound:,}" for name, bound in limits(f).items()]
    limited = f" {' and '.join(bounds)}" if bounds else ""

    def in_words(kind: Any) -> str:
        is_number = _kinds(kind) & {int, float} and get_origin(kind) is not Literal
        return _in_words(kind) + (limited if is_number else "")

    words = " or ".join(map(in_words, kinds))
    if "of" in f.metadata:
        of = [kind for kind in get_args(f.metadata["of"]) or [f.metadata["of"]] if kind is not NoneType]
        words += " whose values are each " + " or ".join(map(in_words, of))
    return words + (' or "none"' if NoneType in get_args(f.type) else "")


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(as_toml, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of " + _in_words(get_args(kind)[0]).removeprefix("one of ")
    return WORDS[kind]


def problem_of(value: Any) -> str:
    """What is wrong with a value of any key, else "": nested too deeply, too long a number, text or a name that is none."""
    if not is_depth_at_most(value, MAX_DEPTH):
        return f"lists and tables are nested more than {MAX_DEPTH} deep"
    level = [value]
    while level:
        for one in level:
            if isinstance(one, dict) and not all(isinstance(name, str) for name in one):
                return "the names in a table are text"
            if isinstance(one, int) and one.bit_length() > MAX_BITS:
                return f"a whole number of {one.bit_length():,} bits"
            if isinstance(one, str):
                try:
                    one.encode("utf-8")
                except UnicodeEncodeError:
                    return "not UTF-8 text"
        inner = [
            [*one, *one.values()] if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [value for values in inner for value in values]
    return ""


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a key chooses from; () where it takes other values."""
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return next((get_args(one) for one in (kind, *get_args(kind)) if get_origin(one) is Literal), ())


def nearest_choice(value: Any, f: Field) -> str:
    """'did you mean "cosine"?' or ''."""
    near = get_close_matches(value, choices(f.type), n=1) if isinstance(value, str) else []
    return f"did you mean {as_toml(near[0])}?" if near else ""


def as_toml(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if value is None:
        return '"none"'
    if isinstance(value, dict):  # None inside a table means absent
        return "{" + ", ".join(f"{_key(str(k))} = {as_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_toml(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > MAX_BITS:  # Python refuses to write many digits
        return hex(value)
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON's escapes are TOML's too; only DEL, which JSON leaves as it is, TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else as_toml(str(key))
