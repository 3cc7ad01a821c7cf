"""The embedded model: where its files lie. Importing this loads nothing.

It owns the paths of weights, held-out material and the training code's folder. Loading is the engine's business.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL_PATH = FOLDER / "model"  # 8-bit MLX weights, tokenizer, chat template: what `mlx_lm.load` takes
HELDOUT_PATH = FOLDER / "heldout"  # prompts.jsonl and texts.jsonl, none of them trained on
MODEL_NAME = "tiny"
