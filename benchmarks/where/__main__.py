"""Can a reducer look for a named object? Minutes on a CPU, for any reducer of this project.

    python benchmarks/where --tokens 16 4 1 --seeds 0 1 2 --output outputs/where        # everything, 40 minutes
    python benchmarks/where --methods grids pool --tokens 16 --seeds 0                  # one comparison

A decoder is trained with all 256 tokens of a frozen, local tower. Then each method goes on from it with K tokens for
the same steps, as a policy goes on in `lerobot-grids fit`. Success is the place within 4 pixels and the heading, of
3,200 questions: 800 pictures, four named objects each. The same questions are asked under conditions that
stress: objects that are small, of which a half is hidden, or that look different; and without the instruction.

Besides the reducers there are: dense (all tokens), oracle (one point where the object is), fastv-rule (tokens kept
inside the decoder by its attention), and attention (Perceiver's queries over the whole map, without coordinates).
One line of JSON for each method, K and seed holds the outcome of every question, a bit for each in hexadecimal.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import GRID, WIDTH, Decoder, Tower, is_right, loss_of, train_tower
from table import SIDE, Table, draw
from torch import Tensor, nn

from lerobot_grids.evaluation.statistics import wilson_interval
from lerobot_policy_grids.reducers import ReducerConfig, reducer_config
from lerobot_policy_grids.reducers.anchored import AnchoredSampler, Float32MLP
from lerobot_policy_grids.reducers.anchors import WHOLE, Region
from lerobot_policy_grids.reducers.base import Reducer, Sampled
from lerobot_policy_grids.reducers.interpolation import bilinear
from lerobot_policy_grids.reducers.layout import TokenLayout, cell_coordinates

LAYOUT = TokenLayout((GRID, GRID), WIDTH, ("camera",), WIDTH, 0, (WHOLE,))
PICTURES, QUESTIONS, BATCH = 4000, 4, 24
CONDITIONS = ("plain", "small", "occluded", "novel")
UNTOLD = "without the instruction"
# Options of a reducer, beside its own defaults, and what it is called in the table.
METHODS: dict[str, dict[str, Any]] = {
    "grids": {"type": "grids", "condition_on": ["language"]},
    "grids-no-value": {"type": "grids", "condition_on": ["language"], "value_rank": 0},
    "grids-wide": {"type": "grids", "condition_on": ["language"], "reading_width": 16.0},
    "mean": {"type": "mean", "condition_on": ["image", "language"]},
    "uniform": {"type": "uniform"},
    "pool": {"type": "pool"},
    "tome": {"type": "tome"},
    "random": {"type": "random"},
}
OTHERS = ("dense", "oracle", "fastv-rule", "attention")


class Oracle(AnchoredSampler):
    """The first point is on the object, the others on their anchors."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__((GRID, GRID), num_tokens)
        self.geometry = Float32MLP(2, 128, WIDTH)

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        coordinates = self.anchors(k).expand(len(feature_map), -1, -1).clone()
        coordinates[:, 0] = context["place"]
        return Sampled(bilinear(feature_map, coordinates * GRID - 0.5) + self.geometry(coordinates), coordinates)


