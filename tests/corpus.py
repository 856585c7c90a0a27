"""A small made-up language, so that no test needs a package with text."""

import random


def made_up_text(sentences: int = 400, seed: int = 0) -> str:
    """Sentences of a tiny grammar: learnable, and with more than one document's worth of words."""
    rng = random.Random(seed)
    nouns = "dog cat bird horse king queen fool ship storm crown".split()
    verbs = "sees hears loves fears follows calls".split()
    places = "castle garden forest river market".split()
    lines = []
    for i in range(sentences):
        line = f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} in the {rng.choice(places)}."
        lines.append(f"{rng.choice(nouns).upper()}:\n{line}" if i % 5 == 0 else line)
    return "\n".join(lines) + "\n"
