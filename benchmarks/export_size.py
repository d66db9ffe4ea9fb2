"""Export a policy of real size with random weights, and print what `lerobot-grids export` prints, with peak memory.

    python benchmarks/export_size.py --family smolvla --tokens 16 --threads 1

Nothing is downloaded: the tokenizer is the one of this package, which decides nothing about the graphs.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_grids.exporting import export
from lerobot_grids.exporting.exporter import print_export
from lerobot_grids.policies.loaded import LoadedPolicy
from lerobot_grids.profiling.architectures import ACTION_SIZE, STATE_SIZE, instantiate, make_config
from lerobot_policy_grids import compress
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.reducers import reducer_config
from lerobot_policy_grids.tiny import VLM_FOLDER


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="smolvla, pi0 or pi05")
    parser.add_argument("--tokens", type=int, default=16, help="K, visual tokens per camera")
    parser.add_argument("--sample_after_layer", type=int, help="sample inside the vision tower, after so many layers")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--language_bucket", type=int, default=48)
    parser.add_argument("--format", default="onnx", choices=("onnx", "openvino", "torch"))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    start = time.monotonic()
    torch.manual_seed(0)
    policy = instantiate(make_config(asked.family, asked.cameras, dtype="float32"), "cpu")
    for field in ("vlm_model_name", "tokenizer_name"):
        if hasattr(policy.config, field):
            setattr(policy.config, field, str(VLM_FOLDER))
    statistics = {
        name: {"mean": torch.zeros(size), "std": torch.ones(size)}
        for name, size in ((OBS_STATE, STATE_SIZE), (ACTION, ACTION_SIZE))
    }
    processors = make_processors(policy.config, statistics)
    inside = {} if asked.sample_after_layer is None else {"sample_after_layer": asked.sample_after_layer}
    loaded = LoadedPolicy(
        compress(policy, reducer=reducer_config("grids", num_tokens=asked.tokens, **inside)), *processors
    )
    with tempfile.TemporaryDirectory() as folder:
        result = export(
            loaded,
            Path(folder) / "graphs",
            asked.format,
            task="push",
            language_bucket=asked.language_bucket,
            repeats=asked.repeats,
            on_progress=lambda name: print(f"{time.monotonic() - start:5.0f} s  {name}", flush=True),
        )
        print_export(result)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.monotonic() - start:.0f} s, peak of memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
