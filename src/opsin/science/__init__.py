"""Weather, PDEs, fMRI, graphs: systems with data of their own kind and a `fit`/`predict` of their own."""
