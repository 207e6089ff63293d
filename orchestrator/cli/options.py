"""Options that several commands share, and the parsing of their small languages."""

from pathlib import Path
from typing import Annotated

import typer

from ...worker.errors import InvalidRequest
from ...worker.knobs import Knobs
from ..client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, Select

Address = Annotated[str, typer.Option(envvar="CONCLAVE_ADDRESS", help="host:port of the gateway")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Token = Annotated[
    str | None,
    typer.Option(envvar="CONCLAVE_TOKEN", help="bearer token; other users see what is typed here"),
]
TlsCa = Annotated[
    str | None,
    typer.Option(
        envvar="CONCLAVE_TLS_CA", help="PEM file of the gateway's authority, or `public`; means TLS"
    ),
]
TlsCert = Annotated[
    Path | None, typer.Option(envvar="CONCLAVE_TLS_CERT", help="PEM file of your own certificate")
]
TlsKey = Annotated[Path | None, typer.Option(envvar="CONCLAVE_TLS_KEY", help="its private key")]
Timeout = Annotated[float, typer.Option(help="seconds until the request is given up")]
Names = Annotated[list[str] | None, typer.Option("--worker", help="only this worker; repeatable")]
Model = Annotated[str, typer.Option(help="only workers with this model")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help="KEY=VALUE, only workers so labelled; repeatable"),
]
KnobText = Annotated[
    str | None,
    typer.Option("--knobs", help="the least its weights must be, such as weight_bits=8,sparsity=0"),
]

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT",
    "Address",
    "AsJson",
    "KnobText",
    "Labels",
    "Model",
    "Names",
    "Timeout",
    "TlsCa",
    "TlsCert",
    "TlsKey",
    "Token",
    "knobs",
    "pairs",
    "selection",
]


def selection(names: list[str] | None, model: str, labels: list[str] | None) -> Select | None:
    """The choice of workers that the options name; None for any."""
    if not names and not model and not labels:
        return None
    return Select(names or (), model, pairs("label", labels))


def knobs(text: str | None) -> Knobs | None:
    """`weight_bits=8,sparsity=0` as knobs. Raises InvalidRequest naming what is wrong."""
    return None if text is None else Knobs.checked(pairs("knobs", text.split(",")))


def pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dict. Raises InvalidRequest naming the option."""
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidRequest.of(f"--{option}", f"{text!r} is not of the form KEY=VALUE")
        found[key] = value
    return found
