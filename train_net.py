#!/usr/bin/env python
"""Train or evaluate a detector.

python train_net.py --num-gpus 8 --config-file configs/coco/sparse_rcnn_R50_300pro_3x.yaml
python train_net.py --eval-only --config-file ... MODEL.WEIGHTS checkpoint.pth
"""

import sys

from dsrcnn_command import quiet_interrupts

if __name__ == "__main__":
    with quiet_interrupts():
        from dsrcnn.engine.main import run

    sys.exit(run())
