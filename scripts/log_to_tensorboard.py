"""Turns the logs of training into TensorBoard's event files.

    pip install tensorboardX==2.6.5
    python scripts/log_to_tensorboard.py OUT.training      # or any folder with *.jsonl below it
    tensorboard --logdir OUT.training/tensorboard

Each `*.jsonl` below the folder becomes a run of its own; contact sheets in `samples/` become its images. Run it again
at any time: runs are written anew.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
    sys.exit(__doc__)
folder = Path(sys.argv[1])
target = folder / "tensorboard"
shutil.rmtree(target, ignore_errors=True)

logs = sorted(log for log in folder.rglob("*.jsonl") if '"step"' in log.open().readline())
if not logs:
    sys.exit(f"{folder}: no log (*.jsonl with a `step` in each line) below it")
for log in logs:
    with SummaryWriter(str(target / log.relative_to(folder).with_suffix(""))) as writer:
        for line in log.open():
            figures = json.loads(line)
            step = figures.pop("step")
            for name, value in figures.items():
                # What could not be computed is null.
                writer.add_scalar(name, float("nan") if value is None else value, step)
        for sheet in sorted((log.parent / "samples").glob("step-*.png")):
            step = int(re.search(r"\d+", sheet.stem)[0])
            writer.add_image("samples", np.asarray(Image.open(sheet).convert("RGB")), step, dataformats="HWC")
    print(f"{log}: {target / log.relative_to(folder).with_suffix('')}")
