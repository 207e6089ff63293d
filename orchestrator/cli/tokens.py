"""`conclave token`: a bearer token for one caller, and the line that lets it in."""

import json
from typing import Annotated

import typer

from ..security.tokens import digest, new_token
from .output import errors


def token(
    name: Annotated[str, typer.Argument(help="who shall have it")],
) -> None:
    """Make a bearer token; it is shown once and kept nowhere."""
    secret = new_token()
    errors.print("the token, for its caller (CONCLAVE_TOKEN); nobody can show it again:")
    print(secret, flush=True)
    errors.print("its hash, for gateway.security.tokens or the tokens file:")
    # JSON quotes whatever YAML would take for something else.
    print(f"- {{name: {json.dumps(name, ensure_ascii=False)}, sha256: {digest(secret)}}}")
