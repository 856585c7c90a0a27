"""The controlled experiments: the essay's claims about GPT and BERT, each turned into a measurement, and their report."""
