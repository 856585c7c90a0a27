"""`bothways` in processes that import nothing: each is a fork of one that has all imports.

`python -m bothways` imports for longer than a small run trains. What stands for it here hands its arguments, environment,
directory and open files to the process that forks. It passes SIGTERM on, ends as the fork ends, and takes it along when it is
killed.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def server(*modules: str, **variables: str) -> Iterator[list[str]]:
    """What stands for `python -m bothways` while this lasts.

    Args:
      modules: what is imported beforehand, beside the command line and all that training needs.
      variables: of the environment meanwhile; what is started later has its own.
    """
    with tempfile.TemporaryDirectory() as home, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(where := f"{home}/forks")
        listener.listen(64)
        number = listener.fileno()
        argv = [sys.executable, "-P", "-W", "ignore", __file__, "serve", str(number), *modules]
        options = {"env": os.environ | variables, "pass_fds": [number], "start_new_session": True}
        with subprocess.Popen(argv, stdin=subprocess.PIPE, **options) as parent:
            yield [sys.executable, "-I", "-S", str(Path(__file__)), "ask", where]
            os.killpg(parent.pid, signal.SIGKILL)


def ask(where: str, argv: list[str]) -> None:
    """One that stands for `bothways`."""
    with socket.socket(socket.AF_UNIX) as forks:
        forks.connect(where)
        socket.send_fds(forks, [b"."], [0, 1, 2])
        forks.sendall(json.dumps([argv, dict(os.environ), os.getcwd()]).encode() + b"\n")
        signal.signal(signal.SIGTERM, lambda number, _: forks.sendall(bytes([number])))
        code = int(forks.recv(9) or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(number: int, modules: list[str]) -> None:
    import importlib

    for module in ("bothways.commands.train", "bothways.train.loop", "bothways.cli", *modules):
        importlib.import_module(module)
    listener = socket.socket(fileno=number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in select.select([listener, sys.stdin], [], [])[0]:  # until whoever started it has gone
        asked, _ = listener.accept()
        if os.fork():
            asked.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, files, _, _ = socket.recv_fds(asked, 1, 3)
        argv, environment, directory = json.loads(asked.makefile("rb", buffering=0).readline())
        ended, held = os.pipe()  # until the child ends it holds one end of it
        if child := os.fork():
            os.close(held)
            keep(child, ended, asked)
        asked.close()
        listener.close()
        for to, file in enumerate(files):
            os.dup2(file, to)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.argv = ["bothways", *argv]
        sys.exit(sys.modules["bothways.cli"].main(argv))


def keep(child: int, ended: int, asked: socket.socket) -> None:
    """Signals to the child, and its exit code to who asked for it."""
    while ended not in select.select([ended, asked], [], [])[0]:
        signals = asked.recv(9) or bytes([signal.SIGKILL])
        for number in signals:
            os.kill(child, number)
        if signal.SIGKILL in signals:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        asked.sendall(str(code).encode())
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), sys.argv[3:])
    else:
        ask(sys.argv[2], sys.argv[3:])
