"""A gateway in a process of its own that is told of its workers by JSON lines; it needs no Ray.

    python -m benchmarks.gateway_process --config '{"port": 0}'

Prints one JSON line with its address, then obeys the lines of its input, each answered by one:

    {"located": ["name", "address", "incarnation", 4711]}    a worker's process is there
    {"absent": ["name", "why"]}                              it is about to be started (again)

It ends, with the grace of its settings, when its input does.
"""

import argparse
import asyncio
import json

import uvloop

from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.affinity import keep_to_one_core
from conclave.orchestrator.gateway.server import Gateway

from .stub_worker import input_lines


async def serve(config: GatewayConfig) -> None:
    """Serves until the process's input ends."""
    gateway = Gateway(config, fleet="stub")
    await gateway.start()
    print(json.dumps({"address": gateway.address}), flush=True)
    async for line in input_lines():
        command = json.loads(line)
        if "located" in command:
            gateway.located(*command["located"])
        if "absent" in command:
            gateway.absent(*command["absent"])
        print(json.dumps({"done": sorted(command)}), flush=True)
    await gateway.stop()


def main() -> None:
    """Run one gateway."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=json.loads, default={"port": 0}, help="GatewayConfig")
    config = GatewayConfig(**parser.parse_args().config)
    if config.one_core:
        keep_to_one_core(config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config))


if __name__ == "__main__":
    main()
