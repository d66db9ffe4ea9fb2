"""lerobot-grids import-reference."""

from .messages import OptionError
from .parser import run


def import_reference(checkpoint: str, output: str = "", convention: str | None = None, json: str | None = None) -> None:
    """Make a grids checkpoint of a published GridS checkpoint, such as one of the paper's LeRobot tree.

    Published weights of π0 and π0.5 are openpi's, in JAX: they must be converted to a LeRobot policy first.

    Args:
        checkpoint: The published checkpoint: a folder with config.json and model.safetensors, or a Hub id.
        output: The folder to write. Must be given.
        convention: Where coordinates are on the feature map: lerobot or openpi. Defaults to that of the published
            checkpoints of the policy's type.
        json: JSON file for what was imported.

    Examples:
        lerobot-grids import-reference me/published --output outputs/published
        lerobot-grids import-reference published_folder --output outputs/published --convention openpi
    """
    if not output:
        raise OptionError("where to? give --output FOLDER")
    from dataclasses import asdict
    from pathlib import Path

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.policies import reference

    if json is not None:
        require_writable(Path(json))
    imported = reference.import_reference(checkpoint, Path(output), convention)
    print(
        f"imported the '{imported.policy_type}' policy with {imported.num_tokens} visual tokens per camera, "
        f"coordinates as in {imported.convention}, into {output}\nnext: lerobot-grids eval --policy {output}"
    )
    write_json(json, asdict(imported))


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(import_reference, "import-reference", arguments, positional=True)
