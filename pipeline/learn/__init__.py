"""From labelled sessions to a bundle that runs live: datasets, models, training, export. Needs the extra `learn`."""
