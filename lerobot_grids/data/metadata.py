"""The metadata of a dataset in a folder or on the Hub."""

from pathlib import Path

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_policy_grids.errors import DatasetError, first_line

# Dataset features of recorded simulations: positions of object and goal in metres, and where each camera sees them.
# They are not observations, so no policy gets them.
POSITIONS, PLACES = "auxiliary.positions", "auxiliary.places"
CONVERTER = "lerobot.scripts.convert_dataset_v21_to_v30"


def load_metadata(dataset: str, revision: str | None = None) -> LeRobotDatasetMetadata:
    """Load the metadata of a dataset from a local folder or the Hub.

    Raises:
        DatasetError: If it is neither, is not a LeRobotDataset v3, or has no episodes.
    """
    folder = Path(dataset).expanduser()
    local = folder.exists() or dataset.startswith((".", "/", "~")) or dataset.count("/") != 1
    if local and not (folder / "meta" / "info.json").is_file():
        seen = "does not exist" if not folder.exists() else "holds no meta/info.json"
        raise DatasetError(
            f"dataset {dataset} {seen}; expected the folder of a LeRobotDataset v3.0, or a Hub id like user/name"
        )
    try:
        if local:
            meta = LeRobotDatasetMetadata(f"local/{folder.name}", root=folder)
        else:
            meta = LeRobotDatasetMetadata(dataset, revision=revision)
    except Exception as error:  # LeRobot raises many types of errors here
        raise DatasetError(_explain(dataset, folder if local else None, error)) from error
    if meta.total_episodes < 1 or meta.total_frames < 1:
        raise DatasetError(f"dataset {dataset} has no episodes; record some")
    return meta


def _explain(dataset: str, folder: Path | None, error: Exception) -> str:
    where = "read" if folder is not None else "fetched from the Hub (and it is not a folder here)"
    text = f"dataset {dataset} cannot be {where}: {first_line(error)}"
    if CONVERTER in str(error):
        place = f"--repo-id={dataset}" if folder is None else f"--repo-id=local/{folder.name} --root={folder}"
        text += f"; convert it with: python -m {CONVERTER} {place}"
    return text
