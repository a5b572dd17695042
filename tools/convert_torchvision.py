#!/usr/bin/env python
"""Convert a torchvision ResNet checkpoint to a file for ``MODEL.WEIGHTS``.

python tools/convert_torchvision.py resnet101.pth torchvision-R-101.pkl
"""

import pickle

from conversion import converter_parser, detectron2_key, read_or_exit


def main() -> None:
    """Read, rename, write."""
    args = converter_parser(__doc__).parse_args()
    state = read_or_exit(args.source, trust=args.trust)
    model = {
        detectron2_key(k): v.numpy()
        for k, v in state.items()
        if not k.endswith("num_batches_tracked")
    }
    content = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    args.target.write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
