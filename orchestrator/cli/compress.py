"""`conclave compress`: hands over to the worker's own command, as no model is known here."""

import os
import sys

import typer


def compress(context: typer.Context) -> None:
    """Make a sparse, quantized checkpoint of a full one; `conclave compress --help` for more."""
    os.execv(sys.executable, [sys.executable, "-m", "conclave.worker.compress", *context.args])
