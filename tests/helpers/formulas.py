"""FLOPs of parts of policies, by closed formulas of their dimensions."""

import itertools


def linear(tokens, *widths):
    """FLOPs of a chain of linear layers."""
    return sum(2 * tokens * a * b for a, b in itertools.pairwise(widths))


def siglip(images, tokens=256, width=1152, mlp=4304, layers=27, patch=14):
    block = 4 * linear(tokens, width, width) + linear(tokens, width, mlp, width) + 4 * tokens**2 * width
    return images * (layers * block + linear(tokens, 3 * patch**2, width))


def gemma(tokens, keys, width, mlp, heads=8, head=256, layers=18):
    inner = heads * head
    attention = linear(tokens, width, inner, width) + 2 * linear(tokens, width, head) + 4 * tokens * keys * inner
    return layers * (attention + 3 * linear(tokens, width, mlp))
