"""Constraints without a model: whatever is drawn under the masks, the answer is what was asked for."""

from __future__ import annotations

import atexit
import json
import os
import random
import re
import secrets
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tests.turboserve.engine.schemas import FIXED, Schema, random_schemas

from turboserve.engine.grammar import rule as rule_module
from turboserve.engine.grammar.compiler import Compiler
from turboserve.engine.grammar.rule import GrammarRule
from turboserve.engine.grammar.source import MAX_TEXT_BYTES, embedded_schema
from turboserve.engine.grammar.vocabulary import Vocabulary
from turboserve.errors import InvalidRequestError, UnsupportedParameterError
from turboserve.messages import Constraint, ConstraintKind
from turboserve.models import tiny

NUM_RANDOM = 300
MAX_TOKENS = 400
TIMEOUT_S = 60.0  # generous: how long compiling takes is bench/structured.py's
ENDS_MORE_OFTEN = 8.0  # added to the logits of tokens that close what is open, or no string would ever end
TEST_SEED = int(os.environ.get("TEST_SEED") or secrets.randbits(31))
MODEL = Path(tiny.__file__).parent / "model"
END = 8185
VOCAB = 8192


def nothing() -> None: ...


@cache
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@cache
def compiler() -> Compiler:
    one = Compiler(Vocabulary(tokenizer(), VOCAB, {END}))
    atexit.register(one.close)
    return one


@cache
def closing() -> npt.NDArray[np.bool_]:
    """(V,) bool: tokens that begin with a quote, a closing bracket or an address's sign, or end the answer."""
    texts = tokenizer().convert_ids_to_tokens(list(range(VOCAB)))
    return np.array([i == END or (text or "").startswith(('"', "}", "]", "@")) for i, text in enumerate(texts)])


def compiled(kind: ConstraintKind, text: str, **options: Any) -> GrammarRule:
    return compiler().compile(Constraint(kind, text, **options), TIMEOUT_S, nothing)


