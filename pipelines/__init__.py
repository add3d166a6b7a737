"""Where Ray and MLflow live: prompt streaming, training, sweeps, reports and the command line."""
