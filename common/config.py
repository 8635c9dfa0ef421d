"""Settings: a frozen dataclass per service. Flags over environment over one file over defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from common.config_file import ConfigFile, ConfigFileError, Given, nearest

T = TypeVar("T")

ENV_PREFIX = "KVBATON_"
CONFIG_VARIABLE = "KVBATON_CONFIG"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SWITCH = {"1": True, "true": True, "0": False, "false": False}


class StartError(Exception):
    """The process cannot run as it is set up: the message says what to change."""


class ConfigError(StartError):
    """A setting has a value it cannot have; the message names the setting and the limit."""


KEYS_HELP = "folder of this process's key and public.json, made by scripts/keygen"
INSECURE_HELP = "no keys and no encryption; on loopback alone"
ADVERTISE_HELP = "host, or tcp://HOST:PORT, where others reach what is bound; as bound unless given"
NIXL_HELP = "network devices that NIXL may use, comma-separated: all on them must be trusted"


def setting(default: Any, help_text: str, *, low: float | None = None, choices: str = "") -> Any:
    """A dataclass field with its help text and limits. `choices` are separated by blanks."""
    metadata = {"help": help_text, "low": low, "choices": tuple(choices.split())}
    return dataclasses.field(default=default, metadata=metadata)


def parse_bytes(text: str) -> int:
    """A number of bytes such as 268435456, 256M or 1.5G. Raises ValueError or OverflowError."""
    text = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = _UNITS.get(text[-1:], 1)
    return int(float(text[:-1] if unit > 1 else text) * unit)


class _Setting(NamedTuple):
    """One setting of a service."""

    field: dataclasses.Field[Any]
    kind: type

    @property
    def flag(self) -> str:
        return "--" + self.field.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.field.name.upper()

    @property
    def _is_bytes(self) -> bool:
        return self.field.name.endswith("_bytes")

    def parse(self, text: str, name: str) -> Any:
        """The value that a flag or a variable says. Raises ConfigError, which calls it `name`."""
        try:
            if self.kind is bool:
                value: Any = _SWITCH[text.lower()]
            else:
                value = parse_bytes(text) if self._is_bytes else self.kind(text)
        except (ValueError, OverflowError, KeyError) as error:
            raise self._wrong_type(name, text) from error
        return self._within(value, name, text)

    def take(self, given: Given) -> Any:
        """The value that a file says. Raises ConfigError."""
        value, name = given.value, f"{given.place}: {self.field.name}"
        if isinstance(value, str) and self._is_bytes:
            return self.parse(value, name)
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise self._wrong_type(name, value)
        return self._within(value, name, value)

    def _wrong_type(self, name: str, got: Any) -> ConfigError:
        return ConfigError(f"{name} must be of type {self.kind.__name__}, got {got!r}")

    def _within(self, value: Any, name: str, got: Any) -> Any:
        low, choices = self.field.metadata["low"], self.field.metadata["choices"]
        if low is not None and not value >= low:
            raise ConfigError(f"{name} must be at least {low}, got {got}")
        if choices and value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {got!r}")
        return value


class Found(NamedTuple):
    """A setting's value, and where it is from."""

    value: Any
    source: str


def settings_of(cls: type[Any]) -> dict[str, _Setting]:
    """The settings of a service, by name."""
    hints = get_type_hints(cls)
    return {field.name: _Setting(field, hints[field.name]) for field in dataclasses.fields(cls)}


def find_settings(
    settings: Mapping[str, _Setting],
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
    given: Mapping[str, Given],
) -> dict[str, Found]:
    """Each setting's value from where it is said first. Raises ConfigError. Pure."""
    found = {}
    for name, each in settings.items():
        text = flags.get(name)
        if text is not None:
            found[name] = Found(each.parse(text, each.flag), each.flag)
        elif each.variable in environ:
            value = each.parse(environ[each.variable], f"{each.variable}: {each.flag}")
            found[name] = Found(value, each.variable)
        elif name in given:
            found[name] = Found(each.take(given[name]), given[name].place)
        else:
            found[name] = Found(each.field.default, "default")
    return found


def load_config(
    cls: type[T],
    role: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> T:
    """Flags, then KVBATON_* variables, then the file, then defaults. Exits with usage on what
    cannot be, and after --print-config."""
    settings = settings_of(cls)
    parser = _parser(cls, role, settings)
    options, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        hint = nearest(unknown[0].partition("=")[0], [each.flag for each in settings.values()])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    path = options.config or environ.get(CONFIG_VARIABLE)
    try:
        given = ConfigFile(Path(path)).settings(role, settings) if path else {}
        found = find_settings(settings, vars(options), environ, given)
    except (ConfigError, ConfigFileError) as error:
        parser.error(str(error))
    if options.print_config:
        sys.stdout.write(describe(role, found))
        parser.exit()
    return cls(**{name: each.value for name, each in found.items()})


def describe(role: str, found: Mapping[str, Found]) -> str:
    """The settings as a table of the file, each with where its value is from."""
    lines = {f"{name} = {toml_value(each.value)}": each.source for name, each in found.items()}
    width = max(map(len, lines))
    return f"[{role}]\n" + "".join(f"{line:<{width}}  # {at}\n" for line, at in lines.items())


def toml_value(value: Any) -> str:
    """A setting's value in TOML."""
    return json.dumps(value, ensure_ascii=False)


def _parser(cls: type[Any], role: str, settings: Mapping[str, _Setting]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{role}", description=cls.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"TOML file with settings (default: {CONFIG_VARIABLE})"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and its source, and exit"
    )
    for name, each in settings.items():
        parser.add_argument(
            each.flag,
            dest=name,
            metavar=each.kind.__name__.upper(),
            nargs="?" if each.kind is bool else None,
            const="true" if each.kind is bool else None,
            help=f"{each.field.metadata['help']} (default: {each.field.default})",
        )
    return parser
