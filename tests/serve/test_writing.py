"""From tokens to pieces of text, without a server."""

from bothways.serve.writing import SETTLED, Text
from tests.serve.conftest import trained_tokenizer

WRITTEN = "the king caf\u00e9 \U0001f389 sees a river and " * 9


def test_pieces_are_the_text_whatever_is_settled():
    tokenizer = trained_tokenizer()
    ids = tokenizer.encode(WRITTEN)
    assert len(ids) > 4 * SETTLED
    text = Text(tokenizer.decode, (), tokenizer.eos)
    pieces = [text.add([token], [0.0], [[]], "max_tokens" if n == len(ids) else "")[0] for n, token in enumerate(ids, 1)]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_token_of_a_long_text_decodes_a_few_tokens_only():
    tokenizer, most = trained_tokenizer(), []
    text = Text(lambda ids: (most.append(len(ids)), tokenizer.decode(ids))[1], ("never said",), tokenizer.eos)
    for token in tokenizer.encode(WRITTEN):
        text.add([token], [0.0], [[]], "")
    assert max(most) < 3 * SETTLED
    assert text.shown == tokenizer.decode(text.ids)
