"""Settings: a frozen dataclass per service, from flags over environment over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")

ENV_PREFIX = "KVBATON_"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class StartError(Exception):
    """The process cannot run as it is set up: the message says what to change."""


class ConfigError(StartError):
    """A setting has a value it cannot have; the message names the setting and the limit."""


KEYS_HELP = "folder of this process's key and public.json, made by scripts/keygen"
INSECURE_HELP = "no keys and no encryption; on loopback alone"


def setting(default: Any, help_text: str, *, low: float | None = None, choices: str = "") -> Any:
    """A dataclass field with its help text and limits. `choices` are separated by blanks."""
    metadata = {"help": help_text, "low": low, "choices": tuple(choices.split())}
    return dataclasses.field(default=default, metadata=metadata)


def parse_bytes(text: str) -> int:
    """A number of bytes such as 268435456, 256M or 1.5G. Raises ValueError or OverflowError."""
    text = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.get(text[-1:], 1)
    return int(float(text[:-1] if unit > 1 else text) * unit)


def _convert(field: dataclasses.Field[Any], kind: Any, text: str) -> Any:
    flag = "--" + field.name.replace("_", "-")
    try:
        if kind is bool:
            value: Any = {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        elif field.name.endswith("_bytes"):
            value = parse_bytes(text)
        else:
            value = kind(text)
    except (ValueError, OverflowError, KeyError) as error:
        raise ConfigError(f"{flag} must be of type {kind.__name__}, got {text!r}") from error
    low, choices = field.metadata["low"], field.metadata["choices"]
    if low is not None and not value >= low:
        raise ConfigError(f"{flag} must be at least {low}, got {text}")
    if choices and value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {text!r}")
    return value


def load_config(
    cls: type[T],
    prog: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> T:
    """Parse flags, then KVBATON_* variables, then defaults. Exits with usage on a bad value."""
    parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name, field in fields.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            metavar=hints[name].__name__.upper(),
            nargs="?" if hints[name] is bool else None,
            const="true" if hints[name] is bool else None,
            help=f"{field.metadata['help']} (default: {field.default})",
        )
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    values: dict[str, Any] = {}
    try:
        for name, field in fields.items():
            text = flags[name]
            if text is None:
                text = environ.get(ENV_PREFIX + name.upper())
            if text is not None:
                values[name] = _convert(field, hints[name], text)
    except ConfigError as error:
        parser.error(str(error))
    return cls(**values)
