"""Does a policy fit a dataset, the memory and the disks? Its weights are not fetched."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from . import hub
from .check import Check, from_findings
from .dataset_plan import DatasetPlan

GIB = 2**30
# Rank of the low-rank matrices that `fit` trains unless told otherwise.
LORA_RANK = 16


class PolicyPlan:
    """A policy to train, of which only the configuration is fetched."""

    def __init__(
        self,
        policy: str,
        tokens: int | str | None,
        data: DatasetPlan | None,
        batch_size: int | None,
        gpu_memory: float | None,
    ) -> None:
        self.policy, self.tokens, self.data = policy, tokens, data
        self.batch_size, self.gpu_memory = batch_size, gpu_memory
        # Set by `check`: the configuration with the dataset's features, that of the dense policy, and what was found.
        self.config: Any = None
        self.dense: Any = None
        self.findings: list[Any] = []
        self.fits = True
        # What is trained, of those that fit.
        self.trained: Any = None

    @property
    def _features(self) -> Any:
        return self.data.features if self.data is not None and self.data.is_readable else None

    def check(self) -> Iterator[Check]:
        """What the policy is, and how large."""
        from lerobot_policy_grids.configuration_grids import base_config
        from lerobot_policy_grids.errors import CheckpointError, GridsError

        from ..policies import find_source
        from ..policies.starting import configure
        from ..profiling.architectures import architectures, make_config

        try:
            folder = find_source(self.policy, weights=False)
        except CheckpointError as error:
            if self.policy not in architectures():
                yield Check("fail", "Policy", str(error))
                return
            folder = None
            yield Check("warn", "Policy", f"{error}; sizes are those of its family's architecture")
        except GridsError as error:
            yield Check("fail", "Policy", str(error))
            return
        try:
            if self._features is not None:
                self.config, self.findings = configure(self.policy, folder, self._features)
            elif folder is not None:
                from lerobot_policy_grids.checkpoint import read_config

                self.config = read_config(folder)
            cameras = 2 if self._features is None else max(1, len(self._features.cameras))
            dense = make_config(self.policy, cameras) if folder is None else base_config(self.config)
            self.config = self.config or dense
            self.dense = dense
            layout, size = self._measure()
        except GridsError as error:
            self.dense = None
            yield Check("fail", "Policy", str(error))
            return
        grid = " x ".join(map(str, layout.token_grid))
        chunk = getattr(dense, "chunk_size", None)
        seen = f"{dense.type}, {layout.num_dense_tokens} = {grid} visual tokens per camera"
        seen += "" if chunk is None else f", chunks of {chunk} actions"
        yield Check("ok", "Policy", f"{seen}; to act it needs {_size(size)} for its weights")

    def _measure(self) -> tuple[Any, int]:
        """The layout of the dense visual tokens, and the bytes of all weights."""
        from lerobot_policy_grids.families import get_family

        policy = self._build()
        return get_family(self.dense.type).layout(policy), sum(
            p.numel() * p.element_size() for p in policy.parameters()
        )

    def _build(self) -> Any:
        from ..profiling.architectures import instantiate

        return instantiate(deepcopy(self.dense), "meta")

    def check_cameras(self) -> Iterator[Check]:
        """Which camera of the dataset goes where."""
        if self.dense is None or self._features is None:
            return
        from lerobot_policy_grids.families.base import EMPTY_CAMERA

        wanted = [name for name in self.config.image_features if EMPTY_CAMERA not in name]
        have = self._features.cameras
        pairs = [f"{self._features.sources[name]} -> {name}" for name in wanted if name in have]
        lacking = [name for name in wanted if name not in have]
        if pairs:
            # What does not match is said with the dataset's findings.
            seen = ", ".join(pairs) + (f"; without {', '.join(lacking)}" if lacking else "")
            yield Check("ok", "Cameras", seen)

    def check_data(self) -> Iterator[Check]:
        """What is wrong with the dataset for this policy: sizes, names, statistics, lengths."""
        if self.dense is None or self._features is None:
            return
        from lerobot.processor import rename_stats

        from ..preflight.episodes import check_episodes
        from ..preflight.normalisation import check_statistics
        from ..preflight.relative import check_relative

        assert self.data is not None
        meta = self.data.meta
        findings = [*self.findings, *check_relative(self.policy, self.config, meta, self._features)]
        findings += check_statistics(self.config, rename_stats(meta.stats or {}, self.data.rename_map))
        findings += check_episodes(self.config, meta)
        self.fits = not any(finding.is_error for finding in findings)
        yield from from_findings("Fit", findings, f"{self.policy} can be trained on this dataset")

    def check_tokenizer(self) -> Iterator[Check]:
        """Whether the tokenizer is here, and cuts no instruction of the dataset."""
        if self.dense is None or not self.fits:
            return
        from lerobot_policy_grids.processor_grids import make_processors

        from ..preflight.language import check_tasks

        meta = None if self._features is None else self.data.meta  # type: ignore[union-attr]
        statistics = None if meta is None else meta.stats
        try:
            preprocessor, _ = make_processors(self.config, statistics, meta)
        except Exception as error:  # transformers and the Hub's client raise many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            advice = "accept the licence on its page if it has one, log in with hf auth login, and unset HF_HUB_OFFLINE"
            yield Check("warn", "Tokenizer", f"cannot be loaded ({reason})", advice)
            return
        if meta is not None:
            findings = check_tasks(preprocessor, list(meta.tasks.index), statistics or {})
            yield from from_findings("Tokenizer", findings, f"{len(meta.tasks)} instructions reach the policy whole")

    def _asked(self) -> tuple[int | None, Any]:
        """(Visual tokens per camera, reducer); None tokens for all of them."""
        from lerobot_policy_grids import GridsConfig

        if self.tokens == "dense":
            return None, None
        reducer = self.config.reducer if isinstance(self.config, GridsConfig) else None
        default = 16 if reducer is None else reducer.budget
        return (default if self.tokens is None else int(self.tokens)), reducer

    def check_tokens(self) -> Iterator[Check]:
        """Whether the policy can have so few tokens."""
        if self.dense is None:
            return
        from lerobot_policy_grids import compress
        from lerobot_policy_grids.errors import GridsError

        tokens, reducer = self._asked()
        if tokens is None:
            return
        try:
            policy = compress(self._build(), tokens, deepcopy(reducer) or "grids")
        except GridsError as error:
            self.dense = None
            yield Check("fail", "Tokens", str(error))
            return
        dense = policy.seam.layout.num_dense_tokens
        yield Check(
            "ok", "Tokens", f"{tokens} of {dense} per camera; what that saves: lerobot-grids bench --policy NAME"
        )

    def check_memory(self) -> Iterator[Check]:
        """What of the policy can be trained in the memory that there is."""
        if self.dense is None:
            return
        from lerobot_policy_grids import compress
        from lerobot_policy_grids.errors import GridsError
        from lerobot_policy_grids.families import get_family

        from ..training.step_cost import USABLE_SHARE, predict_step
        from ..training.trainable import choose_trainable, device_memory, training_bytes

        tokens, reducer = self._asked()
        device, memory = device_memory("auto")
        if self.gpu_memory is not None:
            device, memory = f"a GPU of {self.gpu_memory:g} GiB", round(self.gpu_memory * GIB)
        batch = self.batch_size or get_family(self.dense.type).recipe.micro_batch
        policy = self._build()
        needed = training_bytes(policy)
        ways: list[tuple[Any, bool]] = [("all", False), ("all", True)]
        if tokens is not None:
            # What fit chooses comes first.
            policy = compress(policy, tokens, deepcopy(reducer) or "grids")
            chosen = choose_trainable(policy, device, memory).train
            ways += [("reducer+lora", False), ("reducer+lora", True), ("reducer", False), ("reducer", True)]
            ways = ways[ways.index((chosen, False)) :]
        if not hasattr(self.dense, "gradient_checkpointing"):
            ways = [way for way in ways if not way[1]]
        if tokens is None or ways[0][0] != "all":
            seen = f"all weights with gradients and Adam need {needed / GIB:.1f} GiB, without a batch"
            if needed > USABLE_SHARE * memory:
                yield Check("warn", "Training", f"{seen}; {device} has {memory / GIB:.1f}")
        predicted = False
        for train, checkpointing in ways:
            try:
                cost = predict_step(
                    self.dense,
                    train,
                    tokens=tokens,
                    reducer=reducer,
                    batch_size=batch,
                    gradient_checkpointing=checkpointing,
                )
            except (GridsError, NotImplementedError) as error:
                yield Check("warn", "Training", f"{train} cannot be predicted ({error})")
                continue
            predicted = True
            flags = f"--model.train {train}" if tokens is not None else "--tokens dense"
            flags += " --model.gradient_checkpointing true" if checkpointing else ""
            largest = cost.largest_batch(memory)
            seen = f"{flags}: a step of {batch} frames needs {_size(cost.peak)}; {device} has {memory / GIB:.1f}"
            if largest >= batch:
                self.trained = train
                yield Check("ok", "Training", f"{seen}, enough for {largest} frames")
                return
            advice = f"{largest} frames fit: --batch_size {largest}" if largest else "not even one frame fits"
            yield Check("warn", "Training", seen, advice)
        if not predicted:
            yield Check("warn", "Training", "no way could be predicted; whether it fits shows when fit runs")
            return
        advice = "choose a smaller policy or a larger GPU (--gpu_memory GIB plans for one)"
        yield Check("fail", "Training", f"no way to train it with {batch} frames fits {device}", advice)

    def check_room(self) -> Iterator[Check]:
        """Whether the disks have room for the weights to fetch and for a run's checkpoints."""
        if self.dense is None:
            return
        from lerobot_policy_grids import compress

        from ..preflight.disk import check_disk
        from ..training.trainable import train_only

        (tokens, reducer), policy = self._asked(), self._build()
        if tokens is not None:
            policy = compress(policy, tokens, deepcopy(reducer) or "grids")
        if self.trained is not None:
            train_only(policy, self.trained, LORA_RANK)
        findings = check_disk(Path.cwd(), policy)
        yield from from_findings("Room", findings, "enough for a run's checkpoints here")
        yield from self._check_download()

    def _check_download(self) -> Iterator[Check]:
        from huggingface_hub import HfApi, constants, try_to_load_from_cache

        from lerobot_policy_grids.checkpoint.files import WEIGHTS_FILES

        from ..policies.sources import sources

        place = sources().get(self.policy, self.policy)
        if not isinstance(place, str) or Path(place).exists() or constants.HF_HUB_OFFLINE:
            return
        repository, _, named = place.partition("@")
        revision = named or None
        if any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in WEIGHTS_FILES):
            yield Check("ok", "Download", f"the weights of {place} are in the cache")
            return

        def ask() -> tuple[int | None, Any]:
            files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
            return sum(file.size or 0 for file in files if file.rfilename in WEIGHTS_FILES), None

        size, _ = hub.in_time(ask, hub.TIMEOUT_S + 1) or (None, None)
        cache = hub.cache_folder()
        if size and cache is not None:
            free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
            seen = f"{_size(size)} of weights from {place}; the cache's disk has {free / GIB:.1f} GiB free"
            if size > free:
                yield Check("fail", "Download", seen, "make room, or set HF_HOME to a folder elsewhere")
            else:
                yield Check("ok", "Download", seen)


def _size(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
