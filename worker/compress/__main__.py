"""The commands that work on checkpoints, each told where it stands."""

import os

import typer

from ..audit.command import audit
from ..memory.command import plan
from .command import compress
from .interchange.command import export, import_
from .quality.command import evaluate
from .recovery.command import recover

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(compress)
app.command()(evaluate)
app.command()(audit)
app.command()(plan)
app.command()(recover)
app.command()(export)
app.command("import")(import_)

if __name__ == "__main__":
    # Weights of all sizes come and go on a card that they nearly fill: no pieces may be left.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    app(prog_name="conclave")
