"""What is left of a worker's weights, from a message and back."""

from dataclasses import asdict

from ..protos.gateway_pb2 import WorkerInfo
from ..protos.generation_pb2 import Precision as Message
from ..protos.worker_pb2 import DescribeResponse
from ..worker.precision import Precision


def precision_of(message: DescribeResponse | WorkerInfo) -> Precision | None:
    """What the message says; None if nothing."""
    if not message.HasField("precision"):
        return None
    said = message.precision
    return Precision(said.sparsity, said.weight_bits, said.bits_per_weight, said.kv_error)


def precision_message(precision: Precision | None) -> Message | None:
    """The inverse."""
    return None if precision is None else Message(**asdict(precision))
