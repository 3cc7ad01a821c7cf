"""Loading a model and building everything the engine needs around it, on the engine thread.

No code that comes with a model is ever run: trust_remote_code is False for model and tokenizer.
Every expected failure is a StartupError whose one line names the cure.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from turboquant_kv import blas
from turboquant_kv.backends.native.backend import is_available
from turboquant_kv.cache.calibration import Calibration, calibration_for
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.runtime import UnsupportedModelError
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.format_name import PLAIN_FORMAT, UnsupportedFormatError
from turboquant_kv.evaluation.contestants import check_compressible
from turboserve.cache.disk import DiskStore, SharedDiskStore, StoreLockedError
from turboserve.cache.interfaces import ServedModel, SessionDisk
from turboserve.cache.memory import Memory, MemoryLimits
from turboserve.cache.sizes import largest_fitting, peak_bytes
from turboserve.engine import adapters, weights
from turboserve.engine.ahead.start import CompiledStart
from turboserve.engine.ahead.start import begin as begin_compiling
from turboserve.engine.distributed.dividing import calibration_of_rank, own_share, store_folder
from turboserve.engine.distributed.following import Follower
from turboserve.engine.distributed.leading import Lead, LeadingDisk, LeadingFormats
from turboserve.engine.distributed.leading_passes import LeadingPasses
from turboserve.engine.distributed.ranks import ALONE, FirstRank, OtherRank, Ranks
from turboserve.engine.distributed.sharding import count_heads, shard
from turboserve.engine.end_tokens import end_tokens
from turboserve.engine.expanded_products import ExpandedProducts, choose_expanded_products
from turboserve.engine.forecast import MIN_TOKENS, expanded_bytes, forecast, too_small
from turboserve.engine.format_choice import choose_format
from turboserve.engine.fused_layers import FusedLayers, prepare_fused_layers
from turboserve.engine.kept_quality import kept_quality
from turboserve.engine.loaded_model import EngineParts, LoadedModel
from turboserve.engine.memory_plan import memory_plan
from turboserve.engine.mlx_lm_loading import load_with_mlx_lm
from turboserve.engine.model_config import read_config, read_generation_config
from turboserve.engine.model_folder import model_id_for, resolve_folder
from turboserve.engine.native_blocks import NativeBlocks, install_native_blocks
from turboserve.engine.native_linears import install_native_linears, native_bytes, native_candidates
from turboserve.engine.native_model import install_native_model
from turboserve.engine.progress import Progress, step
from turboserve.engine.projections import choose_projections
from turboserve.engine.prompt_products import PromptProducts, choose_prompt_products
from turboserve.engine.sampling_defaults import chosen_defaults, described
from turboserve.engine.served_formats import ServedFormats
from turboserve.engine.speculation_choice import as_draft, wants_draft_model
from turboserve.engine.weight_files import read_shapes
from turboserve.errors import StartupError
from turboserve.machine_memory import MemoryInfo, detect_memory, resolve_budget
from turboserve.models.tiny.prompts import load_texts
from turboserve.settings import AUTO_FORMAT, Settings
from turboserve.weight_sizes import adapters_bytes, model_bytes

log = logging.getLogger(__name__)

# Enough to keep readers and cores busy, little enough to be seen growing.
READ_TOGETHER_BYTES = 256 << 20
# For a model whose configuration names no limit; about the shortest context in use today.
DEFAULT_MAX_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class _Built:
    """What every rank of a model has."""

    loaded: LoadedModel
    guessing: LoadedModel | None
    formats: ServedFormats
    budget_bytes: int
    disk: SessionDisk | None
    compiled: CompiledStart | None


def _build(settings: Settings, progress: Progress, ranks: Ranks) -> _Built:
    # before the model takes its share
    memory = own_share(detect_memory(device_limit_bytes=_device_limit_bytes()), ranks)
    _tell_what_fits(settings, progress, memory, ranks)
    compiled = None
    if ranks.size == 1:  # a part of a model has other shapes
        compiled = begin_compiling(settings, resolve_folder(settings.model, progress), memory, progress)
    try:
        return _build_beside(settings, progress, ranks, memory, compiled)
    finally:
        if compiled is not None:
            compiled.stop()


def _build_beside(
    settings: Settings, progress: Progress, ranks: Ranks, memory: MemoryInfo, compiled: CompiledStart | None
) -> _Built:
    """compiled: waited for once the weights are read."""
    loaded = load(settings, progress, memory, ranks, compiled)
    guessing = None
    if wants_draft_model(settings) and ranks.rank == 0:  # into what the served model has left
        left_bytes = max(0, memory.available_bytes - loaded.weights_bytes)
        guessing = _load_draft(settings, progress, replace(memory, available_bytes=left_bytes))
    formats = _serve_formats(settings, loaded, progress, ranks)
    more_bytes = 0 if guessing is None else guessing.weights_bytes
    budget_bytes = resolve_budget(settings.kv_budget, memory, loaded.weights_bytes + more_bytes)
    budget_bytes = ranks.least("budget", budget_bytes)
    runtime = formats.default_runtime
    kept = [runtime.description, str(runtime.shapes), runtime.token_bytes, runtime.chunk_token_bytes]
    ranks.check_same(
        "what layers keep",
        kept,
        "keeps other caches than rank 0: start all ranks with the same settings, on machines of one kind",
    )
    store = _open_store(settings, loaded, formats, progress, ranks)
    if compiled is not None:
        compiled.built()
    return _Built(loaded, guessing, formats, budget_bytes, store, compiled)


def build_follower(settings: Settings, progress: Progress, ranks: OtherRank) -> Follower:
    """A rank's part of a divided model, which does what rank 0 says. Raises StartupError."""
    built = _build(settings, progress, ranks)
    return Follower(ranks, built.loaded.model, built.formats, built.disk)


