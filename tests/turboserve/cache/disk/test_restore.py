"""Real caches through the real store and a restart: every layer mix continues bit by bit, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens
from tests.turboserve.cache.disk.conversations import close_clean, open_store

from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.codec.format import KVFormat

BASE = KVFormat(page_tokens=16, sink_tokens=8)


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
def test_conversations_continue_after_a_restart(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    before = KVFamily(model, base=BASE)
    store = open_store(tmp_path, fingerprint=before.fingerprint)
    live: dict[str, Any] = {}
    for name, length in (("4/4", 60), ("8/3", 1100), ("f16", 1100), ("f16 short", 5)):
        caches = before.runtime(name.split()[0]).make_cache()
        logits_of(model, caches, random_tokens(rng, length), [])
        header, arrays = before.export_caches(caches)
        assert store.put(name, {"salt": "s"}, header, arrays)
        live[name] = caches
    store.close()

    after = KVFamily(model, base=BASE)
    assert after.fingerprint == before.fingerprint
    store = open_store(tmp_path, fingerprint=after.fingerprint)
    more = random_tokens(rng, 40)
    for name, caches in live.items():
        stored = store.get(name)
        assert stored is not None
        restored = after.import_caches(*stored[1:])
        for part in (more[:1], more[1:]):
            assert np.array_equal(logits_of(model, restored, part, []), logits_of(model, caches, part, []))
    close_clean(store)
    after.check_integrity()


def test_a_grown_conversation_writes_its_new_pages_only(tmp_path: Path, rng: np.random.Generator) -> None:
    model = small_models.dense()
    family = KVFamily(model, base=BASE)
    store = open_store(tmp_path)
    written = []
    caches = family.runtime("4/4").make_cache()
    for turn, length in enumerate((4200, 100)):
        logits_of(model, caches, random_tokens(rng, length), [])
        before = store.counts.written_bytes
        store.put(f"turn {turn}", {"salt": "s"}, *family.export_caches(caches))
        assert store.flush(20)
        written.append(store.counts.written_bytes - before)
    assert written[1] < 0.1 * written[0]
    store.delete("turn 0")
    assert store.flush(20)
    restored = store.get("turn 1")
    assert restored is not None
    more = random_tokens(rng, 3)
    assert np.array_equal(
        logits_of(model, family.import_caches(*restored[1:]), more, []), logits_of(model, caches, more, [])
    )
    close_clean(store)
