"""Curvature of the loss: operators of R members at once, or of one model, certified eigenpairs, one analysis.

Needs ``networks/`` only, and is of use to people who never run a study.
"""
