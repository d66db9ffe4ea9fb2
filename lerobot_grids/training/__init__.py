"""Training: the LightningModule, its losses, the choice of trained weights, and the callbacks of a run."""
