"""A store that commands are given: by URI where it is not mounted, by path where it is."""

import json
from collections.abc import Callable

from click.testing import CliRunner

from hlfsfs.cli.main import main
from tests.fuse.mounts import hlfs

# How `hlfs` ended: status, output, what it said.
Ended = tuple[int, str, str]


class Place:
    """A store with volumes `v` and `p/w`, named as the commands are to name them."""

    def __init__(self, base: str, call: Callable[..., Ended]) -> None:
        self.base = base
        self._call = call

    def command(self, *words: str) -> Ended:
        return self._call(*self._named(words))

    def done(self, *words: str) -> str:
        status, output, said = self._call("snapshot", *self._named(words))
        assert (status, said) == (0, "")
        return output

    def failed(self, *words: str, status: int = 1) -> str:
        """The one line."""
        ended, output, said = self._call("snapshot", *self._named(words))
        assert (ended, output) == (status, "")
        assert said.startswith("hlfs: ")
        assert said.count("\n") == 1
        return said.removeprefix("hlfs: ").strip()

    def names(self, volume: str) -> list[str]:
        return [each["snapshot"] for each in json.loads(self.done("list", volume, "--json"))]

    def _named(self, words: tuple[str, ...]) -> list[str]:
        return [self.base + word[1:] if word.startswith("/") else word for word in words]


def invoke(*words: str) -> Ended:
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.stdout, result.stderr


def spawn(*words: str) -> Ended:
    """In a process of its own, as everything that touches a mount."""
    ended = hlfs(*words)
    return ended.returncode, ended.stdout, ended.stderr
