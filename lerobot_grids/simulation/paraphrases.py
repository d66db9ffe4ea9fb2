"""Other words for a task's instruction, further from the training wording with each severity."""

import re

import numpy as np

# Severity 1: the instruction itself, in a frame.
FRAMES = ("please {}", "{} now", "robot, {}")
# Severity 3: synonyms in a long frame.
LONG_FRAMES = ("i would like you to {}", "your job is this: {}", "could you {} for me")
SYNONYMS = {
    "bypass": ("avoid", "go around"),
    "close": ("shut",),
    "dunk": ("drop", "throw"),
    "get": ("fetch", "retrieve"),
    "goal": ("target", "mark"),
    "grasp": ("grab", "seize"),
    "hammer": ("pound", "beat"),
    "insert": ("stick", "plug"),
    "kick": ("shoot", "strike"),
    "lock": ("bolt",),
    "machine": ("maker", "brewer"),
    "mug": ("cup", "beaker"),
    "open": ("unclose",),
    "pick": ("lift", "grab"),
    "place": ("put", "set"),
    "press": ("hit", "depress"),
    "puck": ("disc", "cylinder"),
    "pull": ("drag", "draw"),
    "push": ("shove", "nudge"),
    "reach": ("touch", "move to"),
    "rotate": ("spin", "twist"),
    "slide": ("glide", "move"),
    "sweep": ("brush", "wipe"),
    "unlock": ("unbolt",),
    "unplug": ("disconnect", "remove"),
}


def paraphrase(instruction: str, severity: int, random: np.random.Generator) -> str:
    """Say an instruction in other words.

    Args:
        instruction: As in training.
        severity: 1 puts it in a frame ("please ..."), 2 replaces verbs and nouns by synonyms, 3 does that in a longer
            frame.
        random: Chooses among synonyms and frames.
    """
    frame, long_frame = str(random.choice(FRAMES)), str(random.choice(LONG_FRAMES))
    words = instruction[0].lower() + instruction[1:]
    if severity == 1:
        return frame.format(words)
    words = re.sub(r"[a-z]+", lambda word: str(random.choice(SYNONYMS.get(word[0], (word[0],)))), words)
    return words if severity == 2 else long_frame.format(words)
