"""How the commands speak: progress and errors on stderr, so that stdout has the result alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import ConclaveError

stderr = Console(stderr=True)


@contextmanager
def errors_told() -> Iterator[None]:
    """Ends the command with status 1 and one line, if it is the user's error or the disk's."""
    try:
        yield
    except (ConclaveError, OSError) as error:
        stderr.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """A bar with the time that is left. What it yields is told (done, in all), and perhaps what
    the bar is called from then on.
    """
    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task(what, total=None)

        def told(done: int, whole: int, what: str | None = None) -> None:
            bar.update(task, completed=done, total=whole, description=what)

        yield told
