"""Which optimizer changes what: AdamW everything, or Muon the layers' matrices.

Muon's step has about the same size in every direction of a matrix (Jordan 2024, with the sizes of
steps of Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982, so that AdamW's learning
rate does for both). The models shipped here came nearer to their teachers by it in the same time.
Embeddings, norms and scales stay AdamW's, and so do stacks of experts, which torch's Muon does not
take.
"""

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_BETAS = 0.9, 0.95


def optimizers_of(
    student: nn.Module,
    large: Sequence[nn.Parameter],
    undecayed: Sequence[nn.Parameter],
    weight_decay: float,
    muon: bool,
) -> list[Optimizer]:
    """What trains all parameters of `student` together, each once; learning rates are zero.

    Args:
        student: on the device that trains.
        large: its layers' packed weights as they are trained, [R, K] or [E, R, K].
        undecayed: of the others those that never lose any weight, whatever their shape; vectors
            do not either.
        weight_decay: of all others, times the learning rate.
        muon: whether the matrices among `large` are Muon's.
    """
    theirs = [own for own in large if muon and own.ndim == 2]
    apart = {id(own) for own in theirs}
    fixed = {id(own) for own in undecayed}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for own in student.parameters():
        if id(own) not in apart:
            groups[own.ndim > 1 and id(own) not in fixed].append(own)
    found: list[Optimizer] = [
        AdamW(
            [
                {"params": groups[True], "weight_decay": weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=_BETAS,
            fused=groups[True][0].is_cuda,
        )
    ]
    if theirs:
        found.append(
            Muon(theirs, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """The learning rate of the next step."""
    for own in optimizers:
        for group in own.param_groups:
            group["lr"] = rate


def step(optimizers: Sequence[Optimizer]) -> None:
    """Change all parameters by their gradients, which are gone then."""
    for own in optimizers:
        own.step()
        own.zero_grad(set_to_none=True)
