"""A `LinearGaussian` as an OpenMM System."""

import openmm

from ccg_training.openmm_dynamics import KJ_PER_MOL, NM


def harmonic_system(molecule):
    """Return a System with the energy of the molecule."""
    system = openmm.System()
    K = molecule.K.reshape(molecule.n_atoms, 3, molecule.n_atoms, 3) / KJ_PER_MOL * NM**2
    names = [f"k{i}{j}" for i in range(3) for j in range(3)]

    def quadratic(first, second):
        return "+".join(
            f"k{i}{j}*({a}{first}-{a}{first}0)*({b}{second}-{b}{second}0)"
            for i, a in enumerate("xyz")
            for j, b in enumerate("xyz")
        )

    own = openmm.CustomCompoundBondForce(1, f"0.5*({quadratic(1, 1)})")
    pair = openmm.CustomCompoundBondForce(2, quadratic(1, 2))
    for force, sites in ((own, "1"), (pair, "12")):
        for name in names + [f"{a}{site}0" for site in sites for a in "xyz"]:
            force.addPerBondParameter(name)
        system.addForce(force)
    x0 = (molecule.x0 / NM).tolist()
    for i in range(molecule.n_atoms):
        system.addParticle(12.0)
        own.addBond([i], [*K[i, :, i].ravel(), *x0[i]])
        for j in range(i):
            if K[i, :, j].any():
                pair.addBond([i, j], [*K[i, :, j].ravel(), *x0[i], *x0[j]])
    return system
