"""Requests that ask for weights of a certain precision, through a real gateway."""

from typing import Any

import pytest

from conclave.orchestrator.client import InvalidRequest, WorkerNotFound
from conclave.protos import gateway_pb2, gateway_pb2_grpc, generation_pb2
from conclave.protos.generation_pb2 import Precision
from conclave.worker import Knobs
from conclave.worker import precision as worker_precision

PRUNED = Precision(sparsity=0.6875, weight_bits=4, bits_per_weight=2.75)
INT8 = Precision(sparsity=0, weight_bits=8, bits_per_weight=8.25)


def mixed(rig: Any) -> Any:
    """Three workers: pruned, int8, pruned."""
    fleet = rig(3)
    for worker, precision in zip(fleet.workers, (PRUNED, INT8, PRUNED), strict=True):
        worker.precision, worker.weights = precision, f"{precision.weight_bits} bits"
    return fleet


def test_a_request_goes_where_the_weights_are_enough(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with mixed(rig) as fleet:
            listed = await fleet.client.workers()
            assert listed[0].precision == worker_precision.Precision(0.6875, 4, 2.75)
            for knobs in ({"weight_bits": 8}, Knobs(sparsity=0.5), {"sparsity": 0.0}):
                answer = await fleet.client.generate("hello", knobs=knobs)
                assert answer.worker == "w1"
                async with fleet.client.stream("hello", knobs=knobs) as stream:
                    async for _ in stream:
                        pass
                assert stream.completion.worker == "w1"
            assert fleet.workers[1].asked[-1].knobs == generation_pb2.Knobs(sparsity=0)
            with pytest.raises(WorkerNotFound, match=r"w0: 4-bit values, 68.8% pruned; w1: 8-bit"):
                await fleet.client.generate("hello", knobs={"weight_bits": 16})
            assert (await fleet.client.generate("hello", knobs={})).worker == "w0"

    run(scenario())


def test_the_gateway_names_the_knob_at_fault(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(fleet.channel)
            request = generation_pb2.GenerateRequest(
                prompt=generation_pb2.Prompt(text="hi"),
                knobs=generation_pb2.Knobs(sparsity=2, weight_bits=5),
            )
            with pytest.raises(Exception, match=r"knobs.sparsity: .*; knobs.weight_bits: choose"):
                await stub.Complete(gateway_pb2.CompleteRequest(request=request))
            with pytest.raises(InvalidRequest, match=r"knobs.prefetch: is a worker's"):
                await fleet.client.generate("hi", knobs={"prefetch": True})
            assert not fleet.workers[0].asked

    run(scenario())


def test_every_member_of_an_ensemble_is_enough(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with mixed(rig) as fleet:
            answer = await fleet.client.generate(
                "q", ensemble={"vote": {}, "count": 2}, knobs={"sparsity": 0.7}
            )
            assert len({member.worker for member in answer.ensemble.members}) == 2
            members = [{"selector": {"names": ["w0"]}}, {"selector": {"names": ["w1"]}}]
            with pytest.raises(WorkerNotFound, match="names w0; knobs weight_bits at least 8"):
                await fleet.client.generate(
                    "q", ensemble={"vote": {}, "members": members}, knobs={"weight_bits": 8}
                )

    run(scenario())


def test_a_stream_goes_on_with_weights_that_are_enough(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with mixed(rig) as fleet:
            fleet.workers[0].script = fleet.Scripts.count(die_at=3)
            fleet.workers[2].script = fleet.Scripts.count()
            request = generation_pb2.GenerateRequest(
                request_id="r",
                prompt=generation_pb2.Prompt(text="hello"),
                knobs=generation_pb2.Knobs(sparsity=0.6875, weight_bits=4),
            )
            envelope = gateway_pb2.GatewayGenerateRequest(request=request)
            envelope.selector.names.extend(("w0", "w2"))
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(fleet.channel)
            got: list[Any] = []
            async for event in stub.Generate(envelope):
                got.append(event)
                for worker in fleet.workers:
                    worker.seen["r"] = len(got)
            assert [t.id for event in got for t in event.delta.tokens] == list(range(6))
            assert (got[-1].finished.resumes, got[-1].finished.worker) == (1, "w2")
            assert fleet.workers[2].asked[0].knobs == request.knobs

    run(scenario())


def test_a_worker_that_came_back_says_anew_what_it_runs(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with mixed(rig) as fleet:
            assert (await fleet.client.generate("q", knobs={"weight_bits": 8})).worker == "w1"
            await fleet.replace(1)  # an older release, which does not say
            await fleet.until(lambda: fleet.gateway.registry.workers["w1"].restarts == 1)
            with pytest.raises(WorkerNotFound):
                await fleet.client.generate("q", knobs={"weight_bits": 8})

    run(scenario())
