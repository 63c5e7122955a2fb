"""Directions in parameter space: how they are curved, and their angles to the curvature's eigenspaces."""
