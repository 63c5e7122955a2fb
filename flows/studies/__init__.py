"""Ready-made studies: `lossray studies` lists them."""
