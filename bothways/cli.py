"""The command line: which commands there are, and what their errors mean for the exit code."""

import errno
import importlib
import io
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bothways
from bothways.errors import Busy, CheckpointUnavailable, Diverged, InputError, Stopped
from bothways.log import log
from bothways.platform import leave_absent_tpu_alone, with_memory_tuned

COMMANDS = {
    "prepare": "text to shards of tokens, once, in parallel",
    "train": "train a recipe, or resume a run",
    "sample": "continue text",
    "chat": "a conversation at the terminal",
    "fill": "fill the masks of a text",
    "score": "log-probability of each line of a file",
    "embed": "a vector for each line of a file",
    "search": "the texts nearest to a query, and how often they are right",
    "finetune": "train a head and the whole stack on a labelled task",
    "predict": "labels from a fine-tuned run",
    "evaluate": "held-out loss and bits per byte of a run",
    "import": "turn a published checkpoint into a run",
    "export": "turn a run into a checkpoint that transformers opens",
    "compare": "the controlled experiments of GPT against BERT, and their report",
    "serve": "answer over HTTP, with a page",
    "plan": "what a recipe needs on a target topology",
    "launch": "start a recipe on a slice or a cluster",
}
"""Each command is the function of its name in commands/, in the module of its name."""

ANSWERING = ("sample", "chat", "fill", "score", "embed", "search", "predict", "evaluate", "plan")
"""Commands whose result is what they print, and nothing else."""

RECIPE_FIRST = ("prepare", "train", "plan", "launch")
"""Commands that take a recipe, whose fields become flags: they parse their own arguments."""


def _quiet_libraries() -> None:
    """Orbax logs each save, and each failure that it raises too, and warns of what this code does on purpose.

    Only the command line changes the process so; a program that imports bothways keeps its own hooks.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="orbax")
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of a restore that failed
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _show_exception
        sys.unraisablehook = lambda u: _show_exception(u.exc_type, u.exc_value or u.exc_type(), u.exc_traceback)


def is_leftover(error: BaseException) -> bool:
    """Whether it only follows from a save or a restore that failed, and says nothing itself.

    tensorstore's threads find orbax's event loop closed, and reads of the other arrays are cut off when they are collected.
    """
    return "Event loop is closed" in str(error) or isinstance(error.__cause__, GeneratorExit)


def _show_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python does, but for what says nothing."""
    if not is_leftover(error):
        sys.__excepthook__(kind, error, trace)


def _escape_what_the_locale_lacks() -> None:
    """Where standard output or error is not in UTF-8, characters that it lacks are written as \\u escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_output(verb: str) -> None:
    """Where standard output or error is closed, nothing is printed, and no file that is opened later takes its number.

    Raises:
      InputError: a command that only prints has no standard output.
    """
    closed = sys.stdout is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for the rest of the process)
    if closed and verb in ANSWERING:
        raise InputError("standard output is closed, and nothing else is made of the result; open it, or use > FILE")


def _refused_path(error: BaseException, arguments: list[str]) -> str | None:
    """The path of the command line that cannot be used, if that is what the error says: any other is a fault of ours.

    A file that may not be written counts below such a path too, and so does a name that is too long, as a text is where a
    path is wanted; one that is there already, or is no directory, only where it is that path or leads there.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    forbidden = isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
    if not forbidden and not isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
        return None
    path = Path(os.fsdecode(error.filename)).absolute()
    words = [word.partition("=")[2] if word.startswith("-") else word for word in arguments]
    named = [Path(os.path.expanduser(word)).absolute() for word in [*words, "runs", "launches"] if word]
    leads_there = any(path == p or path in p.parents for p in named)
    if not leads_there and not (forbidden and any(p in path.parents for p in named)):
        return None
    return f"{str(path)[:100]}..." if error.errno == errno.ENAMETOOLONG else str(path)


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between starts, unless JAX's own variable says otherwise or there is no home."""
    home = os.path.expanduser("~/.cache/bothways/xla")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not home.startswith("~"):
        import jax

        jax.config.update("jax_compilation_cache_dir", home)


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left on device", "File too large", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _nobody_reads() -> bool:
    """Whether whoever read standard output has gone, as `| head` does. A store's connection breaks with the same error."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # errors are reported in any case
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _several_processes() -> bool:
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def _peer_lost(error: BaseException) -> bool:
    """Whether a run of several processes ended because one of them has gone."""
    import jax

    signs = ("gloo", "connection", "heartbeat", "unavailable", "coordination", "barrier")
    lost = isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in signs)
    return lost and _several_processes()


def _leave(code: int) -> int:
    """The exit code; but of several processes one that failed ends here, since JAX would first wait for the others."""
    if _several_processes():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def find_command(name: str) -> Callable[..., None]:
    """The function behind a command. Raises InputError for one that there is not."""
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise InputError(
            f"no command {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
        )
    module = "import_" if name == "import" else name  # `import` is no name in Python
    return getattr(importlib.import_module(f"bothways.commands.{module}"), module)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
      the exit code: 0 done, 2 bad input or a full disk, 3 diverged; 143 after SIGTERM, 130 after Ctrl-C and 129 after a
      closed terminal, where training saves its state first; 1 anything else.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: bothways COMMAND ...\n")
        for name, does in COMMANDS.items():
            print(f"  {name:10s} {does}")
        print("\n`bothways COMMAND --help` tells more; `bothways --version` prints the version.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"bothways {bothways.__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        run = find_command(verb)
        _check_output(verb)
        leave_absent_tpu_alone()
        _quiet_libraries()
        _escape_what_the_locale_lacks()
        _keep_compiled_programs()
        if verb in RECIPE_FIRST:
            run(rest)
        else:
            import tyro

            tyro.cli(run, prog=f"bothways {verb}", args=rest)
        return 0
    except InputError as e:
        log(f"bothways {verb}: {e}")
        return 2
    except KeyboardInterrupt:
        log(f"bothways {verb}: interrupted")
        return 130
    except SystemExit as e:  # tyro has said what was wrong
        return e.code if isinstance(e.code, int) else 2
    except (Busy, CheckpointUnavailable) as e:
        log(f"bothways {verb}: {e}")
        return _leave(1)
    except (Stopped, Diverged) as e:
        log(f"bothways {verb}: {e}")
        return 128 + e.signal if isinstance(e, Stopped) else 3
    except Exception as e:
        if isinstance(e, BrokenPipeError) and _nobody_reads():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for what Python writes at its end)
            return 0
        if path := _refused_path(e, rest):
            log(f"bothways {verb}: cannot use {path}: {e.strerror}; name another file or directory")
            return _leave(2)
        if _disk_full(e):
            log(
                f"bothways {verb}: the disk is full; free some space and run the same command again: "
                "it goes on from the last checkpoint"
            )
            return _leave(2)
        if _peer_lost(e):
            log(
                f"bothways {verb}: another process of this run has gone ({str(e).splitlines()[0][:200]}); "
                "run the same command on every host again: it goes on from the last checkpoint"
            )
        else:
            traceback.print_exc()
        return _leave(1)


def command() -> int:
    """`bothways` as a program."""
    with_memory_tuned()
    return main()


if __name__ == "__main__":
    sys.exit(command())
