"""A model, a loss and data as a symmetric operator: Hessian, Gauss-Newton, Fisher, and transforms of them."""
