"""Folders that hold no usable model: each is one line without Python's words, told before weights are read."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import utils as mlx_lm_utils

from turboserve.engine import loading, mlx_lm_loading
from turboserve.engine.model_config import read_config
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings

PLENTY = MemoryInfo(1 << 40, 1 << 40)
DEEP = 100_000
PYTHONS_WORDS = (
    "Error(",
    "object",
    "<class",
    "NoneType",
    "incompatible function",
    "argument",
    "Errno",
    "operand",
    "\\",
)

Change = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model's, with its weights linked. Evaluating them fails the test."""
    for path in EMBEDDED_DIR.iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / path.name).symlink_to(path)
        else:
            shutil.copy(path, tmp_path)

    def expand(*args: Any) -> None:
        raise AssertionError("weights were about to be read")

    monkeypatch.setattr(loading, "_expand_if_wanted", expand)
    return tmp_path


def startup_error(folder: Path) -> str:
    with pytest.raises(StartupError) as caught:
        loading.load(Settings(model=str(folder)), lambda line: None, PLENTY)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    plain = message.replace(str(folder), "").replace("JSON object", "")
    assert not [word for word in PYTHONS_WORDS if word in plain], message
    return message


def config(**changes: Any) -> Change:
    """Of config.json; ... takes an entry out."""
    return edited("config.json", **changes)


def edited(name: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        entries = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in entries.items() if v is not ...}))

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def weights(content: bytes) -> Change:
    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / "model.safetensors").write_bytes(content)

    return change


def header(tensors: Any, num_bytes: int = 0) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def as_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


