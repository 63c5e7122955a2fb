"""The store of a study: files, layout and commits (store), tables, checkpoints, recordings, the lease."""
