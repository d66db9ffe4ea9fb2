"""Formats of exported graphs: how each is written, and run by its own runtime on a CPU."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch

from lerobot_policy_grids.runtime.export import Graph

Arrays = dict[str, np.ndarray]
# Takes more than it needs: an input that no part of the graph reads may be missing from it.
Run = Callable[[Mapping[str, np.ndarray]], Arrays]


class Format(ABC):
    """A file format with a runtime.

    Attributes:
        suffix: Of its files.
        runtime: The distribution that runs it.
    """

    suffix: ClassVar[str]
    runtime: ClassVar[str]

    @abstractmethod
    def write(self, graph: Graph, file: Path) -> None:
        """Write a graph, and what belongs to it, beside each other."""

    @abstractmethod
    def open(self, graph: Graph, file: Path, threads: int) -> Run:
        """A function that runs a file; of `graph` only the names and dtypes are used."""

    def described(self) -> str:
        """The runtime and its version."""
        return f"{self.runtime} {version(self.runtime)}"


class Onnx(Format):
    """ONNX, run by onnxruntime."""

    suffix, runtime = ".onnx", "onnxruntime"

    def write(self, graph: Graph, file: Path) -> None:
        # Weights above 1.5 GB go to a second file, because one of ONNX holds 2 GB at most.
        inputs, outputs = list(graph.inputs), list(graph.outputs)
        program: Any = torch.onnx.export(
            graph.program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs
        )
        program.save(file)

    def open(self, graph: Graph, file: Path, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        wanted = [value.name for value in session.get_inputs()]
        given = [value.name for value in session.get_outputs()]

        def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
            return dict(zip(given, session.run(None, {name: inputs[name] for name in wanted}), strict=True))

        return run


class OpenVino(Format):
    """OpenVINO's own format."""

    suffix, runtime = ".xml", "openvino"

    def write(self, graph: Graph, file: Path) -> None:
        import openvino

        # Through ONNX: what OpenVINO 2026.4 makes of a program of torch.export gave other keys with two cameras.
        with TemporaryDirectory(dir=file.parent) as folder:
            onnx = Path(folder) / f"{graph.name}.onnx"
            Onnx().write(graph, onnx)
            openvino.save_model(openvino.convert_model(onnx), file, compress_to_fp16=False)

    def open(self, graph: Graph, file: Path, threads: int) -> Run:
        import openvino

        # On some CPUs it would compute in bfloat16.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        model = openvino.Core().compile_model(file, "CPU", options)
        wanted = [place.get_any_name() for place in model.inputs]

        def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
            results = model({name: inputs[name] for name in wanted})
            return {place.get_any_name(): results[place] for place in model.outputs}

        return run


class Torch(Format):
    """What torch.export writes, run by torch, without LeRobot's code."""

    suffix, runtime = ".pt2", "torch"

    def write(self, graph: Graph, file: Path) -> None:
        torch.export.save(graph.program, file)

    def open(self, graph: Graph, file: Path, threads: int) -> Run:
        module = torch.export.load(file).module()

        @torch.no_grad()
        def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
            results = module(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
            results = results if isinstance(results, tuple) else (results,)
            return {name: value.numpy() for name, value in zip(graph.outputs, results, strict=True)}

        return run


FORMATS: dict[str, Format] = {"onnx": Onnx(), "openvino": OpenVino(), "torch": Torch()}


@contextmanager
def quiet() -> Iterator[None]:
    """In this block libraries keep to themselves what they could not simplify."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
