"""What SAEs miss: their error, its linear and nonlinear part (Engels et al. 2024)."""
