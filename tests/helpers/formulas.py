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


def sampler(images, k, cells=256, width=1152, language=2048, state=32, cameras=2):
    # The context once for each image, then a query for each token.
    queries = sum(linear(1, given, 128) for given in (language, state, cameras)) + linear(k, 128, width)
    # Every token scores all cells, is a weighted mean of them, and gets what the scores weight through a low rank.
    cells_of_all = 3 * 2 * k * cells * width
    return images * (queries + cells_of_all + linear(k, width, 128, width) + linear(k, 2, 128, width))


def qwen(tokens, keys, width, mlp, inner, shared, layers):
    """A Qwen trunk: `inner` channels of all heads of the queries, `shared` of those of keys and values."""
    attention = linear(tokens, width, inner) + 2 * linear(tokens, width, shared) + linear(tokens, inner, width)
    return layers * (attention + 4 * tokens * keys * inner + 3 * linear(tokens, width, mlp))


def windows(side, window=4):
    """Tokens in each window of a grid of `side` x `side`."""
    pieces = [min(window, side - start) for start in range(0, side, window)]
    return [height * width for height in pieces for width in pieces]


def qwen_2_5_tower(images, side, layers=32, full=4, width=1280, mlp=3420, patch=14):
    """Vision tower of Qwen2.5-VL for images of `side` x `side` tokens, without its merger."""
    patches = 4 * side**2
    block = 4 * linear(patches, width, width) + 3 * linear(patches, width, mlp)
    attention = full * patches**2 + (layers - full) * sum((4 * tokens) ** 2 for tokens in windows(side))
    return images * (layers * block + 4 * attention * width + linear(patches, 3 * 2 * patch**2, width))


def qwen_3_tower(images, side, layers=24, deepstack=3, width=1024, mlp=4096, patch=16, out=2048):
    """Vision tower of Qwen3-VL for images of `side` x `side` tokens, without its last merger."""
    patches = 4 * side**2
    block = 4 * linear(patches, width, width) + linear(patches, width, mlp, width) + 4 * patches**2 * width
    merged = deepstack * linear(side**2, 4 * width, 4 * width, out)
    return images * (layers * block + linear(patches, 3 * 2 * patch**2, width) + merged)
