"""The command line `conclave`. Exit codes: 0 well, 1 failed, 2 wrong usage or settings.

Ray is imported by the commands that need it, when they run: it costs a second.
"""

from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from ...worker.errors import ConclaveError, ConfigError, InvalidRequest
from .ask import generate, score
from .compress import audit, compress, evaluate, export, import_, plan, recover
from .demo import demo
from .output import errors
from .run import serve, stop, workers
from .tokens import token

WRONG_INPUT = (ConfigError, InvalidRequest)


class _Group(TyperGroup):
    """Tells errors in one line on stderr, never as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConclaveError as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, WRONG_INPUT) else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An ensemble of single-GPU Gemma 4 workers, orchestrated over gRPC.",
)
for command in (serve, stop, workers, generate, score, token, demo):
    app.command()(command)
_HANDED_OVER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for handed_over in (compress, evaluate, audit, plan, recover, export, import_):
    name = handed_over.__name__.rstrip("_")
    app.command(name, context_settings=_HANDED_OVER)(handed_over)


def main() -> None:
    """Entry point of the `conclave` script."""
    app()
