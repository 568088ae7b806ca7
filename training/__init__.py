"""Train coarse-grained models: reference data, the loop over beads and atoms, and its report.

The command line is ``ccg``; everything that it does is a function in this package. Importing the
package loads nothing heavy: import from its modules.
"""
