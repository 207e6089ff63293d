"""`conclave compress`, `recover`, `export`, ...: the worker's own, as no model is known here."""

import os
import sys

import typer


def compress(context: typer.Context) -> None:
    """Make a sparse, quantized checkpoint of a full one."""
    _hand_over("compress", context)


def evaluate(context: typer.Context) -> None:
    """Tell what compression did to a model's predictions, by language."""
    _hand_over("evaluate", context)


def audit(context: typer.Context) -> None:
    """Recompute how far off keys and values in narrow numbers are."""
    _hand_over("audit", context)


def plan(context: typer.Context) -> None:
    """Tell how a memory budget would be divided up, and how long steps would take."""
    _hand_over("plan", context)


def recover(context: typer.Context) -> None:
    """Train what a compressed checkpoint keeps against the full one."""
    _hand_over("recover", context)


def export(context: typer.Context) -> None:
    """Write a compressed checkpoint as one that stock Hugging Face loaders read."""
    _hand_over("export", context)


def import_(context: typer.Context) -> None:
    """Take a quantized Hugging Face checkpoint over as a compressed one."""
    _hand_over("import", context)


def _hand_over(command: str, context: typer.Context) -> None:
    module = ("-m", "conclave.worker.compress", command)
    os.execv(sys.executable, [sys.executable, *module, *context.args])
