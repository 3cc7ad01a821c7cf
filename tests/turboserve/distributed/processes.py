"""Real ranks: `turboserve serve --distributed` in processes of their own on this machine, joined by MLX's ring."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

import turboserve.models.tiny

START_TIMEOUT_S = 120  # generous, for a loaded machine
TOKENIZER = Path(turboserve.models.tiny.__file__).parent / "model"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 8185,
}


def write_model(folder: Path, **changes: Any) -> Path:
    """A folder with random float32 weights and the embedded model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(config))
    for layer in model.layers:  # so that greedy choices depend on what was read
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * 6
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder


@dataclass
class Process:
    """One rank, and what it has printed."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        self.lines.extend(iter(self.popen.stdout.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        ends_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < ends_s:
            if match := re.search(pattern, self.text):
                return match
            if self.popen.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r}:\n{self.text}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(timeout=30)
        self._reader.join(timeout=10)
        for stream in (self.popen.stdin, self.popen.stdout):
            assert stream is not None
            stream.close()


@dataclass
class Ranks:
    """Rank 0's address and all ranks' processes."""

    url: str
    processes: list[Process]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(sock.getsockname()[1]) for sock in sockets]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1", **more}


def start(command: Sequence[str], env: dict[str, str]) -> Process:
    popen = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,  # whom a launcher starts is ended with it
    )
    return Process(popen)


@contextmanager
def started_ranks(folder: Path, *flags: str, num_ranks: int = 2) -> Iterator[list[Process]]:
    """The processes of so many ranks, killed at the end if they run then."""
    hostfile = folder / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)]))
    command = [sys.executable, "-m", "turboserve", "serve", "--distributed", "--port", "0", *flags]
    command += ["--cache-dir", str(folder / "cache")]
    ranks: list[Process] = []
    for rank in range(num_ranks):
        ranks.append(start(command, environment(MLX_HOSTFILE=str(hostfile), MLX_RANK=str(rank))))
    try:
        yield ranks
    finally:
        for one in ranks:
            one.end()


@contextmanager
def running_ranks(folder: Path, *flags: str, num_ranks: int = 2) -> Iterator[Ranks]:
    """Ranks that answer."""
    with started_ranks(folder, *flags, num_ranks=num_ranks) as processes:
        yield Ranks(processes[0].wait_for(r"Ready: \S+ at (http://\S+)")[1], processes)


@contextmanager
def launched_ranks(folder: Path, *flags: str) -> Iterator[Process]:
    """The launcher of two ranks on this machine, `mlx.launch`."""
    port = next(port for port in iter(lambda: min(free_ports(2)), None) if _is_free(port + 1))
    command = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()", "-n", "2"]
    command += ["--backend", "ring", "--starting-port", str(port), "--python", sys.executable, "--"]
    command += ["-m", "turboserve", "serve", "--distributed", "--port", "0", *flags]
    launcher = start([*command, "--cache-dir", str(folder / "cache")], environment())
    try:
        yield launcher
    finally:
        launcher.end()


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
