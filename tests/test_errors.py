"""Every error has one line, an errno and an exit code; to_errno translates all there is."""

import errno
import inspect
import logging
from typing import Any

import pytest

from hlfsfs import errors
from hlfsfs.errors import HlfsError, printable, to_errno

CLASSES = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, HlfsError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_class_has_a_valid_errno_and_exit_code(kind: type[HlfsError]) -> None:
    assert kind.errno in errno.errorcode
    assert kind.errno != errno.ENOSYS  # would switch the operation off for the whole mount
    assert kind.exit_code in (1, 2, 32)
    assert kind.__doc__


def example(kind: type[HlfsError]) -> HlfsError:
    """An error of the class, its texts holding a newline as a hostile name would."""
    values = {
        "exc": OSError(errno.EIO, "x"),
        "name": b"bad\nname",
        "features": ["bad\nfeature"],
        "holders": ["qemu (12)"],
        "pid": 12,
        "node_id": 1 << 32,
    }
    texts = {"uri", "text", "word"}
    arguments: list[Any] = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return kind("a message")
        default: object = "bad\nname" if parameter.name in texts else 5 if "int" in str(parameter.annotation) else "x"
        if parameter.name == "name" and "str" in str(parameter.annotation):
            default = "bad\nname"
            arguments.append(default)
            continue
        if parameter.name not in {"args", "kwargs"}:
            arguments.append(values.get(parameter.name, default))
    return kind(*arguments)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_error_is_one_line(kind: type[HlfsError]) -> None:
    assert str(example(kind))
    assert "\n" not in str(example(kind))


def test_translation_to_errno(caplog: pytest.LogCaptureFixture) -> None:
    assert to_errno(errors.NoSpace("x")) == errno.ENOSPC
    assert to_errno(errors.StoreFailed("x", OSError(errno.ESTALE, "stale"))) == errno.ESTALE
    assert to_errno(PermissionError(errno.EACCES, "no")) == errno.EACCES
    assert caplog.records == []
    with caplog.at_level(logging.ERROR):
        assert to_errno(ZeroDivisionError("bug")) == errno.EIO
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"win%20.iso", "win%20.iso"),
        (b"a\nb", "a\\nb"),
        (b"\xff", "\\xff"),
        ("\udcff", "\\udcff"),
        ("é \x1b[", "é \\x1b["),
    ],
)
def test_names_are_printable(name: bytes | str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode()
