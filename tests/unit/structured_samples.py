"""Random JSON schemas and regexes whose sentences are bounded, so that a model comes to an end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_NAMES = [
    "name",
    "age",
    "tags",
    "id",
    "value",
    "kind",
    "items",
    "ok",
    "été",
    "a b",
    "x_1",
    "default",
]
_CLASSES = ["[a-z]", "[A-Z]", "[0-9]", "[a-f0-9]", "[xyz]", "[^a-z\n]", "[ -~]", "\\d", "\\."]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]
_MOST_DEPTH = 3


def json_schema(rng: random.Random) -> dict[str, Any]:
    """An object, an array or, now and then, a plain value."""
    return _value(rng, 0 if rng.random() < 0.9 else _MOST_DEPTH)


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    made: list[Callable[[random.Random, int], dict[str, Any]]] = [_text, _number, _choice, _pattern]
    if depth < _MOST_DEPTH:
        made = [_object, _object, _array] if depth == 0 else [*made, _object, _array, _any_of]
    return rng.choice(made)(rng, depth + 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 4 if depth < 3 else 2))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _value(rng, max(depth, 2)),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def _text(rng: random.Random, _depth: int) -> dict[str, Any]:
    if rng.random() < 0.2:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.choice([0, 0, 1, 3])
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}


def _number(rng: random.Random, _depth: int) -> dict[str, Any]:
    low = rng.choice([-1000, -7, 0, 1, 18])
    return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 5, 99, 12345])}


def _choice(rng: random.Random, _depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": rng.choice(["on", 7, None, True])},
            {"enum": rng.sample(["red", "green", 'q"', 1, 2.5, None, False, "ü"], 3)},
        ]
    )


def _pattern(rng: random.Random, _depth: int) -> dict[str, Any]:
    low = rng.randint(1, 4)
    part = rng.choice(["[a-z]", "[A-Z0-9]", "[0-9]", "(ab|cd)"])
    return {"type": "string", "pattern": f"^{part}{{{low},{low + 4}}}$"}


def regex(rng: random.Random, depth: int = 0) -> str:
    """Classes, words, groups and alternatives, each repeated a bounded number of times."""
    return "".join(_piece(rng, depth) for _ in range(rng.randint(1, 4 if depth == 0 else 2)))


def _piece(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(["id-", "foo", "é", "->", "\\n", "x", "::", "100%"])
    if kind < 0.6 or depth == 2:
        part = rng.choice(_CLASSES)
    else:
        part = "(" + "|".join(regex(rng, depth + 1) for _ in range(rng.randint(1, 3))) + ")"
    low = rng.randint(0, 2)
    return part + rng.choice(["", "?", f"{{{low},{low + 3}}}", f"{{{low + 1}}}"])
