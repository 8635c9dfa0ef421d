"""The version of the whole project; the wheel has it too."""

VERSION = "0.1.0"
