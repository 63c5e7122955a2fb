"""The store of a study: files (files), layout and commits (store), tables, checkpoints, and the lease."""
