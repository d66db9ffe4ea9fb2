"""The tokenizer step of tiny_smolvla's processor: it loads the tokenizer of this package on any machine."""

from dataclasses import dataclass
from pathlib import Path

from lerobot.processor import ProcessorStepRegistry, TokenizerProcessorStep

TINY_FOLDER = Path(__file__).parent
VLM_FOLDER = TINY_FOLDER / "vlm"


@ProcessorStepRegistry.register("tiny_smolvla_tokenizer")
@dataclass
class TinyTokenizerStep(TokenizerProcessorStep):
    """LeRobot's tokenizer step with the tokenizer of this package; a saved processor holds no path."""

    max_length: int = 32
    padding: str = "longest"

    def __post_init__(self) -> None:
        self.tokenizer_name: str | None = str(VLM_FOLDER)
        super().__post_init__()
        # Otherwise the saved configuration would hold a path of this machine.
        self.tokenizer_name = None

    def save_artifacts(self, save_directory: Path) -> dict[str, str]:
        """Save nothing: newer LeRobot would copy the tokenizer, which is part of this package."""
        return {}
