"""The tokenizer step of tiny_smolvla's processor: finds the shipped tokenizer by itself, on any machine."""

from dataclasses import dataclass
from pathlib import Path

from lerobot.processor import ProcessorStepRegistry, TokenizerProcessorStep

TINY_FOLDER = Path(__file__).parent
VLM_FOLDER = TINY_FOLDER / "vlm"


@ProcessorStepRegistry.register("tiny_smolvla_tokenizer")
@dataclass
class TinyTokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step with the tokenizer that ships in this package; a saved processor holds no path."""

    max_length: int = 32
    padding: str = "longest"

    def __post_init__(self) -> None:
        self.tokenizer_name: str | None = str(VLM_FOLDER)
        super().__post_init__()
        # The step's saved configuration would name the folder of this machine.
        self.tokenizer_name = None

    def save_artifacts(self, save_directory: Path) -> dict[str, str]:
        """No copy, which newer LeRobot would put beside the processor: the tokenizer ships with this package."""
        return {}
