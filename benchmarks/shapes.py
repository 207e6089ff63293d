"""Shapes of the linear layers of every Gemma 4 model, rows out x columns in."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer, or a stack of them for experts."""

    model: str
    rows: int
    columns: int
    experts: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}" + (f"x{self.experts}" if self.experts else "")


HEADLINE = Shape("31B", 21504, 5376)
"""Gate or up of the 31B model."""
LINEARS = (
    HEADLINE,
    *(
        Shape("31B", rows, columns)
        for rows, columns in (
            *((43008, 5376), (5376, 21504)),  # gate and up, down
            *((16384, 5376), (8192, 5376), (4096, 5376)),  # q global, q sliding, keys and values
            *((5376, 8192), (5376, 16384)),  # o
        )
    ),
    *(Shape("12B", rows, columns) for rows, columns in ((15360, 3840), (3840, 15360))),
    *(Shape("E4B", rows, columns) for rows, columns in ((10240, 2560), (2560, 10240))),
    *(Shape("26B", rows, columns) for rows, columns in ((4224, 2816), (2816, 2112))),
)
STACKS = (Shape("26B", 1408, 2816, 128), Shape("26B", 2816, 704, 128))
"""Gate and up, then down, of the 26B model's experts."""
EXPERTS_EACH = 8
"""Experts of one token."""


def tokens_of(shape: Shape) -> tuple[int, ...]:
    """Batch sizes to measure a shape at."""
    if shape == HEADLINE:
        return (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
    if shape.model == "31B":
        return (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return (1, 8, 64)


def group_of(columns: int) -> int:
    """Columns that share a scale: 128 where they divide a row, else 64."""
    return 64 if columns % 128 else 128
