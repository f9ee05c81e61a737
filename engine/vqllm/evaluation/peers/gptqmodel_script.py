"""Runs `gptqmodel` in its own Python: `PYTHON gptqmodel_script.py JOB.json`.

Stands alone, because the other environment has no vqllm. JOB.json: source, target, bits,
group_size, windows (a JSON file of token windows), num_threads.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    """Quantize as the job says and save the folder."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    # Its default on a small machine is one worker, which its own loader refuses.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    torch = importlib.import_module("torch")
    torch.set_num_threads(job["num_threads"])
    gptqmodel = importlib.import_module("gptqmodel")
    windows = json.loads(Path(job["windows"]).read_text(encoding="utf-8"))
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    config = gptqmodel.QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=False,
        act_group_aware=True,
        sym=True,
        device="cpu",
        offload_to_disk=False,
    )
    model = gptqmodel.GPTQModel.load(job["source"], config, dtype=torch.float32)
    model.quantize(calibration, batch_size=1)
    model.save(job["target"])


if __name__ == "__main__":
    main(sys.argv[1])
