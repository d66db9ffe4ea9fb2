"""Paraphrases of a task's instruction; a higher severity changes more words."""

import re

import numpy as np

# Severity 1: the unchanged instruction inside another sentence.
FRAMES = ("please {}", "{} now", "robot, {}")
# Severity 3: synonyms inside a longer sentence.
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
    """Paraphrase an instruction.

    Args:
        instruction: The instruction as in training.
        severity: 1 puts it into another sentence ("please ..."), 2 replaces verbs and nouns by synonyms, 3 does both
            with a longer sentence.
        random: Random numbers that choose synonyms and sentences.
    """
    frame, long_frame = str(random.choice(FRAMES)), str(random.choice(LONG_FRAMES))
    words = instruction[0].lower() + instruction[1:]
    if severity == 1:
        return frame.format(words)
    words = re.sub(r"[a-z]+", lambda word: str(random.choice(SYNONYMS.get(word[0], (word[0],)))), words)
    return words if severity == 2 else long_frame.format(words)
