"""Figures and names: who makes way, what is configured, what a process is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest

from turboserve.cli import config
from turboserve.cli.config import UsageError
from turboserve.errors import InvalidRequestError, ModelNotFoundError
from turboserve.fleet.budget import Holder, victims
from turboserve.fleet.footprint import PROCESS_BYTES, resident_bytes, weights_bytes
from turboserve.fleet.model import Backoff, Model
from turboserve.fleet.owners import Owners
from turboserve.fleet.plan import Catalogue, environment, make_catalogue
from turboserve.fleet.streams import WholeEvents
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings

GiB = 1 << 30
MEMORY = MemoryInfo(100 * GiB, 50 * GiB)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("TURBOSERVE_")]:
        monkeypatch.delenv(name)


def settings_of(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "models.toml"
    file.write_text(text)
    return config.resolve({}, file)


def catalogue_of(tmp_path: Path, text: str) -> Catalogue:
    return make_catalogue(settings_of(tmp_path, text), MEMORY)[0]


def _subsets(holders: list[Holder]) -> Iterator[tuple[Holder, ...]]:
    return chain.from_iterable(combinations(holders, count) for count in range(len(holders) + 1))


def test_victims_make_room_and_none_in_vain(rng: np.random.Generator) -> None:
    """Against all subsets: found whenever there is one, enough, minimal, and never a model that must stay."""
    for _ in range(300):
        holders = [
            Holder(str(index), int(rng.integers(1, 20)), float(rng.random()), bool(rng.random() < 0.7))
            for index in range(int(rng.integers(0, 6)))
        ]
        held = sum(holder.need_bytes for holder in holders)
        needed, budget = int(rng.integers(0, 25)), int(rng.integers(10, 60))
        stoppable = [holder for holder in holders if holder.may_be_stopped]

        def fits(gone: tuple[Holder, ...], excess: int = held + needed - budget) -> bool:
            return sum(holder.need_bytes for holder in gone) >= excess

        chosen = victims(needed, budget, holders)
        assert (chosen is None) == (not any(fits(subset) for subset in _subsets(stoppable)))
        if chosen is None:
            continue
        gone = tuple(holder for holder in holders if holder.name in chosen)
        assert all(holder.may_be_stopped for holder in gone)
        assert fits(gone)
        assert not any(fits(tuple(h for h in gone if h is not spared)) for spared in gone)


def test_the_least_recently_used_goes_first() -> None:
    holders = [Holder("old", 5, 1.0, True), Holder("older", 5, 0.0, True), Holder("new", 5, 2.0, True)]
    assert victims(5, 15, holders) == ["older"]
    assert victims(9, 15, holders) == ["older", "old"]


def test_a_table_overrides_the_servers_settings(tmp_path: Path) -> None:
    text = """
        api_key = "secret"
        kv_format = "8/8"
        max_running = 5
        kv_store_dir = "/store"
        idle_unload_s = 9
        [models.a]
        [models."org/b"]
        kv_format = "4/3"
        max_context_tokens = 2048
        kv_budget = "1GiB"
        idle_unload_s = 0
    """
    a, b = catalogue_of(tmp_path, text)
    assert (a.settings.kv_format, a.settings.max_context_tokens, a.idle_unload_s) == ("8/8", 0, 9)
    assert (b.settings.kv_format, b.settings.max_context_tokens, b.idle_unload_s) == ("4/3", 2048, 0)
    assert (a.settings.max_running, b.settings.max_running, b.settings.kv_budget) == (5, 5, str(GiB))
    assert a.settings.kv_store_dir != b.settings.kv_store_dir
    assert {plan.settings.kv_store_dir.parent for plan in (a, b) if plan.settings.kv_store_dir} == {Path("/store")}
    assert (a.settings.api_key, a.settings.host, a.settings.port, a.settings.models) == ("", "127.0.0.1", 0, {})


def test_a_process_reads_exactly_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'template_kwargs = ["one", "two"]\nkv_auto_limit = 0.5\nlog_json = true\n[models.a]\nkv_format = "auto"'
    (plan,) = catalogue_of(tmp_path, text)
    for name, value in environment(plan.settings).items():
        monkeypatch.setenv(name, value)
    assert config.resolve({}).model_dump() == plan.settings.model_dump()


def test_by_default_all_models_fit_together(tmp_path: Path) -> None:
    catalogue, budget_bytes = make_catalogue(settings_of(tmp_path, "[models.a]\n[models.b]\n[models.c]"), MEMORY)
    assert budget_bytes == 80 * GiB
    assert 0.99 * budget_bytes < sum(plan.estimate_bytes for plan in catalogue) <= budget_bytes
    (plan, *_) = catalogue
    assert plan.weights_bytes == weights_bytes("") > 10 << 20
    assert plan.estimate_bytes == plan.weights_bytes + plan.kv_bytes + PROCESS_BYTES


def test_what_is_measured_corrects_the_estimate(tmp_path: Path) -> None:
    (plan,) = catalogue_of(tmp_path, '[models.a]\nkv_budget = "1GiB"')
    model = Model.of(plan)
    model.measured(100 << 20, is_fresh=True)
    assert model.need_bytes == (100 << 20) + GiB  # a fresh process holds no caches yet
    model.measured(3 * GiB, is_fresh=False)
    model.measured(2 * GiB, is_fresh=False)
    assert model.need_bytes == 3 * GiB
    model.measured(1, is_fresh=True)
    assert model.need_bytes == plan.weights_bytes + GiB  # weights on a GPU are not resident
    assert resident_bytes(os.getpid()) > 10 << 20


def test_names(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, '[models."org/a"]\naliases = ["gpt-4o"]\n[models.b]')
    assert [catalogue.find(name).name for name in ("org/a", "gpt-4o", "b")] == ["org/a", "org/a", "b"]
    with pytest.raises(ModelNotFoundError, match="org/a, b"):
        catalogue.find("c")
    with pytest.raises(InvalidRequestError, match="name one of org/a, b"):
        catalogue.find(None)
    assert catalogue_of(tmp_path, "[models.a]").find(None).name == "a"


def test_names_of_adapters(tmp_path: Path) -> None:
    text = """
        [models.a]
        aliases = ["gpt-4o"]
        adapters = ["law=/x/law", "legal=/x/law", "/x/tax", "b=/x/b"]
        [models.b]
        adapters = ["tax=/y/tax"]
    """
    catalogue = catalogue_of(tmp_path, text)
    for name in ("law", "legal", "a:law", "gpt-4o:legal", "a:tax", "a:b"):
        assert catalogue.find(name).name == "a"
    assert catalogue.find("b:tax").name == catalogue.find("b").name == "b"
    for name in ("tax", "b:law", "c:law", "a:", "a:nobody"):  # both have a tax
        with pytest.raises(ModelNotFoundError):
            catalogue.find(name)
    a, b = catalogue
    assert a.settings.adapters == ("law=/x/law", "legal=/x/law", "/x/tax", "b=/x/b")
    assert (a.adapters["legal"], b.settings.adapters) == ("law", ("tax=/y/tax",))
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "adapters.safetensors").write_bytes(b"x" * 1000)
    for other in ("adapter_model.safetensors", "adapters_before.safetensors"):  # which nobody reads beside it
        (tmp_path / "law" / other).write_bytes(b"x" * 500)
    assert weights_bytes("", [f"law={tmp_path}/law", f"legal={tmp_path}/law"]) == weights_bytes("") + 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('adapters = ["/x/law"]\n[models.a]', ("adapters", "[models.NAME]")),
        ('[models.a]\nadapters = ["a:b=/x"]', ("models.a.adapters", "NAME=PATH")),
        ('[models.a]\nadapters = ["x=/x", "x=/y"]', ("models.a.adapters", "x names two")),
        ('[models.a]\naliases = ["q:law"]\nadapters = ["law=/x"]', ("'q:law'", "could mean either")),
        ('[models.a]\nadapters = ["law=/x"]\n[models."a:law"]', ("'a:law'", "models.a already")),
        ('[models.a]\nkv_format = "9/9"', ("models.a.kv_format = '9/9'", "balanced")),
        ("[models.a]\npined = true", ("models.a.pined", "unknown key", "did you mean pinned?")),
        ("[models.a]\nport = 1", ("models.a.port", "one of the whole server")),
        ('[models."a b"]', ("models.a b", "letters")),
        ('[models.a]\naliases = ["b"]\n[models.b]', ("'b'", "models.a already")),
        ('model = "x"\n[models.a]', ("[models]",)),
        ('models_memory = "lots"\n[models.a]', ("models_memory='lots'", "512MiB")),
        ('[models.a]\nkv_budget = "lots"', ("models.a.kv_budget='lots'",)),
        ('[models.a]\ndequantize = "maybe"', ("models.a.dequantize = 'maybe'", "always")),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_folder_of_files_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("port = 1234\n[models.a]")
    (tmp_path / "more.toml").write_text("[models.b]\npinned = true")
    (tmp_path / "left.example.toml").write_text("[models.c]")
    settings = config.resolve({}, tmp_path)
    assert (settings.port, sorted(settings.models)) == (1234, ["a", "b"])
    (tmp_path / "zz.toml").write_text("[models.a]")
    with pytest.raises(UsageError, match=r"models\.a is set in .*server\.toml and in .*zz\.toml"):
        config.resolve({}, tmp_path)


def test_the_example_is_valid() -> None:
    example = Path(__file__).resolve().parents[3] / "config" / "models.example.toml"
    assert len(config.resolve({}, example).models) >= 2


def test_backoff_grows_and_forgets() -> None:
    backoff = Backoff()
    waits = []
    for _ in range(8):
        backoff.start_failed(100.0)
        waits.append(backoff.not_before - 100.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.crashed(200.0, lived_s=3600.0)
    assert backoff.not_before == 200.0
    backoff.crashed(200.0, lived_s=1.0)
    assert backoff.not_before == 201.0


def test_owners_forget_the_oldest_and_know_callers_apart() -> None:
    owners = Owners(max_remembered=2)
    owners.remember("x", "1", "a")
    owners.remember("y", "1", "b")
    assert (owners.find("x", "1"), owners.find("y", "1"), owners.find("z", "1")) == ("a", "b", None)
    owners.remember("x", "1", "c")
    owners.remember("x", "2", "a")
    assert (owners.find("x", "1"), owners.find("y", "1"), owners.find("x", None)) == ("c", None, None)


def test_only_whole_events_pass(rng: np.random.Generator) -> None:
    text = b"".join(b"data: %d\n\n" % number for number in rng.integers(0, 10**6, 50)) + b"data: torn"
    events, sent = WholeEvents(b"\n\n"), b""
    cuts = sorted(rng.integers(0, len(text), 40).tolist())
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        sent += events.take(text[begin:end])
        assert sent == b"" or sent.endswith(b"\n\n")
    assert sent + events.rest() == text
    assert events.rest() == b"data: torn"
