"""LoRA adapters: each as mlx-lm alone computes it, whoever shares the batch, and caches that never are another's."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn
import mlx_lm
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.adapter_folders import mlx_lm_with, write_adapter
from tests.turboserve.engine.fakes import VOCAB, add, make_loop, make_parts, random_model, request, run, text_of
from tests.turboserve.engine.ties import BATCH_TIE, RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.memory import MemoryLimits
from turboserve.engine import weights
from turboserve.engine.adapter_layers import AdaptedLinear, MixedRowsError, RowAdapters
from turboserve.engine.adapters import Adapters, install
from turboserve.engine.inbox import Call
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.loading import load
from turboserve.engine.model_folder import EMBEDDED_DIR
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.template_process import Patience
from turboserve.engine.warm_up import Plan, warm_up
from turboserve.errors import ModelNotFoundError, StartupError
from turboserve.machine_memory import MemoryInfo
from turboserve.messages import Embed, Request
from turboserve.settings import Settings
from turboserve.weight_sizes import adapters_bytes

nn: Any = mlx.nn  # whose stubs say too little

FORMATS = [None, KVFormat(k_bits=4, v_bits=4, page_tokens=16, sink_tokens=16, centred=False)]
PLENTY = MemoryInfo(1 << 40, 1 << 40)
QUERY, VALUE = "self_attn.q_proj", "self_attn.v_proj"

# Ranks, layers and scales that differ: stacks are padded, some layers have one adapter, some all.
KINDS: dict[str, dict[str, Any]] = {
    "all": {"rank": 8},
    "last": {"rank": 3, "num_layers": 1, "scale": 3.3},
    "some": {"rank": 16, "keys": [QUERY, VALUE], "scale": 1.0},
}


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


@pytest.fixture
def make_model(rng: np.random.Generator) -> Callable[[], Any]:
    return partial(random_model, int(rng.integers(1 << 30)))


@pytest.fixture
def folders(tmp_path: Path, make_model: Callable[[], Any], rng: np.random.Generator) -> dict[str, Path]:
    return {name: write_adapter(tmp_path / name, make_model, rng, **kind) for name, kind in KINDS.items()}


def specs(folders: dict[str, Path]) -> list[str]:
    return [f"{name}={folder}" for name, folder in folders.items()]


def parts_with(model: Any, installed: Adapters, fmt: KVFormat | None, **options: Any) -> EngineParts:
    parts = make_parts(model, fmt=fmt, **options)
    return replace(parts, loaded=replace(parts.loaded, adapters=installed))


def loop_with(
    make_model: Callable[[], Any], folders: dict[str, Path], fmt: KVFormat | None, **settings: Any
) -> tuple[StepLoop, EngineParts]:
    model = make_model()
    parts = parts_with(model, install(model, specs(folders), "float32"), fmt)
    return make_loop(parts, **settings), parts


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, VOCAB, num_tokens)])


def asked(name: str, content: str, adapter: str, **options: Any) -> Request:
    return replace(request(name, content, **options), adapter=adapter)


def logits_of(model: Any, tokens: list[list[int]]) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


# --- arithmetic


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("expanded", [False, True], ids=["as stored", "float32"])
def test_each_is_as_mlx_lm_alone_has_it(
    tmp_path: Path, rng: np.random.Generator, expanded: bool, num_tokens: int
) -> None:
    """The embedded model, 8-bit and bfloat16; its table of embeddings, also the output layer, is adapted too."""

    def make() -> Any:
        return mlx_lm.load(str(EMBEDDED_DIR))[0]

    kinds: dict[str, dict[str, Any]] = {**KINDS, "table": {"keys": ["model.embed_tokens"], "rank": 4}}
    folders = {name: write_adapter(tmp_path / name, make, rng, **kind) for name, kind in kinds.items()}
    model = weights.expand(make()) if expanded else make()
    tokens = [[int(t) for t in rng.integers(0, 8000, num_tokens)]]
    plain = logits_of(model, tokens)
    installed = install(model, specs(folders), weights.activation_dtype(model))
    assert np.array_equal(logits_of(model, tokens), plain)
    rows = ["all", "", "table", "last", "some", "all"]
    with installed.applied([installed.get(name) for name in rows]):
        together = logits_of(model, tokens * len(rows))
    without = logits_of(model, tokens * len(rows))
    for name, folder in folders.items():
        reference = mlx_lm.load(str(EMBEDDED_DIR), adapter_path=str(folder))[0]
        stored = logits_of(reference, tokens)
        wanted = logits_of(weights.expand(reference), tokens)
        # One rounding of bfloat16 more or less goes through all layers: what mlx-lm itself is off by is the measure.
        tolerance = 1e-4 * wanted.std() if expanded else 1.5 * _rms(stored - wanted)
        assert not expanded or _rms(wanted - plain) > 20 * tolerance, "one that is left out would be seen"
        with installed.applied([installed.get(name)]):
            assert _rms(logits_of(model, tokens) - wanted) < tolerance
        for i in (i for i, row in enumerate(rows) if row == name):
            assert _rms(together[i] - wanted[0]) < tolerance
    assert np.array_equal(together[1], without[1]), "a row without an adapter keeps its bits"


def _rms(values: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def test_rows_that_a_layer_cannot_tell_apart_are_an_error() -> None:
    rows = RowAdapters([1.0])
    layer = AdaptedLinear(nn.Linear(4, 4), mx.ones((1, 2, 4)), mx.ones((1, 4, 2)), rows, (0,))
    with rows.applied([0, None]):
        flat, whole = layer(mx.ones((6, 4))), layer(mx.ones((2, 3, 4)))
        assert np.array_equal(np.array(flat), np.array(whole).reshape(6, 4))
        with pytest.raises(MixedRowsError, match="2 rows"):
            layer(mx.ones((3, 2, 4)))
    assert np.array_equal(np.array(layer(mx.ones((3, 2, 4)))), np.array(layer.linear(mx.ones((3, 2, 4)))))


@pytest.mark.parametrize("make", [small_models.sliding, small_models.recurrent], ids=["sliding", "recurrent"])
def test_other_architectures(make: Callable[..., Any], tmp_path: Path, rng: np.random.Generator) -> None:
    folder = write_adapter(tmp_path / "one", make, rng)
    model, reference = make(), mlx_lm_with(folder, make)
    installed = install(model, [str(folder)], "float32")
    tokens = [[int(t) for t in rng.integers(0, small_models.VOCAB, 9)]]
    wanted, plain = logits_of(reference, tokens), logits_of(make(), tokens)
    with installed.applied([installed.get("one"), None]):
        got = logits_of(model, tokens * 2)
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-4 * wanted.std())
    np.testing.assert_allclose(got[1], plain[0], atol=1e-4 * wanted.std())
    assert np.abs(wanted - plain).max() > 0.01 * wanted.std()


# --- requests


@pytest.mark.parametrize("is_apart", [False, True], ids=["together", "one by one"])
def test_answers_in_one_batch_are_those_of_mlx_lm_alone(
    make_model: Callable[[], Any],
    folders: dict[str, Path],
    rng: np.random.Generator,
    fmt: KVFormat | None,
    is_apart: bool,
) -> None:
    """Rows of all adapters and of none, in prompts that are read in one pass as well."""
    loop, _ = loop_with(make_model, folders, fmt, prefill_chunk_tokens=256)
    if is_apart:
        loop.runner.apart, loop.runner.prompts.can_feed_together = "for this test", False
    names = ["", *KINDS, "", *KINDS]
    requests = [
        asked(f"r{i}", prompt(rng, int(rng.integers(30, 50))), name, tenant=str(i), max_tokens=12)
        for i, name in enumerate(names)
    ]
    sinks = run(loop, *requests)
    loop.check_integrity()
    for one, sink in zip(requests, sinks, strict=True):
        model = mlx_lm_with(folders[one.adapter], make_model) if one.adapter else make_model()
        reference = make_parts(model, fmt=fmt)
        (alone,) = run(make_loop(reference, prefill_chunk_tokens=512), replace(one, adapter=""))
        tie = BATCH_TIE if fmt is None else RECOMPUTED_TIE
        assert_same_answer(reference, str(one.messages[0]["content"]), sink.tokens, alone.tokens, tie)
    assert len({tuple(sink.tokens) for sink in sinks}) > 1


def test_a_preempted_row_goes_on_with_its_adapter(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator
) -> None:
    loop, _ = loop_with(make_model, folders, None)
    content = prompt(rng, 40)
    (undisturbed,) = run(loop, asked("a", content, "all", tenant="1", max_tokens=20))
    one, _ = add(loop, asked("b", content, "all", tenant="2", max_tokens=20), asked("c", content, "some", tenant="2"))
    while not any(g.request_id == "b" and len(g.answer) > 5 for g in loop.requests.running):
        loop.step()
    loop.requests.preempt(next(g for g in loop.requests.running if g.request_id == "b"))
    while loop.has_work:
        loop.step()
    assert one.tokens == undisturbed.tokens


def test_a_prefix_is_found_under_its_own_adapter_alone(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    """Of one caller, idle and running, whoever came first; so is what prompts that come together share."""
    loop, parts = loop_with(make_model, folders, fmt, prefill_chunk_tokens=256)
    content = prompt(rng, 90)
    for name in ("", *KINDS, *KINDS, ""):
        is_new = not any(conversation.adapter == fingerprint(parts, name) for conversation in parts.memory.idle)
        (sink,) = run(loop, asked(f"r-{name}-{is_new}", content, name))
        assert (sink.finished.usage.cached_tokens == 0) == is_new
    tokens = prompt(rng, 90)
    together = run(loop, *(asked(f"t{i}", tokens, name) for i, name in enumerate(("all", "some", "all", ""))))
    cached = [sink.finished.usage.cached_tokens for sink in together]
    assert cached[0] == cached[1] == cached[3] == 0 and cached[2] > 0, "only the third begins like another of its own"
    loop.check_integrity()


def test_equal_prompts_of_several_adapters_are_read_in_one_pass(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator
) -> None:
    """None waits for another's, whose cache it could not use."""
    loop, _ = loop_with(make_model, folders, FORMATS[1], prefill_chunk_tokens=512)
    content, passes = prompt(rng, 90), list[int]()
    prefill = loop.runner.prompts._feed_together

    def noted(pieces: Any) -> None:
        passes.append(len(pieces))
        prefill(pieces)

    loop.runner.prompts._feed_together = noted  # type: ignore[method-assign]
    run(loop, *(asked(f"t{i}", content, name) for i, name in enumerate(("all", "some", "", "last"))))
    assert passes == [4]


