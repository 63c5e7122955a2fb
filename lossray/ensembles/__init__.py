"""Ensembles of models: how their members are made, and what they are worth."""