def build_parts(settings: Settings, progress: Progress, ranks: Ranks = ALONE) -> EngineParts:
    """Model, runtime and cache memory as the settings say, on all ranks that have parts of it. Raises StartupError."""
    built = _build(settings, progress, ranks)
    if not isinstance(ranks, FirstRank):
        return _parts_of(settings, progress, built)
    lead = Lead(ranks, built.formats)
    formats = LeadingFormats(lead, built.loaded.model)
    disk = None if built.disk is None else LeadingDisk(lead, built.disk)
    parts = _parts_of(settings, progress, built, formats, disk)
    if disk is not None:
        disk.keep_only_own()
    # What is not told to the others must not reach the model.
    loaded = replace(parts.loaded, model=None)
    return replace(parts, loaded=loaded, passes=LeadingPasses(lead, built.loaded.model), divided=lead)


def _parts_of(
    settings: Settings,
    progress: Progress,
    built: _Built,
    leading: LeadingFormats | None = None,
    disk: LeadingDisk | None = None,
) -> EngineParts:
    """leading, disk: those of a divided model, through which its other ranks are told."""
    loaded, guessing, formats, budget_bytes = built.loaded, built.guessing, built.formats, built.budget_bytes
    runtime = formats.default_runtime
    family, store = leading or formats, disk or built.disk
    draft = None if guessing is None else as_draft(guessing, loaded, budget_bytes)
    if draft is not None:
        budget_bytes -= draft.cache_bytes
    limits = MemoryLimits(
        session_ttl_s=settings.session_ttl_s,
        max_sessions_per_caller=settings.max_sessions_per_caller,
        max_session_bytes_per_caller=settings.max_session_bytes_per_caller,
        allow_requantise=settings.allow_requantise,
        has_one_caller=len({key for key in (settings.api_key, *settings.api_keys) if key}) == 1,
    )
    kv_memory = Memory(
        *(family, budget_bytes, limits, store),
        wall_offset=lambda: time.time() - time.monotonic(),
        model=ServedModel(
            loaded.model_id,
            _meaning(loaded),
            frozenset(adapter.fingerprint for adapter in loaded.adapters),
            is_divided=leading is not None,
        ),
    )
    if runtime.verdict is not None:
        progress(f"KV kernels   {runtime.verdict.line}")
    if (needed_bytes := peak_bytes(runtime, MIN_TOKENS)) > budget_bytes:
        tokens = largest_fitting(lambda n: peak_bytes(runtime, n), budget_bytes, MIN_TOKENS)
        raise StartupError(too_small(budget_bytes, tokens, needed_bytes, formats.default))
    for line in memory_plan(loaded, runtime, budget_bytes):
        progress(line)
    details = {"blas": blas.interpose().describe()}  # put in place before MLX was imported; only asked for here
    if formats.calibration is not None:
        details["calibration"] = formats.calibration.origin
    if runtime.verdict is not None:
        details["kv_kernels"] = runtime.verdict.line
    if runtime.fmt is not None:
        details["kv_layers"] = runtime.description
        details |= {"scale": runtime.fmt.scale, "page_tokens": str(runtime.fmt.page_tokens)}
    quality = kept_quality(settings.cache_dir.expanduser(), loaded.weights_fingerprint)
    parts = EngineParts(loaded, family.default_runtime, kv_memory, details, draft, quality)
    return replace(parts, compiled=built.compiled)


