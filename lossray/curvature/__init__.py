"""Curvature of the loss: products with the Hessian of R members at once, certified eigenpairs, one analysis.

Needs ``networks/`` only, and is of use to people who never run a study.
"""
