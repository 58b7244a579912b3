"""The command line: the only package that prints.

It turns flags into a Selection, errors into one line and an exit code, and progress into a bar on
a terminal or plain lines elsewhere. What a command does lies in the module it calls.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from harness.cli.base import FLAG_ALIASES, app, complain
from harness.types import HarnessError, Interrupted

IN_ORDER = (  # of --help
    "running", "looking", "datasets", "reporting", "papers", "gating", "auditing", "serving",
    "caching",
)  # fmt: skip
for _module in IN_ORDER:
    import_module(f"harness.cli.{_module}")


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the code that DESIGN gives the outcome."""
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
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    plain = name.replace("_", "-")
    return FLAG_ALIASES.get(plain, plain) + equals + value
