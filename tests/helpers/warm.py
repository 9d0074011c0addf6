"""Processes forked from a server that has imported a run's libraries, which takes ten CPU seconds.

Use `python()` in place of sys.executable: `python() -m MODULE ARGUMENTS` gets the working directory, environment, standard
streams, signals and exit code of a fresh process. Where its PYTHONPATH names other folders than this repository, it imports
powernap anew: packages there may have entry points.

    test, or a process it started -> client (this file's main) -> socket -> server -> watcher -> process that runs MODULE

The watcher waits for the process and kills it if the client dies, so a test that kills what it started leaves nothing.
"""

import json
import os
import select
import signal
import socket
import sys

SESSION = "POWERNAP_TESTS_WARM"  # environment variable, "OWNER FOLDER": all workers of xdist share one server
LIBRARIES = (
    "deepspeed", "torch._dynamo", "megatron.core.transformer", "mlflow.store.tracking.sqlalchemy_store",
    # What a run imports late.
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "megatron.core.transformer.moe.experts", "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.system_metrics.metrics.cpu_monitor", "mlflow.system_metrics.metrics.gpu_monitor",
    "sqlalchemy.dialects.sqlite", "alembic.command",
    "powernap.launch.fit", "powernap.model.mixers.fla", "powernap.model.mixers.delta_rule", "tests.helpers.runs",
)  # fmt: skip
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def begin_session() -> str:
    """Make the folder that this session's processes share. The first process to call it owns the server, which ends with it."""
    import atexit
    import shutil
    import tempfile

    if SESSION not in os.environ:
        folder = tempfile.mkdtemp(prefix="powernap-warm-")
        os.environ[SESSION] = f"{os.getpid()} {folder}"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.environ[SESSION].split(" ", 1)[1]


def python() -> str:
    """Path of the executable; starts the server if it does not run yet."""
    import shlex
    import subprocess
    from pathlib import Path

    from filelock import FileLock

    folder = begin_session()
    owner = os.environ[SESSION].split(" ", 1)[0]
    client = Path(folder) / "python"
    with FileLock(f"{folder}/lock"):
        if not client.exists():
            with socket.socket(socket.AF_UNIX) as listener, open(f"{folder}/log", "w") as log:
                Path(f"{folder}/socket").unlink(missing_ok=True)  # left by a server that failed to start
                listener.bind(f"{folder}/socket")
                listener.listen(100)
                environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
                command = [sys.executable, __file__, "--serve", owner, folder]
                subprocess.Popen(
                    command, stdin=listener, stdout=log, stderr=log, env=environment, cwd="/", start_new_session=True
                )
            command = shlex.join([sys.executable, "-IS", __file__, folder])
            client.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            client.chmod(0o755)
    return str(client)


def ask(folder: str, arguments: list[str]) -> int:
    """The client: request a process for these arguments and forward signals to it; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(f"{folder}/socket")
            socket.send_fds(server, [b"streams"], [0, 1, 2])
            call = json.dumps([arguments, os.getcwd(), dict(os.environ), f"{folder}/python"]).encode()
            server.sendall(len(call).to_bytes(4, "big") + call)
            process = _receive(server)
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: os.kill(process, number))
            code = _receive(server)
        except ConnectionError:
            raise SystemExit(open(f"{folder}/log").read()) from None
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _receive(connection: socket.socket) -> int:
    if not (data := connection.recv(4, socket.MSG_WAITALL)):
        raise ConnectionResetError
    return int.from_bytes(data, "big", signed=True)


def serve(owner: int, folder: str) -> None:
    """Import the libraries, then fork processes as long as the process `owner` lives."""
    import gc
    import importlib
    import shutil

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA must not be initialised before a fork
    sys.path[0] = ROOT  # for `tests`
    import torch

    if not torch.cuda.is_available():  # or DeepSpeed would initialise it
        os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # as parallel/cpu.py does
        for name in LIBRARIES:
            importlib.import_module(name)
    gc.freeze()  # otherwise each process's collector would visit all these objects and copy their pages
    listener = socket.socket(fileno=os.dup(0))
    while _is_running(owner):
        if select.select([listener], [], [], 1)[0]:
            connection, _ = listener.accept()
            if not os.fork():
                watch(connection)
            connection.close()
        _reap()
    shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def watch(client: socket.socket) -> None:
    """Fork the process that a client requests and send back its pid and exit code; kill it if the client dies."""
    _, streams, _, _ = socket.recv_fds(client, len(b"streams"), 3)
    call = json.loads(client.recv(_receive(client), socket.MSG_WAITALL))
    process = os.fork()
    if not process:
        client.close()
        run(streams, *call)
    for stream in streams:
        os.close(stream)
    client.sendall(process.to_bytes(4, "big"))
    ended = os.pidfd_open(process)
    if client in select.select([client, ended], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        client.sendall(code.to_bytes(4, "big", signed=True))
    finally:
        os._exit(0)


def run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str], executable: str) -> None:
    """Do what `python -m MODULE ARGUMENTS` does; never returns."""
    import atexit
    import runpy
    import threading
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", 1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = executable  # so its own children are forked too
    packages = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:1] = [folder, *packages]
    option, module, *rest = arguments[1:] if arguments[0] == "-u" else arguments  # torchrun's: unbuffered
    assert option == "-m", arguments
    sys.argv = [module, *rest]
    anew = ("powernap", "tests") if {*packages} - {ROOT} else ()
    for name in [name for name in sys.modules if name.split(".")[0] in anew or name == module]:
        del sys.modules[name]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
