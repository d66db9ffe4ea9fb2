"""Training: the LightningModule, its loss, what it trains, and the callbacks that keep and show a run."""