class Attention(nn.Module):
    """k queries attend to the whole map, as a Perceiver's do; no coordinates."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_tokens, 128) * 0.5)
        self.language, self.query = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.query.weight, std=0.05)

    def forward(self, feature_map: Tensor, context: Mapping[str, Tensor]) -> Sampled:
        flat = feature_map.flatten(1, 2)
        query = self.query(nn.functional.gelu(self.queries + self.language(context["language"])[:, None]))
        weights = (query @ self.norm(flat).transpose(1, 2) / WIDTH**0.5 * 4).softmax(-1)
        return Sampled(weights @ flat, weights @ cell_coordinates((GRID, GRID)))


class Dense(nn.Module):
    """All tokens, the same for each question about a picture."""

    def forward(self, feature_map: Tensor, context: Mapping[str, Tensor]) -> Sampled:
        places = cell_coordinates((GRID, GRID)).expand(len(feature_map), -1, -1)
        return Sampled(feature_map.flatten(1, 2), places)


def build(method: str, tokens: int) -> nn.Module | Reducer:
    """The reducer of a method."""
    if method in ("dense", "fastv-rule"):
        return Dense()
    if method in ("oracle", "attention"):
        return Oracle(tokens) if method == "oracle" else Attention(tokens)
    options = METHODS.get(method, {"type": method})
    return reducer_config(**{"name": options["type"], "num_tokens": tokens}, **_without_type(options)).build(LAYOUT)


def _without_type(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "type"}


@dataclass
class Questions:
    """Feature maps of pictures, and what is asked of them."""

    maps: Tensor
    table: Table

    def of(self, pictures: Tensor, objects: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(maps [n, ...], names [b, 2], places [b, 2] in [0, 1], headings [b]) of objects [n, q] in pictures [n]."""
        rows = pictures[:, None]
        kinds = self.table.kinds[rows, objects].flatten()
        maps = self.maps[pictures].float()
        places = (self.table.centres[rows, objects] / SIDE).flatten(0, 1)
        return maps, torch.stack([kinds // 4, 4 + kinds % 4], -1), places, self.table.headings[rows, objects].flatten()


@dataclass
class Run:
    """A method with its decoder."""

    method: str
    tokens: int
    reducer: Any
    decoder: Decoder

    def __call__(self, maps: Tensor, names: Tensor, places: Tensor, told: bool = True) -> tuple[Tensor, Tensor]:
        """(answers, coordinates)."""
        if not isinstance(self.reducer, Dense):
            maps = maps.repeat_interleave(len(names) // len(maps), 0)
        instruction = self.decoder.instruction(names)
        context = {"language": instruction if told else torch.zeros_like(instruction), "place": places}
        sampled = self.reducer(maps, context)
        kept = self.tokens if self.method == "fastv-rule" else None
        coordinates = sampled.coordinates.repeat_interleave(len(names) // len(sampled.coordinates), 0)
        return self.decoder(sampled.tokens, names, kept), coordinates

    def train(self, questions: Questions, steps: int, lr: float) -> None:
        """Train reducer and decoder."""
        weights = [*self.reducer.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            pictures = torch.randint(len(questions.maps), (BATCH,))
            objects = torch.rand(BATCH, questions.table.kinds.shape[1]).argsort(1)[:, :QUESTIONS]
            maps, names, places, headings = questions.of(pictures, objects)
            answers, _ = self(maps, names, places)
            loss = loss_of(answers, places, headings)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def ask(self, questions: Questions, told: bool = True) -> tuple[str, dict[str, float]]:
        """(Outcome of each question, a bit for each in hexadecimal; what the points did)."""
        right, at, wanted = [], [], []
        for first in range(0, len(questions.maps), 40):
            pictures = torch.arange(first, min(first + 40, len(questions.maps)))
            maps, names, places, headings = questions.of(pictures, torch.arange(QUESTIONS).expand(len(pictures), -1))
            answers, coordinates = self(maps, names, places, told)
            right.append(is_right(answers, places, headings))
            at.append(coordinates)
            wanted.append(places)
        points, places = torch.cat(at) * GRID, torch.cat(wanted) * GRID
        nearest = (points - places[:, None]).norm(dim=-1).min(1).values
        looks = {"hit": float((nearest < 1).float().mean()), "motion": float(points.std(0).norm(dim=-1).mean())}
        bits = "".join("01"[bool(answer)] for answer in torch.cat(right))
        return f"{int(bits, 2):0{len(bits) // 4}x}", looks


def prepare(output: Path, sizes: tuple[int, int, int], say: Callable[[str], None]) -> tuple[Any, Any, Any]:
    """Draw the pictures, train tower and dense decoder, or read what was made before.

    Returns:
        (training questions, {condition: questions}, the dense decoder's weights).
    """
    file = output / "prepared.pt"
    if file.is_file():
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]
    output.mkdir(parents=True, exist_ok=True)
    pictures, tower_steps, decoder_steps = sizes
    say(f"drawing {pictures} pictures, training the tower for {tower_steps} steps")
    tower = train_tower(draw(pictures, seed=3, condition="training"), tower_steps)
    train = Questions(*_seen(tower, draw(pictures, seed=1, condition="training")))
    tests = {name: Questions(*_seen(tower, draw(800, seed=2, condition=name))) for name in CONDITIONS}
    say(f"training the dense decoder for {decoder_steps} steps")
    torch.manual_seed(0)
    dense = Run("dense", GRID * GRID, Dense(), Decoder())
    dense.train(train, decoder_steps, 1.5e-3)
    made = train, tests, dense.decoder.state_dict()
    torch.save(made, file)
    return made


@torch.no_grad()
def _seen(tower: Tower, table: Table) -> tuple[Tensor, Table]:
    maps = torch.cat([tower(table.images[i : i + 100]) for i in range(0, len(table), 100)]).half()
    return maps, Table(torch.empty(len(table), 0), table.kinds, table.headings, table.centres)


def measure(method: str, tokens: int, seed: int, steps: int, made: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Train a method from the dense decoder and ask it everything; a line of the results."""
    train, tests, weights = made
    torch.manual_seed(seed)
    start = time.process_time()
    run = Run(method, tokens, build(method, tokens), Decoder())
    run.decoder.load_state_dict(weights)
    run.train(train, steps, 1e-3)
    run.reducer.eval()
    seconds = time.process_time() - start
    answers, looks = {}, {}
    for condition, questions in tests.items():
        answers[condition], found = run.ask(questions)
        looks = looks or found
    answers[UNTOLD], _ = run.ask(tests["plain"], told=False)
    line = {"kind": "where", "method": method, "tokens": tokens, "seed": seed, "steps": steps}
    line |= {"parameters": sum(p.numel() for p in run.reducer.parameters())}
    return (
        line
        | {name: round(value, 3) for name, value in looks.items()}
        | {"answers": answers, "cpu_seconds": round(seconds, 1)}
    )


def count(line: dict[str, Any], condition: str) -> tuple[int, int]:
    """(Successes, questions)."""
    answers = line["answers"][condition]
    return int(answers, 16).bit_count(), 4 * len(answers)


def _rate(line: dict[str, Any], condition: str) -> float:
    """Success in percent."""
    right, asked = count(line, condition)
    return 100 * right / asked


def print_table(lines: list[dict[str, Any]]) -> None:
    """Success in percent: mean over seeds, its range, the interval of the questions of one seed."""
    conditions = (*CONDITIONS, UNTOLD)
    print(f"| K | method | seeds | {' | '.join(conditions)} | a point on it | motion, cells |")
    print("|---" * (len(conditions) + 5) + "|")
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["tokens"], line["method"]), []).append(line)

    def success(group: list[dict[str, Any]]) -> float:
        return sum(_rate(line, "plain") for line in group) / len(group)

    for (tokens, method), group in sorted(groups.items(), key=lambda item: (-item[0][0], -success(item[1]))):
        cells = []
        for condition in conditions:
            rates = [_rate(line, condition) for line in group]
            cells.append(f"{sum(rates) / len(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        low, high = wilson_interval(*count(group[0], "plain"))
        cells[0] += f", ± {50 * (high - low):.1f}"
        means = [sum(line[name] for line in group) / len(group) for name in ("hit", "motion")]
        print(f"| {tokens} | {method} | {len(group)} | {' | '.join(cells)} | {100 * means[0]:.0f} % | {means[1]:.2f} |")


def main() -> None:
    """Run the benchmark."""
    before_trunk = {name for name, config in ReducerConfig.get_known_choices().items() if not config.in_trunk}
    names = sorted({*METHODS, *OTHERS, *before_trunk} - {"blind"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=names, default=[*METHODS, *OTHERS], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 4, 1], help="K, visual tokens of a picture")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each method")
    parser.add_argument("--tower_steps", type=int, default=2400, help="training steps of the tower, made once")
    parser.add_argument("--decoder_steps", type=int, default=8000, help="training steps of the decoder, made once")
    parser.add_argument("--output", type=Path, default=Path("outputs/where"), help="folder for what is made once")
    parser.add_argument("--results", type=Path, help="JSONL file; defaults to where.jsonl in the output folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few pictures and steps, to try the program")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    file = asked.results or asked.output / "where.jsonl"
    sizes = (200, 20, 20) if asked.quick else (PICTURES, asked.tower_steps, asked.decoder_steps)
    made = prepare(asked.output, sizes, lambda text: print(text, flush=True))
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(line["method"], line["tokens"], line["seed"]) for line in lines}
    for seed in asked.seeds:
        for tokens in asked.tokens:
            for method in asked.methods:
                kept = GRID * GRID if method == "dense" else tokens
                if (method, kept, seed) in done:
                    continue
                done.add((method, kept, seed))
                lines.append(measure(method, kept, seed, asked.steps, made))
                right, questions = count(lines[-1], "plain")
                print(f"{method} {kept} seed {seed}: {right}/{questions}", flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
    print_table(lines)


if __name__ == "__main__":
    main()
