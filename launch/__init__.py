"""How a recipe gets onto a Cloud TPU slice, a GKE cluster, SkyPilot's spot machines, a Slurm GPU cluster."""
