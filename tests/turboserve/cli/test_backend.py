"""A missing or wrong MLX backend yields the command that cures it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from turboquant_kv.backends.gpu.nvrtc import FOLDER_VARIABLE
from turboserve.cli.backend import explain_import_error, extra_for_driver, keep_compiled_kernels

ROOT = Path(__file__).resolve().parents[3]
BANNER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.54.15  Tue Mar  5\nGCC version:  gcc version 12.2.0\n"


@pytest.mark.parametrize(
    ("banner", "smi", "extra"),
    [
        ("", False, "cpu"),
        ("", True, "cuda12"),
        (BANNER.format(550), True, "cuda12"),
        (BANNER.format(580), False, "cuda13"),
        (BANNER.format(595), True, "cuda13"),
    ],
)
def test_extra_fits_the_driver(banner: str, smi: bool, extra: str) -> None:
    assert extra_for_driver(banner, has_nvidia_smi=smi) == extra


@pytest.mark.parametrize(
    ("message", "extra", "words"),
    [
        ("libmlx.so: cannot open shared object file", "cpu", "pip install 'turboserve[cpu]'"),
        ("libmlx.so: cannot open shared object file", "cuda13", "pip install 'turboserve[cuda13]'"),
        ("No module named 'mlx'", "", "pip install turboserve"),
        ("libcuda.so.1: cannot open shared object file", "cpu", "pip install 'turboserve[cpu]'"),
        ("libm.so.6: version `GLIBC_2.35' not found", "cpu", "glibc 2.35"),
    ],
)
def test_explanation_names_the_cure(message: str, extra: str, words: str) -> None:
    line = explain_import_error(message, extra)
    assert words in line
    assert "\n" not in line


def test_absent_mlx_ends_with_one_line() -> None:
    """What a plain `pip install turboserve` meets on Linux, with an import that fails like the real one."""
    code = """
import importlib.abc, sys
class NoBackend(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")
sys.meta_path.insert(0, NoBackend())
from turboserve.cli.main import main
main(["serve", "--port", "0"])
"""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("turboserve: ")]
    assert len(lines) == 1
    assert "MLX has no backend installed: pip install 'turboserve[" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("has_cuda", [False, True])
def test_compiled_cuda_kernels_are_kept_in_our_folder(
    has_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder for each kind of GPU, and none of ours where the user names one."""
    import mlx.core as mx

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9, "compute_capability_minor": 0})
    keep_compiled_kernels(tmp_path)
    folder = os.environ.pop(FOLDER_VARIABLE, "")
    assert folder.endswith("-sm90") == has_cuda and Path(folder or tmp_path).is_dir()
    assert bool(list(tmp_path.iterdir())) == has_cuda
    monkeypatch.setenv(FOLDER_VARIABLE, "elsewhere")
    keep_compiled_kernels(tmp_path)
    assert os.environ[FOLDER_VARIABLE] == "elsewhere"


def test_half_written_cuda_kernels_are_removed_before_mlx_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlx.core as mx

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": 9, "compute_capability_minor": 0})
    keep_compiled_kernels(tmp_path)
    (torn := Path(os.environ.pop(FOLDER_VARIABLE)) / "gather.ptx").touch()
    os.utime(torn, (0, 0))
    keep_compiled_kernels(tmp_path)
    del os.environ[FOLDER_VARIABLE]
    assert not torn.exists() and "gather.ptx was left half written" in caplog.text


def test_doctor_tells_what_is_kept_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboserve.cli import doctor

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert doctor.check_compiled() is None
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kernels"))
    found = doctor.check_compiled()
    assert found is not None and found.level == "ok" and "none yet" in found.detail
    (tmp_path / "kernels" / "long").mkdir(parents=True)
    (tmp_path / "kernels" / "long" / "rest.ptx").write_bytes(b"code")
    found = doctor.check_compiled()
    assert found is not None and found.detail.startswith("1 modules in ")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    found = doctor.check_compiled()
    assert found is not None and found.level == "warning" and "every start compiles" in found.detail


