"""Compare the file sizes of an adapter and its base policy, and measure the time to verify the base by its SHA-256.

    python benchmarks/adapter_size.py pi0|smolvla [--dtype bfloat16] [--cameras 2] [--folder FOLDER] [--results FILE]

The script builds the family's real architecture with random weights and the default sampler at K = 16, without network
access. The base is stored as in the cache of the Hub's client. The adapter is written and loaded with the code of
`push` and `from_pretrained`. π0 in bfloat16 needs 17 GB of memory, including mapped files, and 18 GB of temporary disk
space.
"""

import gc
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import results as kept
from jsonargparse import auto_cli

COMMIT, VLM = "0" * 40, "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


def snapshot(cache: Path, repo_id: str) -> Path:
    """Folder of a repository in the client's cache, at COMMIT, to which its branch main points."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    return home / "snapshots" / COMMIT


def measure(family: str, dtype: str, cameras: int, folder: Path) -> dict[str, Any]:
    """Measure sizes in bytes and times in seconds."""
    # Set before the import of the client, which reads them.
    os.environ |= {"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    import torch

    from lerobot_grids.hub.formats import write_adapter
    from lerobot_grids.profiling.architectures import cheap_construction, instantiate, make_config
    from lerobot_policy_grids import GridsConfig, GridsPolicy
    from lerobot_policy_grids.checkpoint.load import fetch_base
    from lerobot_policy_grids.checkpoint.manifest import verify_manifest, write_manifest
    from lerobot_policy_grids.families.smolvla import write_vlm

    source, adapter, base = folder / "policy", folder / "adapter", snapshot(folder / "cache", f"random/{family}")
    adapter.mkdir()
    write_vlm(snapshot(folder / "cache", VLM))
    torch.manual_seed(0)
    dense = instantiate(make_config(family, cameras, dtype=dtype), "cpu")
    dense.save_pretrained(base)
    options = {"num_tokens": 16, "base_repo_id": f"random/{family}", "base_revision": COMMIT}
    policy = GridsPolicy(GridsConfig(base=dense.config, device="cpu", **options), base=dense)
    for parameter in policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    expected = {name: value.clone() for name, value in policy.reducer.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    policy.save_pretrained(source)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        (source / f"{name}.json").write_text(json.dumps({"name": name, "steps": []}))
    config = dense.config
    del dense, policy
    gc.collect()
    # Skip the random initialisation of weights that are loaded anyway, and use their own precision.
    with cheap_construction(config):
        write_manifest(adapter, write_adapter(source, adapter))
        gc.collect()
        (source / "model.safetensors").unlink()
        manifest = verify_manifest(adapter)
        assert manifest is not None
        assert manifest.base is not None
        start = time.perf_counter()
        fetch_base(manifest.base, verify=True)
        verify_base_s = time.perf_counter() - start
        loaded = GridsPolicy.from_pretrained(adapter)
    assert all(torch.equal(value, loaded.reducer.state_dict()[name]) for name, value in expected.items())
    files = {path.name: path.stat().st_size for path in sorted(adapter.iterdir())}
    base_bytes = (base / "model.safetensors").stat().st_size
    return {
        "kind": "adapter",
        "policy": family,
        "dtype": dtype,
        "cameras": cameras,
        "num_tokens": 16,
        "base_parameters": parameters,
        "adapter_parameters": sum(value.numel() for value in expected.values()),
        "base_bytes": base_bytes,
        "adapter_files": files,
        "verify_base_s": verify_base_s,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Name of the processor, from /proc/cpuinfo on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(
    family: str, dtype: str = "bfloat16", cameras: int = 2, folder: str | None = None, results: str | None = None
) -> None:
    """Measure one family.

    Args:
        family: pi0 or smolvla.
        dtype: Precision of the π policies' trunk; SmolVLA is built in float32.
        cameras: Number of cameras.
        folder: Folder for temporary files, which are removed at the end.
        results: File for the result line, such as benchmarks/results/adapter.jsonl.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        result = measure(family, "float32" if family == "smolvla" else dtype, cameras, Path(place))
    share = sum(result["adapter_files"].values()) / result["base_bytes"]
    print(f"{json.dumps(result, indent=2)}\nadapter / base: {100 * share:.2f} %")
    if results is not None:
        kept.put(Path(results), [result])
    assert share < 0.02, "the adapter has at least 2 % of the size of its base"


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
