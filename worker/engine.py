"""The engine: a loaded model that many callers may ask at once, from any thread.

    with Engine("path/to/checkpoint") as engine:
        print(engine.generate("Once upon a time", max_tokens=32).text)

All work is done by one thread of its own (`loop.py`). Callers talk to it through one queue of
commands and get events back through their request's sink, so nothing else ever touches the
scheduler or the model.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from .config import EngineConfig
from .errors import Cancelled, ConclaveError, InvalidRequest, Overloaded, Unavailable
from .load import Load
from .loading import Progress, load_model
from .loop import EngineLoop
from .memory.recorder import StepRecorder
from .requests.completion import Completion, Score, Stream
from .requests.events import Made, Request
from .requests.intake import Intake, Prompt
from .requests.limits import Limits
from .requests.stepping import Stepper

log = logging.getLogger(__name__)


class Engine:
    """A loaded model that answers many requests at once.

    Args:
        config: the settings, or just the checkpoint's folder.
        progress: called with tensors loaded so far and in all.
        settings: fields of EngineConfig, when `config` is a folder.

    Raises:
        CheckpointError, ConfigError: see `load_model`.
    """

    def __init__(
        self,
        config: EngineConfig | Path | str,
        progress: Progress | None = None,
        **settings: object,
    ) -> None:
        if not isinstance(config, EngineConfig):
            config = EngineConfig.model_validate({"model": config, **settings})
        elif settings:
            raise TypeError("give an EngineConfig or single settings, not both")
        self.config = config
        self.model = load_model(config, progress)
        self._loop = EngineLoop(self.model, config, self._gone)
        model = self.model
        limits = Limits.of(config, model.vocabulary, model.cache.max_context, model.precision)
        self.intake = Intake(self.model.tokenizer, limits)
        self.load: Load = self._loop.state()
        """State after the last step; safe to read from any thread."""
        self._last_life = time.monotonic()
        self._idle = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._admission = threading.Lock()
        self._recording = threading.Lock()
        self._open: dict[str, int] = {}  # sequences of each request, from submit to its last event
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests; False once closed or broken."""
        return not self._closed

    @property
    def step_age(self) -> float:
        """Seconds since the engine's thread last showed life; 0 while it has nothing to do."""
        return 0.0 if self._idle or self._closed else time.monotonic() - self._last_life

    def generate(self, prompt: Prompt, **sampling: object) -> Completion:
        """Answer a prompt and wait for the whole answer.

        Args:
            prompt: text, token ids, or chat messages.
            sampling: fields of SamplingParams.

        Raises:
            ConclaveError: the request was refused or broke.
        """
        return self.stream(prompt, **sampling).result()

    def stream(self, prompt: Prompt, **sampling: object) -> Stream:
        """Answer a prompt token by token; close the stream early to cancel."""
        return self.resume(prompt, (), **sampling)

    def resume(self, prompt: Prompt, made: Items[Made], /, **sampling: object) -> Stream:
        """Go on with answers that were begun elsewhere; only what is new is told.

        Args:
            prompt: text, token ids, or chat messages.
            made: what each output has already, by output index.
            sampling: fields of SamplingParams, as before, with the seed.

        Raises:
            InvalidRequest: with every field at fault.
        """
        ids = self.intake.encode(prompt)
        stream = Stream(lambda: self.abort(request.id))
        request = self.intake.generation(ids, sampling, stream.put, made=made)
        self.submit(request)
        return stream

    def step(
        self,
        prompt: Prompt,
        *,
        candidates: int = 1,
        generate: int = 0,
        made: Items[Made] = (),
        **sampling: object,
    ) -> Stepper:
        """Answer a prompt with tokens that the caller chooses; see `requests/stepping.py`.

        Args:
            prompt: text, token ids, or chat messages.
            candidates: how many of the likeliest next tokens each step tells.
            generate: tokens to generate right after the prompt.
            made: what the answer has already, one entry.
            sampling: fields of SamplingParams, for what the engine generates.

        Raises:
            InvalidRequest: with every field at fault.
        """
        ids = self.intake.encode(prompt)
        stepper = Stepper(
            lambda: self.submit(request),
            lambda ids, generate: self.take(request.id, ids, generate),
            lambda: self.abort(request.id),
        )
        request = self.intake.stepping(
            ids, sampling, stepper.put, candidates=candidates, generate=generate, made=made
        )
        return stepper

    def score(self, context: Prompt, continuations: Items[str | Items[int]]) -> list[Score]:
        """Log-likelihood of each continuation after the context (which may be empty ids)."""
        start = self.intake.encode(context)
        streams = []
        for continuation in continuations:
            stream = Stream(lambda: None)
            self.submit(self.intake.scoring(start, self._continue(continuation), stream.put))
            streams.append(stream)
        return [Score.of(stream.result().prompt_tokens) for stream in streams]

    def submit(self, request: Request) -> None:
        """Queue a request made by `intake`; events go to its sink.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the engine is closed.
            InvalidRequest: a request with this id is open.
        """
        count = request.sampling.n
        with self._admission:
            if self._closed:
                raise Unavailable("the engine is closed")
            room = self.config.max_waiting + self.config.max_sequences
            if sum(self._open.values()) + count > room:
                raise Overloaded(f"the queue is full ({room} sequences are open)", retry_after=1.0)
            if request.id in self._open:
                raise InvalidRequest.of("request_id", f"{request.id!r} is already running")
            self._open[request.id] = count
            arrived = time.monotonic()
            self._commands.put(lambda: self._loop.accept(request, arrived))

    def take(self, request_id: str, ids: Items[int], generate: int = 0) -> None:
        """Begin the next step of a stepped request, once the last one has had its response.

        Raises:
            InvalidRequest: ids outside the vocabulary, or a negative count.
        """
        self.intake.check_step(ids, generate)
        self._commands.put(lambda: self._loop.take(request_id, ids, generate))

    def abort(self, request_id: str, error: ConclaveError | None = None) -> None:
        """End a request before the next step; its blocks are free by then. Unknown ids are fine."""
        failure = error or Cancelled("the caller gave the request up")
        self._commands.put(lambda: self._loop.fail(request_id, failure))

    @contextmanager
    def recorded(self) -> Iterator[StepRecorder]:
        """Record what computes, copies and waits in the steps meanwhile.

            with engine.recorded() as recording:
                engine.generate("Once upon a time")
            path.write_text(json.dumps(chrome_trace({"steps": recording.timeline})))

        Steps take a little longer. Raises Unavailable if the engine is closed, or recorded already.
        """
        if not self._recording.acquire(blocking=False):
            raise Unavailable("the engine is being recorded; wait for that to end")
        try:
            runner = self.model.runner
            recorder = StepRecorder(runner.decoder, runner.stream, runner.device)

            def begin() -> None:
                runner.watched = True
                recorder.begin()

            def end() -> None:
                recorder.end()
                runner.watched = False

            self._between_steps(begin)
            try:
                yield recorder
            finally:
                try:
                    self._between_steps(end)
                except Unavailable:  # closed meanwhile, so there are no more steps
                    end()
        finally:
            self._recording.release()

    def warm_up(self) -> None:
        """Run one short generation, so that the first caller does not pay for first-time work."""
        room = min(self.config.max_step_tokens + 1, self.intake.limits.max_context - 2)
        self.generate([0] * max(1, room), max_tokens=2, temperature=0.0, ignore_eos=True)

    def close(self) -> None:
        """Stop the thread and release the host's memory; open requests end with Unavailable."""
        with self._admission:
            self._closed = True
        self._commands.put(lambda: None)  # wakes the thread up
        self._thread.join()
        with self._admission:  # also if the thread broke; a second time there is nothing left
            self.model.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _between_steps(self, action: Callable[[], None]) -> None:
        """Done by the engine's thread, before this returns."""
        done = threading.Event()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        with self._admission:
            if self._closed:
                raise Unavailable("the engine is closed")
            self._commands.put(act)
        done.wait()

    def _continue(self, continuation: str | Items[int]) -> list[int]:
        if isinstance(continuation, str):
            return self.model.tokenizer.encode(continuation, special=False)
        return self.intake.encode(continuation)

    def _gone(self, request_id: str) -> None:
        with self._admission:
            del self._open[request_id]

    def _run(self) -> None:
        try:
            while not self._closed:
                self._obey(self._loop.pause())
                self._loop.turn()
                self._deliver()
        except Exception:
            log.exception("the engine broke; it takes no more requests")
        with self._admission:
            self._closed = True
        try:
            self._obey(0.0)
            self._loop.fail_all(Unavailable("the engine was closed"))
            self.load = self._loop.state()
        except Exception:
            log.exception("the engine broke; its last state is not known")
        self._loop.deliver()

    def _obey(self, pause: float | None) -> None:
        """Run all commands that are there; wait for one as long as there is nothing to compute."""
        self._last_life = time.monotonic()
        if pause != 0:
            command = self._await_command(pause)
            if command is not None:
                command()
        while not self._commands.empty():
            self._commands.get()()
        self._last_life = time.monotonic()

    def _await_command(self, pause: float | None) -> Callable[[], None] | None:
        self._idle = True
        try:
            return self._commands.get(timeout=pause)
        except queue.Empty:
            return None
        finally:
            self._last_life = time.monotonic()
            self._idle = False

    def _deliver(self) -> None:
        """Publish the state, then send what has happened: who hears of it sees no older state."""
        self.load = self._loop.state()
        self._loop.deliver()