def _tell_what_fits(settings: Settings, progress: Progress, memory: MemoryInfo, ranks: Ranks) -> None:
    """Before the model is loaded. Raises StartupError, with the figures, when it cannot be served.

    Of a divided model this rank's share, by what is divided: embeddings, which every rank has, are counted too little.
    """
    folder = resolve_folder(settings.model, progress)
    config, shapes = read_config(folder), read_shapes(folder)
    stored_bytes = (model_bytes(folder) + adapters_bytes(settings.adapters)) // ranks.size
    _check_fits(stored_bytes, memory)
    float32_bytes = expanded_bytes(config, shapes) // ranks.size
    config = count_heads(config, ranks.size)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    is_native = on_cpu and settings.dequantize == "auto" and is_available()
    is_expanded = not is_native and weights.should_expand(
        settings.dequantize, on_cpu=on_cpu, needed_bytes=float32_bytes, available_bytes=memory.available_bytes
    )
    expected = forecast(
        config,
        float32_bytes if is_expanded else stored_bytes,
        is_expanded or is_native,
        memory,
        settings.kv_budget,
        settings.kv_format,
        max_context(config, settings.max_context_tokens),
    )
    expected.check()
    for line in expected.lines():
        progress(line)


def load(
    settings: Settings,
    progress: Progress,
    memory: MemoryInfo,
    ranks: Ranks = ALONE,
    compiled: CompiledStart | None = None,
) -> LoadedModel:
    """A model ready to run, or this rank's part of it, weights in memory. Raises StartupError.

    compiled: what is waited for between reading the weights and computing with them.
    """
    model_id = model_id_for(settings.model, settings.served_model_name)
    progress(f"loading {model_id}")
    folder = resolve_folder(settings.model, progress)
    config, shapes = read_config(folder), read_shapes(folder)
    _check_fits((model_bytes(folder) + adapters_bytes(settings.adapters)) // ranks.size, memory)
    model, tokenizer = load_with_mlx_lm(folder, str(config["model_type"]), shapes)
    if ranks.size > 1:
        shard(model, config, ranks.group)
    is_native = ranks.all_agree("native products", _multiplies_as_stored(model, settings, memory))
    note = ""
    if not is_native:
        model, note = _expand_if_wanted(model, settings, memory, ranks)
    dtype = "float32" if is_native else weights.activation_dtype(model)
    try:
        _read_weights(model, progress)
        if compiled is not None:
            compiled.wait(progress)
        installed = adapters.install(model, settings.adapters, dtype)
        if is_native:
            model, note = _take_as_stored(model, settings, memory, ranks)  # under the adapters
        mx.eval(model.parameters())
    except (RuntimeError, MemoryError) as exc:
        raise StartupError(f"The weights do not fit in memory ({exc}): choose a smaller model.") from exc
    if note:
        progress(note)
    if settings.adapters:
        progress(f"adapters     {adapters.described(installed)}")
    agree = partial(ranks.all_agree, "joined projections")
    arranged = choose_projections(model, settings.projections, agree)  # of what lies under the adapters as well
    progress(f"projections  {arranged}")
    layers = _arranged_layers(model, settings, ranks)
    if isinstance(layers, FusedLayers) or layers.num_layers or is_native:
        progress(f"layers       {layers}")
    choose_products = choose_prompt_products if is_native else choose_expanded_products
    prompts: PromptProducts | ExpandedProducts = choose_products(model, settings.projections)
    if is_native or prompts.trials:
        progress(f"prompts      {prompts}")
    fingerprint = weights.fingerprint(folder, dtype)
    ranks.check_same("weights", fingerprint, "has other weights than rank 0: copy the model's folder to all machines")
    own = () if ranks.size == 1 else (f"rank {ranks.rank} of {ranks.size}",)
    defaults = chosen_defaults(settings.sampling_defaults, folder)
    progress(f"sampling     {described(defaults)}, where a request says nothing")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        model_id=model_id,
        dtype=dtype,
        max_context=max_context(config, settings.max_context_tokens),
        weights_bytes=weights.parameter_bytes(model) + native_bytes(model),
        weights_fingerprint=weights.fingerprint(folder, dtype, *own) if own else fingerprint,
        eos_ids=end_tokens(tokenizer.eos_token_ids, [config, read_generation_config(folder)]),
        tokenizer_fingerprint=weights.tokenizer_fingerprint(folder),
        sampling_defaults=defaults,
        details={
            "weights": note or "as stored",
            "projections": str(arranged),
            "layers": str(layers),
            "prompts": str(prompts),
            "adapters": adapters.described(installed) or "none",
        },
        adapters=installed,
        choices=(*arranged.choices, *prompts.choices),
        prompt_block=prompts.prompt_block if isinstance(prompts, PromptProducts) else 1,
    )


