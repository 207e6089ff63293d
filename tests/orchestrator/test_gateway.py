"""The gateway against scripted workers: routing, retry, terminal events, cancel, deadline."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conclave.orchestrator.client import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RemoteError,
    Select,
    Unavailable,
    WorkerNotFound,
)
from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.routing.registry import WorkerState
from conclave.protos import gateway_pb2, gateway_pb2_grpc
from conclave.worker.errors import ConfigError

GATEWAY = "conclave.v1.GatewayService"


def kinds(events: list[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def test_answers_on_the_least_loaded_worker(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.answer(2, pause=0.1)
            answers = await asyncio.gather(*(fleet.client.generate("hello") for _ in range(6)))
            assert sorted(a.worker for a in answers) == ["w0", "w0", "w1", "w1", "w2", "w2"]
            assert {a.text for a in answers} == {"t0 t1 "}
            assert len({a.request_id for a in answers}) == 6
            assert all(w.open_requests == 0 for w in fleet.gateway.registry.workers.values())

    run(scenario())


def test_stream_is_passed_on_event_by_event(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            events = await fleet.events(request_id="mine")
            assert kinds(events) == ["delta"] * 3 + ["finished"]
            assert {event.request_id for event in events} == {"mine"}

    run(scenario())


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_an_unanswered_ask_is_tried_elsewhere(rig: Any, run: Any, call: str) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for worker in fleet.workers[:2]:
                worker.script = fleet.Scripts.die_after(0)
            if call == "generate":
                assert (await fleet.client.generate("hello")).worker == "w2"
            else:
                assert kinds(await fleet.events()) == ["delta"] * 3 + ["finished"]
            states = [fleet.state(worker) for worker in fleet.workers]
            assert states == [WorkerState.DOWN, WorkerState.DOWN, WorkerState.SERVING]
            # Later asks never see the dead ones.
            for _ in range(4):
                await fleet.client.generate("again")
            assert [len(worker.asked) for worker in fleet.workers] == [1, 1, 5]
            assert (await fleet.client.fleet()).retries == 2

    run(scenario())


def test_attempts_are_limited(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3, attempts=2) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.die_after(0)
            with pytest.raises(Unavailable):
                await fleet.client.generate("hello")
            assert sum(len(worker.asked) for worker in fleet.workers) == 2

    run(scenario())


def test_a_stream_that_has_begun_ends_with_one_failed_event(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2, wait_for_worker_seconds=0.2) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.die_after(2)
            events = await fleet.events()
            assert kinds(events) == ["delta", "delta", "failed"]
            error = events[-1].failed.error
            assert (error.code, error.retryable) == (14, True)
            assert sum(len(worker.asked) for worker in fleet.workers) == 1

    run(scenario())


def test_the_client_raises_for_a_failed_event(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].script = fleet.Scripts.fail_after(1)
            stream = fleet.client.stream("hello")
            assert (await anext(stream)).text == "t0 "
            with pytest.raises(Unavailable, match="scripted"):
                await anext(stream)

    run(scenario())


def test_a_worker_that_ends_without_an_end_is_a_failure(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].script = fleet.Scripts.stop_short(1)
            assert kinds(await fleet.events()) == ["delta", "failed"]

    run(scenario())


def test_a_failed_event_before_any_other_counts_as_unanswered(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            fleet.workers[0].script = fleet.Scripts.fail_after(0)
            assert kinds(await fleet.events()) == ["delta"] * 3 + ["finished"]
            # The worker said so itself: it is not marked down for that.
            assert fleet.state(fleet.workers[0]) is WorkerState.SERVING

    run(scenario())


def test_a_bad_request_passes_unchanged_and_is_not_retried(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.invalid("sampling.top_p")
            with pytest.raises(InvalidRequest) as caught:
                await fleet.client.generate("hello")
            assert [v.field for v in caught.value.violations] == ["sampling.top_p"]
            assert sum(len(worker.asked) for worker in fleet.workers) == 1
            assert all(fleet.state(w) is WorkerState.SERVING for w in fleet.workers)

    run(scenario())


def test_an_internal_error_passes_unchanged(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.refuse(grpc.StatusCode.INTERNAL)
            with pytest.raises(RemoteError, match="INTERNAL: scripted refusal"):
                await fleet.client.generate("hello")

    run(scenario())


def test_a_full_worker_is_passed_over(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            fleet.workers[0].script = fleet.Scripts.full(7)
            assert (await fleet.client.generate("hello")).worker == "w1"
            fleet.workers[1].script = fleet.Scripts.full(7)
            with pytest.raises(Overloaded) as caught:
                await fleet.client.generate("hello")
            assert caught.value.retry_after == 7.0

    run(scenario())


def test_a_missing_request_is_named(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(fleet.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Complete(gateway_pb2.CompleteRequest())
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "request: is missing" in str(caught.value.details())

    run(scenario())


def test_selectors(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(3) as fleet:
            for _ in range(3):
                answer = await fleet.client.generate("hello", select=Select(names=["w1"]))
                assert answer.worker == "w1"
            with pytest.raises(WorkerNotFound, match="model nothing"):
                await fleet.client.generate("hello", select=Select(model="nothing"))
            listed = await fleet.client.workers(Select(names=["w1", "w2"]))
            assert [worker.name for worker in listed] == ["w1", "w2"]
            assert listed[0].served_requests == 3
            assert await fleet.client.workers(Select(labels={"no": "one"})) == ()

    run(scenario())


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_a_cancelled_ask_is_cancelled_at_the_worker(rig: Any, run: Any, call: str) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            (worker,) = fleet.workers
            worker.script = fleet.Scripts.hang()
            task = asyncio.ensure_future(
                fleet.client.generate("hello") if call == "generate" else fleet.events()
            )
            await fleet.until(lambda: worker.running == 1)
            task.cancel()
            await fleet.until(lambda: worker.cancelled == 1 and worker.running == 0)
            await fleet.until(lambda: fleet.gateway.registry.workers["w0"].open_requests == 0)

    run(scenario())


def test_leaving_a_stream_cancels_it(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            (worker,) = fleet.workers
            worker.script = fleet.Scripts.answer(10_000, pause=0.01)
            async with fleet.client.stream("hello") as stream:
                assert (await anext(stream)).text == "t0 "
            await fleet.until(lambda: worker.cancelled == 1)

    run(scenario())


def test_the_deadline_reaches_the_worker(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            (worker,) = fleet.workers
            worker.script = fleet.Scripts.hang()
            with pytest.raises(DeadlineExceeded):
                await fleet.client.generate("hello", timeout=0.5)
            timeout = worker.timeouts[0]
            assert timeout is not None and timeout <= 0.501  # gRPC rounds up
            await fleet.until(lambda: worker.running == 0)

    run(scenario())


def test_an_ask_waits_for_a_worker_that_comes_back(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].relay.kill()
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.DOWN)
            task = asyncio.ensure_future(fleet.client.generate("hello"))
            await asyncio.wait([task], timeout=0.2)
            assert not task.done()
            await fleet.replace(0)
            assert (await task).worker == "w0"
            (status,) = await fleet.client.workers()
            assert status.restarts == 1

    run(scenario())


def test_the_wait_ends_and_says_why(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1, wait_for_worker_seconds=0.2) as fleet:
            fleet.workers[0].relay.kill()
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.DOWN)
            with pytest.raises(Unavailable, match="w0 down"):
                await fleet.client.generate("hello")

    run(scenario())


def test_nobody_waits_for_a_lost_worker(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1, wait_for_worker_seconds=600.0) as fleet:
            fleet.gateway.lost("w0", "bad checkpoint")
            with pytest.raises(Unavailable, match="bad checkpoint"):
                await fleet.client.generate("hello")

    run(scenario())


def test_a_connection_that_broke_by_itself_is_used_again(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.workers[0].relay.cut()
            assert (await fleet.client.generate("hello")).worker == "w0"

    run(scenario())


def test_a_draining_worker_gets_no_new_asks(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            await fleet.workers[0].set_serving(False)
            await fleet.until(lambda: fleet.state(fleet.workers[0]) is WorkerState.DRAINING)
            for _ in range(3):
                assert (await fleet.client.generate("hello")).worker == "w1"

    run(scenario())


def test_another_process_at_the_address_is_not_taken_for_the_worker(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            fleet.gateway.located("other", fleet.workers[0].address, "other.1")
            other = fleet.gateway.registry.workers["other"]
            await fleet.until(lambda: "another process" in other.reason)
            assert other.state is WorkerState.DOWN

    run(scenario())


def test_health_follows_the_workers(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            stub: Any = health_pb2_grpc.HealthStub(fleet.channel)
            for name in ("", GATEWAY):
                seen = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert seen.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=GATEWAY))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            fleet.workers[0].relay.kill()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await fleet.replace(0)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

    run(scenario())


def test_an_address_in_use_is_told(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            port = int(fleet.gateway.address.rpartition(":")[2])
            second = Gateway(GatewayConfig(port=port))
            with pytest.raises(ConfigError, match="cannot listen on"):
                await second.start()
            await second.stop()

    run(scenario())


def test_an_answer_larger_than_a_message_may_be_is_not_retried(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2, max_message_mib=1) as fleet:
            for worker in fleet.workers:
                worker.script = fleet.Scripts.say("x" * 2_000_000)
            with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED"):
                await fleet.client.generate("hello")
            assert sum(len(worker.asked) for worker in fleet.workers) == 1
            assert all(fleet.state(w) is WorkerState.SERVING for w in fleet.workers)

    run(scenario())


def test_reflection_lists_the_services(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(fleet.channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            async for response in stub.ServerReflectionInfo(iter([request])):
                names = {service.name for service in response.list_services_response.service}
                assert {GATEWAY, "grpc.health.v1.Health"} <= names
                break

    run(scenario())


def test_score(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(1) as fleet:
            scores = await fleet.client.score("context", ["one", [1, 2]])
            assert [score.logprob for score in scores] == [-1.0, -2.0]

    run(scenario())


def test_fleet_status(rig: Any, run: Any) -> None:
    async def scenario() -> None:
        async with rig(2) as fleet:
            fleet.gateway.declare("later", model="big")
            status = await fleet.client.fleet()
            assert (status.name, status.desired_workers, status.serving_workers) == ("test", 3, 2)
            assert status.models == ("big", "fake")

    run(scenario())