@pytest.mark.parametrize("value", [-5, 0, "x", "4", 1.5, True, {}, 10**12, 10**30], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_no_model_has_are_named(folder: Path, name: str, value: Any) -> None:
    config(**{name: value})(folder)
    message = startup_error(folder)
    assert f"config.json: {name} is " in message and json.dumps(value)[:30] in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (config(intermediate_size=-1), "intermediate_size is -1"),
        (config(rms_norm_eps="x"), 'rms_norm_eps is "x", not a number'),
        (config(rms_norm_eps=float("nan")), "rms_norm_eps is NaN"),
        (config(rope_theta="10000"), "rope_theta"),
        (config(rope_theta=True), "rope_theta"),
        (config(rope_scaling=[1]), "rope_scaling is no JSON object"),
        (config(text_config="x"), "text_config is no JSON object"),
        (config(text_config=[], max_position_embeddings=...), "text_config is no JSON object"),
        (config(text_config={"num_hidden_layers": -1}), "num_hidden_layers is -1"),
        (config(max_position_embeddings="x"), 'max_position_embeddings is "x"'),
        (config(max_position_embeddings=1e3), "max_position_embeddings is 1000.0"),
        (config(quantization=3), "quantization is no JSON object"),
        (config(quantization_config=[]), "quantization_config is no JSON object"),
        (config(quantization={"group_size": 64}), "quantization names no bits"),
        (config(quantization={"group_size": "x", "bits": 4}), "group_size of quantization"),
        (config(quantization={"group_size": 64, "bits": 99}), "bits of quantization is 99"),
        (config(num_attention_heads=...), "config.json lacks num_attention_heads"),
        (config(eos_token_id="x"), 'eos_token_id is "x"'),
        (config(eos_token_id=["x"]), 'eos_token_id is "x"'),
        (config(eos_token_id=[[1]]), "eos_token_id is [1]"),
        (config(eos_token_id={}), "eos_token_id is {}"),
        (config(eos_token_id=1.5), "eos_token_id is 1.5"),
        (config(eos_token_id=True), "eos_token_id is true"),
        (config(eos_token_id=10**30), "eos_token_id is 1000"),
        (written("generation_config.json", b'{"eos_token_id": "x"}'), "generation_config.json: eos_token_id"),
        (written("generation_config.json", b"[]"), "generation_config.json holds no JSON object"),
        (written("generation_config.json", b"\xff"), "generation_config.json cannot be read (not UTF-8)"),
        (written("generation_config.json", b"[" * DEEP), "generation_config.json is nested too deeply"),
    ],
)
def test_other_values_that_mean_nothing_are_named(folder: Path, change: Change, named: str) -> None:
    change(folder)
    assert named in startup_error(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no JSON at line 1, column 1"),
        (b"\0\0", "no JSON at line 1"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "no JSON at line 1"),
        (b"3", "holds no JSON object"),
        (b"[]", "holds no JSON object"),
        (b'{"a":' * DEEP, "nested too deeply"),
        (b'{"model_type":"qwen2","x":' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
        (b'{"model_type":"qwen2","hidden_size":' + b"9" * 5000 + b"}", "number is too long"),
        (b'{"model_type": "a\\nb"}', "names a model_type that cannot be one"),
        (b'{"model_type": ""}', "names a model_type that cannot be one"),
        (b'{"model_type": "../x"}', "names a model_type that cannot be one"),
        (b'{"model_type": "' + b"x" * 5000 + b'"}', "names a model_type that cannot be one"),
        (b'{"model_type": "base"}', "Models of type base are not supported"),
        (b'{"model_type": "rope_utils"}', "Models of type rope_utils are not supported"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_config_that_is_none_is_named(folder: Path, content: bytes, named: str) -> None:
    written("config.json", content)(folder)
    message = startup_error(folder)
    assert named in message and (str(folder / "config.json") in message or "not supported" in message)


def test_a_config_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    assert "too large" in startup_error(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_folder_in_a_files_place_is_one_line(folder: Path, name: str) -> None:
    as_folder(name)(folder)
    startup_error(folder)


@pytest.mark.parametrize(
    "change",
    [
        without("tokenizer.json"),
        without("tokenizer.json", "tokenizer_config.json"),
        written("tokenizer.json", b""),
        written("tokenizer.json", b"{}"),
        written("tokenizer.json", b"[]"),
        written("tokenizer.json", b"\xff\0"),
        written("tokenizer.json", b"[" * DEEP),
        written("tokenizer_config.json", b"[]"),
        written("tokenizer_config.json", b"\xff"),
        edited("tokenizer_config.json", tokenizer_class=3),
        edited("tokenizer_config.json", eos_token=3),
        edited("tokenizer_config.json", chat_template=3),
        edited("tokenizer_config.json", tool_parser_type="nosuch"),
        edited("tokenizer_config.json", chat_template_type="nosuch"),
        written("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(folder: Path, change: Change) -> None:
    change(folder)
    assert "tokenizer" in startup_error(folder)


def test_a_tokenizer_that_knows_no_text_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers makes one up where files are missing: all answers would be empty."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    content |= {"added_tokens": [], "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "knows no text" in startup_error(folder)


@pytest.mark.parametrize("change", [config(hidden_size=7), config(hidden_size=128), config(intermediate_size=7)])
def test_quantised_weights_of_another_size_are_named(folder: Path, change: Change) -> None:
    """MLX would divide by zero, which ends the process."""
    change(folder)
    message = startup_error(folder)
    assert "config.json and the weights do not belong together" in message and "inputs" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (config(num_hidden_layers=3), "weights that the model has no place for"),
        (config(num_hidden_layers=20), "weights are missing"),
        (config(vocab_size=10), "model.embed_tokens.weight is (8192, 128) instead of (10, 128)"),
        (config(quantization=..., quantization_config=...), "weights that the model has no place for"),
        (config(rope_scaling={"type": "nosuch"}), "Unsupported RoPE type nosuch"),
        (config(architectures=3), "missing or wrong"),
        (config(model_type="mamba"), "config.json lacks state_size"),
    ],
)
def test_weights_of_another_model_are_told_shortly(folder: Path, change: Change, named: str) -> None:
    change(folder)
    assert named in startup_error(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        (1 << 60).to_bytes(8, "little") + b"{}",
        header(b"[]"),
        header(b"{"),
        header(b"[" * DEEP),
        header({"a": 3}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, num_bytes=7),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, num_bytes=4),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, num_bytes=8),
        header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}, num_bytes=8),
        header({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, num_bytes=8),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_weight_files_that_are_not_whole_are_named(folder: Path, content: bytes) -> None:
    weights(content)(folder)
    assert f"{folder / 'model.safetensors'} is damaged or not complete" in startup_error(folder)


def test_a_weight_file_cut_short_is_named(folder: Path) -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is damaged or not complete" in startup_error(folder)


def test_weight_files_that_are_none_are_one_line(folder: Path) -> None:
    weights(b"")(folder)
    as_folder("model.safetensors")(folder)
    assert "model.safetensors cannot be read" in startup_error(folder)
    (folder / "model.safetensors").rmdir()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
    assert "model.safetensors" in startup_error(folder)


def test_a_model_file_that_ends_the_process_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mlx-lm's olmo does where a package is missing."""
    config(model_type="olmo")(folder)
    monkeypatch.setitem(sys.modules, "hf_olmo", None)
    assert "Python package" in startup_error(folder)


def test_whatever_mlx_lm_raises_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Callable[..., Any]:
        def load(*args: Any, **options: Any) -> Any:
            raise error

        return load

    nanobind = "uniform(): incompatible function arguments. The following argument types are supported:\n  1. uniform("
    for error in (
        TypeError(nanobind),
        ZeroDivisionError("x"),
        AssertionError(),
        IndexError("<class 'int'>"),
        SystemExit(3),
    ):
        for name in ("load_model", "load_tokenizer"):
            with monkeypatch.context() as patch:
                patch.setattr(mlx_lm_utils, name, raising(error))
                assert "cannot be loaded" in startup_error(folder)


def test_what_is_whole_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are unusual and mean something."""
    monkeypatch.undo()
    changes = {
        "eos_token_id": [8185, -1],
        "head_dim": None,
        "rope_scaling": None,
        "text_config": None,
        "intermediate_sizes": [0, 3],
        "pad_token_id": -1,
        "max_position_embeddings": 512,
    }
    config(**changes)(folder)
    loaded = loading.load(Settings(model=str(folder), dequantize="never"), lambda line: None, PLENTY)
    assert loaded.max_context == 512 and 8185 in loaded.eos_ids


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "mamba2", "num_heads": 0, "num_attention_heads": 0, "intermediate_size": 0},
        {"model_type": "nemotron-nas", "num_key_value_heads": [4, None, 0], "num_attention_heads": [4, 8, 0]},
        {"model_type": "gemma3n", "text_config": {"intermediate_size": [16, 32], "rope_theta": 1e6}},
        {"model_type": "x", "rope_theta": [1e4, 1e6], "rms_norm_eps": {"__float__": "Infinity"}},
        {"model_type": "x", "quantization_config": {"quant_method": "bitnet", "bits": 1.58}},
    ],
    ids=lambda text: str(text["model_type"]),
)
def test_what_other_architectures_say_is_let_through(tmp_path: Path, text: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert read_config(tmp_path) == text


def test_a_model_of_weights_under_other_names_is_not_looked_at() -> None:
    """Those that mlx-lm translates when it loads them."""

    class Bare:
        def named_modules(self) -> list[tuple[str, Any]]:
            return [("a", {"weight": mx.zeros((4, 7))}), ("b", {})]

    mlx_lm_loading._check_packed(Bare(), {"b.scales": (4, 1), "b.weight": (4, 8)})
    with pytest.raises(StartupError, match="a would have 7 inputs"):
        mlx_lm_loading._check_packed(Bare(), {"a.scales": (4, 1), "a.weight": (4, 8)})