def _arranged_layers(model: Any, settings: Settings, ranks: Ranks) -> NativeBlocks | FusedLayers:
    """Let kernels compute decoder layers, or what stands between their products, where the whole of them is here."""
    if settings.projections == "off":
        return NativeBlocks(0, 0, "as set")
    if ranks.size > 1:
        return NativeBlocks(0, 0, "layers are divided among ranks")
    if mx.default_device().type != mx.DeviceType.cpu:
        return prepare_fused_layers(model, settings.projections)
    blocks = install_native_blocks(model)
    return replace(blocks, has_steps=blocks.num_native == blocks.num_layers > 0 and install_native_model(model))


def _read_weights(model: Any, progress: Progress) -> None:
    """Have the weights in memory, some at a time, so that it can be seen how far that is."""
    arrays = weights.parameters(model)
    with step(progress, "reading weights", sum(int(a.nbytes) for a in arrays)) as advance:
        waiting: list[mx.array] = []
        for array in arrays:
            waiting.append(array)
            if (num_bytes := sum(int(a.nbytes) for a in waiting)) >= READ_TOGETHER_BYTES or array is arrays[-1]:
                mx.eval(waiting)
                advance(num_bytes)
                waiting = []


def _load_draft(settings: Settings, progress: Progress, memory: MemoryInfo) -> LoadedModel:
    """The model that guesses tokens for the served one. Raises StartupError."""
    own = {
        "model": settings.draft_model,
        "served_model_name": "",
        "adapters": (),
    }  # the adapters are the served model's
    return load(settings.model_copy(update=own), progress, memory)


def max_context(config: dict[str, Any], wanted: int) -> int:
    """The model's own limit, or the lower one that is wanted (0: none)."""
    limit = weights.config_value(config, "max_position_embeddings")
    own = int(limit) if isinstance(limit, int) and limit > 0 else None
    if own is None:
        return wanted or DEFAULT_MAX_CONTEXT
    if wanted > own:
        log.warning("max_context_tokens=%d is more than the model was made for: %d is used", wanted, own)
    return min(wanted or own, own)


def _multiplies_as_stored(model: Any, settings: Settings, memory: MemoryInfo) -> bool:
    """Whether the CPU kernels are to multiply by the weights as they are. Raises StartupError."""
    if settings.dequantize not in ("auto", "always", "never"):
        raise StartupError(f"dequantize={settings.dequantize!r}: expected auto, always or never.")
    if mx.default_device().type != mx.DeviceType.cpu or settings.dequantize != "auto" or not is_available():
        return False
    linears = native_candidates(model)
    rest_bytes = weights.expanded_bytes(model, without=linears)  # of experts, say, which become float32
    wanted = weights.should_expand("auto", on_cpu=True, needed_bytes=rest_bytes, available_bytes=memory.available_bytes)
    return bool(linears) and wanted


def _take_as_stored(model: Any, settings: Settings, memory: MemoryInfo, ranks: Ranks) -> tuple[Any, str]:
    """The model with native linear layers, everything else in float32; and what to tell about it. Raises StartupError.

    A model that does not work with them is expanded, if it fits, as where there are no kernels.
    """
    try:
        native = install_native_linears(model)
    except ValueError as exc:  # TURBOQUANT_ISA names what this CPU or build has not
        raise StartupError(f"The CPU kernels cannot multiply by the weights: {exc}.") from exc
    if native is None:
        return _expand_if_wanted(model, settings, memory, ranks)
    return weights.expand(model), f"weights {native}"