def fingerprint(parts: EngineParts, name: str) -> str:
    adapter = parts.loaded.adapters.get(name)
    return "" if adapter is None else adapter.fingerprint


def test_a_session_that_changes_its_adapter_begins_anew(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator
) -> None:
    """Its name stays, its cache is the latest adapter's."""
    loop, parts = loop_with(make_model, folders, None)
    content = prompt(rng, 60)
    (first,) = run(loop, asked("a", content, "all", session_id="s"))
    (other,) = run(loop, asked("b", content, "some", session_id="s", max_tokens=1))
    (again,) = run(loop, asked("c", content, "some", session_id="s"))
    (back,) = run(loop, asked("d", content, "all", session_id="s"))
    assert other.finished.usage.cached_tokens == 0 and again.finished.usage.cached_tokens > 40
    assert back.finished.usage.cached_tokens == 0 and back.tokens == first.tokens
    assert [c.adapter for c in parts.memory.idle] == [fingerprint(parts, "all")]


def test_an_unknown_one_is_not_found(make_model: Callable[[], Any], folders: dict[str, Path]) -> None:
    loop, _ = loop_with(make_model, folders, None)
    (sink,) = run(loop, asked("a", "hello", "nobody"))
    assert isinstance(sink.error, ModelNotFoundError)
    call = Call(Embed(((1, 2),), "nobody"), Future())
    loop.embeddings.add(call, [[1, 2]])
    assert isinstance(call.future.exception(), ModelNotFoundError)


