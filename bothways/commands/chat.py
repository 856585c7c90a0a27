"""`bothways chat`: a conversation at the terminal."""

import sys
from collections.abc import Iterator
from typing import Any

import tyro

import bothways
from bothways.commands.shared import ONE, capability, checked_text, emit, which
from bothways.config import MeshConfig
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional


def chat(
    run: Positional[str],
    system: str = "",
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    seed: int = 0,
    block: int | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    mesh: MeshConfig = ONE,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Talk with a run: each line is a turn, and the answer is shown as it is generated. Ctrl-D or Ctrl-C ends it.

    Args:
        run: A run directory, preferably of a model that was trained on conversations.
        system: The system message with which the conversation begins.
        max_tokens: Most tokens per answer.
        temperature: Below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: Sample from the K most likely tokens; 0 is off.
        top_p: Sample from the fewest tokens that together have this probability; 1 is off.
        min_p: Leave out tokens less likely than this fraction of the most likely one; 0 is off.
        greedy: Always take the most likely token.
        seed: The same seed and the same turns give the same answers.
        block: Tokens per block, generated together (diffusion models).
        steps: Denoising steps per block (diffusion models).
        threshold: In every step, keep all tokens of at least this probability (diffusion models).
        mesh: Devices over which the parameters are sharded.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per turn, without streaming.
    """
    checked_text([system], "the system message")
    if sys.stdin is None:
        raise InputError("standard input is closed; chat reads a turn from each of its lines")
    model = bothways.load(run, mesh, which(step))
    capability(model, "sample", "")
    in_blocks = {k: v for k, v in (("block", block), ("steps", steps), ("threshold", threshold)) if v is not None}
    if in_blocks and model.recipe.objective.kind != "diffusion":
        raise InputError(f"--{min(in_blocks)} is for diffusion runs; {run} goes left to right")
    from bothways.sample.chat import Conversation

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"greedy": greedy, "max_tokens": max_tokens, "seed": seed} | in_blocks
    talk = Conversation(model, system, log, **options)
    if not model.tokenizer.chat_template:
        log(f"{run} has no chat template: a plain one is used, which it may never have seen")
    stream = None if json else (lambda piece: print(piece, end="", flush=True))
    try:
        for text in turns():
            try:
                found = talk.reply(text, stream)
            except InputError as e:
                log(str(e))
                if not sys.stdin.isatty():
                    raise
                continue
            emit(found, json, "")
    except KeyboardInterrupt:
        print(file=sys.stderr)


def turns() -> Iterator[str]:
    """The lines of standard input that are not empty, up to its end; at a terminal, with a prompt.

    Raises:
      InputError: a line that is not UTF-8.
    """
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  (so that a line can be edited)
    first = True
    while True:
        try:
            line = input("> ") if asked else sys.stdin.buffer.readline().decode("utf-8-sig" if first else "utf-8")
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError as e:
            raise InputError(f"standard input is not UTF-8 (offset {e.start})") from e
        first = False
        if not asked and not line:
            return
        if text := line.strip():
            checked_text([text], "the turn")
            yield text