def test_doctor_report(tmp_path: Path) -> None:
    from turboserve.cli import doctor
    from turboserve.settings import Settings

    findings = {finding.name: finding for finding in doctor.run_checks(Settings(cache_dir=tmp_path / "new"))}
    assert findings["mlx backend"].level == "ok"
    assert findings["cache folder"].level == "ok"
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    blocked = doctor.check_cache_dir(Settings(cache_dir=tmp_path / "file"))
    assert blocked.level == "warning"
    assert "--cache-dir" in blocked.detail


def test_doctor_tries_the_kernels_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the format that will be served; kernels that are not taken are a warning that says why."""
    from turboquant_kv.backends.mlx_ops.backend import MlxBackend
    from turboquant_kv.cache import backend_choice
    from turboquant_kv.cache.trial import Verdict
    from turboserve.cli import doctor
    from turboserve.settings import Settings

    asked = []

    def chosen(name: str, cases: Sequence[Any]) -> Any:
        asked.append((name, cases[0].fmt.name))
        return backend_choice.Chosen(
            MlxBackend(), Verdict("gpu-metal", "mlx-ops", "failed", "RuntimeError: no library")
        )

    monkeypatch.setattr(backend_choice, "choose", chosen)
    for wanted in ("3t/2t", "auto"):
        finding = doctor.check_kv_backend(Settings(cache_dir=tmp_path, kv_format=wanted))
        assert finding.level == "warning"
        assert "mlx-ops instead of gpu-metal: its kernels do not run (RuntimeError: no library)" in finding.detail
    assert asked == [("auto", "3t/2t"), ("auto", "4t/3t")]


def test_doctor_says_what_it_knows_and_what_it_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing came for the seconds that MLX's import and the trials take, and then everything at once."""
    from turboserve.cli.doctor import Finding, report, run_checks
    from turboserve.settings import Settings

    said = []

    def findings() -> Iterator[Finding]:
        yield Finding("a", "ok", "known early")
        said.append(capsys.readouterr().out)
        yield Finding("b", "ok", "known late")

    assert report(findings()) == 0
    assert "known early\n" in said[0] and "known late\n" in capsys.readouterr().out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    shown = []
    for finding in run_checks(Settings(cache_dir=tmp_path)):
        shown.append((finding.name, stderr.getvalue()))
        stderr.truncate(0)
    assert shown[0][0] == "python" and dict(shown)["mlx backend"].count("importing MLX")
    assert dict(shown)["kv backend"].count("trying what computes attention")
    assert capsys.readouterr().out == "", "lines alone go to stdout"


def test_doctor_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    from turboserve.cli.doctor import Finding, report

    assert report([Finding("a", "ok", "fine"), Finding("b", "warning", "slow")]) == 0
    assert report([Finding("a", "ok", "fine"), Finding("b", "failed", "do this")]) == 1
    assert "do this" in capsys.readouterr().out


def test_transformers_is_not_confused_by_our_kernels_folder() -> None:
    """From the repository root `kernels/` looks like the published package that transformers uses when present."""
    code = """
import json, sys
sys.path.insert(0, "")  # as `python -m` does
import mlx_lm
from transformers import AutoTokenizer
from turboserve.models.tiny import MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(str(MODEL_PATH), trust_remote_code=False)
print(json.dumps(tokenizer.decode(tokenizer.encode("Hello there"))))
"""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "server")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == "Hello there"
    for folder in ("kernels", "server", "config", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def value_seen_by_mlx(name: str, **environment: str) -> str:
    """Of an environment variable, as C reads it in a process that has loaded the backend."""
    program = (
        "import ctypes, sys; from turboserve.cli.backend import load_backend; load_backend(); "
        "get = ctypes.CDLL(None).getenv; get.restype = ctypes.c_char_p; print(get(sys.argv[1].encode()).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_long_life_does_not_end_in_mlxs_count_of_graphs() -> None:
    """MLX counts the structures of CUDA graphs that it meets, and raises from the 801st on, unless told not to."""
    name = "MLX_ENABLE_CACHE_THRASHING_CHECK"
    assert value_seen_by_mlx(name) == "0"
    assert value_seen_by_mlx(name, **{name: "1"}) == "1"
