"""`lerobot-grids report`: one page that holds every figure it was given, and nothing that runs."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from kept_results import BENCHMARKS
from lerobot_grids.evaluation.open_loop import BudgetResult, Validation
from lerobot_grids.evaluation.paired import ComparisonResult, MethodResult
from lerobot_grids.evaluation.statistics import Paired
from lerobot_grids.evaluation.success import Evaluation, summarise
from lerobot_grids.looks.view import STRIP_FILE, LookResult, ViewResult
from lerobot_grids.profiling.bench import BenchResult
from lerobot_grids.profiling.measure import STAGES, Cost
from lerobot_grids.reporting.curves import PLACEHOLDER, read_logs, training_charts
from lerobot_grids.reporting.report import MINUS, gather, last_part, render
from lerobot_grids_cli.main import COMMANDS, main
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError

HOSTILE = '<script>alert("x")</script>"><img src=x onerror=alert(1)> {{ 7 * 7 }} ${x}'
TIMES = "\N{MULTIPLICATION SIGN}"
TO = "\N{EN DASH}"
# Elements without an end tag.
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert self._open == [], "an element is never closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def view_of(instruction="push the cube", other=None):
    """What `view` would return, and a picture."""

    def draw(folder):
        Image.new("RGB", (8, 8)).save(folder / STRIP_FILE)
        looks = [LookResult(16, "observation.images.top", 16, (1.5, 1.5), 0.0625, 0.318, 0.271)]
        return ViewResult("run", "data/push", 3, "grids", (12, 12), instruction, other, True, 87, 10.0, looks)

    return draw


METRICS = """epoch,step,train/loss,train/num_tokens,val/loss,coordinates/motion,train/lr
0,9,0.9123,36,,,0.0003
0,19,0.7345,16,,,0.0005
0,19,,,0.8456,0.4567,
0,29,nan,16,,,0.0001
"""


@pytest.fixture
def run(grids_checkpoint, tmp_path):
    """The output folder of a training run."""
    folder = tmp_path / "my-run"
    shutil.copytree(grids_checkpoint, folder / "pretrained_model")
    (folder / "logs" / "csv").mkdir(parents=True)
    (folder / "logs" / "csv" / "metrics.csv").write_text(METRICS)
    (folder / "logs" / "csv-2").mkdir()
    later = METRICS.splitlines()[0] + "\n0,19,0.6789,8,,,0.0002\n0,39,0.5432,8,,,0.00007\n"
    (folder / "logs" / "csv-2" / "metrics.csv").write_text(later)
    options = {"policy": "tiny", "tokens": 16, "dataset": "/home/me/secret/demos", "data": {"batch_size": 32}}
    (folder / "fit.yaml").write_text(yaml.safe_dump(options))
    return folder


def evaluation(policy, tokens, successes, path):
    outcomes = [True] * successes + [False] * (50 - successes)
    tasks = [summarise(name, outcomes, list(range(100, 150)), 1.0, name) for name in ("push-v3", "sweep-v3")]
    Evaluation(str(policy), "grids", tokens, 144, tasks).save(path)
    return path


@pytest.fixture
def results(run, tmp_path):
    """What every command writes."""
    paths = [evaluation(run, 16, 43, tmp_path / "own.json"), evaluation("dense", 144, 47, tmp_path / "dense.json")]
    compared = ComparisonResult({"env": "metaworld", "episodes": 25}, 1)
    first = MethodResult("dense", 144, {"push": (47, 50)}, [0.94], 47, 50, (0.838, 0.979), None, 0.36, 12.34, "a CPU")
    paired = Paired(3, 7, -0.08, (-0.191, 0.031), 0.344)
    second = MethodResult("pooled", 16, {"push": (43, 50)}, [0.86], 43, 50, (0.738, 0.93), paired, 0.217, 9.87, "a CPU")
    compared.methods = [first, second]
    compared.save(tmp_path / "compared.json")
    budgets = [BudgetResult(k, loss, [0.1], far) for k, loss, far in ((4, 0.7654, 0.321), (16, 0.6543, 0.123))]
    Validation(str(run), "grids", "data/push", "dense", 77, 144, budgets, 2).save(tmp_path / "valid.json")
    bench = BenchResult("tiny_smolvla", 1, 48, 1_300_000, "float32", "a CPU", 1)
    for name, tokens, flops, total in (("dense", 144, 100_000_000, 21.9), ("K=16", 16, 60_000_000, 14.6)):
        times = dict.fromkeys(STAGES, 1.0) | {"total": total}
        bench.costs.append(Cost(name, tokens, 200, dict.fromkeys(STAGES, flops), 2, times, total + 1, 555.0))
    (tmp_path / "bench.json").write_text(json.dumps(bench.to_dict()))
    return [*paths, *(tmp_path / f"{name}.json" for name in ("compared", "valid", "bench"))]


def test_the_page_holds_every_figure_and_nothing_that_runs(run, results):
    html = render(gather(str(run), results, view_of(other="open the drawer")))
    page = Page(html)
    wanted = ["my-run", "16 of 144", "push the cube", "open the drawer"]
    # Success: counts, rates and Wilson intervals, by the formula at z = 1.96.
    wanted += ["43/50", "86/100", "47/50", "94/100", "86 %", "94 %", f"78 {TO} 91 %", f"88 {TO} 97 %", "100 to 149"]
    wanted += ["pooled", "-8.0 (-19.1 to +3.1)", "0.34", "0.217", "9.9", "env metaworld, episodes 25"]
    # Looks, costs, other budgets.
    wanted += ["87 frames", "± 1.5", "6 %", "0.32", "0.27"]
    wanted += ["0.5", "0.3", f"{MINUS}40.0 %", "21.9", "14.6", "15.6", f"1.50{TIMES}", "555", "a CPU, float32"]
    wanted += ["0.7654", "0.6543", "0.321", "0.123", "77"]
    # Training: the last value of each curve, of the newest log; options and versions.
    wanted += ["training 0.5432, held out 0.8456", "K 8 to 36", "from image to image 0.4567", "7e-05"]
    wanted += ["data.batch_size", "32", "…/demos", "lerobot", "torch"]
    for text in wanted:
        assert text in page.text, text
    assert "/home/me" not in html
    assert str(run.parent) not in html
    assert "not here yet" not in page.text
    # Nothing runs, and nothing is fetched.
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.elements)
    assert "default-src 'none'" in html
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])
    names = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= set(names)
    # For phones and for the dark.
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in html


def test_texts_of_other_people_stay_texts(run, results, tmp_path):
    """Whatever a checkpoint, a dataset or a result calls itself."""
    (run / "fit.yaml").write_text(yaml.safe_dump({HOSTILE: HOSTILE, "data": {HOSTILE: [HOSTILE]}}))
    config = json.loads((run / "pretrained_model" / "config.json").read_text())
    image = config["input_features"].pop("observation.image")
    config["input_features"][f"observation.image{HOSTILE}"] = image
    config["base_repo_id"] = HOSTILE
    (run / "pretrained_model" / "config.json").write_text(json.dumps(config))
    for path in results:
        content = json.loads(path.read_text())
        if "methods" in content:
            content["methods"][1]["name"] = HOSTILE
            content["protocol"] = {HOSTILE: HOSTILE}
        elif "tasks" in content:
            content["tasks"][0]["task"] = HOSTILE
        elif "costs" in content:
            content |= {"device": HOSTILE, "dtype": HOSTILE}
            content["costs"][1]["name"] = HOSTILE
            for cost in content["costs"]:
                cost["flops"] = {HOSTILE: 1}
        path.write_text(json.dumps(content))
    html = render(gather(str(run), results, view_of(HOSTILE, HOSTILE)))
    page = Page(html)
    assert "script" not in page.elements
    assert page.elements.count("img") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count('<script>alert("x")</script>') >= 10
    assert "{{ 7 * 7 }}" in page.text


def test_what_is_missing_says_which_command_makes_it(grids_checkpoint, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(grids_checkpoint, folder)

    def refuse(place):
        raise UnsupportedPolicyError("it has no points to show")

    page = Page(render(gather(str(folder), [], refuse)))
    assert "it has no points to show" in page.text
    said = re.findall(r"lerobot-grids (\w+)", page.text)
    assert {"eval", "bench", "validate", "report", "fit"} <= set(said) <= set(COMMANDS)
    assert page.text.count("not here yet") == 3


def test_logs_of_a_resumed_run_are_one_curve(run):
    logs = read_logs(run)
    assert logs["train/loss"] == [(9, 0.9123), (19, 0.6789), (39, 0.5432)]
    assert logs["val/loss"] == [(19, 0.8456)]
    charts = {chart.title: chart for chart in training_charts(run)}
    assert set(charts) == {"Loss", "Token budget", "How far points move", "Learning rate"}
    for chart in charts.values():
        assert PLACEHOLDER not in chart.svg
        assert "currentColor" in chart.svg
        picture = ElementTree.fromstring(chart.svg)
        assert not {"width", "height"} & set(picture.attrib)
    # Text is text: the numbers on the axes can be found and read aloud.
    assert "training step" in "".join(ElementTree.fromstring(charts["Loss"].svg).itertext())


def test_lines_of_kept_results_are_read(run, tmp_path):
    """A file with one evaluation per line, as benchmarks/results has them."""
    page = Page(render(gather(str(run), [BENCHMARKS / "results" / "demo.jsonl"], "no dataset")))
    for text in ("tiny_metaworld", "95/100", f"89 {TO} 98 %", "blind", "5/100"):
        assert text in page.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data", "…/data"),
        ("~/data", "…/data"),
        ("C:\\data\\x", "…/"),
        ("user/name", "user/name"),
        ("16", "16"),
    ],
)
def test_paths_of_this_machine_are_cut(text, shown):
    assert last_part(text).startswith(shown)


def test_report_writes_a_page_with_a_picture_and_costs(run, dataset, tmp_path, capsys):
    arguments = [
        "--dataset",
        dataset,
        "--frames",
        2,
        "--output",
        tmp_path / "page.html",
        "--json",
        tmp_path / "page.json",
    ]
    assert main(["report", *map(str, [run, *arguments, "--instruction", "open the drawer"])]) == 0
    assert "opens offline" in capsys.readouterr().out
    html = (tmp_path / "page.html").read_text()
    page, content = Page(html), json.loads((tmp_path / "page.json").read_text())
    (address,) = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert picture.width > 300
    assert content["picture"]["other_instruction"] == "open the drawer"
    rows = content["results"]["measured"]["costs"][0]["rows"]
    assert [row["visual_tokens"] for row in rows] == [144, 4, 8, 16]
    assert f"{rows[0]['total_gigaflops']:.4g}" in page.text


def test_a_result_with_a_text_for_a_number_is_refused(run, tmp_path):
    path = evaluation(run, 16, 43, tmp_path / "own.json")
    content = json.loads(path.read_text())
    content["total"]["interval"] = ["0", "1"]
    path.write_text(json.dumps(content))
    with pytest.raises(GridsError, match="no number"):
        render(gather(str(run), [path], "no dataset"))


def test_report_refuses_what_is_no_result(run, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"a": 1}')
    arguments = [str(run), f"--results={tmp_path / 'other.json'}", f"--output={tmp_path / 'page.html'}"]
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert "other.json is not a result of eval, compare, validate or bench" in error
    assert "Traceback" not in error
    assert not (tmp_path / "page.html").exists()
