"""The command line: the only package that prints.

It turns flags into a Selection, errors into one line and an exit code, and progress into a bar on
a terminal or plain lines elsewhere. What a command does lies in the module it calls.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module

from harness.cli.base import app, complain
from harness.specs import option_name
from harness.types import HarnessError, Interrupted, UsageError

for _module in ("running", "looking", "datasets", "reporting", "gating", "serving", "caching"):
    import_module(f"harness.cli.{_module}")


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the code that DESIGN gives the outcome."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a character, even —
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(args=[_flag(a) for a in (sys.argv[1:] if args is None else args)])
    except HarnessError as error:
        complain(str(error))
        if isinstance(error, Interrupted):  # an import interrupted half way would decide the code
            sys.stderr.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _flag(word: str) -> str:
    """Underscores in a flag's name are hyphens, and some flags have a second name."""
    if any("\udc80" <= c <= "\udcff" for c in word):  # how Python reads a byte that is not UTF-8
        raise UsageError(f"{word!r}: expected UTF-8: rename the file or folder")
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    return f"--{option_name(name.removeprefix('--')).replace('_', '-')}{equals}{value}"
