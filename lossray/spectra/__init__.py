"""Symmetric operators in, certified eigenpairs, densities and traces out; knows no network, no study."""