def allowed_by(rule: GrammarRule, vocab_len: int = VOCAB) -> npt.NDArray[np.intp]:
    mask = np.full(-(-vocab_len // 32), 0xAAAAAAAA, np.uint32)
    assert rule.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def drawn(rule: GrammarRule, rng: np.random.Generator) -> tuple[str, bool]:
    """An answer by random logits at temperature 1, and whether it came to its end."""
    tokens: list[int] = []
    while len(tokens) < MAX_TOKENS:
        if rule.is_complete:
            return text_of(tokens), True
        allowed = allowed_by(rule)
        scores = rng.normal(size=len(allowed)) + ENDS_MORE_OFTEN * closing()[allowed] + rng.gumbel(size=len(allowed))
        token = int(allowed[np.argmax(scores)])
        if token == END:
            return text_of(tokens), True
        rule.accept(token)
        tokens.append(token)
    return text_of(tokens), False


def text_of(tokens: list[int]) -> str:
    return str(tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@cache
def formats() -> jsonschema.FormatChecker:
    """Leap seconds and any number of a second's digits, which RFC 3339 allows, are beyond Python's own parsers."""
    checker = jsonschema.FormatChecker(formats=("date", "email", "ipv4", "ipv6", "uuid"))
    time = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
    for name, pattern in (("time", time), ("date-time", r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T" + time)):
        checker.checks(name)(lambda value, p=pattern: not isinstance(value, str) or bool(re.fullmatch(p, value, re.I)))
    return checker


def check(schema: Schema, text: str) -> None:
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator, format_checker=formats())


def accepts(kind: ConstraintKind, text: str, answer: str) -> bool:
    """Whether this answer may be given and end there."""
    rule = compiled(kind, text)
    for token in tokenizer().encode(answer, add_special_tokens=False):
        if rule.is_complete or token not in allowed_by(rule):
            return False
        rule.accept(token)
    return rule.is_complete or END in allowed_by(rule)


@pytest.mark.parametrize("schema", FIXED, ids=lambda s: json.dumps(s)[:60])
def test_answers_match_each_kind_of_schema(schema: Schema) -> None:
    print(f"TEST_SEED={TEST_SEED}")
    rng = np.random.default_rng(TEST_SEED)
    num_ended = 0
    for _ in range(5):
        text, has_ended = drawn(compiled("json_schema", json.dumps(schema)), rng)
        num_ended += has_ended
        if has_ended:
            check(schema, text)
    assert num_ended


def test_answers_match_random_schemas() -> None:
    print(f"TEST_SEED={TEST_SEED}")
    rng, num_ended = np.random.default_rng(TEST_SEED), 0
    for schema in random_schemas(TEST_SEED, NUM_RANDOM):
        print(json.dumps(schema))  # pytest shows the last one when the test fails
        rule = compiled("json_schema", json.dumps(schema))
        text, has_ended = drawn(rule, rng)
        print(text)
        num_ended += has_ended
        if has_ended:
            check(schema, text)
    assert num_ended >= 0.9 * NUM_RANDOM


def test_any_json_object() -> None:
    for seed in range(20):
        text, has_ended = drawn(compiled("json_object", ""), np.random.default_rng(seed))
        assert not has_ended or isinstance(json.loads(text), dict)
    assert not accepts("json_object", "", "[1]")


def test_whitespace_is_free_but_never_without_end() -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a", "b"]}'
    for answer in ('{"a":1,"b":2}', '{"a": 1, "b": 2}', '{\n  "a": 1,\n  "b": {\n    "c": []\n  }\n}'):
        assert accepts("json_schema", schema, answer), answer
    for answer in ('{"a":  1, "b": 2}', '{"a": 1,\n\n"b": 2}', '{"a": 1, "b": 2}\n', ' {"a": 1, "b": 2}'):
        assert not accepts("json_schema", schema, answer), answer


@pytest.mark.parametrize("choices", [["yes", "no"], ["a", "ab", "abc"], ['quo"te', "é\n\\/", "\u0001\u2028", "", "😀"]])
def test_choices(choices: list[str]) -> None:
    text = json.dumps(choices)
    assert all(accepts("choice", text, one) for one in choices)
    assert not accepts("choice", text, choices[0] + "x")
    rng = np.random.default_rng(TEST_SEED)
    assert {drawn(compiled("choice", text), rng) for _ in range(50)} <= {(one, True) for one in choices}


@pytest.mark.parametrize("pattern", ["[a-z]{3}-[0-9]{2}", "^(yes|no)$", r"\d+/\d+", "(?i)abc", "é+", '"[^"]*"', ""])
def test_regular_expressions_hold_for_the_whole_answer(pattern: str) -> None:
    rng = np.random.default_rng(TEST_SEED)
    for _ in range(20):
        text, has_ended = drawn(compiled("regex", pattern), rng)
        assert not has_ended or re.fullmatch(pattern, text), text


def test_a_grammar_may_name_control_tokens_and_hold_schemas() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    grammar = f"start: <tool_call> call </tool_call>\ncall: {embedded_schema(schema, 'tools')}"
    rule = compiled("lark", grammar)
    assert list(allowed_by(rule)) == [8186]
    assert accepts("lark", grammar, '<tool_call>{"n": 3}</tool_call>')
    assert not accepts("lark", grammar, '<tool_call>{"n": "3"}</tool_call>')


def test_strings_never_hold_control_tokens() -> None:
    rule = compiled("json_schema", '{"type": "string"}')
    rule.accept(tokenizer().encode('"')[0])
    added = set(tokenizer().added_tokens_decoder)
    assert len(added) >= 3 and not added & set(allowed_by(rule).tolist())


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if, then"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"type": "array", "minContains": 1}, "minContains"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"$dynamicRef": "#x"}, r"\$dynamicRef"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"type": "string", "format": "no-such-format"}, "no-such-format"),
        ({"$ref": "https://example.com/schema.json"}, "example.com.*nothing is fetched"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "#"}, "nothing can be"),
        ({"type": "strin"}, "strin"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "[a"}, "unclosed"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}, "exclusiveMinimum 0"),
        ({"items": {"anyOf": [{"exclusiveMaximum": -1, "exclusiveMinimum": -1.5}]}}, "exclusiveMaximum -1"),
        ({"enum": []}, "empty"),
        (False, "empty"),
        ([1], "a schema is a JSON object"),
        ("text", "a schema is a JSON object"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_named(schema: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        compiled("json_schema", json.dumps(schema), param="response_format.json_schema.schema")
    assert caught.value.param == "response_format.json_schema.schema" and caught.value.status == 400
    assert "state" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[" * 100_000, "nested"),
        ("json_schema", json.dumps({"enum": ["x" * MAX_TEXT_BYTES]}), "longer than"),
        ("json_schema", '{"const": "\ud800"}', "surrogate"),
        ("choice", "[]", "at least one"),
        ("choice", "[1]", "at least one"),
        ("choice", '"a"', "at least one"),
        ("choice", "a", "no JSON"),
        ("regex", "[a", "unclosed"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?<=a)b", "look-around"),
        ("lark", "", "Empty grammar"),
        ("lark", "start: x", "unknown name"),
        ("lark", 'other: "a"', "start"),
        ("lark", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}', "not"),
    ],
)
def test_nonsense_is_refused(kind: ConstraintKind, text: str, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        compiled(kind, text, param="guided")
    assert caught.value.param == "guided"


def test_a_compiled_grammar_serves_several_answers() -> None:
    """Each has a state of its own, at whatever token it is; what was refused is refused again."""
    text = '["one", "two"]'
    first, second = compiled("choice", text), compiled("choice", text)
    first.accept(tokenizer().encode("one")[0])
    assert set(allowed_by(first).tolist()) != set(allowed_by(second).tolist())
    assert drawn(second, np.random.default_rng(1))[0] in ("one", "two")
    for param in ("a", "b"):
        with pytest.raises(InvalidRequestError) as caught:
            compiled("regex", "[", param=param)
        assert caught.value.param == param


def test_the_cache_forgets_the_longest_unused() -> None:
    texts = [json.dumps([f"choice {i}"]) for i in range(100)]
    assert all(
        drawn(compiled("choice", text), np.random.default_rng(0)) == (json.loads(text)[0], True) for text in texts
    )
    assert len(compiler()._cached) <= 64 and ("choice", texts[-1]) in compiler()._cached


@pytest.mark.parametrize("vocab_len", [8192, 8200, 8224, 8190, 9000])
def test_logits_may_be_more_or_fewer_than_the_tokenizers_tokens(vocab_len: int) -> None:
    """Bits beyond the tokenizer's tokens are 0, and so are bits beyond the logits."""
    other = Compiler(Vocabulary(tokenizer(), vocab_len, {END, 8186}))
    try:
        for text in ('["a"]', '[""]'):
            rule = other.compile(Constraint("choice", text), TIMEOUT_S, nothing)
            expected = {tokenizer().encode("a")[0]} if text == '["a"]' else {END, 8186}
            assert set(allowed_by(rule, vocab_len).tolist()) == expected
        anything = allowed_by(other.compile(Constraint("regex", "(?s:.*)"), TIMEOUT_S, nothing), vocab_len)
        assert len(anything) > 7000 and anything.max() < min(vocab_len, 8192)
    finally:
        other.close()


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(UnsupportedParameterError, match="not a fast tokenizer"):
        Vocabulary(object(), 256, {0})


def test_an_answer_that_becomes_too_much_work_fails_alone() -> None:
    """Its rule raises; a rule of another answer goes on."""
    hard, easy = compiled("regex", "(a?){5000}a{5000}"), compiled("choice", '["aaa"]')
    with pytest.raises(InvalidRequestError, match="could not be enforced any further"):
        for _ in range(MAX_TOKENS):
            hard.accept(int(random.choice(allowed_by(hard).tolist())))
    assert not hard.is_complete
    assert drawn(easy, np.random.default_rng(1)) == ("aaa", True)


BOUNDS = (-2, -1.5, -1, -0.25, 0, 0.1, 1, 1.5, 3)
NUMBERS = (
    "0",
    "-0",
    "0.0",
    "-0.0",
    "1",
    "1.0",
    "-1",
    "-1.00",
    "0.25",
    "0.1",
    "0.10",
    "-0.25",
    "1.5",
    "-1.50",
    "2",
    "3",
    "-2",
)


def test_no_number_outside_its_bounds() -> None:
    """At the bounds and beside them, for every pair of bounds that is not refused; how numbers end is left free."""
    num_checked = 0
    for low, high in [(low, high) for low in BOUNDS for high in BOUNDS if low < high]:
        for at_least, at_most in (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")):
            schema = {"type": "number", at_least: low, at_most: high}
            try:
                compiled("json_schema", json.dumps(schema))
            except InvalidRequestError as error:
                assert "is not supported" in error.message and high - low < 1
                continue
            for number in NUMBERS:
                if accepts("json_schema", json.dumps(schema), number):
                    num_checked += 1
                    check(schema, number)
    assert num_checked > 100


def test_a_rule_that_is_slow_token_after_token_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_module, "SLOW_S", -1.0)
    rule = compiled("regex", "a{100}")
    token = tokenizer().encode("a")[0]
    for _ in range(rule_module.MAX_SLOW_TOKENS):
        rule.accept(token)
    with pytest.raises(InvalidRequestError, match="too much work for each token"):
        rule.accept(token)


def test_what_a_rule_allows_is_what_it_accepts() -> None:
    rule = compiled("choice", '["a"]')
    with pytest.raises(InvalidRequestError, match="any further"):
        rule.accept(tokenizer().encode("b")[0])
    assert not rule.is_complete
    with pytest.raises(InvalidRequestError, match="any further"):
        allowed_by(rule)
