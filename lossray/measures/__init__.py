"""What is measured at a checkpoint, between two, of runs and of models; knows no Ray, no store, no job."""
