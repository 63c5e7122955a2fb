"""How often each verdict is wrong at the edge of its truth, and how often right inside it: by simulation."""
