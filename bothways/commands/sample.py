"""`bothways sample`: continues text."""

import functools
from pathlib import Path
from typing import Any

import tyro

import bothways
from bothways.commands.shared import ONE, capability, checked_text, emit, read_lines, which
from bothways.config import MeshConfig
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional
PROMPTS = 512
"""Prompts that are continued before the first result is shown."""


def sample(
    run: Positional[str],
    prompts: Positional[tuple[str, ...]],
    source: Path | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    beams: int | None = None,
    length_penalty: float | None = None,
    num: int = 1,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    block: int | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    remask: bool = False,
    any_order: bool = False,
    sweeps: int | None = None,
    stream: bool = False,
    chat: bool = False,
    system: str = "",
    mesh: MeshConfig = ONE,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Continue text: token by token, or, with a masked or diffusion model, a block of masks at a time. With an
    encoder-decoder, generate a target from a source, such as its translation.

    Args:
        run: A run directory.
        prompts: Texts to continue; "" starts a document. For an encoder-decoder: sources.
        source: A file with a source per line (encoder-decoders); the results keep its order.
        max_tokens: Most tokens per continuation; by default 256, or 50 more than the source has.
        temperature: Below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: Sample from the K most likely tokens; 0 is off.
        top_p: Sample from the fewest tokens that together have this probability; 1 is off.
        min_p: Leave out tokens less likely than this fraction of the most likely one; 0 is off.
        greedy: Always take the most likely token.
        beams: Width of a beam search instead of sampling (causal models; encoder-decoders use 4 beams unless
            another method is given).
        length_penalty: Beam search divides log-probabilities by a term that grows with length to this power (0.6).
        num: Continuations of each prompt.
        seed: The same seed gives the same text.
        stop: End before this string; may be given several times.
        block: Tokens per block, generated together (masked models: up to half of the context, by default 16; diffusion
            models: a block size that they were trained on, or as masked models if whole rows were among them).
        steps: Denoising steps per block, the most confident tokens first (masked models: 16; diffusion models: one per
            token).
        threshold: In every step, keep all tokens of at least this probability; 0 is off (masked, diffusion models).
        remask: Tokens of the open block may be masked again when others are more confident (masked, diffusion models).
        any_order: Keep tokens in a random order instead of the most confident first (masked, diffusion models).
        sweeps: How often each token of a block is resampled afterwards (masked models; by default 0).
        stream: Show the text while it is generated.
        chat: Each prompt is a user's turn, and the output is the answer, with the run's chat template.
        system: With --chat: the system message with which the conversation begins.
        mesh: Devices over which the parameters are sharded.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per result.
    """
    if source is not None:
        prompts = (*prompts, *read_lines(source))
    if not prompts:
        raise InputError('sample wants at least one prompt after the run: bothways sample RUN "ROMEO:"')
    checked_text(prompts, "the prompt")
    checked_text(stop, "the stop string")
    if stream and (len(prompts) * num > 1 or json):
        raise InputError("--stream shows one continuation as plain text: give one prompt, and neither --num nor --json")
    model = bothways.load(run, mesh, which(step))
    capability(model, "sample", "")
    family = model.recipe.family
    blocks = family == "bert" or model.recipe.objective.kind == "diffusion"
    if source is not None and family != "seq2seq":
        raise InputError(
            f"--source is for encoder-decoders; a {family} run goes on from a prompt: give it as an argument"
        )
    other_method = greedy or stream or stop or temperature != 1.0 or top_k or top_p != 1.0 or min_p
    if family == "seq2seq" and beams is None and not other_method:
        beams = 4
    chosen = {
        "max_tokens": max_tokens,
        "beams": beams,
        "length_penalty": length_penalty,
        "block": block,
        "steps": steps,
        "threshold": threshold,
        "remask": remask or None,
        "any_order": any_order or None,
        "sweeps": sweeps,
        "stream": stream or None,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    of_blocks = {"block", "steps", "threshold", "remask", "any_order", "sweeps"}
    wrong = set(options) & ({"beams", "length_penalty"} if blocks else of_blocks)
    if wrong:
        why = "writes blocks of masks and not token by token" if blocks else "goes left to right and has no masks"
        raise InputError(f"--{min(wrong).replace('_', '-')} is not for a {family} run, which {why}")
    if system and not chat:
        raise InputError("--system begins a conversation: add --chat, or leave it out")
    if chat:
        checked_text([system], "the system message")
        from bothways.sample.chat import answer_prompts

        answer = functools.partial(answer_prompts, model, system=system)
    else:
        answer = model.sample
    alone = family == "seq2seq" or chat
    if stream:
        print("" if alone else prompts[0], end="", flush=True)
        options["stream"] = lambda _, piece: print(piece, end="", flush=True)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy}
    count = len(prompts) * num
    for begin in range(0, len(prompts), PROMPTS):  # what row i generates does not depend on its neighbours
        results = answer(prompts[begin : begin + PROMPTS], num=num, seed=seed, stop=stop, **options)
        if stream:
            print()
            return
        for i, result in enumerate(results, begin * num + 1):
            head = f"--- {i} of {count}\n" if count > 1 and source is None else ""
            emit(result, json, f"{head}{result.text}" if alone else f"{head}{result.prompt}{result.text}")
        if len(prompts) > PROMPTS:
            log(f"{min(begin + PROMPTS, len(prompts)):,} of {len(prompts):,} done")
