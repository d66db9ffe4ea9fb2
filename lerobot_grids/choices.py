"""Names that a command line may choose from. Without heavy imports, so that a mistake is answered at once."""

from importlib.util import find_spec

# Tampering -> effect, as in `eval --help`.
TAMPERINGS = {
    "image": "every camera is black",
    "patches": "the 8 x 8 patches of every image are shuffled, differently at each step",
    "tokens": "the visual tokens are shuffled over the token grid before reduction, differently at each forward pass",
    "instruction": "the instruction is that of the next evaluated task",
    "state": "the robot state is always the mean of the training data",
}
# Environment -> kinds of perturbations.
PERTURBATIONS = {
    "metaworld": ("camera", "light", "background", "noise", "robot", "layout", "instruction"),
    "libero": ("light", "noise", "view", "occlusion", "novel"),
}
SEVERITIES = (1, 2, 3)
# Logger of `fit` -> the package that it needs, besides this project's own.
LOGGERS = {"csv": None, "tensorboard": None, "wandb": "wandb", "trackio": "trackio"}
# Format of an export -> the modules that write and run it, besides torch. The extra that installs them has its name.
EXPORTS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}


def parts(text: str | None) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def logger_fault(text: str) -> str | None:
    """What is wrong with a list of loggers, in words; None if nothing is."""
    asked = parts(text)
    unknown = [name for name in asked if name not in LOGGERS]
    if unknown or not asked:
        return f"--logger {text} names no logger; choose from {', '.join(LOGGERS)}, such as csv,wandb"
    for name in asked:
        package = LOGGERS[name]
        if package is not None and find_spec(package) is None:
            return f"--logger {name} needs a package that is not installed: pip install {package}"
    return None


def export_fault(name: str) -> str | None:
    """What a format of an export needs and is not installed, in words; None if nothing."""
    missing = [module for module in EXPORTS[name] if find_spec(module) is None]
    if not missing:
        return None
    return f"--format {name} needs {', '.join(missing)}: pip install 'lerobot_policy_grids[{name}]'"


def tampering_fault(text: str | None) -> str | None:
    """What is wrong with a list of tamperings, in words; None if nothing is."""
    unknown = [name for name in parts(text) if name not in TAMPERINGS]
    return f"tampering '{unknown[0]}' is unknown; choose from {', '.join(TAMPERINGS)}" if unknown else None


def perturbation_fault(text: str | None, env: str) -> str | None:
    """What is wrong with a list such as "camera:2,light:1" for an environment, in words; None if nothing is."""
    if text and env not in PERTURBATIONS:
        return f"environment '{env}' cannot be perturbed, only {' and '.join(PERTURBATIONS)} can; drop --perturb"
    kinds = []
    for part in parts(text):
        kind, _, severity = part.partition(":")
        if kind not in PERTURBATIONS[env]:
            return f"perturbation '{kind}' is unknown in {env}; choose from {', '.join(PERTURBATIONS[env])}"
        if severity not in map(str, SEVERITIES):
            return (
                f"perturbation '{part}' has {'an unknown' if severity else 'no'} severity; "
                f"write {kind}: and one of {', '.join(map(str, SEVERITIES))}, such as {kind}:2"
            )
        if kind in kinds:
            return f"perturbation '{kind}' is given twice in '{text}'; give each kind once"
        kinds.append(kind)
    return None
