"""Python, LeRobot, torch, the GPU and the memory of this machine, and room on its disks."""

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import hub, media, packages
from .check import Check, Checker

GIB = 2**30
# Below this much free disk space a run of the smallest policy may fail, and one of a large policy does.
FULL, NEARLY_FULL = 1 * GIB, 30 * GIB
# Workers of a DataLoader hand frames on through shared memory. Docker gives a container 64 MiB of it.
LITTLE_SHARED = GIB
SHARED = Path("/dev/shm")


def check_python() -> Iterator[Check]:
    """Python and the operating system."""
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 12):  # noqa: UP036 (a source tree can be run by any Python)
        yield Check("fail", "Python", seen, "LeRobot needs 3.12 or newer; make the environment with that version")
    else:
        yield Check("ok", "Python", seen)


def check_lerobot() -> Iterator[Check]:
    """Whether LeRobot is a release that this project was run with."""
    try:
        found = version("lerobot")
    except PackageNotFoundError:
        yield Check("fail", "LeRobot", "not installed", "pip install lerobot_policy_grids")
        return
    from lerobot_policy_grids.versions import NEWEST, OLDEST

    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    first, last = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    seen = f"{found}; lerobot-grids was run with {first} to {last}"
    if numbers < OLDEST:
        yield Check("fail", "LeRobot", seen, f"pip install 'lerobot>={first}'")
    elif numbers > NEWEST:
        yield Check("warn", "LeRobot", seen, f"if something fails: pip install 'lerobot<={last}'")
    else:
        yield Check("ok", "LeRobot", seen)


def check_torch() -> Iterator[Check]:
    """Whether torch can be imported and sees a GPU that it can compute on."""
    try:
        import torch
    except Exception as error:  # a wrong CUDA library raises OSError
        reason = str(error).splitlines()[0]
        yield Check("fail", "torch", f"cannot be imported ({reason})", "pip install --force-reinstall torch")
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Check("ok", "torch", f"{torch.__version__}, built {'with ' if torch.version.cuda else ''}{built}")
    with warnings.catch_warnings(record=True) as caught:
        # Torch warns here of a driver that is too old.
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        yield from _check_gpus()
        return
    if torch.backends.mps.is_available():
        yield Check("ok", "GPU", "Apple's, by torch's mps", "trained policies act there with --device mps")
        return
    said = " ".join(str(caught[0].message).split("(")[0].split()) if caught else "torch sees none"
    if not _has_nvidia():
        advice = "policies other than the tiny ones train too slowly without one"
        yield Check("warn", "GPU", "none", advice)
    elif torch.version.cuda is None:
        advice = "install torch with CUDA, as pytorch.org/get-started says"
        yield Check("fail", "GPU", "there is an NVIDIA driver, and this torch is built without CUDA", advice)
    else:
        advice = (
            f"update the NVIDIA driver for CUDA {torch.version.cuda}, or install a torch for the driver that you have"
        )
        yield Check("fail", "GPU", f"there is an NVIDIA driver, and {said}", advice)


def _check_gpus() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        name = "GPU" if torch.cuda.device_count() == 1 else f"GPU {index}"
        kind = torch.cuda.get_device_name(index)
        try:
            torch.ones(8, 8, device=f"cuda:{index}").matmul(torch.ones(8, 8, device=f"cuda:{index}")).sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            advice = "install a torch that was built for it, or give --device cpu"
            yield Check("fail", name, f"{kind} cannot compute ({reason})", advice)
            continue
        free, total = torch.cuda.mem_get_info(index)
        precision = "bfloat16" if torch.cuda.get_device_capability(index) >= (8, 0) else "no fast bfloat16"
        seen = f"{kind}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {precision}"
        if free < total / 2:
            yield Check("warn", name, seen, "another program holds the rest; nvidia-smi lists it")
        else:
            yield Check("ok", name, seen)


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def check_memory() -> Iterator[Check]:
    """Cores, memory, and the memory that processes share."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {cores} cores"
    if memory.available < 4 * GIB:
        yield Check("warn", "Memory", seen, "close other programs; a dataset's images and its loaders need some GiB")
    else:
        yield Check("ok", "Memory", seen)
    if SHARED.is_dir():
        size = shutil.disk_usage(SHARED).total
        if size < LITTLE_SHARED:
            advice = "start the container with --shm-size=8g, or give fit --data.num_workers 0"
            yield Check("warn", "Shared memory", f"{size / 2**20:.0f} MiB, little for processes that load data", advice)


def check_disk() -> Iterator[Check]:
    """Room where runs are written and where the Hub's client keeps what it fetched."""
    folders = {"here": Path.cwd()}
    cache = hub.cache_folder()
    if cache is not None:
        folders["the Hub's cache"] = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    places: dict[int, list[str]] = {}
    for name, folder in folders.items():
        places.setdefault(folder.stat().st_dev, []).append(name)
    for names in places.values():
        free = shutil.disk_usage(folders[names[0]]).free
        seen = f"{free / GIB:.1f} GiB free ({', '.join(names)})"
        advice = "make room, or set HF_HOME and --output to folders elsewhere"
        if free < FULL:
            yield Check("fail", "Disk", seen, advice)
        elif free < NEARLY_FULL:
            yield Check("warn", "Disk", seen, f"a run of a large policy needs some {NEARLY_FULL // GIB} GiB; {advice}")
        else:
            yield Check("ok", "Disk", seen)


# What is looked at where no policy is named, in this order.
MACHINE: tuple[tuple[str, Checker], ...] = (
    ("Python", check_python),
    ("LeRobot", check_lerobot),
    ("torch", check_torch),
    ("Memory", check_memory),
    ("Disk", check_disk),
    ("Plugin", packages.check_plugin),
    ("Extras", packages.check_extras),
    ("Loggers", packages.check_loggers),
    ("Video", media.check_video),
    ("OpenGL", media.check_opengl),
    ("Hub", hub.check_hub),
)
