"""Write the 8-bit MLX version of the trained model, in shards of at most 15 MiB.

python -m training.quantize model --out model-8bit
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm

SHARD_BYTES = 15 * 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("model-8bit"))
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=64)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted"
        mlx_lm.convert(str(args.model), str(converted), quantize=True, q_bits=args.bits, q_group_size=args.group_size)
        weights = {name: t for file in converted.glob("*.safetensors") for name, t in mx.load(str(file)).items()}
        mx.eval(weights)
        shutil.copy(converted / "config.json", args.out)
    groups, size = [{}], 0
    for name, tensor in sorted(weights.items()):
        if size + tensor.nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        mx.save_safetensors(str(args.out / name), group, metadata={"format": "mlx"})
        index["weight_map"] |= dict.fromkeys(group, name)
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(args.model / name, args.out)


if __name__ == "__main__":
    main()