def test_embeddings_have_the_adapter(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator
) -> None:
    """Inputs that are computed together, and one that takes several pieces."""
    loop, _ = loop_with(make_model, folders, None)
    inputs = tuple(tuple(int(t) for t in rng.integers(0, VOCAB, n)) for n in (3, 5, 60))
    asked = Embed(inputs, "all")
    call = Call(asked, Future())
    loop.embeddings.add(call, loop.read_inputs(asked, Patience(10.0)))
    while loop.has_work:
        loop.step()
    reference = mlx_lm_with(folders["all"], make_model)
    for tokens, vector in zip(inputs, call.future.result().vectors, strict=True):
        mean = np.array(reference.model(mx.array([list(tokens)])))[0].mean(axis=0)
        np.testing.assert_allclose(np.array(vector), mean / np.linalg.norm(mean), atol=1e-4)


def test_warm_up_meets_rows_of_all_kinds(make_model: Callable[[], Any], folders: dict[str, Path]) -> None:
    loop, parts = loop_with(make_model, folders, None)
    rows = parts.loaded.adapters.rows
    assert rows is not None
    rows._known.clear()
    warm_up(loop.runner, parts, VOCAB, Plan((16, 8), (2, 4, 8), 1))
    met = set(rows._known)
    assert {(0,), (1,), (2,)} <= met, "each alone"
    assert any(len(batch) == 8 and {None, 0, 1, 2} <= set(batch) for batch in met), "and all in one batch"
    assert loop.runner.num_rows == 0 and not list(parts.memory.idle)


