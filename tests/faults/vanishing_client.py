"""A client in a process of its own with open streams, to be killed: says so when all have begun."""

import argparse
import asyncio
import json
from typing import Any

import grpc
import grpc.aio

from conclave.protos import gateway_pb2
from conclave.protos import generation_pb2 as pb
from conclave.protos.gateway_pb2_grpc import GatewayServiceStub

TOKENS = 4000


async def main() -> None:
    """Opens streams and reads them until the end of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    async with grpc.aio.insecure_channel(options.address) as channel:
        front: Any = GatewayServiceStub(channel)
        calls = [front.Generate(_envelope(n, options.tokens)) for n in range(options.streams)]
        await asyncio.gather(*(call.read() for call in calls))
        print(json.dumps({"begun": len(calls)}), flush=True)
        await asyncio.gather(*(_drain(call) for call in calls))


def _envelope(number: int, tokens: int) -> gateway_pb2.GatewayGenerateRequest:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=f"vanishing {number}"),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
    )
    return gateway_pb2.GatewayGenerateRequest(request=request)


async def _drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass


if __name__ == "__main__":
    asyncio.run(main())
