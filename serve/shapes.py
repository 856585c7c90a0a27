"""What requests hold and what answers look like: OpenAI's, Cohere's and Jina's shapes, and those of our own endpoints."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bothways.errors import InputError

Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Some = Annotated[int, Meta(ge=1, le=1_000_000)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Flag = bool | None
"""null is OpenAI's word for the default."""
Text = Annotated[str, Meta(min_length=1)]
Texts = Annotated[list[Text], Meta(min_length=1, max_length=2048)]
Stop = Text | Annotated[list[Text], Meta(max_length=16)] | None
Share = Annotated[float, Meta(ge=0, le=1)]
Logprobs = Annotated[int, Meta(ge=0, le=20)]
Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TextOrIds = str | Id | Annotated[list[Id], Meta(min_length=1)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}
"""Fields of OpenAI's that this server has nothing for, by the values that change nothing."""


def refuse_unsupported(body: Any) -> None:
    """Raises InputError for a field that would change the answer, had this server something for it."""
    for name, values in NEUTRAL.items():
        if isinstance(body, dict) and body.get(name) not in values:
            raise InputError(f"{name} is not supported; leave it out")


def texts_of(given: Any, tokenizer: Any) -> list[str]:
    """A text, texts, token ids, or lists of them, as texts.

    Raises:
      InputError: texts and ids mixed, an empty text, or an id that the vocabulary lacks.
    """
    items = [given] if isinstance(given, str) else given
    if all(isinstance(item, int) for item in items):
        items = [items]
    if len({type(item) for item in items}) > 1 or isinstance(items[0], int):
        raise InputError("a list holds texts only, or token ids only, or lists of token ids only")
    if isinstance(items[0], str):
        return items
    for ids in items:
        if max(ids) >= len(tokenizer):
            raise InputError(f"there is no token {max(ids)}; the vocabulary has {len(tokenizer)}")
    return [tokenizer.decode(ids) for ids in items]


class StreamOptions(Struct):
    include_usage: Flag = False


class Drawing(Struct, kw_only=True):
    """How text is written."""

    model: Text
    stream: Flag = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count = 0
    min_p: Share = 0.0
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop = None
    block: Count | None = None
    """Tokens that a masked or diffusion run writes together."""
    steps: Some | None = None
    """Denoising steps for a block."""
    threshold: Share = 0.0
    remask: Flag = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Drawing, kw_only=True):
    prompt: str | Annotated[list[TextOrIds], Meta(min_length=1, max_length=2048)] = ""
    """A text, token ids, or a list of either."""
    suffix: str | None = None
    """Text behind the gap, of runs that read both ways; max_tokens is the size of the gap."""
    max_tokens: Some | None = None
    logprobs: Logprobs | None = None
    echo: Flag = False


class Part(Struct):
    type: Literal["text"]
    text: str


class Message(Struct):
    role: Text
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])


class ChatRequest(Drawing, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=1024)]
    max_tokens: Some | None = None
    max_completion_tokens: Some | None = None
    logprobs: Flag = False
    top_logprobs: Logprobs | None = None


class EmbeddingRequest(Struct):
    model: Text
    input: Text | Annotated[list[TextOrIds], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Some | None = None
    pool: Literal["", "mean", "cls", "last"] = ""


class RerankRequest(Struct):
    model: Text
    query: Text
    documents: Annotated[list[Text | "Document"], Meta(min_length=1, max_length=1024)]
    top_n: Some | None = None
    return_documents: bool = True


class Document(Struct):
    text: Text


class ScoreRequest(Struct):
    model: Text
    input: Text | Texts
    rule: Literal["causal", "pll", "pll_word", "bound"] | None = None


class FillRequest(Struct):
    model: Text
    input: Text | Texts
    top: Annotated[int, Meta(ge=1, le=50)] = 5
    steps: Annotated[int, Meta(ge=1, le=4096)] = 1


class TokensRequest(Struct):
    model: Text
    text: Text
    direction: Literal["forward", "both"] | None = None
    top: Annotated[int, Meta(ge=1, le=20)] = 5


class ClassifyRequest(Struct):
    model: Text
    input: Text | Texts


# ---- answers -------------------------------------------------------------------------------------------------------


class PromptDetails(Struct):
    cached_tokens: int


class Usage(Struct, omit_defaults=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | msgspec.UnsetType = msgspec.UNSET
    prompt_tokens_details: PromptDetails | msgspec.UnsetType = msgspec.UNSET


class TokenLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Struct, omit_defaults=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET


class ChatTop(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    top_logprobs: list[ChatTop] = []


class ChatLogprobs(Struct):
    content: list[ChatToken]


class ChatMessage(Struct, omit_defaults=True):
    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Struct, omit_defaults=True, kw_only=True):
    index: int
    message: ChatMessage | msgspec.UnsetType = msgspec.UNSET
    delta: ChatMessage | msgspec.UnsetType = msgspec.UNSET
    logprobs: ChatLogprobs | msgspec.UnsetType | None = msgspec.UNSET
    finish_reason: Literal["stop", "length"] | msgspec.UnsetType | None = msgspec.UNSET


class ChatCompletion(Struct, omit_defaults=True):
    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET


class Embedding(Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Struct):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Ranked(Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | msgspec.UnsetType = msgspec.UNSET


class Ranking(Struct):
    id: str
    model: str
    results: list[Ranked]
    usage: Usage


class Scored(Struct):
    text: str
    logprob: float | None
    tokens: int
    rule: str


class Scores(Struct):
    model: str
    data: list[Scored]


class Candidate(Struct):
    token: str
    p: float


class FilledText(Struct):
    text: str
    filled: str
    masks: list[list[Candidate]]


class Fills(Struct):
    model: str
    data: list[FilledText]


class TextToken(Struct):
    text: str
    p: float
    top: list[Candidate]


class TextTokens(Struct):
    model: str
    direction: Literal["forward", "both"]
    tokens: list[TextToken]


class Label(Struct):
    text: str
    label: str | float | list[str]
    p: float | list[float] | dict[str, float] | None


class Labels(Struct):
    model: str
    data: list[Label]


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: str
    abilities: list[str]
    context_length: int
    block_sizes: list[int]
    mask: str | None
    loaded: bool


class Models(Struct):
    object: Literal["list"]
    data: list[Model]


class Health(Struct):
    status: Literal["ok"]


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    error: ErrorBody
