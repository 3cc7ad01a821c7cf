"""Who guesses tokens for a loaded model, or why nobody does. Decided once."""

from __future__ import annotations

import time
from collections.abc import Callable

from turboserve.engine import scheduler
from turboserve.engine.device import on_cpu, own_memory_bytes
from turboserve.engine.loaded_model import LoadedModel
from turboserve.engine.speculation import Speculation
from turboserve.engine.speculation_lookup import LookupDrafter
from turboserve.engine.speculation_model import DraftModel, ModelDrafter
from turboserve.errors import StartupError
from turboserve.settings import Settings

CACHE_SHARE = 8  # this part of the KV budget is for a draft model's caches


def wants_draft_model(settings: Settings) -> bool:
    """Whether a second model is to be loaded. Raises StartupError when one is needed and none is named."""
    if settings.speculate == "draft" and not settings.draft_model:
        raise StartupError("speculate = draft needs a model that drafts: set --draft-model.")
    return bool(settings.draft_model) and settings.speculate in ("auto", "draft")


def as_draft(draft: LoadedModel, served: LoadedModel, budget_bytes: int) -> DraftModel:
    """A loaded model as the served one's draft. budget_bytes: of all KV memory.

    Raises StartupError when the two do not mean the same by the same tokens.
    """
    if draft.tokenizer.get_vocab() != served.tokenizer.get_vocab():
        raise StartupError(
            f"The draft model {draft.model_id} has another vocabulary than {served.model_id}: choose one of its family."
        )
    return DraftModel(draft.model, draft.model_id, draft.weights_bytes, budget_bytes // CACHE_SHARE)


def new_speculation(
    draft: DraftModel | None, settings: Settings, vocab_len: int, clock: Callable[[], float] = time.perf_counter
) -> Speculation:
    """As the settings say, where `reason_against` has none. Raises StartupError, as ModelDrafter does."""
    if settings.speculate == "lookup":
        return Speculation(LookupDrafter(), settings.num_draft_tokens, clock)
    assert draft is not None, "reason_against has a reason"
    chunk = scheduler.most_prefill_tokens(settings.prefill_chunk_tokens, on_cpu=on_cpu(), gpu_bytes=own_memory_bytes())
    return Speculation(ModelDrafter(draft, vocab_len, chunk), settings.num_draft_tokens, clock)


def reason_against(wanted: str, *, has_draft_model: bool, can_cut: bool, stores_no_padding: bool) -> str | None:
    """Why nothing is drafted; None: something is. wanted: auto, off, lookup or draft (settings.speculate).

    can_cut: whether all layers' caches can be cut back by a token. stores_no_padding: whether rows of a batch may bring
    different numbers of tokens.
    """
    if wanted == "off":
        return "as set"
    if wanted != "lookup" and not has_draft_model:
        return "no draft model"
    if not can_cut or not stores_no_padding:
        return "this model's caches cannot be cut back by a token"
    return None
