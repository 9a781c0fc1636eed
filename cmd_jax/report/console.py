"""What the verbs say on the screen."""

from rich.console import Console


def make_console(quiet: bool = False, file_width: int | None = None) -> Console:
    """The console of a verb: texts come out as they are, in one line; tables are printed with soft_wrap=False.

    Without these flags rich takes the [..] of a path or a caption for markup and :name: for an emoji, and breaks lines.
    file_width: characters of a line where the output is no terminal.
    """
    flags = dict(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
    console = Console(**flags)
    return console if console.is_terminal or not file_width else Console(**flags, width=file_width)
