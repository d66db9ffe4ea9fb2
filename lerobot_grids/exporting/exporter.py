"""Write a policy's two phases for another runtime, and run what was written beside the policy itself."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.checkpoint.atomic import atomic_folder
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families.base import image_size
from lerobot_policy_grids.runtime import Observation
from lerobot_policy_grids.runtime.buckets import bucket
from lerobot_policy_grids.runtime.export import Graph, export_phases
from lerobot_policy_grids.runtime.fast import BOUNDS

from .constants import (
    Constants,
    describe,
    longest_prompt,
    prepare,
    prompt_of,
    require_alike,
    restore,
    save_tokenizer,
    state_normalisation,
)
from .formats import FORMATS, Arrays, Format, Run, quiet

CONSTANTS_FILE, TOKENIZER_FOLDER = "export.json", "tokenizer"
# Share of the range of the actions, as for the fast path: both are float32 and round in other places.
BOUND = BOUNDS[torch.float32]


@dataclass(frozen=True)
class Check:
    """Exported graphs beside the eager policy, from the same observation and noise.

    Attributes:
        runtime: What ran the graphs.
        threads: Of the CPU.
        difference: Largest difference of the action chunk, in the policy's units, before unnormalisation.
        share: The same as a share of the range of the actions.
        bound: The largest share that is accepted.
        eager_ms: Median milliseconds of an action chunk by LeRobot's loop.
        exported_ms: The same by the exported graphs.
        repeats: Timed runs of both.
    """

    runtime: str
    threads: int
    difference: float
    share: float
    bound: float
    eager_ms: float
    exported_ms: float
    repeats: int


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where it is.
        constants: What is in its `export.json`.
        check: How it compares with the policy.
        was: Precisions of the policy's weights before they were brought to float32.
    """

    folder: Path
    constants: Constants
    check: Check
    was: list[str]


class ExportedPolicy:
    """Exported graphs, which give action chunks.

    Args:
        prefill: Runs the prefill.
        denoise_step: Runs a denoising step.
        steps: How many of them.
    """

    def __init__(self, prefill: Run, denoise_step: Run, steps: int) -> None:
        self.prefill, self.denoise_step, self.steps = prefill, denoise_step, steps

    def chunk(self, inputs: Arrays, noise: np.ndarray) -> np.ndarray:
        """An action chunk [1, t, width], of the prefill's inputs and of noise float32 [1, t, width]."""
        given, x_t = dict(self.prefill(inputs)), noise
        for number in range(self.steps):
            given |= {"x_t": x_t, "step": np.array([number])}
            x_t = x_t - self.denoise_step(given)["velocity"] / np.float32(self.steps)
        return x_t