def _expand_if_wanted(model: Any, settings: Settings, memory: MemoryInfo, ranks: Ranks) -> tuple[Any, str]:
    """The model, maybe with float32 weights, and what to tell about it."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    stored, needed = weights.parameter_bytes(model), weights.expanded_bytes(model)
    choice = settings.dequantize
    wanted = weights.should_expand(choice, on_cpu=on_cpu, needed_bytes=needed, available_bytes=memory.available_bytes)
    if not ranks.all_agree("float32 weights", wanted) or needed == stored:
        return model, ""
    note = f"weights expanded to float32, {needed >> 20} MiB instead of {stored >> 20} MiB"
    return weights.expand(model), note + (" (faster on a CPU)" if on_cpu else "")


def _serve_formats(settings: Settings, loaded: LoadedModel, progress: Progress, ranks: Ranks = ALONE) -> ServedFormats:
    """All formats of the model, the wanted one ready to use. Raises StartupError."""

    def calibrate() -> Calibration:
        progress("key and value means: measured at the first start, then read from the cache folder")
        cache_dir = settings.cache_dir.expanduser()
        with step(progress, "measuring key and value means"):
            if ranks.size > 1:
                return calibration_of_rank(ranks, loaded.model, loaded.tokenizer, cache_dir, loaded.weights_fingerprint)
            return calibration_for(loaded.model, loaded.tokenizer, cache_dir, loaded.weights_fingerprint)

    cache_dir = settings.cache_dir.expanduser()
    try:
        name = settings.kv_format
        if name == AUTO_FORMAT:
            check_compressible(probe_layers(loaded.model))
            name = choose_format(loaded, calibrate(), settings.kv_auto_limit, cache_dir, held_out_text(), progress)
        fmt = None if name == PLAIN_FORMAT else KVFormat.parse(name)
        with step(progress, "preparing KV caches"):  # a GPU's kernels are compiled and tried
            return ServedFormats(loaded.model, fmt, calibrate, cache_dir)
    except (UnsupportedModelError, UnsupportedFormatError) as exc:
        raise StartupError(f"KV format {settings.kv_format}: {_one_line(exc)}. Use --kv-format f16.") from exc
    except ValueError as exc:  # the calibration text gave too few tokens
        raise StartupError(f"{_one_line(exc)}: serve this model with --kv-format f16") from exc


def held_out_text() -> str:
    """A document that neither the embedded model nor the calibration of means has seen."""
    return "\n\n".join(item.text for item in load_texts()[:4])


def _open_store(
    settings: Settings, loaded: LoadedModel, formats: ServedFormats, progress: Progress, ranks: Ranks
) -> SessionDisk | None:
    """The disk store, if one is wanted. Raises StartupError when another process has it."""
    if settings.kv_store_dir is None:
        return None
    # A rank's weights have a fingerprint that tells how many ranks there are and which it is.
    meaning = (loaded.weights_fingerprint, loaded.tokenizer_fingerprint, loaded.dtype, formats.kv.fingerprint)
    try:
        store = (SharedDiskStore if settings.kv_store_shared else DiskStore)(
            store_folder(settings.kv_store_dir.expanduser(), ranks),
            limit_bytes=settings.kv_store_bytes,
            write_rate=settings.kv_store_write_rate,
            fingerprint=hashlib.sha256(repr(meaning).encode()).hexdigest()[:32],
        )
    except StoreLockedError as exc:
        raise StartupError(f"{_one_line(exc)}: set another --kv-store-dir, or stop the other server.") from exc
    status = store.status()
    state = f", {status.reason}" if status.reason else ""
    state = f"{', shared' if store.is_shared else ''}{state}"
    progress(f"session store {settings.kv_store_dir}: {status.num_entries} conversations{state}")
    return store


def _meaning(loaded: LoadedModel) -> str:
    """A hash of what computes caches: the same model serves both or neither."""
    said = (loaded.weights_fingerprint, loaded.tokenizer_fingerprint, loaded.dtype)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _check_fits(num_bytes: int, memory: MemoryInfo) -> None:
    if num_bytes > memory.available_bytes:
        raise StartupError(
            f"The weights take {num_bytes >> 20} MiB, but only {memory.available_bytes >> 20} MiB of memory are "
            "available: free some memory or choose a smaller or more strongly quantised model."
        )


def _device_limit_bytes() -> int | None:
    """What a GPU lets one process use; None on a CPU."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    return int(limit) if limit else None


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300].rstrip(".") or type(exc).__name__