def test_a_quota_and_a_name_count_across_adapters(
    make_model: Callable[[], Any], folders: dict[str, Path], rng: np.random.Generator
) -> None:
    model = make_model()
    installed = install(model, specs(folders), "float32")
    loop = make_loop(parts_with(model, installed, None, limits=MemoryLimits(max_sessions_per_caller=2)))
    for i, name in enumerate(("", "all", "some")):
        run(loop, asked(f"r{i}", prompt(rng, 30), name, session_id=f"s{i}"))
    assert len(list(loop._memory.idle)) == 2


# --- folders


def test_loading_counts_and_names_them(tmp_path: Path, rng: np.random.Generator) -> None:
    def make() -> Any:
        return mlx_lm.load(str(EMBEDDED_DIR))[0]

    folder = write_adapter(tmp_path / "law", make, rng, keys=[QUERY, VALUE])
    lines: list[str] = []
    alone = load(Settings(), lines.append, PLENTY)
    loaded = load(Settings(adapters=(f"legal={folder}", str(folder))), lines.append, PLENTY)
    added = (folder / "adapters.safetensors").stat().st_size
    assert 0.9 * added < loaded.weights_bytes - alone.weights_bytes <= added
    assert loaded.dtype == alone.dtype and loaded.weights_fingerprint == alone.weights_fingerprint
    assert loaded.adapters.get("legal") is loaded.adapters.get("law") and len(list(loaded.adapters)) == 1
    assert "adapters     legal (rank 8, 16 matrices)" in lines
    assert loaded.details["adapters"] == "legal (rank 8, 16 matrices)" and alone.details["adapters"] == "none"


