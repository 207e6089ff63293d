"""`conclave generate` and `conclave score`: one request from the shell."""

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from ...worker.errors import InvalidRequest
from ..client import Client, Completion, Message, Options, Prompt
from .options import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT,
    Address,
    AsJson,
    KnobText,
    Labels,
    Model,
    Names,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    Token,
    knobs,
    pairs,
    selection,
)
from .output import console, errors, member_table, print_json

Number = Annotated[float | None, typer.Option()]
Count = Annotated[int | None, typer.Option(min=0)]


def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from stdin")],
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a user's turn")] = False,
    system: Annotated[str | None, typer.Option(help="a system turn before it")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="think before the answer")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="print tokens as they come")] = False,
    as_json: AsJson = False,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="most tokens of the answer")] = None,
    min_tokens: Annotated[int | None, typer.Option(min=0, help="no stop before so many")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_k: Annotated[int | None, typer.Option(help="only the k likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="only tokens up to this mass")] = None,
    min_p: Annotated[float | None, typer.Option(help="only tokens at least so likely")] = None,
    presence_penalty: Number = None,
    frequency_penalty: Number = None,
    repetition_penalty: Number = None,
    logit_bias: Annotated[list[str] | None, typer.Option(help="TOKEN_ID=VALUE; repeatable")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same answer")] = None,
    n: Annotated[int | None, typer.Option(help="independent answers")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends it; repeatable")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go past stop tokens")] = False,
    include_stop: Annotated[bool, typer.Option("--include-stop", help="keep stop text")] = False,
    special_tokens: Annotated[bool, typer.Option("--special-tokens", help="show them")] = False,
    logprobs: Annotated[int | None, typer.Option(help="candidates a token; with --json")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="same for the prompt")] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(help="a preset of the fleet file, or a spec as JSON: '{\"vote\": {}}'"),
    ] = None,
    priority: Annotated[int | None, typer.Option(min=0, max=9, help="in the queue")] = None,
    session: Annotated[str | None, typer.Option(help="keeps asks on one worker")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="go on if the worker dies")
    ] = None,
    worker: Names = None,
    model: Model = "",
    label: Labels = None,
    knob: KnobText = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Answer a prompt."""
    options: dict[str, object] = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": _bias(logit_bias),
        "seed": seed,
        "n": n,
        "stop": stop or None,
        "stop_token_ids": stop_token_id or None,
        "ignore_eos": ignore_eos or None,
        "include_stop": include_stop or None,
        "skip_special_tokens": False if special_tokens else None,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "select": selection(worker, model, label),
        "knobs": knobs(knob),
        "thinking": thinking,
        "timeout": timeout,
        "ensemble": _ensemble(ensemble),
        "priority": priority,
        "session": session,
        "resume": resume,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    chosen: Options = {k: v for k, v in options.items() if v is not None}  # type: ignore[assignment]
    if chat or system is not None:
        turns = [Message("system", system)] if system is not None else []
        chosen["messages"] = [*turns, Message("user", text)]
    with Client(
        address, token=token, ca=tls_ca, certificate=tls_cert, private_key=tls_key
    ) as client:
        run = _stream if stream else _complete
        run(client, None if "messages" in chosen else text, chosen, as_json)


def score(
    context: Annotated[str, typer.Argument(help="what stands before; may be empty")],
    continuations: Annotated[list[str], typer.Argument(help="what is scored")],
    as_json: AsJson = False,
    logprobs: Annotated[int | None, typer.Option(help="candidates a token; with --json")] = None,
    worker: Names = None,
    model: Model = "",
    label: Labels = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Tell how likely each continuation is after a context."""
    with Client(
        address,
        timeout=timeout,
        token=token,
        ca=tls_ca,
        certificate=tls_cert,
        private_key=tls_key,
    ) as client:
        scores = client.score(
            context or None,
            continuations,
            logprobs=logprobs,
            select=selection(worker, model, label),
        )
    if as_json:
        print_json(scores)
        return
    table = Table("logprob", "a token", "tokens", "continuation", box=None, pad_edge=False)
    for text, one in zip(continuations, scores, strict=True):
        mean = one.logprob / max(one.scored_tokens, 1)
        table.add_row(f"{one.logprob:.3f}", f"{mean:.3f}", str(one.scored_tokens), repr(text))
    console.print(table)


def _complete(client: Client, prompt: Prompt | None, options: Options, as_json: bool) -> None:
    completion = client.generate(prompt, **options)
    if as_json:
        print_json(completion)
        return
    for index, output in enumerate(completion.outputs):
        if len(completion.outputs) > 1:
            errors.print(f"[bold]answer {index}[/]")
        print(output.text, flush=True)
    _footer(completion)


def _stream(client: Client, prompt: Prompt | None, options: Options, as_json: bool) -> None:
    if options.get("n", 1) > 1 and not as_json:
        raise InvalidRequest.of("--stream", "shows one answer; with --n use --json too")
    with client.stream(prompt, **options) as stream:
        for delta in stream:
            if as_json:
                print_json(delta)
            else:
                print(delta.text, end="", flush=True)
    if as_json:
        print_json(stream.completion)
    else:
        print(flush=True)
        _footer(stream.completion)


def _footer(completion: Completion) -> None:
    if errors.is_terminal:
        usage = completion.usage
        errors.print(
            f"[dim]{completion.worker}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
            f"{completion.timings.total:.2f} s, {completion.finish_reason}[/]"
        )
        if completion.ensemble is not None:
            errors.print(member_table(completion.ensemble))


def _ensemble(text: str | None) -> object:
    """A preset's name, or the mapping that a JSON object says."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest.of("--ensemble", f"is not JSON: {error}") from None


def _bias(texts: list[str] | None) -> dict[int, float] | None:
    if not texts:
        return None
    try:
        return {int(key): float(value) for key, value in pairs("logit-bias", texts).items()}
    except ValueError as error:
        raise InvalidRequest.of("--logit-bias", f"{error}; use TOKEN_ID=VALUE") from error
