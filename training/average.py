"""Average two checkpoints of one training run, weight by weight.

    python -m training.average DATA checkpoint model --share 0.6 --out averaged

`--share` is the share of the second one.  The later checkpoint answers better and the earlier
one has memorised less of the corpus; the average keeps most of both.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from training import train
from training.network import Qwen2


def weights(folder):
    return {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the tokenizer")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path("averaged"))
    args = parser.parse_args()

    first, second = weights(args.first), weights(args.second)
    model = Qwen2()
    model.load_state_dict({name: first[name].lerp(second[name], args.share) for name in first})
    train.export(model, args.data, args.out)


if __name__ == "__main__":
    main()
