"""Conversations as tokens: a run's own chat template, in a sandbox, and which of the tokens are answers."""

import bisect
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

ROLES = ("system", "user", "assistant")
Message = dict[str, str]
Span = tuple[int, int]

PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "Assistant:\n{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{ message.role | title }}:\n{{ message.content }}{{ '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{{ '\n' }}{% endif %}"
)
"""The template of a run that has none of its own."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""What `{% generation %}` leaves in a rendered text until `render` takes it out: no characters, by Unicode's own word."""
NOTHING = {"tools": None, "documents": None}
"""What `transformers` gives a template besides messages, where there is none of it."""
FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a template may raise besides jinja2's own errors, since it computes."""


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of a vocabulary, or the plain one."""
    return tokenizer.chat_template or PLAIN


def template_fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses these messages: {message}")


@functools.cache
def _environment() -> Any:
    """Jinja2 as `transformers` sets it up for chat templates, with `{% generation %}` around what the model writes."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=64)
def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What a template calls the special tokens."""
    roles = {name: tokenizer.piece(token) for name, token in tokenizer.role_ids().items() if token is not None}
    own = {"bos": tokenizer.piece(tokenizer.bos), "eos": tokenizer.piece(tokenizer.eos)}
    return {f"{name}_token": piece for name, piece in (roles | own).items()}


@functools.lru_cache(maxsize=64)
def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Texts that are read as special tokens where a conversation is encoded, and their ids."""
    return {piece: i for i in tokenizer.special if len(piece := tokenizer.piece(i)) > 2}


def _write(tokenizer: Tokenizer, messages: Sequence[Message], open_answer: bool) -> tuple[str, list[Span]]:
    """The conversation as the template writes it, and where in it `{% generation %}` stood, if anywhere."""
    import jinja2

    names = _special_names(tokenizer)
    try:
        text = _compiled(template_of(tokenizer)).render(
            messages=[dict(m) for m in messages], add_generation_prompt=open_answer, **NOTHING, **names
        )
    except jinja2.TemplateError as e:
        raise InputError(f"the chat template cannot write these messages: {e}") from e
    except FAILURES as e:
        raise InputError(f"the chat template fails on these messages: {type(e).__name__}: {e}") from e
    parts, spans, length = re.split(f"([{OPEN}{CLOSE}])", text), [], 0
    for part in parts:
        if part == OPEN:
            begin = length
        elif part == CLOSE:
            spans.append((begin, length))
        else:
            length += len(part)
    return "".join(part for part in parts if part not in (OPEN, CLOSE)), spans


@functools.lru_cache(maxsize=64)
def _marks(tokenizer: Tokenizer) -> re.Pattern:
    """What only the template may write."""
    longest_first = sorted((*control_tokens(tokenizer), OPEN, CLOSE), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _check(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    for message in messages:
        if found := _marks(tokenizer).search(message["content"]):
            raise InputError(f"a message holds {found[0]}, which is how the template marks messages; leave it out")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """A conversation as the run's template writes it, up to where the assistant's next answer begins.

    Raises:
      InputError: the template refuses these messages, fails, or does what its sandbox forbids; or a message holds a
        control token.
    """
    _check(tokenizer, messages)
    return _write(tokenizer, messages, True)[0]


def answers(tokenizer: Tokenizer, messages: Sequence[Message], after: int = 0) -> tuple[str, list[Span]]:
    """A whole conversation as the template writes it, and which characters of it are answers, each with what ends it.

    Where the template has `{% generation %}`, answers are what stands in it. Else answer i is what the template writes
    beyond the messages before i with its generation prompt, so that the model is trained on what it will be asked for.

    Args:
      after: answers before this message are context only.

    Raises:
      InputError: as `render`; there is no answer; the template writes no control token behind an answer, so that a
        model would never learn to stop; or it rewrites earlier messages.
    """
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= after]
    if not wanted:
        raise InputError("there is no answer in it: no message of the role assistant to be trained on")
    _check(tokenizer, messages)
    text, spans = _write(tokenizer, messages, False)
    if spans:
        count = sum(m["role"] == "assistant" for m in messages)
        if len(spans) != count:
            raise InputError(f"the chat template marks {len(spans)} parts with generation, and there are {count} answers")
        spans = spans[-len(wanted) :]
    else:
        for i in wanted:
            before, so_far = _write(tokenizer, messages[:i], True)[0], _write(tokenizer, messages[: i + 1], False)[0]
            if not so_far.startswith(before) or not text.startswith(so_far):
                raise InputError(
                    "the chat template writes a message otherwise once another follows, so where an answer begins cannot "
                    "be seen; put {% generation %} and {% endgeneration %} around what it writes for an answer"
                )
            spans.append((len(before), len(so_far)))
    return text, [(begin, _end_of_turn(tokenizer, text, begin, end)) for begin, end in spans]


def _end_of_turn(tokenizer: Tokenizer, text: str, begin: int, end: int) -> int:
    """Where an answer ends, behind the control token that closes it: its last, or the one that follows at once."""
    controls = tuple(control_tokens(tokenizer))
    stripped = begin + len(text[begin:end].rstrip())
    if text[begin:stripped].endswith(controls):
        return stripped
    following = next((c for c in controls if text.startswith(c, end)), None)
    if following is None:
        raise InputError(
            "the chat template writes no special token behind an answer, so that the model would never learn where to "
            "stop; put {{ eos_token }} there"
        )
    return end + len(following)


@functools.lru_cache(maxsize=64)
def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token that ends an answer; eos, where the template writes none."""
    try:
        text, [(begin, end)] = answers(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
    except InputError:
        return tokenizer.eos
    return encode(tokenizer, text[begin:end])[-1]


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """(id, first character, end) of every token of a rendered conversation. Its control tokens are those of the
    vocabulary, which the text of a message may not hold; nothing is put around it, since the template has done that."""
    return tokenizer.encode_marked(text, control_tokens(tokenizer))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `encode_with_offsets`."""
    return [token for token, _, _ in encode_with_offsets(tokenizer, text)]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], after: int = 0
) -> tuple[list[int], np.ndarray]:
    """Ids of a conversation, and which of them, [tokens] bool, are answers or end one.

    Raises:
      InputError: as `answers`.
    """
    text, spans = answers(tokenizer, messages, after)
    found = encode_with_offsets(tokenizer, text)
    begins, ends = [b for _, b, _ in found], [e for _, _, e in found]
    scored = np.zeros(len(found), bool)
    for begin, end in spans:  # a token that lies across the edge belongs to the answer, which is what writes it
        scored[bisect.bisect_right(ends, begin) : bisect.bisect_left(begins, end)] = True
    return [token for token, _, _ in found], scored


def plain_text(document: str) -> str:
    """What is said in a document of data/conversations.py, a message a line: what a vocabulary is trained on."""
    return "\n".join(f"{m['role'].title()}: {m['content']}" for m in json.loads(document)["messages"])


def encoded(
    conversations: Iterable[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], np.ndarray, int]]:
    """Conversations (name, document of data/conversations.py) one by one: ids, which are answers, bytes of the messages.

    Raises:
      InputError: as `answers`, with the conversation's name.
    """
    for name, document in conversations:
        given = json.loads(document)
        try:
            ids, scored = encode_conversation(tokenizer, given["messages"], given["after"])
        except InputError as e:
            raise InputError(f"conversation {name}: {e}") from e
        yield ids, scored, sum(len(m["content"].encode()) for m in given["messages"])
