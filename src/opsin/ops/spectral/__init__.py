"""Long convolutions, transforms and wavelets."""
