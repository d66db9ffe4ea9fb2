"""Gather what is known of a checkpoint, and write it as one HTML page that needs nothing else."""

import base64
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lerobot_grids_cards import CostRow, Costs, PolicyFacts, SuccessRow
from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_file, resolve_checkpoint
from lerobot_policy_grids.checkpoint.files import OPTIONS_FILE, WEIGHTS_FILES
from lerobot_policy_grids.errors import CheckpointError, GridsError

from ..hub.prepare import read_facts
from ..looks.view import STRIP_FILE, ViewResult
from ..policies import find_weights
from .curves import Chart, budget_chart, training_charts
from .results import Results, read_results

MINUS = "\N{MINUS SIGN}"
TEMPLATE = Path(__file__).with_name("report.html")
# What a run depends on.
PACKAGES = ("lerobot_policy_grids", "lerobot", "torch", "transformers", "lightning")


@dataclass(frozen=True)
class Picture:
    """The strip of `view`, and its figures."""

    view: ViewResult
    png: bytes

    @property
    def address(self) -> str:
        """The picture inside the page."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass
class Report:
    """Everything that the page shows.

    Attributes:
        name: What the checkpoint is called.
        source: What commands call it, without folders of this machine.
        facts: Facts of its configuration.
        size_mib: Size of its weights; 0 where they were not fetched.
        charts: Curves of its training.
        budgets: Curves over the number of tokens.
        results: Of `eval`, `compare`, `validate` and `bench`.
        picture: Where it looks; None if not drawn.
        why_no_picture: Why not.
        options: Options of the training run.
        versions: Of this machine, where the page was made.
        made: When.
    """

    name: str
    source: str
    facts: PolicyFacts
    size_mib: float
    charts: list[Chart] = field(default_factory=list)
    budgets: list[Chart] = field(default_factory=list)
    results: Results = field(default_factory=Results)
    picture: Picture | None = None
    why_no_picture: str = ""
    options: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    made: str = ""

    @property
    def own_success(self) -> SuccessRow | None:
        """Success of the checkpoint on all tasks, or on its only one."""
        own = [row for row in self.results.measured.successes if row.own]
        return own[0] if own else None

    @property
    def dense_success(self) -> SuccessRow | None:
        """Success of the policy with the most tokens beside it, on the same tasks."""
        own = self.own_success
        others = [
            row
            for row in self.results.measured.successes
            if own is not None and not row.own and row.task == own.task and (row.tokens or 0) > (own.tokens or 0)
        ]
        return max(others, key=lambda row: row.tokens or 0, default=None)

    @property
    def costs(self) -> Costs | None:
        """The costs that are shown on top."""
        return self.results.measured.costs[0] if self.results.measured.costs else None

    @property
    def own_cost(self) -> CostRow | None:
        """The costs at the checkpoint's budget."""
        rows = [] if self.costs is None else self.costs.rows[1:]
        wanted = self.facts.num_tokens
        return next((row for row in rows if row.visual_tokens == wanted), None)


