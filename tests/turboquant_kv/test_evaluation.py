"""Evaluations: figures mean what they say, in every mode, and come out as JSON and as a drawing."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tests.turboquant_kv import odd_models, small_models
from tests.turboquant_kv.test_calibration import ByteTokenizer
from tests.turboquant_kv.test_runtime import random_tokens

from turboquant_kv.cache.calibration import Calibration, calibrate
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.evaluation import Comparison, Estimate, Evaluation, Plan, evaluate, standard_rivals, svg
from turboquant_kv.evaluation.contestants import FormatContestant
from turboquant_kv.evaluation.forcing import Forcing, prompt_length
from turboquant_kv.evaluation.recall import compare_greedy, find_needles, plant

NO_MEANS = Calibration({}, "")
RIVALS = {rival.name: rival for rival in standard_rivals()}


def sharp() -> Any:
    """A model whose attention tells keys apart, so that compression shows."""
    model = small_models.dense()
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 3
    mx.eval(model.parameters())
    return model


def some_text(rng: np.random.Generator, num_bytes: int) -> str:
    return bytes(rng.integers(32, 127, num_bytes, dtype=np.uint8)).decode()


def texts(rng: np.random.Generator, *lengths: int) -> dict[str, str]:
    return {f"text {i}": some_text(rng, n) for i, n in enumerate(lengths)}


def run(rng: np.random.Generator, formats: list[str], plan: Plan, *rivals: str, num_texts: int = 2) -> Evaluation:
    written = texts(rng, *[plan.num_tokens + 10] * num_texts)
    chosen = [RIVALS[name] for name in rivals]
    return evaluate(sharp(), ByteTokenizer(), formats, written, plan, rivals=chosen, calibration=NO_MEANS)


# --- figures


def test_estimates_are_t_intervals() -> None:
    assert Estimate.of([3.0]) == Estimate(3.0, None, None)
    two = Estimate.of([1.0, 2.0])
    assert two.mean == 1.5 and two.half_width == pytest.approx(12.7062 * 0.5, rel=1e-5)
    for num_samples, quantile in ((4, 3.18245), (11, 2.22814), (31, 2.04227), (121, 1.97993)):
        samples = np.arange(num_samples, dtype=float)
        half = quantile * samples.std(ddof=1) / num_samples**0.5
        assert Estimate.of(samples.tolist()).half_width == pytest.approx(half, rel=2e-4)
    grown = Estimate(0.0, -1.0, 1.0).exp()
    assert (grown.mean, grown.low, grown.high) == pytest.approx((1.0, 1 / np.e, np.e))
    with pytest.raises(ValueError):
        Estimate.of([])


def test_figures_are_those_of_the_distributions(rng: np.random.Generator) -> None:
    """Recomputed with NumPy from the logits of whole passes."""
    model, written = sharp(), texts(rng, 250, 250, 250)
    plan = Plan(num_tokens=230, chunk_tokens=50)
    found = evaluate(model, ByteTokenizer(), ["3/2"], written, plan, calibration=NO_MEANS).results[0].figures(0)
    runtime = KVRuntime(model, KVFormat.parse("3/2"))
    kl, flips, nll, base_nll = [], [], [], []
    for text in written.values():
        tokens = ByteTokenizer().encode(text)[:230]
        logits = [
            np.array(model(mx.array([tokens]), cache=c)[0], np.float64)
            for c in (make_prompt_cache(model), runtime.make_cache())
        ]
        p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (x[:-1] for x in logits))
        kl.append((p * np.log(p / q)).sum(axis=-1))
        flips.append((p.argmax(axis=-1) != q.argmax(axis=-1)).mean())
        base, own = (-np.log(x[np.arange(229), tokens[1:]]).mean() for x in (p, q))
        nll.append(own)
        base_nll.append(base)
    assert found.kl_mean.mean == pytest.approx(np.mean([x.mean() for x in kl]), rel=1e-3)
    assert found.kl_mean.half_width == pytest.approx(4.3027 * np.std([x.mean() for x in kl], ddof=1) / 3**0.5, rel=0.01)
    assert found.kl_median.mean == pytest.approx(np.mean([np.median(x) for x in kl]), rel=1e-2, abs=1e-6)
    assert found.kl_p99.mean == pytest.approx(np.mean([np.quantile(x, 0.99) for x in kl]), rel=1e-3)
    assert found.flips.mean == pytest.approx(np.mean(flips))
    assert found.perplexity.mean == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert found.perplexity_ratio.mean == pytest.approx(np.exp(np.mean(nll) - np.mean(base_nll)), rel=1e-4)


def test_fewer_bits_diverge_more_and_cost_less(rng: np.random.Generator) -> None:
    evaluation = run(rng, ["2/2", "4/4", "8/8"], Plan(num_tokens=200), "r44", "q8_0")
    kl = {r.name: r.figures(0).kl_mean.mean for r in evaluation.results}
    assert kl["2/2"] > kl["4/4"] > kl["8/8"] > 0 and kl["r44"] > kl["q8_0"]
    ratios = [evaluation.result(name).ratio(16_384) for name in ("2/2", "4/4", "8/8")]
    assert ratios == sorted(ratios, reverse=True)
    assert evaluation.result("r44").ratio(200) == pytest.approx(2 * 64 / (32 + 2))
    assert [r.kind for r in evaluation.results] == ["format"] * 3 + ["rival"] * 2


def test_bytes_are_those_that_a_cache_allocates(rng: np.random.Generator) -> None:
    model, num_tokens = sharp(), 333
    written = texts(rng, 400)
    plan = Plan(num_tokens=num_tokens)
    result = evaluate(model, ByteTokenizer(), ["4/3"], written, plan, calibration=NO_MEANS).results[0]
    runtime = KVRuntime(model, KVFormat.parse("4/3"))
    caches = runtime.make_cache()
    model(mx.array([random_tokens(rng, num_tokens)]), cache=caches)
    assert result.bytes_for[num_tokens] == sum(cache.nbytes for cache in caches)
    assert result.half_bytes_for[num_tokens] == num_tokens * 2 * 2 * 2 * 64 * 2  # layers, k and v, heads, dims, bytes


def test_stretches_of_positions_add_up(rng: np.random.Generator) -> None:
    result = run(rng, ["2/2"], Plan(num_tokens=300)).results[0]
    bins = result.by_position(0)
    assert [(first, end) for first, end, _ in bins] == [(0, 64), (64, 128), (128, 256), (256, 512)]
    sizes = [min(end, 299) - first for first, end, _ in bins]
    mean = sum(n * kl for n, (_, _, kl) in zip(sizes, bins, strict=True)) / 299
    assert mean == pytest.approx(result.figures(0).kl_mean.mean)


# --- modes


@pytest.mark.parametrize("mode", ["decode", "batch"])
def test_decoding_gives_the_figures_of_the_prompt_s_positions(mode: Any, rng: np.random.Generator) -> None:
    """What a query sees depends on its position alone, so all modes agree where they overlap."""
    model, written = sharp(), texts(rng, 370, 390, 350)
    formats, rivals = ["4/3", "2/2"], [RIVALS["q4_0"], RIVALS["mlx-q4"]]
    whole, stepwise = (
        evaluate(
            model,
            ByteTokenizer(),
            formats,
            written,
            Plan(num_tokens=380, mode=m, offsets=(0, 1000), chunk_tokens=48),
            rivals=rivals,
            calibration=NO_MEANS,
        )
        for m in ("prefill", mode)
    )
    for expected, got in zip(whole.results, stepwise.results, strict=True):
        assert len(got.runs) == 6
        for full in expected.runs:
            part = next(r for r in got.runs if (r.text, r.offset) == (full.text, full.offset))
            first, num_tokens = part.first_position, stepwise.text_tokens[part.text]
            num = len(part.comparison.kl)
            row = list(written).index(part.text)
            assert first == prompt_length(num_tokens, row) and num > 50
            if mode == "decode":
                assert first + num == num_tokens - 1
            overlap = full.comparison.kl[first : first + num]
            assert overlap.mean() > 1e-4
            # rounding differs between chunks and single tokens, and now and then tips a code over
            assert np.linalg.norm(part.comparison.kl - overlap) < 0.1 * np.linalg.norm(overlap)


def test_offsets_keep_the_uncompressed_perplexity(rng: np.random.Generator) -> None:
    evaluation = run(rng, ["4/4"], Plan(num_tokens=150, offsets=(0, 2048)))
    assert evaluation.base_perplexity[2048] == pytest.approx(evaluation.base_perplexity[0], rel=1e-3)
    near, far = (evaluation.results[0].figures(offset).kl_mean.mean for offset in (0, 2048))
    assert near != far and far == pytest.approx(near, rel=1.0)


# --- needles and greedy answers


def test_needles_are_planted_and_their_answers_found(rng: np.random.Generator) -> None:
    text = ByteTokenizer().encode(some_text(rng, 400))
    haystack = plant(ByteTokenizer(), text, 5)
    written = bytes(haystack.tokens).decode()
    asked = []
    for answer in haystack.answers:
        number = bytes(haystack.tokens[answer]).decode().strip()
        assert number.isdecimal() and len(number) == 5
        assert written.count(f" is {number}.") == 2
        question = written[: answer.start].rpartition("\n")[2]
        assert written.index(f"{question} {number}") < 500  # the fact lies in the text, the question behind it
        asked.append(question)
    assert len(set(asked)) == 5
    for bad in (0, 99):
        with pytest.raises(ValueError, match="needles"):
            plant(ByteTokenizer(), text, bad)


def forcing_for(model: Any) -> tuple[Forcing, FormatContestant]:
    """A forcing, and a contestant of 2 bits."""
    runtime = KVRuntime(model, None)
    base, low = (FormatContestant(model, fmt, runtime.layers, None, "auto") for fmt in (None, KVFormat.parse("2/2")))
    return Forcing(model, base, [True, True], "prefill", 64), low


def test_log_probabilities_of_needles_are_the_model_s(rng: np.random.Generator) -> None:
    model = sharp()
    forcing, low = forcing_for(model)
    haystacks = [plant(ByteTokenizer(), random_tokens(rng, n), 3, seed) for seed, n in enumerate((200, 260))]
    assert haystacks[0].tokens[haystacks[0].answers[0]] != haystacks[1].tokens[haystacks[1].answers[0]]
    found = find_needles(forcing, haystacks, [low], 0)["2/2"]
    expected = []
    for haystack in haystacks:
        logits = np.array(model(mx.array([haystack.tokens]), cache=make_prompt_cache(model))[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for answer in haystack.answers:
            expected.append(sum(log_p[p - 1, haystack.tokens[p]] for p in range(answer.start, answer.stop)))
    assert found.base_log_probability == pytest.approx(expected, abs=1e-3)
    differences = np.subtract(found.base_log_probability, found.log_probability)
    np.testing.assert_allclose(found.losses, differences)
    assert np.abs(differences).max() > 1e-3


def free_answer(model: Any, caches: list[Any], prompt: list[int], num_tokens: int) -> list[int]:
    answer: list[int] = []
    feed = prompt
    while len(answer) < num_tokens:
        answer.append(int(mx.argmax(model(mx.array([feed]), cache=caches)[0, -1])))
        feed = answer[-1:]
    return answer


def test_greedy_answers_are_counted_up_to_where_free_ones_part(rng: np.random.Generator) -> None:
    model = sharp()
    forcing, low = forcing_for(model)
    prompts = [random_tokens(rng, n) for n in (170, 230, 341)]
    found = compare_greedy(forcing, prompts, [low, forcing.base], 0, 12)
    assert found["f16"].agreed == [12, 12, 12] and found["f16"].num_same == 3
    runtime = KVRuntime(model, KVFormat.parse("2/2"))
    for prompt, agreed in zip(prompts, found["2/2"].agreed, strict=True):
        expected = free_answer(model, make_prompt_cache(model), prompt, 12)
        got = free_answer(model, runtime.make_cache(), prompt, 12)
        same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), 12)
        assert agreed == same


# --- what comes out, and what is refused


def test_json_and_drawing_hold_every_contestant(rng: np.random.Generator) -> None:
    plan = Plan(num_tokens=140, offsets=(0, 512), num_needles=2, num_greedy=2, answer_tokens=5)
    evaluation = run(rng, ["4/4", "3/3"], plan, "r44")
    saved = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert saved["version"] == 1 and [r["name"] for r in saved["results"]] == ["4/4", "3/3", "r44"]
    for item, result in zip(saved["results"], evaluation.results, strict=True):
        assert [at["offset"] for at in item["offsets"]] == [0, 512]
        assert item["offsets"][1]["kl_mean"]["mean"] == result.figures(512).kl_mean.mean
        assert len(item["texts"]) == 4 and len(item["needles"]["log_probability"]) == 2 * 2  # of each text
        assert len(item["greedy"]["agreed"]) == 2
    tree = ElementTree.fromstring(svg(evaluation))
    space = "{http://www.w3.org/2000/svg}"
    written = [e.text for e in tree.iter(f"{space}text")]
    assert {"4/4", "3/3", "r44"} <= set(written)
    points = 1 + len(evaluation.results[0].by_position(0)) + 2 + 1  # memory, text, offsets, legend
    assert len(list(tree.iter(f"{space}circle"))) == 2 * points
    width, height = float(tree.get("width", 0)), float(tree.get("height", 0))
    for circle in tree.iter(f"{space}circle"):
        assert 0 < float(circle.get("cx", -1)) < width and 0 < float(circle.get("cy", -1)) < height


def test_a_drawing_of_no_divergence_at_all() -> None:
    evaluation = run(np.random.default_rng(1), ["8/8"], Plan(num_tokens=64), num_texts=1)
    run_, zeros = evaluation.results[0].runs[0], np.zeros(63)
    same = Comparison(zeros, zeros, zeros, zeros > 0)
    object.__setattr__(run_, "comparison", same)
    drawn = svg(evaluation)
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn and "inf" not in drawn.replace("info", "")


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (Plan(num_tokens=10), "tokens 10"),
        (Plan(offsets=()), "offsets"),
        (Plan(offsets=(0, 0)), "offsets"),
        (Plan(offsets=(-1,)), "offsets"),
        (Plan(mode="sideways"), "mode"),  # type: ignore[arg-type]
        (Plan(num_needles=99), "needles"),
        (Plan(num_greedy=-1), "greedy"),
    ],
)
def test_plans_that_cannot_be_used(plan: Plan, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan.check()


def test_texts_formats_and_models_that_cannot_be_used(rng: np.random.Generator) -> None:
    model, written = small_models.dense(), texts(rng, 200)
    for name in ("f16", "9/9"):
        with pytest.raises(UnsupportedFormatError):
            evaluate(model, ByteTokenizer(), [name], written, calibration=NO_MEANS)
    for bad in ({}, {"short": "short"}):
        with pytest.raises(ValueError, match="text"):
            evaluate(model, ByteTokenizer(), ["4/4"], bad, calibration=NO_MEANS)
    with pytest.raises(ValueError, match="nothing to compare"):
        evaluate(model, ByteTokenizer(), [], written, calibration=NO_MEANS)
    with pytest.raises((UnsupportedModelError, ValueError)):
        evaluate(small_models.recurrent(), ByteTokenizer(), [], written, calibration=NO_MEANS)


def test_models_with_other_layers_are_evaluated_too(rng: np.random.Generator) -> None:
    written = texts(rng, 150)
    for kind in ("sliding", "recurrent"):
        model = small_models.EVERY_KIND[kind]()
        plan = Plan(num_tokens=140, offsets=(0, 700))
        evaluation = evaluate(model, ByteTokenizer(), ["4/4"], written, plan, rivals=[RIVALS["q8_0"]])
        for result in evaluation.results:
            assert 0 < result.figures(700).kl_mean.mean < 0.5


@pytest.mark.parametrize("kind", ["absolute", "chunked"])
def test_models_whose_rows_are_computed_one_by_one_are_evaluated_too(kind: str, rng: np.random.Generator) -> None:
    evaluation = evaluate(odd_models.EVERY_KIND[kind](), ByteTokenizer(), ["4/4"], texts(rng, 150, 150), Plan(140))
    assert 0 < evaluation.result("4/4").figures(0).kl_mean.mean < 0.5


def test_means_are_measured_where_none_are_given(rng: np.random.Generator) -> None:
    model, written = sharp(), texts(rng, 200)
    tokenizer = ByteTokenizer()
    from turboquant_kv.cache.calibration import calibration_text

    calibration = calibrate(model, tokenizer.encode(calibration_text(), add_special_tokens=False))
    given, measured = (
        evaluate(model, tokenizer, ["3/3"], written, Plan(num_tokens=180), calibration=c) for c in (calibration, None)
    )
    assert measured.results[0].figures(0) == given.results[0].figures(0)


def test_formats_without_a_kernel_are_computed_elsewhere(rng: np.random.Generator) -> None:
    """Every codec has a portable kernel, so a backend that lacks one is no reason to go without figures."""
    model, written = sharp(), texts(rng, 200)
    evaluation = evaluate(
        model,
        ByteTokenizer(),
        ["3t/2t", "4/4"],
        written,
        Plan(num_tokens=180),
        calibration=NO_MEANS,
        backend="cpu-native",
    )
    by_name = {result.name: result for result in evaluation.results}
    assert set(by_name) == {"3t/2t", "4/4"}
    elsewhere = by_name["3t/2t"].backend != by_name["4/4"].backend
    assert elsewhere == any(note.startswith("3t/2t") for note in evaluation.notes)
    assert by_name["3t/2t"].figures(0).kl_mean.mean > 0
