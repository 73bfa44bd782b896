"""Studies: many runs that answer one question, in an Optuna storage that any number of workers share."""
