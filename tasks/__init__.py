"""What Ray runs: one thin file per kind of work. Resources are declared here, bodies call lossray."""
