"""What the verbs say on the screen."""

import contextlib
import sys

from rich.console import Console


class Unread:
    """A stream whose reader may leave, like a closed terminal: what cannot be written any more is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str):
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()


def make_console(quiet: bool = False, file_width: int | None = None) -> Console:
    """The console of a verb: texts come out as they are, in one line; tables are printed with soft_wrap=False.

    Without these flags rich takes the [..] of a path or a caption for markup and :name: for an emoji, and breaks lines.
    file_width: characters of a line where the output is no terminal.
    """
    flags = dict(file=Unread(sys.stdout), markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
    console = Console(**flags)
    return console if console.is_terminal or not file_width else Console(**flags, width=file_width)
