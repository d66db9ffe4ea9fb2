"""Train a family on a dataset by a command, in this process, and check all that came of it."""

import contextlib
import io
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.processor import DataProcessorPipeline, TokenizerProcessorStep, tokenizer_processor

import reading
from lerobot_grids.policies import load
from lerobot_grids.policies.loaded import LoadedPolicy
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.act import small_backbone
from lerobot_policy_grids.families.characters import write_character_tokenizer
from lerobot_policy_grids.families.pi import VOCABULARY, small_sizes
from lerobot_policy_grids.processor_grids import make_processors

FAMILIES = ("tiny_smolvla", "pi0", "pi05", "pi0_fast", "xvla", "act")
WIDE = {"max_state_dim": 32, "max_action_dim": 32}
# Fields of the small policies: as wide as the real ones, and few steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "pi0": {**WIDE, "num_inference_steps": 2},
    "pi05": {**WIDE, "num_inference_steps": 2},
    "pi0_fast": {**WIDE, "max_action_tokens": 300},
    "xvla": {**WIDE, "max_len_seq": 512, "tokenizer_max_length": 64, "num_denoising_steps": 2},
}
# What would make the numbers in a batch others than those in the files.
EXACT = ("--model.state_noise", "0", "--model.jitter", "0")
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0")
LEROBOT = (
    "--policy.device=cpu",
    "--policy.push_to_hub=false",
    "--num_workers=0",
    "--env_eval_freq=0",
    "--wandb.enable=false",
    "--steps=1",
)
# Families that start without a checkpoint -> (name for `fit`, options that make it small).
FRESH: dict[str, tuple[str, dict[str, str]]] = {
    "tiny_smolvla": ("tiny", {}),
    "act": (
        "act",
        {
            "pretrained_backbone_weights": "null",
            "chunk_size": "8",
            "n_action_steps": "8",
            "dim_model": "32",
            "n_heads": "2",
            "dim_feedforward": "64",
            "n_encoder_layers": "1",
        },
    ),
}
REFUSAL = "lerobot-grids: error: "


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        status: "trained", "refused" or "wrong".
        line: The refusal, or what is wrong.
        seconds: How long it took.
        printed: All that the command printed.
    """

    status: str
    line: str = ""
    seconds: float = 0.0
    printed: str = field(default="", repr=False)

    def fits(self, expected: str, said: str = "") -> bool:
        """Whether it is "trains", or a refusal that has a pattern, and what was printed has another."""
        if expected == "trains":
            return self.status == "trained" and re.search(said, self.printed) is not None
        return self.status == "refused" and re.search(expected, self.line) is not None


@dataclass
class Seen:
    """What a command gave the policy, and what it saved."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    policy: Any = None
    processors: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def small_world(folder: Path) -> Iterator[None]:
    """In this block every π policy and ACT's ResNet is constructed small, and PaliGemma's tokenizer is a local one."""
    text = str(write_character_tokenizer(folder / "paligemma", VOCABULARY))
    real = tokenizer_processor.AutoTokenizer

    class Local:
        @staticmethod
        def from_pretrained(name: str, *args: Any, **kwargs: Any) -> Any:
            return real.from_pretrained(text if name.startswith("google/") else name, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for kind in ("pi0", "pi05", "pi0_fast"):
            stack.enter_context(small_sizes(kind))
        stack.enter_context(small_backbone())
        stack.enter_context(mock.patch.object(tokenizer_processor, "AutoTokenizer", Local))
        yield


class Checkpoints:
    """Dense checkpoints of small policies, one for each family and set of cameras.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, family: str, cameras: Sequence[str], state: bool = True) -> Path:
        """The folder of a checkpoint whose policy looks through these cameras, and reads the state if it is there."""
        state = state or get_family(family).reads_state
        folder = self.folder / "-".join([family, *cameras, *([] if state else ["stateless"])])
        if not folder.exists():
            inputs = {name: PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for name in cameras}
            if state:
                inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
            outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
            torch.manual_seed(0)
            files = self.folder / f"{family}-files"
            options = OPTIONS.get(family, {}) | ({} if state else {"use_proprio": False})
            policy = get_family(family).small(inputs, outputs, files, **options)
            zero = {key: torch.zeros(4) for key in ("mean", "min", "q01")}
            one = {key: torch.ones(4) for key in ("std", "max", "q99")}
            statistics = dict.fromkeys(("observation.state", "action"), zero | one)
            colours = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
            statistics |= dict.fromkeys(cameras, colours)
            folder.mkdir(parents=True)
            save_policy(policy, folder)
            save_processors(folder, *make_processors(policy.config, statistics))
        return folder

    def wrapped(self, family: str, cameras: Sequence[str]) -> Path:
        """The folder of a grids checkpoint with 16 tokens around such a policy."""
        dense = self.get(family, cameras)
        folder = dense.with_name(f"grids-{dense.name}")
        if not folder.exists():
            loaded = load(dense, device="cpu", reducer="grids", num_tokens=16)
            folder.mkdir()
            loaded.save(folder)
        return folder


def flags_of(checkpoint: Path) -> list[str]:
    """The options of lerobot-train that begin with a dense checkpoint, and build its policy."""
    config = json.loads((checkpoint / "config.json").read_text())
    kind = config.pop("type")
    usual = asdict(PreTrainedConfig.get_choice_class(kind)(device="cpu"))
    left_out = ("input_features", "output_features", "device", "pretrained_path", "normalization_mapping")
    changed = {k: v for k, v in config.items() if k not in left_out and json.dumps(v) != _dumps(usual.get(k))}
    flags = [f"--policy.base.{name}={_flag(value)}" for name, value in changed.items()]
    return ["--policy.type=grids", f"--policy.base.type={kind}", f"--policy.base.pretrained_path={checkpoint}", *flags]


def _dumps(value: Any) -> str:
    return json.dumps(value, default=str)


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fresh(family: str) -> tuple[str, list[str], list[str]]:
    """Of a family in `FRESH`: its name for `fit`, options of `fit`, and options of lerobot-train that mean the same."""
    name, options = FRESH[family]
    ours = [part for option, value in options.items() for part in (f"--base.{option}", value)]
    theirs = [f"--policy.base.{option}={value}" for option, value in options.items()]
    return name, ours, ["--policy.type=grids", f"--policy.base.type={family}", *theirs]


def fit(dataset: Path, output: Path, policy: str | Path, family: str, *options: str) -> Outcome:
    """Train by `lerobot-grids fit` and check."""
    arguments = ["fit", "--dataset", str(dataset), "--output", str(output), "--policy", str(policy)]
    given = " ".join(options)
    for name, value in (("--steps", "1"), ("--batch_size", "4")):
        arguments += [] if name in given else [name, value]
    return _trial(
        lambda: _fit([*arguments, *QUIET, *EXACT, *options]),
        dataset,
        output,
        output / "pretrained_model",
        family,
        options,
    )


def _fit(arguments: list[str]) -> str:
    """Run the command; returns the lines of its refusal."""
    from lerobot_grids_cli.main import main

    code = main(arguments)
    if not code:
        return ""
    lines = [line for line in sys.stderr.getvalue().splitlines() if line.startswith(REFUSAL)]  # type: ignore[attr-defined]
    return " | ".join(line.removeprefix(REFUSAL) for line in lines) or f"exit code {code} without a line"


def lerobot_train(dataset: Path, output: Path, base: Sequence[str], family: str, *options: str) -> Outcome:
    """Train by LeRobot's own command and check."""
    from lerobot.scripts import lerobot_train as script

    arguments = [f"--dataset.repo_id=local/{dataset.name}", f"--dataset.root={dataset}", f"--output_dir={output}"]
    arguments += [*base, "--batch_size=4", *LEROBOT, *options]

    def run() -> str:
        with (
            mock.patch.object(sys, "argv", ["lerobot-train", *arguments]),
            mock.patch.object(script, "init_logging"),
        ):
            try:
                script.train()
            except SystemExit as stop:
                errors = [line for line in sys.stderr.getvalue().splitlines() if "error" in line.lower()]  # type: ignore[attr-defined]
                return (errors or [f"exit code {stop.code}"])[-1]
            except Exception as error:  # LeRobot shows its user tracebacks
                return f"{type(error).__name__}: {_first_line(error)}"
        return ""

    folder = output / "checkpoints" / "last" / "pretrained_model"
    return _trial(run, dataset, output, folder, family, options)


def _trial(
    run: Callable[[], str],
    dataset: Path,
    output: Path,
    folder: Path,
    family: str,
    options: Sequence[str],
) -> Outcome:
    shutil.rmtree(output, ignore_errors=True)
    begin, printed = time.perf_counter(), io.StringIO()
    status, line, seen = "wrong", "", Seen()
    try:
        with _captured(printed), _watched(family, seen):
            line = run()
        if line:
            status = "refused"
            if written := sorted(path.name for path in output.rglob("*") if path.is_file()):
                status, line = "wrong", f"{line}; but wrote {', '.join(written[:4])}"
        else:
            faults = _faults(seen, folder, dataset, family, options, printed.getvalue())
            status, line = ("wrong", "; ".join(faults)) if faults else ("trained", "")
    except SystemExit as stop:
        line = f"exit code {stop.code}: {printed.getvalue().strip().splitlines()[-1:]}"
        status = "refused" if stop.code == 2 and not output.exists() else "wrong"
    except Exception as error:  # that is what is looked for
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        line = f"TRACEBACK {type(error).__name__}: {_first_line(error)} ({Path(place.filename).name}:{place.lineno})"
    return Outcome(status, line, time.perf_counter() - begin, printed.getvalue())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else ""


@contextlib.contextmanager
def _captured(printed: io.StringIO) -> Iterator[None]:
    """What is printed and logged goes to a buffer."""
    handler = logging.StreamHandler(printed)
    handler.setLevel(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        root.removeHandler(handler)


@contextlib.contextmanager
def _watched(family: str, seen: Seen) -> Iterator[None]:
    """In this block the batches of dense policies of a family, and what is saved, are noted."""
    cls = get_policy_class(family)
    forward, save = cls.forward, DataProcessorPipeline.save_pretrained
    ours, whole = GridsPolicy._save_pretrained, LoadedPolicy.save

    def noting_forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        seen.batches.append({k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return forward(self, batch, *args, **kwargs)

    def noting_processors(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.processors = [*seen.processors, self][-2:]
        return save(self, *args, **kwargs)

    def noting_policy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.policy = self
        return ours(self, *args, **kwargs)

    def noting_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = whole(self, *args, **kwargs)
        seen.policy, seen.processors = self.policy, [self.preprocessor, self.postprocessor]
        return result

    with (
        mock.patch.object(cls, "forward", noting_forward),
        mock.patch.object(DataProcessorPipeline, "save_pretrained", noting_processors),
        mock.patch.object(GridsPolicy, "_save_pretrained", noting_policy),
        mock.patch.object(LoadedPolicy, "save", noting_all),
    ):
        yield


def _faults(seen: Seen, folder: Path, dataset: Path, family: str, options: Sequence[str], printed: str) -> list[str]:
    """What is wrong with what the policy got and what was saved."""
    if seen.policy is None or not seen.batches:
        return ["no policy was saved, or none was trained"]
    files = reading.read(dataset, reading.names_of(options))
    episodes = reading.episodes_of(options)
    config = seen.policy.config
    tokenizers = [s.input_tokenizer for s in seen.processors[0].steps if isinstance(s, TokenizerProcessorStep)]
    faults: list[str] = []
    for batch in seen.batches[:3]:
        if episodes and not {int(number) for number in batch["episode_index"].flatten()} <= episodes:
            faults.append(f"the batch has frames of other episodes than {sorted(episodes)}")
        if lost := [name for name in config.image_features if name in files.cameras() and name not in batch]:
            faults.append(f"{', '.join(lost)} is not in the batch")
        faults += reading.batch_faults(batch, files, family, config.chunk_size, printed)
        for tokenizer in tokenizers:
            faults += reading.language_faults(batch, files, tokenizer, "the end is cut" in printed)
    try:
        loaded = load(folder, device="cpu")
    except GridsError as error:
        return [*faults, f"the checkpoint cannot be loaded: {error}"]
    row = len(files.table) // 2
    sent = reading.observation(files, row)
    before, after = (
        act(seen.policy, *seen.processors, sent),
        act(loaded.policy, loaded.preprocessor, loaded.postprocessor, sent),
    )
    if not torch.isfinite(after).all():
        faults.append("the loaded policy's actions are not finite")
    # Low-rank matrices are merged into bfloat16 weights when they are saved.
    allowed = 0.05 * before.abs().max() if "reducer+lora" in options else torch.tensor(0.0)
    if (before - after).abs().max() > allowed:
        faults.append(f"the loaded policy acts otherwise, by {(before - after).abs().max():.3g}")
    if "are not those of its data" not in printed:
        faults += _back_faults(loaded, files, family, row)
    told = getattr(config, "action_feature_names", None)
    if told is not None and list(told) != files.joints("action"):
        faults.append(f"the configuration names the actions {list(told)}, the dataset {files.joints('action')}")
    return list(dict.fromkeys(faults))


def _back_faults(loaded: Any, files: reading.Files, family: str, row: int) -> list[str]:
    """Whether the saved processors bring a frame's state to the policy and its action back to the robot."""
    raw = files.vectors("action")[row]
    normal = files.normalised("action", raw, reading.MODES[family])
    back = loaded.postprocessor(torch.from_numpy(normal).float()[None]).double()[0].numpy()
    if abs(back - raw).max() > 1e-3 * max(1, abs(raw).max()):
        return [f"the saved post-processor gives {back[:3]}, the robot was sent {raw[:3]}"]
    return []


def act(policy: Any, preprocessor: Any, postprocessor: Any, sent: dict[str, Any]) -> torch.Tensor:
    """The action chunk of an observation, in the robot's units."""
    policy.eval()
    policy.reset()
    if hasattr(getattr(policy, "reducer", None), "_looks"):
        # This reducer draws other tokens at each look.
        policy.reducer._looks = 0
    torch.manual_seed(7)
    with torch.no_grad():
        return postprocessor(policy.predict_action_chunk(preprocessor(dict(sent))))
