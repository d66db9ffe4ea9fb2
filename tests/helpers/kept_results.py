"""Results that benchmarks/results holds, as the commands wrote them."""

import importlib.util
import json
from pathlib import Path

from lerobot_grids.evaluation.success import Evaluation, summarise

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_script(name):
    """A module of benchmarks, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load_script("results")


def lines(study):
    return results.read(BENCHMARKS / "results" / f"{study}.jsonl")


def write_evaluation(study, method, path):
    """A result.json of `lerobot-grids eval` again."""
    (line,) = [x for x in lines(study) if x["kind"] == "evaluation" and x["method"] == method]
    seeds, evaluation = results.episode_seeds(line), Evaluation(line["policy"], line["policy_type"], None, None)
    evaluation.num_tokens, evaluation.num_dense_tokens = line["tokens"], line["dense_tokens"]
    for task, bits in line["outcomes"].items():
        outcomes = [bit == "1" for bit in bits]
        evaluation.tasks.append(summarise(task, outcomes, seeds, line["seconds"][task], task))
    evaluation.save(path)
    return json.loads(path.read_text())


def write_bench(policy, cameras, path, device=None):
    """A file of `lerobot-grids bench` again."""
    kept = [x for x in lines("bench") if (x["policy"], x["cameras"], x.get("device")) == (policy, cameras, device)]
    content = {"policy": policy, "cameras": cameras, "device": device} | kept[0] | {"costs": []}
    empty = {"latency_ms": {}, "latency_p95_ms": None, "peak_memory_mib": None}
    content["costs"] = [empty | line | {"total_flops": sum(line["flops"].values())} for line in kept]
    path.write_text(json.dumps(content))
