"""`turboserve ls`, `pull` and `rm`: models in the hub library's cache on this machine.

The cache is the hub library's own (HF_HOME, HF_HUB_CACHE), so that what other programs have downloaded is there too.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboserve.cli.config import UsageError, closest
from turboserve.cli.figures import amount, duration
from turboserve.cli.progress import Bars
from turboserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model as the cache has it; `problem` is why it cannot be served, empty where it can."""

    name: str
    num_bytes: int
    used_at: float  # Unix time
    commits: tuple[str, ...]
    folder: Path
    problem: str


def cached_models() -> list[CachedModel]:
    """By name. Raises StartupError for a cache that cannot be read."""
    found, scan = [], _scan()
    for repo in () if scan is None else scan.repos:
        if repo.repo_type != "model":
            continue
        revisions = sorted(repo.revisions, key=lambda revision: -revision.last_modified)
        problem = _problem(revisions[0].snapshot_path) if revisions else "nothing of it is here"
        commits = tuple(revision.commit_hash for revision in revisions)
        found.append(CachedModel(repo.repo_id, repo.size_on_disk, repo.last_accessed, commits, repo.repo_path, problem))
    return sorted(found, key=lambda model: model.name.lower())


def _scan() -> Any:
    """The hub library's view of its cache; None where there is no cache yet."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None
    except (OSError, ValueError) as exc:
        raise StartupError(f"the hub's cache cannot be read ({exc}): set HF_HUB_CACHE to another folder") from exc


def _problem(folder: Path) -> str:
    """Why a snapshot cannot be served, in a word or two."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    weights = [*folder.glob("model*.safetensors")]
    if not weights:
        return "no MLX weights"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "damaged index"
        if not wanted <= {file.name for file in weights}:
            return "not complete"
    return ""


def show(as_json: bool) -> None:
    """Print the models. Raises StartupError."""
    models = cached_models()
    if as_json:
        rows = [
            {
                "name": m.name,
                "bytes": m.num_bytes,
                "used_at": int(m.used_at),
                "commits": m.commits,
                "problem": m.problem,
            }
            for m in models
        ]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    if not models:
        sys.stderr.write("no models are downloaded; `turboserve pull OWNER/NAME` fetches one\n")
        return
    width = max(len("MODEL"), *(len(model.name) for model in models))
    print(f"{'MODEL':<{width}}  {'SIZE':>10}  {'USED':>12}")
    now_s = time.time()
    for model in models:
        used = f"{duration(now_s - model.used_at)} ago"
        print(f"{model.name:<{width}}  {amount(model.num_bytes):>10}  {used:>12}  {model.problem}".rstrip())
    print(f"{'in all':<{width}}  {amount(sum(model.num_bytes for model in models)):>10}")


def pull(names: list[str]) -> None:
    """Download models, or what of them is new. Raises UsageError and StartupError."""
    from turboserve.engine.model_folder import download, is_hub_name

    for name in names:
        if not is_hub_name(name):
            raise UsageError(f"{name}: expected a model of the hub, as OWNER/NAME")
    bars = Bars()
    for name in names:
        folder = download(name, bars)
        problem = _problem(folder)
        bars(f"{name}: {folder}" + (f" ({problem}: it cannot be served)" if problem else ""))


def remove(names: list[str]) -> None:
    """Delete models from the cache, all their revisions. Raises StartupError when one is not there; then none goes."""
    from huggingface_hub import DeleteCacheStrategy

    models = {model.name: model for model in cached_models()}
    for name in names:
        if name not in models:
            near = closest(name, models)
            raise StartupError(
                f"no model {name} is downloaded"
                + (f"; did you mean {near}?" if near else "; `turboserve ls` lists them")
            )
    going = [models[name] for name in names]
    # By folders: two repositories may have a commit in common, and the library deletes by commits.
    plan = DeleteCacheStrategy(
        expected_freed_size=sum(model.num_bytes for model in going),
        blobs=frozenset(),
        refs=frozenset(),
        repos=frozenset(model.folder for model in going),
        snapshots=frozenset(),
    )
    plan.execute()  # logs what it cannot delete
    left = [model.name for model in going if model.folder.exists()]
    if left:
        raise StartupError(
            f"{', '.join(left)} could not be deleted: see whose files they are in {going[0].folder.parent}"
        )
    print(f"{amount(plan.expected_freed_size)} freed")
