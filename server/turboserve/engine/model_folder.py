"""Where a model's files are: the embedded one, a local folder, or a download from the hub.

Owns names and downloads; every way to fail becomes one StartupError line that names the cure.
Python files are never downloaded, so none can be run.
"""

from __future__ import annotations

import errno
from pathlib import Path

from turboserve import models
from turboserve.engine.progress import Progress, download_bar
from turboserve.errors import StartupError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

EMBEDDED_MODEL_ID = "turboserve-tiny"
EMBEDDED_DIR = Path(models.__file__).parent / "tiny" / "model"

_PATTERNS = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")
# What a tokenizer can be read from; without any of them an empty one would be made up.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "*.tiktoken", "*.jsonl"),
)


def model_id_for(model: str, served_model_name: str = "") -> str:
    """The name clients use: as set, or derived from where the model comes from."""
    if served_model_name:
        return served_model_name
    if not model:
        return EMBEDDED_MODEL_ID
    return model if is_hub_name(model) else Path(model).expanduser().resolve().name


def resolve_folder(model: str, progress: Progress | None = None) -> Path:
    """The local folder with the model's files, downloaded if need be. Raises StartupError.

    progress: shows a download, where it can.
    """
    if not model:
        return _checked(EMBEDDED_DIR, "the embedded model")
    if "\0" in model:
        raise StartupError("A model's name holds a NUL character: name a folder, or a hub model as OWNER/NAME.")
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path, model)
    if path.is_file():
        raise StartupError(f"{model} is a file: name the folder that holds config.json and model*.safetensors.")
    if not is_hub_name(model):
        raise StartupError(f"There is no folder {model}: check the path, or name a hub model as OWNER/NAME.")
    return _checked(download(model, progress), model)


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise StartupError(f"{name} holds no config.json: name a folder in Hugging Face or MLX format.")
    if not any(folder.glob("model*.safetensors")):
        raise StartupError(f"{name} holds no model*.safetensors: convert the model with `mlx_lm.convert` first.")
    if not any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise StartupError(f"{name} holds no tokenizer (tokenizer.json): fetch the model again, with all its files.")
    return folder


def is_hub_name(model: str) -> bool:
    """OWNER/NAME, and no such folder here."""
    is_path_like = model.startswith(("/", "./", "../", "~", ".")) or "\\" in model
    parts = model.split("/")
    return not is_path_like and len(parts) == 2 and all(parts) and not Path(model).expanduser().exists()


def download(name: str, progress: Progress | None = None) -> Path:
    """A model of the hub in its local cache, whatever of it is there already. Raises StartupError."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download  # late: costs a third of a second that local models need not pay

    try:
        with download_bar(progress) as bar:
            return Path(snapshot_download(name, allow_patterns=list(_PATTERNS), tqdm_class=bar))
    except hub.GatedRepoError as exc:
        raise StartupError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN to your token."
        ) from exc
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as exc:
        raise StartupError(
            f"There is neither a folder nor a hub model named {name}: check the spelling; private models need HF_TOKEN."
        ) from exc
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno in FULL_DISK:
            raise StartupError(
                f"The disk is full, so that {name} cannot be downloaded: `turboserve rm` deletes models, "
                "and HF_HOME puts their cache elsewhere. What has arrived is kept."
            ) from exc
        # Lack of internet shows as one of many OS and HTTP errors, all of them OSErrors.
        raise StartupError(
            f"{name} is not in the local hub cache and cannot be downloaded ({_first_line(exc)}): "
            "check the internet connection, or name a local folder."
        ) from exc


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0][:200] if lines else type(exc).__name__
