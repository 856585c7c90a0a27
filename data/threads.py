"""How many threads encode texts."""

import contextlib
import os
from collections.abc import Iterator


def threads() -> int:
    """Threads that encode a batch of texts: as many as there are cores, or one where TOKENIZERS_PARALLELISM is false, as the
    `tokenizers` library has it too."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() == "false" else os.cpu_count() or 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Meanwhile, texts are encoded by one thread."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