def test_a_fingerprint_is_of_weights_and_scale(
    make_model: Callable[[], Any], folders: dict[str, Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    def of(folder: Path) -> str:
        adapter = install(make_model(), [f"x={folder}"], "float32").get("x")
        assert adapter is not None
        return adapter.fingerprint

    first = of(folders["all"])
    assert first == of(folders["all"])
    edit(folders["all"], lora_parameters={"rank": 8, "scale": 2.5, "dropout": 0.0})
    assert of(folders["all"]) != first
    assert of(write_adapter(tmp_path / "new", make_model, rng)) != first


def test_peft_is_read(
    make_model: Callable[[], Any], folders: dict[str, Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    """The same numbers in PEFT's names, shapes and scale give the same logits."""
    folder = tmp_path / "peft"
    to_peft(folders["some"], folder)
    model = make_model()
    installed = install(model, [str(folder), f"some={folders['some']}"], "float32")
    tokens = [[int(t) for t in rng.integers(0, VOCAB, 9)]]
    results = []
    for name in ("peft", "some"):
        with installed.applied([installed.get(name)]):
            results.append(logits_of(model, tokens))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], logits_of(model, tokens))


def to_peft(source: Path, folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    tensors: Any = mx.load(str(source / "adapters.safetensors"))
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    peft = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        peft[f"base_model.model.{path}.{names[leaf]}"] = mx.contiguous(tensor.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), peft)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "bias": "none", "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(folder: Path, **tensors: mx.array) -> None:
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)


PATH = "model.layers.0.self_attn.q_proj"
PAIR = {f"{PATH}.lora_a": mx.ones((128, 2)), f"{PATH}.lora_b": mx.ones((2, 128))}

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapters.safetensors").unlink(), "neither adapters.safetensors nor adapter_model"),
    "cut weights": (lambda f: (f / "adapters.safetensors").write_bytes(b"12345678" * 9), "cannot be read"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "deep JSON": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "no JSON object"),
    "dora": (lambda f: edit(f, fine_tune_type="dora"), "only lora is supported"),
    "full": (lambda f: edit(f, fine_tune_type="full"), "full fine-tune"),
    "no scale": (lambda f: edit(f, lora_parameters={"rank": 8, "alpha": 16}), "no number lora_parameters.scale"),
    "nan scale": (lambda f: edit(f, lora_parameters={"scale": float("nan")}), "no number lora_parameters.scale"),
    "odd parameters": (lambda f: edit(f, lora_parameters=[1]), "no number lora_parameters.scale"),
    "nothing": (lambda f: retensor(f), "no tensors"),
    "foreign layer": (lambda f: retensor(f, **{"model.layers.77.x.lora_a": mx.ones((2, 2))}), "has no layer"),
    "foreign tensor": (lambda f: retensor(f, **{f"{PATH}.weight": mx.ones((2, 2))}), "none of a LoRA"),
    "magnitude": (lambda f: retensor(f, **PAIR, **{f"{PATH}.m": mx.ones(128)}), "DoRA"),
    "one of two": (lambda f: retensor(f, **{f"{PATH}.lora_a": mx.ones((128, 2))}), "one matrix of two"),
    "other model": (lambda f: retensor(f, **{**PAIR, f"{PATH}.lora_a": mx.ones((64, 2))}), "64 × 2"),
    "ranks differ": (lambda f: retensor(f, **{**PAIR, f"{PATH}.lora_b": mx.ones((3, 128))}), "3 × 128"),
    "rank 0": (
        lambda f: retensor(f, **{f"{PATH}.lora_a": mx.ones((128, 0)), f"{PATH}.lora_b": mx.ones((0, 128))}),
        "another model",
    ),
    "integers": (lambda f: retensor(f, **{k: v.astype(mx.int32) for k, v in PAIR.items()}), "no floating-point"),
    "not finite": (lambda f: retensor(f, **{**PAIR, f"{PATH}.lora_b": mx.full((2, 128), mx.inf)}), "not finite"),
    "odd layer": (
        lambda f: retensor(f, **{"model.norm.lora_a": mx.ones((2, 2)), "model.norm.lora_b": mx.ones((2, 2))}),
        "RMSNorm layers are not supported",
    ),
    "peft's prompt": (lambda f: edit(f, peft_type="PROMPT_TUNING"), "only LORA"),
    "peft's dora": (lambda f: edit(f, peft_type="LORA", use_dora=True), "use_dora"),
    "peft's biases": (lambda f: edit(f, peft_type="LORA", bias="all"), "biases"),
    "peft's rank": (lambda f: edit(f, peft_type="LORA", r=0, lora_alpha=1), "r = 0"),
    "peft's names": (lambda f: edit(f, peft_type="LORA", r=8, lora_alpha=8), "none of a LoRA of linear layers"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_folder_is_one_line(
    make_model: Callable[[], Any], tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    spoil, words = BROKEN[kind]
    folder = write_adapter(tmp_path / "bad", make_model, rng, keys=[QUERY], num_layers=1)
    install(make_model(), [str(folder)], "float32")
    spoil(folder)
    with pytest.raises(StartupError) as caught:
        install(make_model(), [str(folder)], "float32")
    message = str(caught.value)
    assert message.startswith("The adapter bad cannot be used: ") and words in message and "\n" not in message


def test_a_missing_folder_is_one_line(make_model: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no folder"):
        install(make_model(), [f"x={tmp_path / 'absent'}"], "float32")
    assert adapters_bytes([f"x={tmp_path / 'absent'}"]) == 0


def test_experts_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = write_adapter(tmp_path / "moe", small_models.with_sinks, rng)
    with pytest.raises(StartupError, match="experts of a mixture are not supported"):
        install(small_models.with_sinks(), [str(folder)], "float32")
    only = write_adapter(tmp_path / "attention", small_models.with_sinks, rng, keys=[QUERY])
    model, reference = small_models.with_sinks(), mlx_lm_with(only, small_models.with_sinks)
    installed = install(model, [str(only)], "float32")
    tokens = [[int(t) for t in rng.integers(0, small_models.VOCAB, 9)]]
    with installed.applied([None, installed.get("attention")]):
        got = logits_of(model, tokens * 2)[1]
    wanted = logits_of(reference, tokens)[0]
    np.testing.assert_allclose(got, wanted, atol=1e-4 * wanted.std())
