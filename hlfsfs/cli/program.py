"""A program of commands: what fails is said in one line on standard error, and the exit status tells how.

0 done, 1 failed, 2 wrong usage; the class of an error may say another.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from hlfsfs.errors import HlfsError

log = logging.getLogger(__name__)

USAGE = 2


class Program(click.Group):
    """A group of commands that is a program by itself, which lines on standard error begin with."""

    def __init__(self, *args: Any, program: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._program = program

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the program; what goes wrong becomes one line and an exit status."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            status = super().main(args, self._program, complete_var, standalone_mode=False, **extra)
        except HlfsError as exc:
            self._fail(str(exc), exc.exit_code)
        except click.UsageError as exc:
            self._fail_usage(exc)
        except click.ClickException as exc:
            self._fail(exc.format_message(), 1)
        except (click.Abort, KeyboardInterrupt):
            self._fail("interrupted", 1)
        except Exception as exc:
            log.debug("unexpected", exc_info=exc)
            again = f"run {self._program} --debug … and report what it says" if self._debugs() else "report it"
            self._fail(f"unexpected {type(exc).__name__}: {exc}; {again}", 1)
        sys.exit(status if isinstance(status, int) else 0)

    def _debugs(self) -> bool:
        return any("--debug" in parameter.opts for parameter in self.params)

    def _fail(self, line: str, status: int) -> NoReturn:
        print(f"{self._program}: {line}", file=sys.stderr, flush=True)
        sys.exit(status)

    def _fail_usage(self, exc: click.UsageError) -> NoReturn:
        message = exc.format_message()
        if "\n" in message:  # a command that needs a subcommand shows its help
            print(message, file=sys.stderr)
            sys.exit(USAGE)
        command = exc.ctx.command_path if exc.ctx else self._program
        self._fail(f"{message.rstrip('.')}; see {command} --help", USAGE)
