"""Is this project found by LeRobot, and which of its extras are installed?"""

import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from pathlib import Path

from packaging.requirements import Requirement

from ..choices import LOGGERS
from .check import Check

PLUGIN = "lerobot_policy_grids"
POLICY_TYPE = "grids"
# Extras that are for developers, or others together.
LEFT_OUT = ("dev", "all")


def check_plugin() -> Iterator[Check]:
    """Whether LeRobot's commands find policy type "grids", and if not, why."""
    found = [d for d in distributions() if (d.metadata["Name"] or "").replace("-", "_").lower() == PLUGIN]
    if not found:
        advice = f"pip install {PLUGIN}, or from a clone: pip install -e ."
        yield Check("fail", "Plugin", "not installed; LeRobot finds only what is, and no folder on PYTHONPATH", advice)
        return
    named = [d for d in found if d.metadata["Name"] == PLUGIN]
    if not named:
        seen = f"installed under the name {found[0].metadata['Name']}, and LeRobot looks for {PLUGIN}"
        yield Check("fail", "Plugin", seen, f"pip install --force-reinstall --no-deps {PLUGIN}")
        return
    try:
        module = import_module(PLUGIN)
    except Exception as error:  # LeRobot logs it, and then says that there is no such policy type
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield Check("fail", "Plugin", f"LeRobot cannot import it ({reason})", f"pip install --upgrade {PLUGIN}")
        return
    broken = _import_all_plugins()
    from lerobot.configs import PreTrainedConfig

    if POLICY_TYPE not in PreTrainedConfig.get_known_choices():
        yield Check("fail", "Plugin", "imported, and LeRobot does not know policy type 'grids'", "reinstall LeRobot")
        return
    seen = f"LeRobot finds policy type '{POLICY_TYPE}' ({PLUGIN} {named[0].version})"
    installed = Path(str(named[0].locate_file(PLUGIN))) / "__init__.py"
    imported = Path(str(module.__file__))
    if installed.is_file() and not installed.samefile(imported):
        advice = "the commands run the second; unset PYTHONPATH, or uninstall the first"
        yield Check("warn", "Plugin", f"installed in {installed.parent}, imported from {imported.parent}", advice)
    else:
        yield Check("ok", "Plugin", seen)
    for name, reason in broken.items():
        advice = f"pip install --upgrade {name}, or uninstall it"
        yield Check("warn", "Other plugin", f"LeRobot cannot import {name} ({reason})", advice)


def _import_all_plugins() -> dict[str, str]:
    """Let LeRobot import every plugin; returns those that it cannot import, and why."""
    from lerobot.utils.import_utils import register_third_party_plugins

    handler = BufferingHandler(1000)
    handler.setLevel(logging.ERROR)
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        register_third_party_plugins()
    finally:
        root.handlers[:] = before
    return {
        str(record.args[0]): str(record.exc_info[1]).partition("\n")[0] if record.exc_info else record.getMessage()
        for record in handler.buffer
        if isinstance(record.args, tuple) and record.args
    }


def check_extras() -> Iterator[Check]:
    """Which extras of this project have everything that they ask for."""
    project = distribution(PLUGIN)
    extras = [extra for extra in project.metadata.get_all("Provides-Extra") or [] if extra not in LEFT_OUT]
    faults = {extra: sorted(set(missing(project, extra))) for extra in extras}
    complete = [extra for extra, lacking in faults.items() if not lacking]
    absent = {extra: lacking for extra, lacking in faults.items() if lacking}
    others = f"not installed: {', '.join(absent)} (pip install '{PLUGIN}[NAME]')" if absent else ""
    if not complete:
        advice = f"install a family's, such as: pip install '{PLUGIN}[{extras[0]}]'"
        yield Check("warn", "Extras", f"none of {', '.join(extras)} is complete", advice)
    else:
        yield Check("ok", "Extras", f"installed: {', '.join(complete)}" + (f"; {others}" if others else ""))
    for extra, lacking in absent.items():
        # Some of it is there, in a version that the extra cannot use.
        if wrong := [text for text in lacking if " is " in text]:
            yield Check("warn", f"Extra {extra}", ", ".join(wrong), f"pip install '{PLUGIN}[{extra}]'")


def missing(project: Distribution, extra: str) -> Iterator[str]:
    """What an extra asks for and is not installed: a package's name, or "name is 1.0, expected >=2".

    Args:
        project: Installed distribution that has the extra.
        extra: Its name.
    """
    for text in project.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            yield requirement.name
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            yield f"{requirement.name} is {found.version}, expected {requirement.specifier}"
        for inner in requirement.extras:
            yield from missing(found, inner)


def check_loggers() -> Iterator[Check]:
    """Where `fit` can send its curves."""
    have = [name for name, package in LOGGERS.items() if package is None or find_spec(package)]
    absent = [name for name in LOGGERS if name not in have]
    seen = f"{', '.join(have)} (fit --logger NAME)"
    yield Check("ok", "Loggers", seen + (f"; for others: pip install {' '.join(absent)}" if absent else ""))
