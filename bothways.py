"""bothways: GPT, BERT and their ancestor from one stack of blocks. The front door: Python functions and the command line.

import bothways
bothways.train(bothways.recipe("shakespeare_gpt"), workdir="runs/x")
run = bothways.load("runs/x")
run.sample(["ROMEO:"])
"""

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from common.errors import Diverged, InputError, Stopped
from common.platform import leave_absent_tpu_alone, with_large_pages
from common.recipe import Recipe
from configs import find
from verbs import VERBS, load, say

if TYPE_CHECKING:
    from train.loop import Result

leave_absent_tpu_alone()

__all__ = ["InputError", "Recipe", "load", "main", "recipe", "train"]


def recipe(name: str) -> Recipe:
    """A recipe by its name in configs/ or the path of a Python file."""
    return find(name)


def train(recipe: Recipe, workdir: str | Path) -> "Result":
    """Train a recipe into a run directory, or go on with the run that is there."""
    from train.loop import train as run_training

    return run_training(recipe, workdir)


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between starts, unless JAX is told otherwise by its own variable."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/bothways/xla").expanduser()))


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left on device", "File too large", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


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


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 bad input, 1 anything else, 143 stopped by SIGTERM and saved."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: bothways VERB ...\n")
        for verb, (_, does) in VERBS.items():
            print(f"  {verb:10s} {does}")
        print("\n`bothways VERB --help` tells more.")
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            raise InputError(
                f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}")
            )
        _keep_compiled_programs()
        run = VERBS[verb][0]
        if verb in ("train", "plan", "launch"):  # a recipe first, then its fields
            run(rest)
        else:
            tyro.cli(run, prog=f"bothways {verb}", args=rest)
        return 0
    except InputError as e:
        say(f"bothways {verb}: {e}")
        return 2
    except KeyboardInterrupt:
        say(f"bothways {verb}: interrupted")
        return 130
    except SystemExit as e:  # tyro has said what was wrong
        return e.code if isinstance(e.code, int) else 2
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (whoever read us has gone)
        return 0
    except (Stopped, Diverged) as e:
        say(f"bothways {verb}: {e}")
        return 143 if isinstance(e, Stopped) else 1
    except (NotADirectoryError, FileExistsError, IsADirectoryError, PermissionError) as e:
        say(f"bothways {verb}: cannot use {e.filename}: {e.strerror}; name another file or directory")
        return 2
    except Exception as e:
        if _disk_full(e):
            say(
                f"bothways {verb}: the disk is full; free some space and run the same command again: "
                "it goes on from the last checkpoint"
            )
            return _leave(2)
        if _peer_lost(e):
            say(
                f"bothways {verb}: another process of this run has gone ({str(e).splitlines()[0][:200]}); "
                "run the same command on every host again: it goes on from the last checkpoint"
            )
        else:
            traceback.print_exc()
        return _leave(1)


def command() -> int:
    """`bothways` as a program."""
    with_large_pages()
    return main()


if __name__ == "__main__":
    sys.exit(command())