def export(
    loaded: Any,
    folder: Path,
    format_name: str,
    *,
    task: str,
    language_bucket: int | None = None,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda name: None,
) -> Exported:
    """Write a policy's phases and constants into a new folder, and compare what was written with the policy.

    Args:
        loaded: The policy on the CPU, with its processors. It is changed: brought to float32, and wrapped if dense.
        folder: Where to; it must not exist. It is written whole or not at all.
        format_name: A name in `FORMATS`.
        task: An instruction, for the comparison.
        language_bucket: Language tokens of the graphs; None for as many as the policy reads at most.
        repeats: Timed runs of both.
        on_progress: Called with what is done next.

    Raises:
        UnsupportedPolicyError: If the policy has no phases, or its processors do what the constants cannot say.
        GridsError: If the instruction is longer than the bucket, or the exported graphs do not act as the policy.
        OutputExistsError: If the folder exists.
    """
    form = FORMATS[format_name]
    policy, looking = _wrapped(loaded)
    was = sorted({str(weight.dtype).removeprefix("torch.") for weight in policy.parameters()})
    policy.float()
    config = policy.base.config
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(0))

    def eager() -> Tensor:
        policy.reset()
        chunk: Tensor = policy.predict_action_chunk(dict(batch), noise=noise.clone())
        return chunk

    with looking, torch.no_grad(), atomic_folder(folder) as partial:
        frame = _example(policy, state_normalisation(loaded.preprocessor), task)
        batch = loaded.preprocessor(dict(frame))
        observation, cameras, steps = _observe(policy, batch, noise)
        length = language_bucket or bucket(longest_prompt(loaded.preprocessor))
        observation = _to_length(observation, length, task)
        constants = describe(loaded, observation, task, prompt_of(loaded.preprocessor, frame))
        inputs = prepare(constants, frame)
        for name, value in observation._asdict().items():
            require_alike(name, inputs[name], value.numpy())

        on_progress("tracing the phases")
        graphs = export_phases(policy.family.phases(policy.base, policy.seam, cameras, steps), observation, noise)
        files = [partial / f"{graph.name}{form.suffix}" for graph in graphs]
        on_progress(f"writing {format_name}")
        with quiet():
            for graph, file in zip(graphs, files, strict=True):
                form.write(graph, file)
        save_tokenizer(loaded.preprocessor, partial / TOKENIZER_FOLDER)

        on_progress(f"running {form.runtime}")
        with quiet():
            threads = torch.get_num_threads()
            prefill, step = (form.open(graph, file, threads) for graph, file in zip(graphs, files, strict=True))
            exported = ExportedPolicy(prefill, step, steps)
            check = _compare(form, eager, lambda: exported.chunk(inputs, noise.numpy()), repeats)
        chunk = eager()
        require_alike("actions", restore(constants, chunk.numpy()), loaded.postprocessor(chunk.clone())[0].numpy())
        budget = policy.seam.budget(cameras)
        dense = policy.seam.layout.num_dense_tokens
        content: Constants = {
            "format": format_name,
            "policy_type": config.type,
            "graphs": {graph.name: _described(graph, file) for graph, file in zip(graphs, files, strict=True)},
            "num_steps": steps,
            "visual_tokens": [dense] * len(cameras) if budget is None else list(budget[1]),
            **constants,
            "check": asdict(check),
        }
        (partial / CONSTANTS_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return Exported(folder, content, check, was)


def _wrapped(loaded: Any) -> tuple[GridsPolicy, AbstractContextManager[None]]:
    """(The policy as a grids policy, what to enter so that one that was dense keeps all its tokens).

    Raises:
        UnsupportedPolicyError: If it has no phases.
    """
    policy: Any = loaded.policy
    looking: AbstractContextManager[None] = nullcontext()
    if not isinstance(policy, GridsPolicy):
        policy = loaded.policy = compress(policy, 1, "uniform")
        looking = policy.looking_everywhere()
    if not policy.family.exports:
        raise UnsupportedPolicyError(
            f"there is nothing to export for the '{policy.base.config.type}' policy: what is exported takes images "
            "and an instruction and integrates a flow from noise, and its phases do not; docs/export.md lists what can "
            "be exported"
        )
    try:
        policy.use_runtime("fast")
    except UnsupportedPolicyError as error:
        reason = str(error).rpartition(";")[0].replace("runtime=fast is not available", "there is nothing to export")
        raise UnsupportedPolicyError(f"{reason}; docs/export.md lists what can be exported") from error
    policy.use_runtime("eager")
    return policy, looking


def _example(policy: GridsPolicy, scale: dict[str, list[float]], task: str) -> dict[str, Any]:
    """What a robot could send: noisy pixels, a state within its statistics, an instruction."""
    random, features = torch.Generator().manual_seed(0), policy.config.image_features
    frame: dict[str, Any] = {"task": task}
    for name in policy.seam.layout.cameras:
        pixels = torch.randint(0, 256, (3, *image_size(features[name].shape)), generator=random)
        frame[name] = pixels.float() / 255
    middle, width = (torch.tensor(scale[name]) for name in ("subtract", "divide"))
    frame[OBS_STATE] = middle + width * (torch.rand(len(middle), generator=random) * 1.8 - 0.9)
    return frame


def _observe(policy: GridsPolicy, batch: dict[str, Any], noise: Tensor) -> tuple[Observation, list[int], int]:
    """What the phases get of a batch: (observation, numbers of the cameras, denoising steps)."""
    found: list[tuple[Observation, list[int], int]] = []

    def note(observation: Observation, noise: Tensor, *, cameras: list[int], steps: int, **options: Any) -> Tensor:
        found.append((observation, cameras, steps))
        return noise

    policy.use_runtime("fast")
    runtime: Any = policy.seam.runtime
    runtime.chunk = note
    policy.reset()
    policy.predict_action_chunk(dict(batch), noise=noise)
    policy.use_runtime("eager")
    return found[0]


def _to_length(observation: Observation, length: int, task: str) -> Observation:
    """The observation with so many language tokens.

    Raises:
        GridsError: If the instruction has more.
    """
    words = int(observation.token_mask.sum())
    if words > length:
        raise GridsError(
            f"'{task}' has {words} tokens with what the policy adds, and --language_bucket {length} holds fewer; give "
            f"at least {bucket(words)}"
        )
    more = max(0, length - observation.tokens.shape[1])
    tokens, mask = (F.pad(value, (0, more))[:, :length] for value in (observation.tokens, observation.token_mask))
    return observation._replace(tokens=tokens * mask, token_mask=mask)


def _compare(form: Format, eager: Callable[[], Tensor], exported: Callable[[], np.ndarray], repeats: int) -> Check:
    """Run both ways.

    Raises:
        GridsError: If they are further apart than rounding explains.
    """
    expected, found = eager().numpy(), exported()
    found = found[:, :, : expected.shape[-1]]
    difference = float(np.abs(found - expected).max())
    share = difference / max(float(expected.max() - expected.min()), 1e-9)
    if not share <= BOUND:
        raise GridsError(
            f"the graphs that {form.described()} ran differ from the policy by {share:.1e} of the range of the "
            f"actions, more than {BOUND:.0e}, so nothing was written; try another --format, and report this"
        )
    return Check(
        runtime=form.described(),
        threads=torch.get_num_threads(),
        difference=difference,
        share=share,
        bound=BOUND,
        eager_ms=_milliseconds(eager, repeats),
        exported_ms=_milliseconds(exported, repeats),
        repeats=repeats,
    )


def _milliseconds(act: Callable[[], Any], repeats: int) -> float:
    """The median of some runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[1:])


def _described(graph: Graph, file: Path) -> Constants:
    """A graph's file, and its inputs and outputs with their shapes and types."""
    sides = {"inputs": graph.inputs, "outputs": graph.outputs}
    return {"file": file.name} | {
        side: {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in values.items()
        }
        for side, values in sides.items()
    }


def print_export(result: Exported) -> None:
    """What was written, what is fixed in it, and how it compares."""
    constants, check = result.constants, result.check
    sizes = [path.stat().st_size for path in result.folder.rglob("*") if path.is_file()]
    graphs = ", ".join(graph["file"] for graph in constants["graphs"].values())
    print(f"exported: {result.folder} ({sum(sizes) / 1e6:.1f} MB): {graphs}, {CONSTANTS_FILE}, {TOKENIZER_FOLDER}")
    cameras = ", ".join(f"{c['name']} {c['height']} x {c['width']}" for c in constants["cameras"])
    image, language, action = constants["image"], constants["language"], constants["action"]
    tokens = " + ".join(map(str, constants["visual_tokens"]))
    print(
        f"fixed in the graphs: batch 1, cameras {cameras} (images {image['height']} x {image['width']}), {tokens} "
        f"visual tokens, {language['length']} instruction tokens, {constants['num_steps']} steps, chunks of "
        f"{action['chunk_size']} actions; to change one, export again"
    )
    if result.was != ["float32"]:
        print(f"weights: float32; the checkpoint's are {', '.join(result.was)}")
    print(
        f"action chunk, same noise: largest difference from the eager policy {check.difference:.1e} "
        f"({check.share:.1e} of the range of the actions, at most {check.bound:.0e})"
    )
    print(
        f"one action chunk, median of {check.repeats}, {check.threads} CPU threads: eager {check.eager_ms:.1f} ms, "
        f"{check.runtime} {check.exported_ms:.1f} ms"
    )
