"""Training, measuring and publishing grids policies. Import its modules; this one stays light."""