def gather(
    source: str,
    results: list[Path],
    draw: Callable[[Path], ViewResult] | str,
    count: Callable[[PolicyFacts, Path], None] | None = None,
) -> Report:
    """Gather what is known of a checkpoint.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        results: Files for `read_results`.
        draw: Draws where the policy looks into a folder; or the reason why it is not drawn.
        count: Writes the costs into a JSON file, as `bench` does. Not called where a file in `results` has costs.
    """
    folder = find_weights(source, weights=False)
    facts = read_facts(folder, repo_id=source)
    run = folder.parent if folder.name == CHECKPOINT_FOLDER else folder
    # LeRobot's training keeps its checkpoints by step, in a folder of the run.
    named = run.parent.parent if run.parent.name == "checkpoints" else run
    name = named.name if Path(source).exists() else source
    own = _is(folder, source)
    report = Report(
        name=name,
        source=last_part(source),
        facts=facts,
        size_mib=weights_mib(folder),
        charts=training_charts(run),
        results=read_results(results, own),
        options=_options(run),
        versions=_versions(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    measured = report.results.measured
    with TemporaryDirectory() as place:
        if not measured.costs and count is not None:
            count(facts, Path(place) / "bench.json")
            measured.costs += read_results([Path(place) / "bench.json"], own).measured.costs
        try:
            if isinstance(draw, str):
                report.why_no_picture = draw
            else:
                report.picture = Picture(draw(Path(place)), (Path(place) / STRIP_FILE).read_bytes())
        except GridsError as error:
            report.why_no_picture = str(error)
    report.budgets = _budget_charts(report)
    return report


def weights_mib(folder: Path) -> float:
    """Size of a checkpoint's weights."""
    return sum((folder / name).stat().st_size for name in WEIGHTS_FILES if (folder / name).is_file()) / 2**20


def _budget_charts(report: Report) -> list[Chart]:
    """Curves over the number of tokens, from the JSON of `validate`."""
    own = [row for row in report.results.measured.distances if row.own and row.tokens]
    if len(own) < 2:
        return []
    charts = [budget_chart("Held-out loss", {"loss": [(float(row.tokens or 0), row.loss) for row in own]}, "loss")]
    far = [(float(row.tokens or 0), row.teacher_distance) for row in own if row.teacher_distance is not None]
    if far:
        charts.append(budget_chart("Distance to the teacher's actions", {"distance": far}, "distance"))
    return charts


def render(report: Report) -> str:
    """The page. Every text is escaped: names and instructions come from other people's files.

    Raises:
        GridsError: If a result has a text in the place of a number.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Drawn by this project, with its own labels.
    environment.filters["drawing"] = lambda chart: Markup(chart.svg)
    environment.filters["percent"] = lambda value, decimals=0: f"{100 * value:.{decimals}f} %"
    environment.filters["change"] = lambda ratio: f"{100 * (ratio - 1):+.1f} %".replace("-", MINUS)
    environment.filters["last_part"] = last_part
    try:
        return environment.get_template(TEMPLATE.name).render(report=report)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise GridsError(f"a result holds something that is no number ({error}); make it again") from error


def write(report: Report, path: Path) -> None:
    """Write the page, all of it or nothing."""
    text = render(report)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def recorded_dataset(folder: Path) -> str | None:
    """The dataset of a checkpoint's training run, if it is on this machine; nothing is fetched."""
    run = folder.parent if folder.name == CHECKPOINT_FOLDER else folder
    path = run / OPTIONS_FILE
    named = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("dataset") if path.is_file() else None
    if not isinstance(named, str):
        return None
    from lerobot.utils.constants import HF_LEROBOT_HOME

    local = any((place / named / "meta" / "info.json").is_file() for place in (Path(), HF_LEROBOT_HOME))
    return named if local else None


def last_part(text: str) -> str:
    """The name at the end of a path of this machine; other texts as they are."""
    return f"…/{Path(text).name}" if text.startswith(("/", "~", "file:")) or text[1:3] in (":\\", ":/") else text


def _options(run: Path) -> dict[str, str]:
    """Options of a training run, one line each: parts joined by dots, without folders of this machine."""
    path = run / OPTIONS_FILE
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise GridsError(f"{path} is not valid YAML ({error}); remove it") from error
    shown: dict[str, str] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, part in value.items():
                flatten(f"{prefix}.{name}" if prefix else str(name), part)
        else:
            shown[prefix] = last_part(str(value))

    flatten("", content if isinstance(content, dict) else {})
    return {name: shown[name] for name in sorted(shown, key=lambda name: (name.count("."), name)) if name}


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _is(folder: Path, source: str) -> Callable[[str], bool]:
    def is_own(policy: str) -> bool:
        try:
            return resolve_checkpoint(Path(policy)).resolve() == folder.resolve()
        except CheckpointError:
            return policy.partition("@")[0] == source.partition("@")[0] or Path(policy).name == folder.parent.name

    return is_own
