"""The phases of each family that has a fast path: its prefill and its denoising step, made of the policy's modules.

One file per family, beside the one of the same name in `families`, which says how a reducer is attached and builds the
phases. What a phase is, and what phases are made of, is in `runtime`. Nothing here imports a family's own file.
"""
