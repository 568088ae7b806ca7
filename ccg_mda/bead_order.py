"""In which order the beads of a map are placed, and which of them side by side."""

from __future__ import annotations

from collections import deque

import numpy as np

from ccg_ase.mapping import CGMap


def bead_order(cg_map: CGMap, max_sequence: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Order beads along each molecule, or by colour in large ones.

    Parameters
    ----------
    cg_map
        A map whose beads may share atoms: then a bead depends on earlier ones that own them, and
        the order is that of the map.
    max_sequence
        Number of beads up to which a molecule is placed bead after bead.

    Returns
    -------
    order, colour, turn
        Beads in order; (n_beads,) colours, such that bonded beads differ: beads of one colour are
        placed side by side, a bead that is placed by itself has a colour of its own; and (n_beads,)
        which turn of its molecule each bead has.
    """
    colours, turn = np.arange(cg_map.n_beads), np.zeros(cg_map.n_beads, dtype=int)
    if len(np.unique(cg_map.atom_index)) < len(cg_map.atom_index):
        return colours.tolist(), colours, colours
    neighbours, seen = cg_map.beads.neighbours(), set()
    chains: list[int] = []
    keys: list[tuple[int, int]] = []
    for first in range(cg_map.n_beads):
        if first in seen:
            continue
        chain, queue = [], deque([first])
        seen.add(first)
        while queue:
            bead = queue.popleft()
            chain.append(bead)
            fresh = [b for b in neighbours[bead] if b not in seen]
            seen.update(fresh)
            queue.extend(fresh)
        colour: dict[int, int] = {}
        for k, bead in enumerate(chain):
            taken = {colour.get(b) for b in neighbours[bead]}
            free = next(c for c in range(len(taken) + 1) if c not in taken)
            colour[bead] = turn[bead] = k if len(chain) <= max_sequence else free
            colours[bead] = colour[bead] if len(chain) > max_sequence else -1 - bead
        keys += [(colour[bead], k) for k, bead in enumerate(chain, start=len(keys))]
        chains += chain
    return [chains[k] for _, k in sorted(keys)], colours, turn
