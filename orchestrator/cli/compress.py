"""`conclave compress` and `evaluate`: the worker's own commands, as no model is known here."""

import os
import sys

import typer


def compress(context: typer.Context) -> None:
    """Make a sparse, quantized checkpoint of a full one."""
    _hand_over("compress", context)


def evaluate(context: typer.Context) -> None:
    """Tell what compression did to a model's predictions, by language."""
    _hand_over("evaluate", context)


def _hand_over(command: str, context: typer.Context) -> None:
    module = ("-m", "conclave.worker.compress", command)
    os.execv(sys.executable, [sys.executable, *module, *context.args])
