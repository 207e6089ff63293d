"""CUDA graphs: what a call puts into a stream, recorded once and begun as a whole.

A step of sixty layers is a thousand kernels, and a host takes longer to begin them one by one than
a card to run them. What it gave up: nothing that a graph does may depend on numbers.
"""

from collections.abc import Callable
from contextlib import suppress

import torch


class GraphRecorder:
    """Records calls on one device; all recordings work in one pool of memory.

    So only one may run at a time, and what it leaves is good until the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """What replays `run` in the current stream.

        `run` has run before, so that all it needs at the first time is there; now it is not run,
        only recorded. What fails in it is raised, and nothing is recorded then.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # Other threads, of another engine perhaps, may go on allocating memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # it tells what follows, not what was wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay
